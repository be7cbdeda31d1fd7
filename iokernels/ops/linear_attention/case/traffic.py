"""How many bytes the Triton kernels of linear_attention should request from global memory: the model of their tiling.

Counted as a thread block requests them: each address once a load instruction, whatever the caches serve. The model is
exact, with every option; a test holds it to what the tracer counts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from iokernels.ops.linear_attention.options import columns, features
from iokernels.ops.linear_attention.triton.tuning import RESTART, Config, segment_rows
from iokernels.testing.case.accounts import Account, Bytes

_STATISTIC = 4  # bytes of a float32: a den, a dden, an r, a number of a state
_OFFSETS = 8  # the begin and end of a packed sequence, int32
_ENTRY = 4  # of the table of segments, int32
_SCAN_BLOCK = 1024  # triton/launch.SCAN_BLOCK


@dataclass(frozen=True)
class Problem:
    """One call, forward and backward, with every gradient that its arguments can have.

    ``lengths`` holds the rows of every sequence (packed: ``total`` counts those of no sequence too). ``decay`` is the
    bytes of a number of log_decay. ``crossing``: log_decay wants a gradient, ``dstate``: the final state has one.
    """

    lengths: tuple[int, ...]
    heads: int
    key_heads: int
    key_width: int
    value_width: int
    itemsize: int
    decay_form: Literal["none", "head", "token"] = "none"
    decay: int = 4
    crossing: bool = False
    packed: bool = False
    total: int = 0
    normalize: bool = False
    taylor: bool = False
    initial_state: bool = False
    dstate: bool = False

    @property
    def rows(self) -> int:
        """Rows of the tensors."""
        return self.total if self.packed else sum(self.lengths)

    @property
    def visited(self) -> int:
        """Rows of all sequences and heads."""
        return self.heads * sum(self.lengths)

    @property
    def state(self) -> int:
        """Bytes of the state of a head, normaliser included."""
        return _STATISTIC * features(self.key_width, self.taylor) * columns(self.value_width, self.normalize)

    @property
    def values_state(self) -> int:
        """The same without the normaliser."""
        return _STATISTIC * features(self.key_width, self.taylor) * self.value_width

    @property
    def normalizer(self) -> int:
        """Bytes of the normaliser of a head."""
        return self.state - self.values_state

    @property
    def states(self) -> int:
        """Bytes of the states of all sequences and heads."""
        return len(self.lengths) * self.heads * self.state

    @property
    def decay_bytes(self) -> int:
        """log_decay, read once."""
        numbers = {"none": 0, "head": self.heads, "token": self.visited}
        return numbers[self.decay_form] * self.decay

    @property
    def keys_bytes(self) -> int:
        """q, or k, of the rows of sequences."""
        return self.key_heads * sum(self.lengths) * self.key_width * self.itemsize

    @property
    def values_bytes(self) -> int:
        """v, or out, likewise."""
        return self.visited * self.value_width * self.itemsize


@dataclass(frozen=True)
class Cut:
    """The segments of a pass: their grid, the rows of each (0 past the last), and which end their sequence."""

    split: bool
    grid: int
    lengths: tuple[int, ...]
    real: int  # segments that belong to a sequence

    @staticmethod
    def of(problem: Problem, config: Config, most_rows: int | None = None) -> Cut:
        """As the launcher cuts sequences."""
        total = problem.rows if problem.packed else problem.lengths[0]
        sharing = len(problem.lengths) if problem.packed else 1
        rows = segment_rows(total, sharing, config.segments, config.chunk, most_rows)
        if rows is None:
            return Cut(False, len(problem.lengths), problem.lengths, len(problem.lengths))
        parts: list[int] = []
        for length in problem.lengths:
            parts += [min(rows, length - start) for start in range(0, max(length, 1), rows)]
        grid = total // rows + len(problem.lengths) if problem.packed else len(parts)
        return Cut(True, grid, tuple(parts), len(parts))


def _placing(problem: Problem, cut: Cut) -> int:
    """What one block reads to find its rows."""
    if not problem.packed:
        return 0
    if not cut.split:
        return _OFFSETS
    return _OFFSETS + _ENTRY * (max(len(problem.lengths) - 1, 0).bit_length() + 1)


def _beginning(problem: Problem, cut: Cut, slices: int) -> int:
    """What all blocks of a walk read before it: their place, and a decay that is one for all tokens."""
    one = problem.decay if problem.decay_form == "head" else 0
    return problem.heads * slices * cut.grid * (_placing(problem, cut) + one)


def _token_decays(problem: Problem, slices: int) -> int:
    return problem.visited * slices * (problem.decay if problem.decay_form == "token" else 0)


def _over_values(problem: Problem, config: Config, cut: Cut, *, has_state: bool, dden: bool) -> int:
    """Bytes that a walk over slices of V reads: x and y of width K, and z."""
    slices = -(-problem.value_width // config.width)
    read = _beginning(problem, cut, slices) + _token_decays(problem, slices)
    read += problem.visited * problem.itemsize * (2 * slices * problem.key_width + problem.value_width)
    if has_state:
        read += cut.grid * problem.heads * (problem.values_state + slices * problem.normalizer)
    if dden:
        read += problem.visited * slices * _STATISTIC
    return read


def _over_keys(problem: Problem, config: Config, cut: Cut, *, has_state: bool, reverse: bool) -> tuple[int, int]:
    """Bytes that dq or dk reads, and those that it writes."""
    item, k, v = problem.itemsize, problem.key_width, problem.value_width
    visited, outer = problem.visited, cut.grid * problem.heads
    slices = -(-(v if problem.taylor else k) // config.width)
    read = _beginning(problem, cut, slices) + _token_decays(problem, slices)
    if problem.taylor:
        read += visited * item * (2 * v + slices * 2 * k)
        squares = _STATISTIC * k * k
        # The products of keys are read both ways round.
        if has_state:
            read += outer * (problem.values_state + squares * v)
            read += outer * slices * (problem.normalizer + (squares if problem.normalize else 0))
    else:
        read += visited * item * (2 * slices * v + k * (2 if problem.crossing else 1))
        read += outer * (problem.values_state + problem.normalizer) if has_state else 0
    if problem.normalize:
        read += visited * slices * _STATISTIC
    if problem.crossing and reverse:
        read += visited * _STATISTIC  # r
        if has_state:
            read += outer * (problem.values_state + problem.normalizer * (slices if problem.taylor else 1))
    shares = slices if problem.taylor else 1
    whole = shares == 1 and problem.heads == problem.key_heads
    written = visited * k * (item if whole else _STATISTIC) * shares
    if problem.crossing:
        written += visited * slices * _STATISTIC
    return read, written


def _segment_states(problem: Problem, config: Config, cut: Cut, *, reverse: bool) -> Bytes:
    slices = -(-problem.value_width // config.width)
    read = _beginning(problem, cut, slices) + _token_decays(problem, slices)
    read += problem.visited * problem.itemsize * (slices * problem.key_width + problem.value_width)
    if reverse and problem.normalize:
        read += problem.visited * slices * _STATISTIC
    totals = _STATISTIC if problem.decay_form != "none" else 0
    return Bytes(read, cut.grid * problem.heads * (problem.state + totals))


def _scan(problem: Problem, cut: Cut, *, first: bool, last: bool) -> Bytes:
    blocks = -(-problem.state // (_STATISTIC * _SCAN_BLOCK))
    segments = cut.real * problem.heads * problem.state
    read = segments + (problem.states if first else 0)
    read += len(problem.lengths) * problem.heads * blocks * (2 * _ENTRY if problem.packed else 0)
    if problem.decay_form != "none":
        read += cut.real * problem.heads * blocks * _STATISTIC
    return Bytes(read, segments + (problem.states if last else 0))


def _account(which: Literal["fwd", "bwd"], floor: tuple[int, int], model: tuple[int, int]) -> Account:
    return Account(which, Bytes(*floor), Bytes(*model))


def forward(problem: Problem, configs: Mapping[str, Config]) -> dict[str, Account]:
    """The kernels of a forward pass: where sequences are cut, the states of their segments first."""
    config = configs["linear_attention_fwd"]
    cut, found = Cut.of(problem, config), {}
    if cut.split:
        states = _segment_states(problem, configs["linear_attention_state"], cut, reverse=False)
        scanned = _scan(problem, cut, first=problem.initial_state, last=True)
        once = problem.keys_bytes + problem.values_bytes + problem.decay_bytes
        found["linear_attention_fwd_state_kernel"] = Account("fwd", Bytes(once, states.written), states)
        found["linear_attention_fwd_scan_kernel"] = Account("fwd", scanned, scanned)
    has_state = cut.split or problem.initial_state
    read = _over_values(problem, config, cut, has_state=has_state, dden=False)
    den = problem.visited * _STATISTIC if problem.normalize else 0
    out = problem.visited * problem.value_width * problem.itemsize
    last = 0 if cut.split else problem.states
    once = 2 * problem.keys_bytes + problem.values_bytes + problem.decay_bytes
    once += cut.grid * problem.heads * problem.state if has_state else 0
    found["linear_attention_fwd_kernel"] = _account("fwd", (once, out + den + last), (read, out + den + last))
    return found


def backward(problem: Problem, configs: Mapping[str, Config]) -> dict[str, Account]:
    """The kernels of a backward pass that computes every gradient there is."""
    found: dict[str, Account] = {}
    cut = Cut.of(problem, configs["linear_attention_bwd_dq"], RESTART if problem.crossing else None)
    states = cut.grid * problem.heads * problem.state
    dden = problem.visited * _STATISTIC if problem.normalize else 0
    if problem.normalize:
        # Rows of no sequence among them.
        every = problem.heads * problem.rows
        one, number = every * problem.value_width * problem.itemsize, every * _STATISTIC
        once = Bytes(2 * one + number, one + number)
        found["linear_attention_bwd_normalize_kernel"] = Account("bwd", once, once)
    if cut.split:
        config = configs["linear_attention_state"]
        one = problem.decay_bytes + problem.keys_bytes + problem.values_bytes
        ahead = _segment_states(problem, config, cut, reverse=False)
        back = _segment_states(problem, config, cut, reverse=True)
        found["linear_attention_fwd_state_kernel"] = Account("bwd", Bytes(one, ahead.written), ahead)
        found["linear_attention_bwd_state_kernel"] = Account("bwd", Bytes(one + dden, back.written), back)
        ahead = _scan(problem, cut, first=problem.initial_state, last=False)
        back = _scan(problem, cut, first=problem.dstate, last=problem.initial_state)
        found["linear_attention_fwd_scan_kernel"] = Account("bwd", ahead, ahead)
        found["linear_attention_bwd_scan_kernel"] = Account("bwd", back, back)
    inputs = 2 * problem.keys_bytes + 2 * problem.values_bytes + problem.decay_bytes + dden
    for name, reverse, has_state in (
        ("dq", False, cut.split or problem.initial_state),
        ("dk", True, cut.split or problem.dstate),
    ):
        model = _over_keys(problem, configs[f"linear_attention_bwd_{name}"], cut, has_state=has_state, reverse=reverse)
        floor = inputs - (0 if problem.crossing or problem.taylor else problem.keys_bytes)
        floor += states if has_state else 0
        written = problem.keys_bytes + (problem.visited * _STATISTIC if problem.crossing else 0)
        if problem.crossing and reverse:
            floor += problem.visited * _STATISTIC + (states if has_state else 0)
        found[f"linear_attention_bwd_{name}_kernel"] = _account("bwd", (floor, written), model)
    has_state, config = cut.split or problem.dstate, configs["linear_attention_bwd_dv"]
    read = _over_values(problem, config, cut, has_state=has_state, dden=problem.normalize)
    written = problem.visited * problem.value_width * problem.itemsize
    written += problem.states if problem.initial_state and not cut.split else 0
    floor = inputs - problem.values_bytes + (states if has_state else 0)
    found["linear_attention_bwd_dv_kernel"] = _account("bwd", (floor, written), (read, written))
    return found


def accounts(problem: Problem, configs: Mapping[str, Config]) -> dict[str, Account]:
    """Every kernel that one forward and backward pass launches, by name; ``configs`` as autotune names them.

    The backward pass makes the states of segments again, with the kernels of the forward pass: their bytes are those of
    both.
    """
    if not problem.lengths or not sum(problem.lengths):
        return {}
    found = forward(problem, configs)
    for name, account in backward(problem, configs).items():
        if name in found:
            own = found[name]
            floor, model = (Bytes(a.read + b.read, a.written + b.written)
                            for a, b in ((own.floor, account.floor), (own.model, account.model)))  # fmt: skip
            account = Account(own.which, floor, model)
        found[name] = account
    return found


def step(problem: Problem, config: Config) -> Account:
    """The step kernel: ``lengths`` are the new tokens of every sequence, all the same."""
    slices = -(-problem.value_width // config.width)
    tokens, heads = problem.lengths[0], problem.heads * len(problem.lengths)
    blocks = heads * (1 if problem.normalize else slices)
    decays = {"none": 0, "head": blocks, "token": heads * slices * tokens}[problem.decay_form] * problem.decay
    read = heads * (problem.values_state + slices * problem.normalizer) + decays
    read += heads * tokens * problem.itemsize * (2 * slices * problem.key_width + problem.value_width)
    written = problem.states + problem.values_bytes
    once = problem.states + 2 * problem.keys_bytes + problem.values_bytes + problem.decay_bytes
    return _account("fwd", (once, written), (read, written))

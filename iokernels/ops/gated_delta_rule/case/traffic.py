"""The bytes of gated_delta_rule's Triton kernels: what each must move, and what its blocks request."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch

from iokernels.ops.gated_delta_rule.options import chunk_rows
from iokernels.ops.gated_delta_rule.triton.tuning import GRADS, INVERSE, STEP, WALKS, Config
from iokernels.testing.case.accounts import Account, Accounts, Bytes, Configs
from iokernels.testing.case.shape import Shape

from . import compile as kernels
from .shapes import STEP_VOCABULARY, VOCABULARY, lengths

_NUMBER = 4  # of beta, of the decay, of a state


@dataclass(frozen=True)
class Problem:
    """What the models need to know of a shape. Counts of bytes are over all heads where they do not say otherwise."""

    shape: Shape
    size: int
    chunk: int

    @cached_property
    def lengths(self) -> list[int]:
        """Of the sequences."""
        return lengths(self.shape)

    @property
    def rows(self) -> int:
        """Of all sequences and heads."""
        return self.shape.h * sum(self.lengths)

    @property
    def chunks(self) -> int:
        """Of all sequences and heads."""
        return self.shape.h * sum(-(-length // self.chunk) for length in self.lengths)

    @property
    def launched(self) -> int:
        """Chunks with those that a packed call launches in vain."""
        if not self.shape.packed:
            return self.chunks
        return self.shape.h * (sum(self.lengths) // self.chunk + len(self.lengths))

    @property
    def states(self) -> int:
        """Bytes of one float32 state for every sequence and head."""
        return _NUMBER * len(self.lengths) * self.shape.h * self.shape.d * self.shape.dv

    @property
    def chunk_states(self) -> int:
        """Bytes of a state for every chunk, in the dtype of q."""
        return self.size * self.chunks * self.shape.d * self.shape.dv

    @property
    def numbers(self) -> int:
        """Bytes of beta and of the decays, as a kernel reads them once: of a decay for each head, one a chunk."""
        decays = (0, self.rows, self.chunks)[self.shape.decay]
        return _NUMBER * (self.rows + decays)

    @property
    def keys(self) -> int:
        """Bytes of k as the heads of v read it."""
        return self.rows * self.shape.d * self.size

    @property
    def keys_once(self) -> int:
        """Bytes of k."""
        return self.keys // self.shape.h * self.shape.hk

    @property
    def values(self) -> int:
        """Bytes of v."""
        return self.rows * self.shape.dv * self.size

    @property
    def inverses(self) -> int:
        """Bytes of the inverses."""
        return self.rows * self.chunk * _NUMBER


def _blocks(width: int, block: int) -> int:
    return -(-width // block)


def inverse(problem: Problem) -> Account:
    """k, beta and decay once for each head of v; the inverses once."""
    table = 8 * problem.launched * problem.shape.packed
    return Account(
        "fwd",
        floor=Bytes(problem.keys_once + problem.numbers, problem.inverses),
        model=Bytes(problem.keys + problem.numbers + table, problem.inverses),
    )


def walk(problem: Problem, config: Config, which: Literal["fwd", "states", "back"]) -> Account:
    """v, its like and the states once; k, perhaps q, the rows' numbers and the inverses once for each block of
    columns."""
    shape = problem.shape
    columns = _blocks(shape.dv, config.block_v)
    tensors = 1 if which == "states" else 2  # k, and q
    found = problem.states * shape.state
    once = problem.values + found
    repeated = tensors * problem.keys + problem.numbers + problem.inverses
    offsets = (8 if which == "fwd" else 12) * shape.packed * len(problem.lengths) * shape.h * columns
    written = {
        "fwd": problem.values + problem.states,
        "states": problem.values + problem.chunk_states,
        "back": 2 * problem.values + problem.chunk_states + problem.states,
    }[which]
    return Account(
        "fwd" if which == "fwd" else "bwd",
        floor=Bytes(once + tensors * problem.keys_once + problem.numbers + problem.inverses, written),
        model=Bytes(once + columns * repeated + offsets, written),
    )


def gradients(problem: Problem, config: Config) -> Account:
    """q, k and the states of the chunks once; v, do, n, r and the rows' numbers once for each block of columns of k;
    gradients of shared heads are float32, one for each head of v."""
    shape = problem.shape
    parts = _blocks(shape.d, config.block_k)
    states = 2 * problem.chunk_states
    repeated = 4 * problem.values + problem.numbers
    table = 8 * problem.launched * parts * shape.packed
    size = problem.size if shape.h == shape.hk else _NUMBER
    sums = _NUMBER * problem.rows * (2 if shape.decay else 1)
    keys = 2 * problem.rows * shape.d * size
    return Account(
        "bwd",
        floor=Bytes(2 * problem.keys_once + states + repeated, keys + sums),
        model=Bytes(2 * problem.keys + states + parts * repeated + table, keys + parts * sums),
    )


def accounts(shape: Shape, dtype: torch.dtype, configs: Configs) -> dict[str, Account]:
    """Every kernel that one forward and backward pass launches, by name."""
    problem = Problem(shape, dtype.itemsize, chunk_rows(dtype, shape.d))
    found = {}
    if problem.launched:
        found[f"{INVERSE}_kernel"] = inverse(problem)
        found[f"{GRADS}_kernel"] = gradients(problem, configs[GRADS])
    if problem.lengths:
        found[f"{WALKS[0]}_kernel"] = walk(problem, configs[WALKS[0]], "fwd")
        found[f"{WALKS[1]}_kernel"] = walk(problem, configs[WALKS[1]], "states")
        found[f"{WALKS[2]}_kernel"] = walk(problem, configs[WALKS[2]], "back")
    return found


def step_account(shape: Shape, dtype: torch.dtype, configs: Configs) -> dict[str, Account]:
    """The state once each way, v and out once; q, k, beta and decay once for each block of columns."""
    rows = shape.b * shape.h * shape.n
    columns = _blocks(shape.dv, configs[STEP].block_v)
    states = _NUMBER * shape.b * shape.h * shape.d * shape.dv
    values = rows * shape.dv * dtype.itemsize
    keys = 2 * rows * shape.d * dtype.itemsize
    beta = _NUMBER * rows
    decay = _NUMBER * (0, rows, rows)[shape.decay]
    once = Bytes(states + values + keys // shape.h * shape.hk + beta + decay, values + states)
    model = Bytes(states + values + columns * (keys + beta + decay), values + states)
    return {f"{STEP}_kernel": Account("fwd", once, model)} if shape.b else {}


def floor_bytes(shape: Shape, dtype: torch.dtype, which: str) -> int:
    """Each input read once, each output written once; the final state counts, and so does the initial one if any."""
    rows, size = sum(lengths(shape)), dtype.itemsize
    number = 8 if dtype == torch.float64 else _NUMBER
    decay = number * (0, rows * shape.h, shape.h)[shape.decay]
    inputs = rows * (size * (2 * shape.hk * shape.d + shape.h * shape.dv) + number * shape.h) + decay
    out = rows * size * shape.h * shape.dv
    state = number * len(lengths(shape)) * shape.h * shape.d * shape.dv
    forward = inputs + out + state * (1 + shape.state)
    backward = 2 * inputs + out + 3 * state * shape.state
    return {"fwd": forward, "bwd": backward, "both": forward + backward}[which]


NAIVE = (
    "the recurrence, one token after the other: each reads and writes the float32 state; backward the state of every "
    "token, which the forward pass kept, is read, and the gradient of the state read and written"
)


def naive_bytes(shape: Shape, dtype: torch.dtype, which: Literal["fwd", "bwd"]) -> int:
    """The bytes of :data:`NAIVE`, and the inputs and outputs once."""
    states = _NUMBER * shape.h * sum(lengths(shape)) * shape.d * shape.dv
    return (2 if which == "fwd" else 3) * states + floor_bytes(shape, dtype, which)


TILES = {
    INVERSE: Config(32, 16, 4, 1),
    **dict.fromkeys(WALKS, Config(32, 16, 4, 1)),
    GRADS: Config(16, 32, 4, 1),
    STEP: Config(32, 16, 4, 1),
}
"""Small ones, so that short calls take several blocks; for widths of k from 17 to 32."""

ACCOUNTS = Accounts(
    model=accounts,
    configs=kernels.configs,
    naive_bytes=naive_bytes,
    naive=NAIVE,
    shapes=tuple(
        (VOCABULARY.parse(text), dtype)
        for text, dtype in (
            ("b=2,h=2,n=70,d=24,dv=40", torch.float16),
            ("b=1,h=4,hk=2,n=64,d=32,dv=24,state=1", torch.bfloat16),
            ("b=1,h=2,n=40,d=20,dv=24,decay=0", torch.float32),
            ("b=1,h=2,n=65,d=24,decay=2,state=1", torch.float32),
            ("b=4,h=2,hk=1,n=50,d=24,dv=40,packed=1,empty=1,state=1", torch.float16),
            ("b=1,h=2,n=1,d=24", torch.bfloat16),
        )
    ),
    test_configs=TILES,
)


def _step_naive(shape: Shape, dtype: torch.dtype, which: Literal["fwd", "bwd"]) -> int:
    states = _NUMBER * shape.b * shape.h * shape.n * shape.d * shape.dv
    return 5 * states + sum(step_account(shape, dtype, TILES)[f"{STEP}_kernel"].floor)


STEP_ACCOUNTS = Accounts(
    model=step_account,
    configs=kernels.configs,
    naive_bytes=_step_naive,
    naive="decay the state, read it with k, add the outer product, read it with q: five passes over the state a token",
    shapes=tuple(
        (STEP_VOCABULARY.parse(text), dtype)
        for text, dtype in (
            ("b=2,h=4,hk=2,n=1,d=24,dv=40", torch.bfloat16),
            ("b=1,h=2,n=3,d=32,dv=16,decay=0", torch.float32),
            ("b=2,h=2,n=2,d=20,decay=2", torch.float16),
        )
    ),
    test_configs=TILES,
)

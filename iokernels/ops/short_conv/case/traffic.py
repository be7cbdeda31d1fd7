"""How many bytes the Triton kernels of short_conv should request from global memory: the model of their tiling.

Counted as a thread block requests them: each address once a load instruction, whatever the caches serve. The model is
exact, with every option; a test holds it to what the tracer counts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import accumulate

from iokernels.autotune import bucket
from iokernels.ops.short_conv.triton.tuning import DIRECT_WIDTH, ShortConfig, dweight_inner, inner, product_rows
from iokernels.testing.case.accounts import Account, Bytes

_OFFSET = 4  # bytes of an entry of cu_seqlens
_SUM = 4  # of an entry of the table of sums, and of a gradient through silu
_STEPS = 16  # lines that a product for the gradient of a wide filter takes at once


@dataclass(frozen=True)
class Problem:
    """One call; ``left`` and ``right`` are the padding."""

    lengths: tuple[int, ...]
    channels: int
    width: int
    left: int
    right: int
    itemsize: int
    silu: bool = False
    bias: bool = False
    state: bool = False
    packed: bool = False

    def outputs(self, length: int) -> int:
        """Rows of the output of a sequence."""
        return length + self.left + self.right - (self.width - 1)

    @property
    def inputs_bytes(self) -> int:
        """Bytes of x."""
        return sum(self.lengths) * self.channels * self.itemsize

    @property
    def outputs_bytes(self) -> int:
        """Bytes of the output."""
        return sum(map(self.outputs, self.lengths)) * self.channels * self.itemsize

    @property
    def state_bytes(self) -> int:
        """Bytes of a state of every sequence."""
        return len(self.lengths) * self.channels * (self.width - 1) * self.itemsize

    @property
    def filter_bytes(self) -> int:
        """Bytes of the filter."""
        return self.channels * self.width * self.itemsize

    @property
    def bias_bytes(self) -> int:
        """Bytes of the bias."""
        return self.bias * self.channels * self.itemsize

    @property
    def offsets_bytes(self) -> int:
        """Bytes of cu_seqlens."""
        return self.packed * (len(self.lengths) + 1) * _OFFSET


def _within(start: int, count: int, low: int, high: int) -> int:
    """How many of ``count`` rows from ``start`` on lie from ``low`` to ``high``."""
    return max(min(start + count, high) - max(start, low), 0)


def _tiles(problem: Problem, block_n: int, rows: Callable[[int], int]) -> Iterator[tuple[int, int]]:
    """(length of the sequence, first row) of every slot of the grid; ``rows(length)`` is what tiles have to cover."""
    if not problem.packed:
        for length in problem.lengths:
            yield from ((length, first) for first in range(0, rows(length), block_n))
        return
    starts = (0, *accumulate(problem.lengths))
    first_slots = [start // block_n + s for s, start in enumerate(starts[:-1])]
    for slot in range(starts[-1] // block_n + len(problem.lengths)):
        sequence = sum(first <= slot for first in first_slots) - 1
        yield problem.lengths[sequence], (slot - first_slots[sequence]) * block_n


def _offsets(problem: Problem, config: ShortConfig, slots: int, search: bool) -> int:
    """Bytes of cu_seqlens that the blocks read: a search among all, and both ends of their sequence."""
    blocks = slots * -(-problem.channels // config.block_h)
    return problem.packed * blocks * _OFFSET * (2 + search * len(problem.lengths))


def _context(problem: Problem, start: int, count: int, length: int, state: bool) -> int:
    """Of ``count`` rows from ``start`` on: those of x, and of the state before it."""
    return _within(start, count, 0, length) + (state and problem.state) * _within(start, count, 1 - problem.width, 0)


def forward(problem: Problem, config: ShortConfig) -> Account:
    """A row of x for each tap of an output."""
    rows = slots = busy = 0
    for length, first in _tiles(problem, config.block_n, problem.outputs):
        slots += 1
        if first >= problem.outputs(length):
            continue
        busy += 1
        for w in range(problem.width):
            rows += _context(problem, first + w - problem.left, config.block_n, length, w < problem.left)
    read = rows * problem.channels * problem.itemsize + busy * (problem.filter_bytes + problem.bias_bytes)
    once = (
        problem.inputs_bytes + problem.filter_bytes + problem.bias_bytes + problem.offsets_bytes
        + problem.state * problem.state_bytes
    )  # fmt: skip
    return Account(
        "fwd",
        floor=Bytes(once, problem.outputs_bytes),
        model=Bytes(read + _offsets(problem, config, slots, True), problem.outputs_bytes),
    )


def final_state(problem: Problem) -> Account:
    """The last rows of every sequence."""
    around = problem.width - 1
    rows = sum(_context(problem, length - around, around, length, True) for length in problem.lengths)
    blocks = len(problem.lengths) * -(-problem.channels // min(64, bucket(problem.channels)))
    read = rows * problem.channels * problem.itemsize
    return Account(
        "fwd",
        floor=Bytes(read + problem.offsets_bytes, problem.state_bytes),
        model=Bytes(read + problem.packed * blocks * 2 * _OFFSET, problem.state_bytes),
    )


def _direct_rows(problem: Problem, first: int, block: int, length: int, sums: bool, base: int) -> int:
    """Rows that one tile of the direct backward kernel reads: of x, of the state, dout and the final state."""
    w = problem.width
    rows = 0
    for s in range(2 * w - 1):
        shift = s - (w - 1)
        own = -problem.left <= shift < w - problem.left
        if problem.silu or (own and sums):
            rows += _context(problem, first + shift, block, length, base < 0 or s < w - 1)
    rows += sum(_within(first + problem.left - v, block, 0, problem.outputs(length)) for v in range(w))
    if problem.state:
        rows += _within(first, block, length - (w - 1), length)
    return rows


def backward(problem: Problem, config: ShortConfig) -> Account:
    """dout and x for every shift that a gradient needs; a line of sums a tile."""
    rows = slots = 0
    for length, first in _tiles(problem, config.block_n, lambda n: max(n, problem.outputs(n))):
        slots += 1
        rows += _direct_rows(problem, first, config.block_n, length, True, 0)
    taps = problem.filter_bytes + problem.silu * problem.bias_bytes
    read = slots * taps + _offsets(problem, config, slots, True)
    written = slots * problem.channels * (problem.width + 1) * _SUM + problem.inputs_bytes
    once = (
        problem.inputs_bytes + problem.outputs_bytes + taps + problem.offsets_bytes
        + 2 * problem.state * problem.state_bytes
    )  # fmt: skip
    if problem.state and problem.width > 1:
        around = problem.width - 1
        rows += sum(_direct_rows(problem, -around, bucket(around), n, False, -1) for n in problem.lengths)
        read += len(problem.lengths) * taps
        state_config = ShortConfig(bucket(around), min(64, bucket(problem.channels)), 4)
        read += _offsets(problem, state_config, len(problem.lengths), False)
        written += problem.state_bytes
    read += rows * problem.channels * problem.itemsize
    least = problem.inputs_bytes + problem.filter_bytes + problem.bias_bytes + problem.state * problem.state_bytes
    return Account("bwd", floor=Bytes(once, least), model=Bytes(read, written))


def _diagonals(width: int, line: int, part: int) -> int:
    """Taps that a block loads for its parts of the filter's matrix."""
    firsts = range(0, 2 * line, part)
    return sum(_within(first - (line - 1), part + line - 1, 0, width) for first in firsts)


def _product_rows(problem: Problem, first: int, block: int, left: int, length: int, state: bool) -> int:
    line = inner(problem.width)
    return sum(_context(problem, first - left + half, block, length, state) for half in (0, line))


def _product(
    problem: Problem, config: ShortConfig, left: int, itemsize: int, *, flip: bool, epilogue: int
) -> tuple[int, int]:
    """Bytes read by one product over all sequences, forward or reversed, and the same for rows of states.

    ``itemsize`` is that of the rows that it reads, ``epilogue`` of what it reads for each row that it writes.
    """
    line = inner(problem.width)
    config = replace(config, block_n=product_rows(problem.width, config))
    taps = _diagonals(problem.width, line, min(32, line)) * problem.itemsize
    read = slots = 0
    for length, first in _tiles(problem, config.block_n, (lambda n: n) if flip else problem.outputs):
        slots += 1
        stored = length if flip else problem.outputs(length)
        if first >= stored:
            continue
        read += taps + problem.bias * problem.itemsize * (not flip)
        long = problem.outputs(length) if flip else length
        read += itemsize * _product_rows(problem, first, config.block_n, left, long, not flip)
        read += epilogue * _within(first, config.block_n, 0, stored)
        if flip and problem.state:
            read += problem.itemsize * _within(first, config.block_n, length - (problem.width - 1), length)
    read = read * problem.channels + _offsets(problem, config, slots, True)
    states = 0
    if flip and problem.state:
        around = problem.width - 1
        for length in problem.lengths:
            states += taps + itemsize * _product_rows(problem, -around, config.block_n, left, length, False)
            states += problem.itemsize * _within(-around, config.block_n, length - around, length)
        states = states * problem.channels + _offsets(problem, config, len(problem.lengths), False)
    return read, states


def wide_forward(problem: Problem, config: ShortConfig) -> Account:
    """Every row of x twice, and the taps that fill the filter's matrix, a tile and channel."""
    read, _ = _product(problem, config, problem.left, problem.itemsize, flip=False, epilogue=0)
    return Account("fwd", floor=forward(problem, config).floor, model=Bytes(read, problem.outputs_bytes))


def wide_backward(problem: Problem, config: ShortConfig) -> Account:
    """The sums once more where a gradient passes silu; then the gradient's rows twice."""
    read, written, itemsize = 0, problem.inputs_bytes, problem.itemsize
    if problem.silu:
        again, _ = _product(
            problem, config, problem.left, problem.itemsize, flip=False, epilogue=problem.itemsize
        )  # fmt: skip
        read, itemsize = again, _SUM
        written += problem.outputs_bytes // problem.itemsize * _SUM
    back, states = _product(problem, config, problem.width - 1 - problem.left, itemsize, flip=True, epilogue=0)
    written += problem.state * problem.state_bytes
    once = problem.outputs_bytes + problem.filter_bytes + problem.offsets_bytes + problem.state * problem.state_bytes
    once += problem.silu * (problem.inputs_bytes + problem.bias_bytes + problem.state * problem.state_bytes)
    least = problem.inputs_bytes + problem.state * problem.state_bytes
    return Account("bwd", floor=Bytes(once, least), model=Bytes(read + back + states, written))


def wide_dweight(problem: Problem, config: ShortConfig) -> Account:
    """The gradient's rows once; rows of x once, and again those that two steps of a tile share."""
    line, _ = dweight_inner(problem.width)
    itemsize = _SUM if problem.silu else problem.itemsize
    read = slots = 0
    for length, first in _tiles(problem, config.block_n, problem.outputs):
        slots += 1
        read += itemsize * _within(first, config.block_n, 0, problem.outputs(length))
        for step in range(0, config.block_n, _STEPS * line):
            start, count = first + step - problem.left, _STEPS * line + problem.width - 1
            read += problem.itemsize * _context(problem, start, count, length, True)
    written = slots * problem.channels * (problem.width + 1) * _SUM
    once = problem.inputs_bytes + problem.outputs_bytes // problem.itemsize * itemsize + problem.offsets_bytes
    once += problem.state * problem.state_bytes
    return Account(
        "bwd",
        floor=Bytes(once, problem.channels * (problem.width + 1) * _SUM),
        model=Bytes(read * problem.channels + _offsets(problem, config, slots, True), written),
    )


def accounts(problem: Problem, configs: Mapping[str, ShortConfig]) -> dict[str, Account]:
    """Every kernel that one forward and backward pass launches, by name; ``configs`` as autotune names them."""
    found: dict[str, Account] = {}
    if problem.outputs_bytes == 0 and not problem.state:
        return found
    if problem.width <= DIRECT_WIDTH:
        found["short_conv_fwd_kernel"] = forward(problem, configs["short_conv_fwd"])
        found["short_conv_bwd_kernel"] = backward(problem, configs["short_conv_bwd"])
    else:
        found["short_conv_wide_fwd_kernel"] = wide_forward(problem, configs["short_conv_wide_fwd"])
        found["short_conv_wide_bwd_kernel"] = wide_backward(problem, configs["short_conv_wide_bwd"])
        found["short_conv_wide_dweight_kernel"] = wide_dweight(problem, configs["short_conv_wide_dweight"])
    if problem.state and problem.width > 1:
        found["short_conv_state_kernel"] = final_state(problem)
    return found

"""A search space of the size and kind that a fused recurrent kernel has, to time the enumeration on.

An LSTM step multiplies a state of width D by a recurrent matrix [4, D, D] for every head. Blocks share out the rows
(gates by units) and may split the inner dimension; warps share out a block's tile; a part of the matrix stays in
registers between time steps. Widths and heads as in FlashRNN's settings; the statement of the limits is our own.
"""

from __future__ import annotations

from typing import NamedTuple

from iokernels.autotune.space import Axis, Constraint, Space, at_most, divisors, literals
from iokernels.runtime.device import DeviceSpec

GATES = 4
MMA_ROWS, MMA_BATCH, MMA_INNER = 16, 8, 16


class Problem(NamedTuple):
    """One recurrent layer: ``batch`` sequences, ``heads`` of ``width`` units each, half precision."""

    width: int
    heads: int
    batch: int = 16

    @property
    def rows(self) -> int:
        """Rows of the recurrent matrix of one head."""
        return GATES * self.width

    @property
    def batch_tiles(self) -> int:
        """Matrix instructions along the batch."""
        return self.batch // MMA_BATCH


def _blocks(p: Problem, device: DeviceSpec, rows: int, inner: int, batch: int) -> int:
    return p.heads * rows * inner * batch


def _shared(p: Problem, device: DeviceSpec, rows: int, inner: int, batch: int, cached: int) -> int:
    """The part of the block's matrix that registers do not hold, its slice of the state, and the partial sums."""
    row, column = p.rows // rows, p.width // inner
    matrix = row * (column - column * cached // 8) * 2
    return matrix + column * (p.batch // batch) * 2 + row * (p.batch // batch) * 4


def _registers(
    p: Problem, device: DeviceSpec, rows: int, inner: int, batch: int, warp_r: int, warp_k: int, cached: int
) -> float:
    row, column = p.rows // rows, p.width // inner
    threads = 32 * warp_r * warp_k
    matrix = row * column * cached // 8 // 2
    sums = row * (p.batch // batch) * warp_k
    return (matrix + sums) / threads + 40


def divisors_of(name: str, size: str) -> Axis:
    """An axis of the divisors of a size of the problem."""
    return Axis(name, lambda problem: divisors(getattr(problem, size)))


SPACE = Space(
    "lstm_forward",
    1,
    (
        divisors_of("blocks_rows", "rows"),
        divisors_of("warps_rows", "rows"),
        divisors_of("blocks_inner", "width"),
        divisors_of("warps_inner", "width"),
        divisors_of("blocks_batch", "batch_tiles"),
        literals("cached_eighths", *range(9)),
    ),
    (
        Constraint("rows to instructions", ("blocks_rows",), lambda p, d, b: p.rows // b % (MMA_ROWS * GATES) == 0),
        Constraint("inner to instructions", ("blocks_inner",), lambda p, d, b: p.width // b % MMA_INNER == 0),
        # Blocks wait for one another at every time step, so all of them must run at once.
        at_most("one wave", ("blocks_rows", "blocks_inner", "blocks_batch"), _blocks, "sms"),
        Constraint(
            "warps share rows", ("blocks_rows", "warps_rows"), lambda p, d, b, w: p.rows // b % (w * MMA_ROWS) == 0
        ),
        Constraint(
            "warps share inner", ("blocks_inner", "warps_inner"), lambda p, d, b, w: p.width // b % (w * MMA_INNER) == 0
        ),
        at_most("warps", ("warps_rows", "warps_inner"), lambda p, d, r, k: r * k, 32),
        Constraint("four warps", ("warps_rows", "warps_inner"), lambda p, d, r, k: r * k >= 4),
        at_most(
            "shared memory", ("blocks_rows", "blocks_inner", "blocks_batch", "cached_eighths"), _shared, "smem_block"
        ),
        at_most(
            "registers",
            ("blocks_rows", "blocks_inner", "blocks_batch", "warps_rows", "warps_inner", "cached_eighths"),
            _registers,
            255,
        ),
    ),
)  # fmt: skip

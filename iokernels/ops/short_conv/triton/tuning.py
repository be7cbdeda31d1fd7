"""Launch parameters of the short_conv kernels: their default, and what the choice depends on.

A block owns ``block_n`` rows of ``block_h`` channels. The direct kernels hold such a tile in registers; those of wide
filters walk over the channels one by one, and hold ``block_n`` rows of each as a matrix.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

from iokernels.autotune import bucket
from iokernels.autotune.tunable import RESULTS
from iokernels.runtime.device import DeviceSpec

KERNELS = (
    "short_conv_fwd",
    "short_conv_bwd",
    "short_conv_wide_fwd",
    "short_conv_wide_bwd",
    "short_conv_wide_dweight",
)
PRODUCTS = ("short_conv_wide_fwd", "short_conv_wide_bwd")
"""Those whose tile is one product with the filter's matrices."""

DIRECT_WIDTH = 8
"""Widest filter whose taps are added up one by one; wider ones are matrix products."""


@dataclass(frozen=True)
class ShortConfig:
    """Launch parameters of one kernel."""

    block_n: int = field(metadata=RESULTS)  # sums over rows are taken by tiles
    block_h: int
    num_warps: int


class ShortProblem(NamedTuple):
    """What the choice depends on. Counts are rounded up to powers of two, so that there are few problems."""

    kernel: str
    width: int  # rounded up: 2, 4, 8 taps are direct
    itemsize: int
    rows_inside: bool  # memory order: the rows of a channel are neighbours
    rows: int = 4096  # of the longest sequence
    channels: int = 1024
    sequences: int = 8
    sm: int = 90
    smem_block: int = 227 * 1024


SIZES = ("rows", "channels", "sequences")
"""The sizes of :func:`table_key` of which the nearest entry serves."""


def table_key(problem: ShortProblem) -> dict[str, Any]:
    """What tables are looked up by."""
    return {
        "width": problem.width,
        "itemsize": problem.itemsize,
        "rows_inside": problem.rows_inside,
        "rows": problem.rows,
        "channels": problem.channels,
        "sequences": problem.sequences,
    }


def problem_of(kernel: str, key: dict[str, Any], device: DeviceSpec) -> ShortProblem:
    """The reverse of :func:`table_key`: a problem that has this key. Raises ``TypeError`` for a key of another make."""
    return ShortProblem(kernel=kernel, sm=device.sm, smem_block=device.smem_block, **key)


def inner(width: int) -> int:
    """Rows that a wide filter's product makes of one line of its operand, which holds twice as many: at least W - 1."""
    return max(16, bucket(width - 1))


def product_rows(width: int, config: ShortConfig) -> int:
    """Rows of a wide filter's tile: ``block_n``, and at least the sixteen lines of a matrix instruction."""
    return max(config.block_n, 16 * inner(width))


def dweight_inner(width: int) -> tuple[int, int]:
    """(rows, lags) of the product that gives a wide filter's gradient: its diagonals, of which there are W, are the
    taps."""
    return 32, bucket(width + 31)


def default(problem: ShortProblem) -> ShortConfig:
    """A configuration that fits, for every problem that the kernels accept."""
    # Sixteen channels share the sectors of memory where channels are neighbours.
    walked = 1 if problem.rows_inside else 16
    if problem.kernel in PRODUCTS:
        line = inner(problem.width)
        return ShortConfig(max(16 * line, 1024), walked, 4 if line <= 64 else 8)
    if problem.kernel == "short_conv_wide_dweight":
        return ShortConfig(1024, walked, 8)
    # A thread holds 8 elements, and 4 backward, which keeps 2 W - 1 tiles of x.
    backward = problem.kernel == "short_conv_bwd"
    elements, lane = (1024, 16) if backward else (2048, 32)
    block_n = max(min(elements if problem.rows_inside else elements // lane, bucket(problem.rows)), 32)
    block_h = max(min(elements // block_n, bucket(problem.channels)), 1)
    return ShortConfig(block_n, block_h, max(1, min(8, block_n * block_h // (128 if backward else 256))))

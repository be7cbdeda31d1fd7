"""Launch parameters of the short_conv kernels: what the choice depends on, its default and its space.

A block owns ``block_n`` rows of ``block_h`` channels. The direct kernels hold such a tile in registers; those of wide
filters walk over the channels one by one, and hold ``block_n`` rows of each as a matrix.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from iokernels.autotune import RESULTS, Size, Tunable, bucket
from iokernels.autotune.space import Constraint, Space, fits_registers, fits_shared_memory, literals, powers_of_two
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
    rows: Size = 4096  # of the longest sequence
    channels: Size = 1024
    sequences: Size = 8
    sm: int = 90
    smem_block: int = 227 * 1024


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


_TILE = ("block_n", "block_h", "num_warps")


def words(kernel: str, problem: ShortProblem, rows: int, channels: int) -> int:
    """32-bit registers of a block: accumulators and operands."""
    item = -(-problem.itemsize // 2)  # a half takes half a register; two are counted as one
    if kernel == "short_conv_fwd":
        return rows * channels * 3
    if kernel == "short_conv_bwd":
        return rows * channels * (3 + (2 * problem.width - 1) * item // 2)
    if kernel in PRODUCTS:
        return rows * (1 + item)
    line, lags = dweight_inner(problem.width)
    return 2 * line * lags + rows


def shared_bytes(kernel: str, problem: ShortProblem, rows: int) -> int:
    """Shared memory of the operands of a matrix product, in bytes."""
    if kernel in PRODUCTS:
        line = inner(problem.width)
        return 4 * (rows + line * line)
    if kernel == "short_conv_wide_dweight":
        line, lags = dweight_inner(problem.width)
        return 4 * (rows + rows // line * lags + line * lags)
    return 0


def _space(kernel: str) -> Space[ShortConfig]:
    wide = kernel in (*PRODUCTS, "short_conv_wide_dweight")

    def registers(problem: ShortProblem, device: DeviceSpec, rows: int, channels: int, warps: int) -> int:
        return words(kernel, problem, rows, channels)

    def shared(problem: ShortProblem, device: DeviceSpec, rows: int) -> int:
        return shared_bytes(kernel, problem, rows)

    def whole_lines(problem: ShortProblem, device: DeviceSpec, rows: int) -> bool:
        line = inner(problem.width) if kernel in PRODUCTS else dweight_inner(problem.width)[0]
        return rows >= 16 * line

    def an_element_a_thread(problem: ShortProblem, device: DeviceSpec, rows: int, channels: int, warps: int) -> bool:
        return rows * channels >= 32 * warps

    def not_past_the_channels(problem: ShortProblem, device: DeviceSpec, channels: int) -> bool:
        return channels <= max(bucket(problem.channels), 16)

    own = (
        (
            Constraint("sixteen lines", ("block_n",), whole_lines),
            fits_shared_memory(("block_n",), shared),
        )
        if wide
        else (Constraint("an element a thread", _TILE, an_element_a_thread),)
    )
    return Space(
        name=kernel,
        version=1,
        axes=(
            powers_of_two("block_n", 256 if wide else 16, 8192 if wide else 4096),
            powers_of_two("block_h", 1, 64 if wide else 256),
            literals("num_warps", *((4, 8, 16) if wide else (1, 2, 4, 8))),
        ),
        constraints=(
            *own,
            Constraint("no more channels than there are", ("block_h",), not_past_the_channels),
            fits_registers(_TILE, "num_warps", registers),
        ),
        make=ShortConfig,
    )


TUNABLES: dict[str, Tunable[ShortConfig]] = {
    kernel: Tunable(kernel, "triton", _space(kernel), default, ShortProblem) for kernel in KERNELS
}
"""The kernels of short_conv by name."""

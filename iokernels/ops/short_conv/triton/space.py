"""The configurations that tuning may try for the short_conv kernels, and which of them look best on paper."""

from __future__ import annotations

from functools import partial

from iokernels.autotune.space import Constraint, Space, fits_registers, fits_shared_memory, literals, powers_of_two
from iokernels.autotune.tunable import Tunable
from iokernels.runtime.device import DeviceSpec

from .tuning import (
    KERNELS,
    PRODUCTS,
    SIZES,
    ShortConfig,
    ShortProblem,
    bucket,
    default,
    dweight_inner,
    inner,
    table_key,
)

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


def predicted_seconds(kernel: str, problem: ShortProblem, device: DeviceSpec, config: ShortConfig) -> float:
    """What a launch would take on paper: the rows that tiles read beside their own, and idle lanes. For ranking."""
    overlap = 2 * (problem.width - 1) if kernel == "short_conv_bwd" else problem.width - 1
    rows = problem.sequences * -(-problem.rows // config.block_n) * (config.block_n + overlap)
    channels = -(-problem.channels // config.block_h) * config.block_h
    contiguous = config.block_n if problem.rows_inside else config.block_h
    sector = max(1.0, 32 / (contiguous * problem.itemsize))
    blocks = problem.sequences * -(-problem.rows // config.block_n) * -(-problem.channels // config.block_h)
    idle = max(1.0, device.sms * 4 / max(blocks, 1))
    a_thread = config.block_n * config.block_h / (32 * config.num_warps)
    return rows * channels * problem.itemsize * sector * idle * (1 + abs(a_thread - 8) / 64) / device.dram_bandwidth


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
        order=partial(predicted_seconds, kernel),
    )


TUNABLES: dict[str, Tunable[ShortConfig]] = {
    kernel: Tunable(kernel, "triton", _space(kernel), default, table_key, SIZES) for kernel in KERNELS
}
"""The kernels of short_conv by name."""

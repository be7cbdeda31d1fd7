"""The configurations that tuning may try for the fft_conv kernels, and which of them look best on paper."""

from __future__ import annotations

from functools import partial
from typing import Any

from iokernels.autotune.space import Axis, Constraint, Space, fits_registers, fits_shared_memory, literals
from iokernels.autotune.tunable import Tunable
from iokernels.runtime.device import DeviceSpec

from .tuning import (
    KERNELS,
    OUTER_KERNEL,
    OUTERS,
    SIZES,
    Config,
    OuterConfig,
    Problem,
    best_lengths,
    cover_of,
    default,
    default_outer,
    fitted,
    lengths,
    most_units,
    row_lengths,
    table_key,
    warps,
    work,
)


def accumulators(kernel: str, problem: Problem, length: int) -> int:
    """The 32-bit registers of a thread block that hold a transform, and in the backward pass the filter's gradient."""
    return 2 * length * (2 if kernel == "fft_conv_bwd" else 1)


def shared_bytes(problem: Problem, length: int) -> int:
    """The shared memory of operands on their way between two products, in bytes; more is used where it is there."""
    return problem.itemsize * 2 * length


def predicted_seconds(problem: Problem, device: DeviceSpec, config: Config) -> float:
    """What a launch would take on paper, good for ranking: the work of its thread blocks, in whole waves."""
    cover = cover_of(problem, config.outer, config.length)
    assert cover is not None
    total = most_units(problem, config.outer, config.length)
    rows = config.outer // 2 + 1 if config.outer > 1 else 1
    parts = -(-total // config.units)
    waves = -(-problem.heads * rows * parts // device.sms)
    once = problem.itemsize * 2 * config.length  # the spectrum
    sequences = 1 if config.outer > 1 else 2
    unit = sequences * work(problem, config.outer, config.length) / cover.chunks / rows
    crowd = 1.0 + 0.1 * abs(config.num_warps - warps(config.length)) / 4
    return waves * (once + config.units * unit) * crowd * device.sms / device.dram_bandwidth


def predicted_outer_seconds(problem: Problem, device: DeviceSpec, config: OuterConfig) -> float:
    """Of the first and the last step: the bytes that their tiles ask of the cache, for a sequence."""
    outer, length = best_lengths(problem)
    outer = max(outer, OUTERS[0])
    tile = fitted(config, outer, length)
    points = outer * length
    asked = points * outer * (1 / tile.rows + 1 / tile.columns) * problem.itemsize
    crowd = 1.0 + 0.1 * abs(tile.rows * tile.columns / (32 * tile.num_warps) - 64) / 64
    steps = 1.0 + 0.05 * (outer / tile.depth - 1) / config.num_stages
    return problem.heads * problem.pairs * asked * crowd * steps / device.dram_bandwidth


def _space(kernel: str) -> Space[Config]:
    def serves(problem: Problem, device: DeviceSpec, length: int, outer: int) -> bool:
        return cover_of(problem, outer, length) is not None

    def some_work(problem: Problem, device: DeviceSpec, length: int, units: int, outer: int) -> bool:
        found = cover_of(problem, outer, length) is not None
        return found and units <= most_units(problem, outer, length)

    def words(problem: Problem, device: DeviceSpec, length: int, warps: int) -> int:
        return accumulators(kernel, problem, length)

    def shared(problem: Problem, device: DeviceSpec, length: int) -> int:
        return shared_bytes(problem, length)

    def choices(problem: Problem) -> tuple[int, ...]:
        return tuple(sorted({1 << bits for bits in range(12)} | {default(problem).units}))

    def outers(problem: Problem) -> tuple[int, ...]:
        # Through memory only what has to go there: it is several times the bytes.
        return (1,) if best_lengths(problem)[0] == 1 else OUTERS

    return Space(
        name=kernel,
        version=2,
        axes=(
            Axis("length", lambda problem: sorted({*lengths(problem.itemsize), *row_lengths()})),
            Axis("units", choices),
            literals("num_warps", 1, 2, 4, 8, 16),
            literals("num_stages", 1, 2),
            Axis("outer", outers),
        ),
        constraints=(
            Constraint("serves the call", ("length", "outer"), serves),
            Constraint("no more units than there are", ("length", "units", "outer"), some_work),
            fits_registers(("length", "num_warps"), "num_warps", words),
            fits_shared_memory(("length",), shared),
        ),
        make=Config,
        order=partial(predicted_seconds),
    )


def _outer_space() -> Space[OuterConfig]:
    def words(problem: Problem, device: DeviceSpec, rows: int, columns: int, warps: int) -> int:
        return rows * columns + 16 * 32 * warps

    def shared(problem: Problem, device: DeviceSpec, rows: int, columns: int, depth: int, stages: int) -> int:
        return stages * depth * (rows + columns) * problem.itemsize

    return Space(
        name=OUTER_KERNEL,
        version=1,
        axes=(
            literals("rows", 16, 32, 64, 128),
            literals("columns", 64, 128, 256),
            literals("depth", 16, 32, 64),
            literals("num_warps", 4, 8),
            literals("num_stages", 1, 2, 3),
        ),
        constraints=(
            fits_registers(("rows", "columns", "num_warps"), "num_warps", words),
            fits_shared_memory(("rows", "columns", "depth", "num_stages"), shared),
        ),
        make=OuterConfig,
        order=partial(predicted_outer_seconds),
    )


TUNABLES: dict[str, Tunable[Any]] = {
    kernel: Tunable(kernel, "triton", _space(kernel), default, table_key, SIZES) for kernel in KERNELS
} | {OUTER_KERNEL: Tunable(OUTER_KERNEL, "triton", _outer_space(), default_outer, table_key, SIZES)}
"""The kernels of this room by name."""

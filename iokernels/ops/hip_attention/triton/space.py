"""The configurations that tuning may try for the selection kernels, and which of them look best on paper."""

from __future__ import annotations

from functools import partial

from iokernels.autotune.space import (
    Constraint,
    Space,
    fits_registers,
    fits_shared_memory,
    literals,
    occupancy,
    powers_of_two,
)
from iokernels.autotune.tunable import Tunable
from iokernels.runtime.device import DeviceSpec

from .tuning import BEST, BOUNDS, KERNELS, SIZES, SelectConfig, SelectProblem, default, shared_bytes, table_key


def words(kernel: str, problem: SelectProblem, rows: int, chunks: int) -> int:
    """32-bit registers of a block: scores, and the tiles that pass through registers."""
    if kernel == BEST:
        return 8 * problem.candidates
    if kernel == BOUNDS:
        return 3 * chunks * problem.block_d
    halves = problem.block_d * problem.itemsize // 4
    return 2 * rows * chunks + (rows + 2 * chunks) * halves


_LATENCY = 1e-6
"""Seconds from asking for a tile to having it: a weight of the ranking, not a measured figure."""


def predicted_seconds(kernel: str, problem: SelectProblem, device: DeviceSpec, config: SelectConfig) -> float:
    """What a launch would take on paper, for ranking: waves of blocks, each of which waits for its tiles one after the
    other, or for the memory that all of them share."""
    if kernel == BEST:
        return _LATENCY * (1 + abs(problem.candidates / (32 * config.num_warps) - 8) / 64)
    tiles = -(-problem.candidates // config.block_c)
    blocks = problem.lists * tiles
    held = min(int(words(kernel, problem, config.block_r, config.block_c) / (32 * config.num_warps)) + 40, 255)
    together = max(
        occupancy(device, warps=config.num_warps, shared=shared_bytes(problem, config), registers=held), 1
    )  # fmt: skip
    row_tiles = 1 if kernel == BOUNDS else -(-problem.rows // config.block_r)
    nbytes = problem.itemsize * problem.block_d * (row_tiles * config.block_r + 2 * config.block_c)
    waves = -(-blocks // (device.sms * together))
    spilled = max(words(kernel, problem, config.block_r, config.block_c) / (32 * config.num_warps * 200), 1.0)
    return spilled * max(waves * row_tiles * _LATENCY, blocks * nbytes / device.dram_bandwidth)


def _space(kernel: str) -> Space[SelectConfig]:
    def registers(problem: SelectProblem, device: DeviceSpec, rows: int, chunks: int, warps: int) -> int:
        return words(kernel, problem, rows, chunks)

    def shared(problem: SelectProblem, device: DeviceSpec, rows: int, chunks: int) -> int:
        return shared_bytes(problem, SelectConfig(rows, chunks, 4))

    def not_past_the_rows(problem: SelectProblem, device: DeviceSpec, rows: int) -> bool:
        return rows <= max(problem.rows, 16)

    scores = kernel not in (BEST, BOUNDS)
    return Space(
        name=kernel,
        version=1,
        axes=(
            powers_of_two("block_r", 16, 256) if scores else literals("block_r", 1),
            powers_of_two("block_c", 16, 128) if scores else literals("block_c", *((1,) if kernel == BEST else _PAGES)),
            literals("num_warps", *((1, 2, 4, 8, 16) if kernel == BEST else (2, 4, 8))),
        ),
        constraints=(
            Constraint("no more rows than there are", ("block_r",), not_past_the_rows),
            fits_registers(("block_r", "block_c", "num_warps"), "num_warps", registers),
            fits_shared_memory(("block_r", "block_c"), shared),
        ),
        make=SelectConfig,
        order=partial(predicted_seconds, kernel),
    )


_PAGES = (1, 2, 4, 8, 16, 32)

TUNABLES: dict[str, Tunable[SelectConfig]] = {
    kernel: Tunable(kernel, "triton", _space(kernel), default, table_key, SIZES) for kernel in KERNELS
}
"""The selection kernels of this room by name."""

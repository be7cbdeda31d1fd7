"""Launch parameters of the selection kernels: what a configuration is, its default and its space.

Those of block-sparse attention itself are its own.

A block of the two scoring kernels holds a tile of query rows and two tiles of keys, and each step of a search waits for
the one before: many small blocks hide each other's latency better than few large ones.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

from iokernels.autotune import Size, Tunable, bucket
from iokernels.autotune.space import (
    Constraint,
    Space,
    fits_registers,
    fits_shared_memory,
    literals,
    powers_of_two,
)
from iokernels.runtime.device import DeviceSpec

STAGE, PAGES, BOUNDS, BEST = KERNELS = (
    "hip_attention_stage",
    "hip_attention_pages",
    "hip_attention_bounds",
    "hip_attention_best",
)


@dataclass(frozen=True)
class SelectConfig:
    """One way to launch a kernel. No field changes a result.

    ``block_r`` query rows to a tile and ``block_c`` chunks or pages to a block; a kernel that has no such tile has 1.
    """

    block_r: int
    block_c: int
    num_warps: int


class SelectProblem(NamedTuple):
    """What the choice depends on. Counts are rounded up to powers of two, so that there are few problems."""

    kernel: str
    block_d: int
    itemsize: int
    tensor_cores: bool  # False for float32 at full precision
    rows: Size = 64  # query rows that share a list, as the kernel sees them
    candidates: Size = 512  # chunks or pages of a list
    lists: Size = 1024
    sm: int = 90
    smem_block: int = 227 * 1024


def default(problem: SelectProblem) -> SelectConfig:
    """A configuration that fits, for every problem the kernels accept."""
    if problem.kernel == BEST:
        return SelectConfig(1, 1, max(1, min(16, bucket(problem.candidates) // 256)))
    if problem.kernel == BOUNDS:
        return SelectConfig(1, max(1, min(16, 4096 // problem.block_d)), 4)
    # All rows of a list in one tile, where that fits: another tile is loaded again in every step of a search.
    elements = 32768 if problem.kernel == STAGE else 16384
    most = 32 if not problem.tensor_cores else 2 * elements // (problem.block_d * problem.itemsize)
    rows = max(16, min(most, 256, bucket(problem.rows)))
    # One new token has few lists: smaller blocks, so that there are enough of them.
    chunks = 16
    if problem.lists > 64 and problem.tensor_cores and problem.block_d <= 128:
        # Hopper's products read operands from shared memory, which frees registers.
        chunks = 64 if problem.sm // 10 == 9 else 32
    wide = rows * max(problem.block_d, 2 * chunks) >= 8192
    config = SelectConfig(rows, chunks, 8 if wide or not problem.tensor_cores else 4)
    while shared_bytes(problem, config) > problem.smem_block and max(config.block_r, config.block_c) > 16:
        name = "block_c" if config.block_c > 16 else "block_r"
        config = replace(config, **{name: getattr(config, name) // 2})
    return config


def shared_bytes(problem: SelectProblem, config: SelectConfig) -> int:
    """An upper estimate of the shared memory that the compiler takes, in bytes."""
    if problem.kernel in (BEST, BOUNDS):
        return 4096
    operands = problem.itemsize * problem.block_d * (config.block_r + 2 * config.block_c)
    return operands + 4 * config.block_r * config.block_c


def words(kernel: str, problem: SelectProblem, rows: int, chunks: int) -> int:
    """32-bit registers of a block: scores, and the tiles that pass through registers."""
    if kernel == BEST:
        return 8 * problem.candidates
    if kernel == BOUNDS:
        return 3 * chunks * problem.block_d
    halves = problem.block_d * problem.itemsize // 4
    return 2 * rows * chunks + (rows + 2 * chunks) * halves


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
    )


_PAGES = (1, 2, 4, 8, 16, 32)

TUNABLES: dict[str, Tunable[SelectConfig]] = {
    kernel: Tunable(kernel, "triton", _space(kernel), default, SelectProblem) for kernel in KERNELS
}
"""The selection kernels of this room by name."""

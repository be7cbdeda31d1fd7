"""Launch parameters of the selection kernels: what a configuration is, and the analytic default.

The configurations that tuning may try are in :mod:`.space`. Those of block-sparse attention itself are its own.

A block of the two scoring kernels holds a tile of query rows and two tiles of keys, and each step of a search waits for
the one before: many small blocks hide each other's latency better than few large ones.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from iokernels.autotune import bucket, precision_of, precision_word
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
    rows: int = 64  # query rows that share a list, as the kernel sees them
    candidates: int = 512  # chunks or pages of a list
    lists: int = 1024
    sm: int = 90
    smem_block: int = 227 * 1024


SIZES = ("rows", "candidates", "lists")
"""The sizes of :func:`table_key` of which the nearest entry serves."""


def table_key(problem: SelectProblem) -> dict[str, Any]:
    """What tables are looked up by."""
    return {
        "dtype": precision_word(problem.itemsize, problem.tensor_cores),
        "block_d": problem.block_d,
        "rows": problem.rows,
        "candidates": problem.candidates,
        "lists": problem.lists,
    }


def problem_of(kernel: str, key: dict[str, Any], device: DeviceSpec) -> SelectProblem:
    """The reverse of :func:`table_key`: a problem that has this key. Raises ``KeyError`` for a key of another make."""
    itemsize, tensor_cores = precision_of(key["dtype"])
    return SelectProblem(
        kernel=kernel,
        itemsize=itemsize,
        tensor_cores=tensor_cores,
        sm=device.sm,
        smem_block=device.smem_block,
        **{name: value for name, value in key.items() if name != "dtype"},
    )


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

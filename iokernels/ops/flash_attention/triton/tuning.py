"""Launch parameters of the flash_attention kernels: what a configuration is, its default and its space.

The default follows from what must fit. A block keeps its own rows (or keys) and ``num_stages`` blocks of what it walks
over in shared memory, and its accumulators in registers: 64 K of them an SM, 255 a thread at most.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import NamedTuple

from iokernels.autotune import RESULTS, Size, Tunable
from iokernels.autotune.space import (
    Constraint,
    Space,
    fits_registers,
    fits_shared_memory,
    literals,
    powers_of_two,
)
from iokernels.runtime.device import DeviceSpec

KERNELS = (
    "flash_attention_fwd",
    "flash_attention_bwd_dq",
    "flash_attention_bwd_dkv",
    "flash_attention_bwd_dbias",
)


@dataclass(frozen=True)
class Config:
    """One way to launch a kernel. ``block_m`` rows and ``block_n`` keys to a tile, powers of two, 16 at least."""

    block_m: int = field(metadata=RESULTS)  # one of the two is walked over, and its tiles are summed up one by one
    block_n: int = field(metadata=RESULTS)
    num_warps: int
    num_stages: int


class Problem(NamedTuple):
    """What the choice depends on. Widths are rounded up to powers of two, 16 at least.

    The fields after ``smem_block`` matter to tables, and not to the default. Counts are rounded up to powers of two
    (:func:`bucket`), so that there are few problems.
    """

    kernel: str
    block_d: int
    block_v: int
    itemsize: int  # bytes an element of q, k, v
    tensor_cores: bool  # False for float32 at full precision
    extras: bool  # bias, mask, ALiBi, softcap or dropout: each takes registers for every score
    sm: int
    smem_block: int  # bytes of shared memory a thread block may use
    causal: bool = False  # keys are bounded to the right
    window: bool = False  # and to the left
    heads: Size = 16  # query heads of all sequences
    seqlen_q: Size = 4096  # of the longest sequence
    seqlen_k: Size = 4096


def default(problem: Problem) -> Config:
    """A configuration that fits, for every problem the kernels accept."""
    config = _preferred(problem)
    while not fits(problem, config):
        config = _smaller(problem, config)
    return config


def _preferred(problem: Problem) -> Config:
    """The shape that the registers suggest, before shared memory has its say."""
    width = max(problem.block_d, problem.block_v)
    if problem.itemsize == 4:
        return _single_precision(problem.kernel, width, problem.tensor_cores)
    if problem.kernel == "flash_attention_bwd_dbias":
        return Config(64, 32, 8, 1) if width <= 128 else Config(32, 32, 4, 1)
    # Warpgroup (Hopper) and tensor-memory (Blackwell) products read operands from shared memory, which frees registers.
    roomy = problem.sm // 10 in (9, 10)
    if problem.extras and width <= 128:
        return Config(64, 64 if problem.kernel == "flash_attention_fwd" and width <= 64 else 32, 8, 2)
    if problem.kernel == "flash_attention_fwd":
        if width <= 64:
            # On Blackwell one warpgroup drives a product of 128 rows.
            return {9: Config(128, 128, 8, 3), 10: Config(128, 64, 4, 3)}.get(problem.sm // 10, Config(128, 64, 8, 3))
        return Config(128, 64, 8, 3) if width <= 128 else Config(64, 64, 8, 2)
    if problem.kernel == "flash_attention_bwd_dq":
        if width <= 64 or (width <= 128 and roomy):
            return Config(128, 64, 8, 2)
        return Config(64, 64, 8, 2) if width <= 128 else Config(64, 32, 8, 2)
    if width <= 64:
        return Config(64, 128, 8, 2) if roomy else Config(32, 128, 8, 2)
    if width <= 128:
        return Config(64, 128, 8, 2) if roomy else Config(64, 64, 8, 2)
    return Config(32, 64, 8, 2)


def _single_precision(kernel: str, width: int, tensor_cores: bool) -> Config:
    """Small tiles: an element takes twice the room, and without matrix units (IEEE float32) each thread holds whole
    rows of both operands in registers."""
    forward, rows, keys = (kernel == f"flash_attention_{name}" for name in ("fwd", "bwd_dq", "bwd_dkv"))
    if tensor_cores:
        if width > 128:
            return Config(32, 32, 8, 1)
        return Config(64, 32, 8, 2) if forward or rows else Config(32, 64 if keys and width <= 64 else 32, 8, 2)
    if width <= 64:
        return Config(16 if keys else 32, 32, 8, 1)
    if width <= 128:
        if forward:
            return Config(32, 32, 16, 2)
        return Config(32, 16, 8, 1) if rows else Config(16, 32 if keys else 16, 8, 1)
    return Config(16, 16, 8, 1)


def _smaller(problem: Problem, config: Config) -> Config:
    """The next thing to give up: stages first, then the side that is walked over, then the other."""
    if config.num_stages > 1:
        return replace(config, num_stages=config.num_stages - 1)
    walked, own = ("block_m", "block_n") if problem.kernel == "flash_attention_bwd_dkv" else ("block_n", "block_m")
    if getattr(config, walked) > 16:
        return replace(config, **{walked: getattr(config, walked) // 2})
    if getattr(config, own) > 16:
        return replace(config, **{own: getattr(config, own) // 2})
    raise AssertionError(f"no configuration of {problem.kernel} fits in {problem.smem_block} bytes")


def fits(problem: Problem, config: Config) -> bool:
    """Whether the tiles that a block holds in shared memory fit."""
    return shared_bytes(problem, config) <= problem.smem_block


def shared_bytes(problem: Problem, config: Config) -> int:
    """An upper estimate of the shared memory that the compiler takes, in bytes."""
    rows, keys = config.block_m, config.block_n
    widths = problem.block_d + problem.block_v
    pair = problem.itemsize * widths  # one row of q and dO, or of k and v
    scores = problem.itemsize * rows * keys  # room to change the layout of P or dS between two products
    if problem.kernel == "flash_attention_fwd":
        return problem.itemsize * rows * problem.block_d + config.num_stages * keys * pair + scores
    if problem.kernel == "flash_attention_bwd_dq":
        return rows * pair + config.num_stages * keys * pair + scores
    if problem.kernel == "flash_attention_bwd_dkv":
        return keys * pair + config.num_stages * rows * pair + 2 * scores
    return (rows + keys) * pair + scores


_TILE = ("block_m", "block_n", "num_warps")


def accumulators(kernel: str, problem: Problem, rows: int, keys: int) -> int:
    """The 32-bit registers of a block that hold results and scores (two copies, or three where S, dP and dS meet)."""
    scores = rows * keys
    if kernel == "flash_attention_fwd":
        return rows * problem.block_v + 2 * scores
    if kernel == "flash_attention_bwd_dq":
        return rows * problem.block_d + 3 * scores
    if kernel == "flash_attention_bwd_dkv":
        return keys * (problem.block_d + problem.block_v) + 3 * scores
    return 3 * scores


def _space(kernel: str) -> Space[Config]:
    def words(problem: Problem, device: DeviceSpec, rows: int, keys: int, warps: int) -> int:
        return accumulators(kernel, problem, rows, keys)

    def shared(problem: Problem, device: DeviceSpec, rows: int, keys: int, stages: int) -> int:
        return shared_bytes(problem, Config(rows, keys, 4, stages))

    def score_a_thread(problem: Problem, device: DeviceSpec, rows: int, keys: int, warps: int) -> bool:
        return rows * keys >= 32 * warps

    return Space(
        name=kernel,
        version=1,
        axes=(
            powers_of_two("block_m", 16, 256),
            powers_of_two("block_n", 16, 256),
            literals("num_warps", 4, 8, 16),
            literals("num_stages", 1, 2, 3, 4),
        ),
        constraints=(
            Constraint("a score a thread", _TILE, score_a_thread),
            fits_registers(_TILE, "num_warps", words),
            fits_shared_memory(("block_m", "block_n", "num_stages"), shared),
        ),
        make=Config,
    )


"""How much faster than DRAM tiles arrive, since L2 serves most: a weight of the ranking, not a measured figure."""


TUNABLES: dict[str, Tunable[Config]] = {
    kernel: Tunable(kernel, "triton", _space(kernel), default, Problem) for kernel in KERNELS
}
"""The kernels of this room by name."""

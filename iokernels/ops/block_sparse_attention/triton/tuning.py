"""Launch parameters of the block-sparse attention kernels: what a configuration is, its default and its space.

The default follows from what must fit, as for flash_attention: a block keeps its own rows (or keys) and ``num_stages``
blocks of what it walks over in shared memory, and its accumulators in registers. Rows are as many as share a list, up
to what fits, because each tile of rows reads the keys of its list.
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

FWD, DQ, DKV = KERNELS = ("block_sparse_fwd", "block_sparse_bwd_dq", "block_sparse_bwd_dkv")

MOST_PARTS = 64
"""Among how many thread blocks the keys of a tile of rows are divided at most, since one block merges them all."""


@dataclass(frozen=True)
class Config:
    """One way to launch a kernel. ``block_m`` rows and ``block_n`` keys to a tile, powers of two, 16 at least;
    ``parts`` thread blocks that share a tile of rows, 1 in the backward kernels."""

    block_m: int = field(metadata=RESULTS)
    block_n: int = field(metadata=RESULTS)
    parts: int = field(metadata=RESULTS)
    num_warps: int
    num_stages: int


class Problem(NamedTuple):
    """What the choice depends on. Widths are rounded up to powers of two, 16 at least, and so are counts."""

    kernel: str
    block_d: int
    block_v: int
    itemsize: int  # bytes an element of q, k, v
    tensor_cores: bool  # False for float32 at full precision
    block_k: int  # keys of a key block
    paged: bool
    sm: int
    sms: int
    smem_block: int  # bytes of shared memory a thread block may use
    item_rows: Size = 256  # rows that share a list
    items: Size = 1024  # lists
    seqlen_k: Size = 65536


def default(problem: Problem) -> Config:
    """A configuration that fits, for every problem the kernels accept."""
    config = _preferred(problem)
    if problem.kernel != DKV and config.block_m > problem.item_rows:
        few = max(problem.item_rows, 16)
        config = replace(
            config, block_m=few, num_warps=4 if few <= (64 if problem.kernel == FWD else 32) else config.num_warps
        )
    while shared_bytes(problem, config) > problem.smem_block:
        config = _smaller(problem, config)
    return replace(config, parts=_parts(problem, config))


def _preferred(problem: Problem) -> Config:
    """The shape that the registers suggest, before shared memory has its say."""
    width = max(problem.block_d, problem.block_v)
    if problem.itemsize == 4:
        return _single_precision(problem.kernel, width, problem.tensor_cores)
    # Warpgroup (Hopper) and tensor-memory (Blackwell) products read operands from shared memory, which frees registers.
    roomy = problem.sm // 10 in (9, 10)
    if problem.kernel == FWD:
        if width <= 128:
            return Config(128, 64, 1, 8, 3)
        return Config(64, 64, 1, 8, 2)
    if problem.kernel == DQ:
        if width <= 64 or (width <= 128 and roomy):
            return Config(128, 64, 1, 8, 2)
        return Config(64, 64, 1, 8, 2) if width <= 128 else Config(64, 32, 1, 8, 2)
    # Rows that a list names lie apart, and their addresses take registers.
    return Config(32, 64, 1, 8, 2 if width > 64 or roomy else 1) if width <= 128 else Config(32, 32, 1, 8, 1)


def _single_precision(kernel: str, width: int, tensor_cores: bool) -> Config:
    """Small tiles: an element takes twice the room, and without matrix units (IEEE float32) each thread holds whole
    rows of both operands in registers."""
    if tensor_cores:
        return Config(64, 32, 1, 8, 2) if kernel != DKV and width <= 128 else Config(32, 32, 1, 8, 1)
    if width <= 64:
        return Config(16, 32, 1, 8, 1) if kernel == DKV else Config(32, 32, 1, 8, 1)
    if width <= 128:
        return Config(32, 16, 1, 8, 1) if kernel == FWD else Config(16, 16, 1, 8, 1)
    return Config(16, 16, 1, 8, 1)


def _smaller(problem: Problem, config: Config) -> Config:
    """The next thing to give up: stages first, then the side that is walked over, then the other."""
    if config.num_stages > 1:
        return replace(config, num_stages=config.num_stages - 1)
    walked, own = ("block_m", "block_n") if problem.kernel == DKV else ("block_n", "block_m")
    if getattr(config, walked) > 16:
        return replace(config, **{walked: getattr(config, walked) // 2})
    if getattr(config, own) > 16:
        return replace(config, **{own: getattr(config, own) // 2})
    raise AssertionError(f"no configuration of {problem.kernel} fits in {problem.smem_block} bytes")


def most_parts(problem: Problem, block_n: int) -> int:
    """Into how many parts a walk may be cut: two steps to a part at least, if it went over all keys."""
    return 1 if problem.kernel != FWD else max(min(problem.seqlen_k // (2 * block_n), MOST_PARTS), 1)


def _parts(problem: Problem, config: Config) -> int:
    """A power of two that brings the grid to about two thread blocks an SM."""
    tiles = problem.items * -(-problem.item_rows // config.block_m)
    wanted = min(2 * problem.sms // max(tiles, 1), most_parts(problem, config.block_n))
    return 1 << max(wanted, 1).bit_length() - 1


def shared_bytes(problem: Problem, config: Config) -> int:
    """An upper estimate of the shared memory that the compiler takes, in bytes."""
    rows, keys = config.block_m, config.block_n
    pair = problem.itemsize * (problem.block_d + problem.block_v)  # one row of q and dO, or of k and v
    scores = problem.itemsize * rows * keys  # room to change the layout of P or dS between two products
    if problem.kernel == FWD:
        return problem.itemsize * rows * problem.block_d + config.num_stages * keys * pair + scores
    if problem.kernel == DQ:
        return rows * pair + config.num_stages * keys * pair + scores
    return keys * pair + config.num_stages * rows * pair + 2 * scores


_TILE = ("block_m", "block_n", "num_warps")

"""How much faster than DRAM tiles arrive, since L2 serves most: a weight of the ranking, not a measured figure."""


def accumulators(kernel: str, problem: Problem, rows: int, keys: int) -> int:
    """The 32-bit registers of a block that hold results and scores (two copies, or three where S, dP and dS meet)."""
    scores = rows * keys
    if kernel == FWD:
        return rows * problem.block_v + 2 * scores
    if kernel == DQ:
        return rows * problem.block_d + 3 * scores
    return keys * (problem.block_d + problem.block_v) + 3 * scores


def _space(kernel: str) -> Space[Config]:
    def words(problem: Problem, device: DeviceSpec, rows: int, keys: int, warps: int) -> int:
        return accumulators(kernel, problem, rows, keys)

    def shared(problem: Problem, device: DeviceSpec, rows: int, keys: int, stages: int) -> int:
        return shared_bytes(problem, Config(rows, keys, 1, 4, stages))

    def a_list_fills_the_rows(problem: Problem, device: DeviceSpec, rows: int) -> bool:
        return kernel == DKV or rows <= max(problem.item_rows, 16)

    def enough_keys(problem: Problem, device: DeviceSpec, keys: int, parts: int) -> bool:
        return parts <= most_parts(problem, keys)

    def score_a_thread(problem: Problem, device: DeviceSpec, rows: int, keys: int, warps: int) -> bool:
        return rows * keys >= 32 * warps

    return Space(
        name=kernel,
        version=1,
        axes=(
            powers_of_two("block_m", 16, 128),
            powers_of_two("block_n", 16, 128),
            literals("parts", 1, 2, 4, 8, 16, 32, 64),
            literals("num_warps", 4, 8, 16),
            literals("num_stages", 1, 2, 3, 4),
        ),
        constraints=(
            Constraint("a list fills the rows", ("block_m",), a_list_fills_the_rows),
            Constraint("enough keys for the parts", ("block_n", "parts"), enough_keys),
            Constraint("a score a thread", _TILE, score_a_thread),
            fits_registers(_TILE, "num_warps", words),
            fits_shared_memory(("block_m", "block_n", "num_stages"), shared),
        ),
        make=Config,
    )


TUNABLES: dict[str, Tunable[Config]] = {
    kernel: Tunable(kernel, "triton", _space(kernel), default, Problem) for kernel in KERNELS
}
"""The block-sparse kernels by name."""

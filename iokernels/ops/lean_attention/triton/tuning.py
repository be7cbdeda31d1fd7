"""Launch parameters of the lean_attention kernels: what a configuration is, and the analytic default.

The configurations that tuning may try are in :mod:`.space`.

Decoding moves bytes and computes little, so the default asks how many bytes must be on their way to keep the memory
busy (bandwidth times latency: some tens of kilobytes for each SM), and takes tiles that two blocks of an SM can hold,
with a third stage where there is room.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from iokernels.autotune import RESULTS
from iokernels.runtime.device import DeviceSpec

KERNEL = "lean_attention"


@dataclass(frozen=True)
class Config:
    """One way to attend.

    ``block_n`` keys to a tile, a power of two, 16 at least; ``blocks`` thread blocks, among which the work is divided;
    ``stream_k`` 1: in equal shares, 0: in fixed parts of each sequence.
    """

    block_n: int = field(metadata=RESULTS)
    blocks: int = field(metadata=RESULTS)
    stream_k: int = field(metadata=RESULTS)
    num_warps: int
    num_stages: int


class Problem(NamedTuple):
    """What the choice depends on. Widths are rounded up to powers of two, 16 at least.

    ``items`` and ``seqlen_k`` are 0 where a row's bits may not depend on the batch.
    """

    block_m: int
    block_d: int
    block_v: int
    itemsize: int  # bytes an element of q
    cache_itemsize: int  # and of the caches
    tensor_cores: bool  # False for float32 at full precision
    schedule: str  # one of options.SCHEDULES
    paged: bool
    sm: int
    sms: int
    smem_block: int  # bytes of shared memory a thread block may use
    smem_sm: int  # and those that blocks of an SM share
    items: int = 8  # row tiles of all sequences and key heads
    seqlen_k: int = 65536  # capacity of the caches


_WORDS = ("schedule", "paged", "block_m", "block_d", "block_v", "itemsize", "cache_itemsize", "tensor_cores")
SIZES = ("items", "seqlen_k")
"""The sizes of :func:`table_key` of which the nearest entry serves."""


def table_key(problem: Problem) -> dict[str, Any]:
    """What tables are looked up by."""
    return {name: getattr(problem, name) for name in (*_WORDS, *SIZES)}


def problem_of(kernel: str, key: dict[str, Any], device: DeviceSpec) -> Problem:
    """The reverse of :func:`table_key`: a problem that has this key. Raises ``TypeError`` for a key of another make."""
    return Problem(**key, sm=device.sm, sms=device.sms, smem_block=device.smem_block, smem_sm=device.smem_sm)


MANY_ITEMS = 8
"""Items for each SM from which equal shares no longer pay: the last wave is then an eighth of the work at most, and
whole items leave no partial results."""


def default(problem: Problem) -> Config:
    """A configuration that fits, for every problem the kernels accept."""
    stream_k = problem.schedule == "lean" or (problem.schedule == "auto" and problem.items < MANY_ITEMS * problem.sms)
    width, decoded = max(problem.block_d, problem.block_v), problem.cache_itemsize != problem.itemsize
    # A tile that has to be decoded passes through registers, all of it.
    block_n = max(16, min(64, (4096 if decoded else 8192) // width))
    tall = problem.block_m >= (64 if problem.tensor_cores else 32)
    if tall or not problem.tensor_cores:
        block_n = min(block_n, 16 if width > 128 or not problem.tensor_cores else 32)
    ahead = (3 if problem.paged else 4) if decoded else 2 if width >= 128 or problem.paged else 3
    if decoded and not problem.tensor_cores:
        ahead = 0  # float32 products on plain cores leave no registers for what is on its way
    config = Config(block_n, 2 * problem.sms, int(stream_k), 8 if tall else 4, stages(problem, ahead))
    while not fits(problem, config, blocks=2):
        if ahead > 1:
            ahead -= 1
            config = replace(config, num_stages=stages(problem, ahead))
        elif config.block_n > 16:
            config = replace(config, block_n=config.block_n // 2)
        elif config.num_stages > 1 and not fits(problem, config):
            config = replace(config, num_stages=1)
        else:
            return replace(config, blocks=problem.sms)
    return config


def stages(problem: Problem, ahead: int) -> int:
    """The number of stages at which ``ahead`` tiles are on their way. Those of a page wait for its number, which takes
    stages of its own."""
    return 2 * ahead + 1 if problem.paged else ahead + 1


def fits(problem: Problem, config: Config, blocks: int = 1) -> bool:
    """Whether so many blocks of an SM can hold their tiles in shared memory at once."""
    needed = shared_bytes(problem, config)
    return needed <= problem.smem_block and blocks * (needed + 1024) <= problem.smem_sm + 1024 * (blocks == 1)


def shared_bytes(problem: Problem, config: Config) -> int:
    """An upper estimate of the shared memory that the compiler takes, in bytes."""
    keys, steps = config.block_n, config.num_stages - 1
    tiles = max(steps // 2 if problem.paged else steps, 1) + (problem.block_m >= 64)
    # A key has its two scales and the number of its page beside it.
    loaded = tiles * keys * ((problem.block_d + problem.block_v) * problem.cache_itemsize + 12)
    return loaded + problem.itemsize * problem.block_m * (problem.block_d + keys) + 1024


INVARIANT_KEYS = 1024
"""Keys of a part where a row's bits may depend on nothing else: long enough that its partial result is a small share of
what it reads, short enough to keep a GPU busy with one long sequence."""


def part_tiles(problem: Problem, config: Config, items: int, tiles: int) -> int:
    """Tiles of a part of a split item, of at most ``tiles``: so many parts that all blocks have one."""
    if problem.schedule == "invariant":
        return max(INVARIANT_KEYS // config.block_n, 1)
    parts = max(min(config.blocks // max(items, 1), tiles), 1)
    return -(-tiles // parts) if tiles else 1

"""Launch parameters of the lean_attention kernel in CUDA C++: what a configuration is, the default, and the space.

As in :mod:`.tuning`, the default asks for many bytes on their way: two blocks an SM, with as many stages as fit.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from iokernels.autotune import RESULTS, Size, Tunable
from iokernels.autotune.space import Axis, Constraint, Space, fits_shared_memory, literals, occupancy, powers_of_two
from iokernels.ops.lean_attention.triton.tuning import INVARIANT_KEYS, MANY_ITEMS
from iokernels.runtime.device import DeviceSpec

KERNEL = "lean_attention_cuda"

FEWEST_TILES = 2
"""Tiles of the smallest share: fewer would cost more to merge than they save."""

MOST_PARTS = 64
"""Into how many shares an item is cut at most, since one block merges them all."""

MOST_WARPS = 8


@dataclass(frozen=True)
class Config:
    """One way to attend.

    ``block_n`` keys to a tile, of which each of ``key_warps`` groups of warps takes 16 or 32; ``blocks`` thread blocks,
    among which the work is divided; ``stream_k`` 1: in equal shares, 0: in fixed parts of each sequence; ``stages``
    tiles in shared memory, one of them in use.
    """

    block_n: int = field(metadata=RESULTS)
    blocks: int = field(metadata=RESULTS)
    stream_k: int = field(metadata=RESULTS)
    key_warps: int = field(metadata=RESULTS)
    stages: int


class Problem(NamedTuple):
    """What the choice depends on. ``items`` and ``seqlen_k`` are 0 where a row's bits may not depend on the batch."""

    row_warps: int  # 16 rows each
    block_d: int  # widths, padded to what a fragment takes
    block_v: int
    cache_itemsize: int
    key_scales: bool  # a factor for each key
    schedule: str  # one of options.SCHEDULES
    paged: bool
    sm: int
    sms: int
    smem_block: int
    smem_sm: int
    items: Size = 8  # row tiles of all sequences and key heads
    seqlen_k: Size = 65536  # capacity of the caches


def shared_bytes(problem: Problem, config: Config) -> int:
    """The shared memory that the kernel takes: q and tiles, whose place the sums of the warps take in the end."""
    rows, warps = 16 * problem.row_warps, problem.row_warps * config.key_warps
    a_key = problem.cache_itemsize * (problem.block_d + problem.block_v) + 32
    tiles = config.stages * config.block_n * a_key
    sums = warps * 16 * (problem.block_v + 10) * 4
    factors = 2 * _arrays(4 * config.stages * config.block_n) if problem.key_scales else 0
    return _arrays(max(2 * rows * (problem.block_d + 8) + tiles, sums)) + factors + 2 * 128


def _arrays(nbytes: int) -> int:
    """Arrays begin at multiples of 128 bytes."""
    return -(-nbytes // 128) * 128


def fits(problem: Problem, config: Config, blocks: int = 1) -> bool:
    """Whether so many blocks of an SM can hold their tiles in shared memory at once."""
    needed = shared_bytes(problem, config)
    return needed <= problem.smem_block and blocks * (needed + 1024) <= problem.smem_sm + 1024 * (blocks == 1)


def default(problem: Problem) -> Config:
    """A configuration that fits, for every problem the kernel accepts."""
    stream_k = problem.schedule == "lean" or (problem.schedule == "auto" and problem.items < MANY_ITEMS * problem.sms)
    warps = max(4 // problem.row_warps, 1)
    ways = [(keys, stages, 2) for keys in (warps, max(warps // 2, 1)) for stages in (4, 3, 2)]
    ways += [(keys, stages, 1) for keys in (warps, max(warps // 2, 1), 1) for stages in (4, 3, 2)]
    for key_warps, stages, blocks in ways:
        config = Config(16 * key_warps, blocks * problem.sms, int(stream_k), key_warps, stages)
        if fits(problem, config, blocks):
            return config
    return config


def part_tiles(problem: Problem, config: Config, items: int, tiles: int) -> int:
    """Tiles of a fixed part of an item, of at most ``tiles``: so many parts that all blocks have one."""
    if problem.schedule == "invariant":
        return max(INVARIANT_KEYS // config.block_n, 1)
    parts = max(min(config.blocks // max(items, 1), tiles), 1)
    return max(-(-tiles // parts), 1)


def registers(problem: Problem) -> int:
    """The 32-bit registers of a thread: its share of the result, of q where it is held, and of scores and addresses."""
    return min(problem.block_v // 2 + (problem.block_d // 4 if problem.block_d <= 128 else 8) + 64, 255)


def _shared(problem: Problem, device: DeviceSpec, keys: int, warps: int, stages: int) -> int:
    return shared_bytes(problem, Config(keys, 1, 1, warps, stages))


def _resident(problem: Problem, device: DeviceSpec, keys: int, blocks: int, key_warps: int, stages: int) -> bool:
    shared = _shared(problem, device, keys, key_warps, stages)
    most = occupancy(device, warps=problem.row_warps * key_warps, shared=shared, registers=registers(problem))
    return blocks <= most * device.sms


SPACE: Space[Config] = Space(
    name=KERNEL,
    version=1,
    axes=(
        powers_of_two("block_n", 16, 128),
        Axis("blocks", lambda problem: tuple(times * problem.sms for times in (1, 2, 3, 4))),
        literals("stream_k", 0, 1),
        literals("key_warps", 1, 2, 4, 8),
        literals("stages", 2, 3, 4),
    ),
    constraints=(
        Constraint(
            "schedule", ("stream_k",),
            lambda problem, device, lean: problem.schedule == "auto" or lean == (problem.schedule == "lean"),
        ),
        Constraint("keys of a warp", ("block_n", "key_warps"), lambda p, device, n, warps: n // warps in (16, 32)),
        Constraint("warps", ("key_warps",), lambda p, device, warps: p.row_warps * warps <= MOST_WARPS),
        fits_shared_memory(("block_n", "key_warps", "stages"), _shared),
        Constraint("resident", ("block_n", "blocks", "key_warps", "stages"), _resident),
    ),
    make=Config,
)  # fmt: skip

TUNABLE: Tunable[Config] = Tunable(KERNEL, "cuda", SPACE, default, Problem)
"""The kernel in CUDA C++."""

"""Launch parameters of the lean_attention kernels: what a configuration is, its default and its space.

Decoding moves bytes and computes little, so the default asks how many bytes must be on their way to keep the memory
busy (bandwidth times latency: some tens of kilobytes for each SM), and takes tiles that two blocks of an SM can hold,
with a third stage where there is room.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import NamedTuple

from iokernels.autotune import RESULTS, Size, Tunable, Verbatim
from iokernels.autotune.space import (
    Axis,
    Constraint,
    Space,
    fits_registers,
    fits_shared_memory,
    literals,
    occupancy,
    powers_of_two,
)
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
    itemsize: Verbatim[int]  # bytes an element of q
    cache_itemsize: int  # and of the caches
    tensor_cores: bool  # False for float32 at full precision
    schedule: str  # one of options.SCHEDULES
    paged: bool
    sm: int
    sms: int
    smem_block: int  # bytes of shared memory a thread block may use
    smem_sm: int  # and those that blocks of an SM share
    items: Size = 8  # row tiles of all sequences and key heads
    seqlen_k: Size = 65536  # capacity of the caches


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


def registers(problem: Problem, keys: int) -> int:
    """The 32-bit registers of a block that hold results, scores and decoded tiles."""
    decoded = keys * (problem.block_d + problem.block_v) // 2 if problem.cache_itemsize != problem.itemsize else 0
    return problem.block_m * (problem.block_v + 2 * keys) + decoded


def _words(problem: Problem, device: DeviceSpec, keys: int, warps: int) -> int:
    return registers(problem, keys)


def _shared(problem: Problem, device: DeviceSpec, keys: int, stages: int) -> int:
    return shared_bytes(problem, Config(keys, 1, 1, 4, stages))


def _as_asked(problem: Problem, device: DeviceSpec, stream_k: int) -> bool:
    return problem.schedule == "auto" or stream_k == (problem.schedule == "lean")


def _resident(problem: Problem, device: DeviceSpec, keys: int, blocks: int, warps: int, stages: int) -> bool:
    held = int(registers(problem, keys) / (32 * warps)) + 40
    most = occupancy(device, warps=warps, shared=_shared(problem, device, keys, stages), registers=min(held, 255))
    return blocks <= most * device.sms


def _blocks(problem: Problem) -> tuple[int, ...]:
    return tuple(times * problem.sms for times in (1, 2, 3, 4))


SPACE: Space[Config] = Space(
    name=KERNEL,
    version=1,
    axes=(
        powers_of_two("block_n", 16, 256),
        Axis("blocks", _blocks),
        literals("stream_k", 0, 1),
        literals("num_warps", 4, 8),
        literals("num_stages", 1, 2, 3, 4, 5, 7),
    ),
    constraints=(
        Constraint("schedule", ("stream_k",), _as_asked),
        fits_registers(("block_n", "num_warps"), "num_warps", _words),
        fits_shared_memory(("block_n", "num_stages"), _shared),
        Constraint("resident", ("block_n", "blocks", "num_warps", "num_stages"), _resident),
    ),
    make=Config,
)

TUNABLES: dict[str, Tunable[Config]] = {KERNEL: Tunable(KERNEL, "triton", SPACE, default, Problem)}
"""The kernels of this room by name."""

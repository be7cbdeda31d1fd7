"""The configurations that tuning may try for lean_attention, and which of them look best on paper."""

from __future__ import annotations

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
from iokernels.autotune.tunable import Tunable
from iokernels.runtime.device import DeviceSpec

from .tuning import KERNEL, SIZES, Config, Problem, default, shared_bytes, table_key


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


_LATENCY = 1e-6
"""Seconds from asking for a tile to having it: a weight of the ranking, not a measured figure."""


def predicted_seconds(problem: Problem, device: DeviceSpec, config: Config) -> float:
    """What a call would take on paper, for ranking: the bytes that are on their way at once over the latency, at most
    the bandwidth of the memory; then partial results, and the imbalance of the last wave."""
    widths = (problem.block_d + problem.block_v) * problem.cache_itemsize
    items, keys = max(problem.items, 1), max(problem.seqlen_k, 1024)
    tiles = items * -(-keys // config.block_n)
    ahead = max((config.num_stages - 1) // (2 if problem.paged else 1), 1)
    in_flight = config.blocks * ahead * config.block_n * widths
    rate = min(device.dram_bandwidth, in_flight / _LATENCY)
    per_block = -(-tiles // config.blocks) if config.stream_k else -(-items // config.blocks) * (tiles // items)
    if not config.stream_k and items < config.blocks:
        per_block = -(-tiles // (config.blocks // items * items))
    work = per_block * config.blocks * config.block_n * widths / rate
    partials = min(2 * config.blocks, tiles) if config.stream_k or items < config.blocks else 0
    merge = 2 * partials * problem.block_m * (problem.block_v + 2) * 4 / device.dram_bandwidth
    return work + merge + (0.0 if config.stream_k else 2 * _LATENCY)


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
    order=predicted_seconds,
)

TUNABLES: dict[str, Tunable[Config]] = {KERNEL: Tunable(KERNEL, "triton", SPACE, default, table_key, SIZES)}
"""The kernels of this room by name."""

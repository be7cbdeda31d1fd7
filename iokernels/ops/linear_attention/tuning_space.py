"""The configurations that tuning may try for the linear_attention kernels, and which of them look best on paper."""

from __future__ import annotations

import torch

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

from .tuning import CUTTING, KERNELS, SIZES, Config, Problem, default, shared_bytes, table_key

_TILE = ("chunk", "width", "num_warps")


def accumulators(problem: Problem, chunk: int, width: int) -> int:
    """The 32-bit registers of a block that hold the state, results and scores."""
    rows = problem.rows_width
    if problem.kernel == "linear_attention_step":
        return (problem.block_k**2 if problem.taylor else rows) * width
    if problem.taylor:
        products = chunk * problem.block_k**2
        return (problem.block_k + problem.block_k**2) * width + products + 2 * chunk * (width + chunk)
    state = rows * width
    if problem.kernel == "linear_attention_state":
        return state
    return state + 2 * chunk * (width + chunk)


def _space(kernel: str) -> Space[Config]:
    def words(problem: Problem, device: DeviceSpec, chunk: int, width: int, warps: int) -> int:
        return accumulators(problem, chunk, width)

    def shared(problem: Problem, device: DeviceSpec, chunk: int, width: int, stages: int) -> int:
        return shared_bytes(problem, Config(chunk, width, 4, stages))

    def no_wider(problem: Problem, device: DeviceSpec, width: int) -> bool:
        return width <= problem.sliced_width

    def whole_chunks(problem: Problem, device: DeviceSpec, chunk: int, segments: int) -> bool:
        return segments == 1 or segments * chunk <= problem.seqlen

    step = kernel == "linear_attention_step"
    return Space(
        name=kernel,
        version=1,
        axes=(
            literals("chunk", 1) if step else powers_of_two("chunk", 16, 128),
            powers_of_two("width", 4 if step else 16, 256),
            literals("num_warps", 1, 2, 4, 8) if step else literals("num_warps", 4, 8, 16),
            literals("num_stages", 1) if step else literals("num_stages", 1, 2, 3, 4),
            powers_of_two("segments", 1, 256) if kernel in CUTTING else literals("segments", 1),
        ),
        constraints=(
            Constraint("width", ("width",), no_wider),
            fits_registers(_TILE, "num_warps", words),
            fits_shared_memory(("chunk", "width", "num_stages"), shared),
            Constraint("whole chunks", ("chunk", "segments"), whole_chunks),
        ),
        make=Config,
        order=predicted_seconds,
    )


_LATENCY = 1e-6
"""Seconds from asking for a chunk to having it, with one stage: a weight of the ranking, not a measured figure."""


def predicted_seconds(problem: Problem, device: DeviceSpec, config: Config) -> float:
    """What a launch would take on paper: waves of blocks, each walking its chunks. Good for ranking, not for reading.

    A chunk costs its matrix products at peak, or its bytes, whichever is longer; a cut costs the states of segments.
    """
    chunk, width, warps = config.chunk, config.width, config.num_warps
    registers = accumulators(problem, chunk, width) / (32 * warps) + 40  # addresses, offsets and operands
    most = min(255, device.regs_sm // (32 * warps))
    shared = shared_bytes(problem, config)
    blocks_sm = max(occupancy(device, warps=warps, shared=shared, registers=int(min(registers, most))), 1)
    slices = -(-problem.sliced_width // width)
    blocks = problem.heads * slices * config.segments
    busy = min(blocks_sm * device.sms, blocks)
    half = torch.float16 if problem.itemsize == 2 else torch.float32
    peak = (device.matmul_peak[half] if problem.tensor_cores else device.vector_peak) / device.sms
    rows = problem.rows_width
    held = problem.block_k**2 if problem.taylor else rows
    products = 2 * chunk * (chunk * (rows + width) + 2 * held * width) / peak
    transfer = chunk * (2 * rows + 2 * width) * problem.itemsize * busy / device.dram_bandwidth
    work = max(products * blocks_sm, transfer) if config.num_stages > 1 else products * blocks_sm + transfer
    if registers > most:
        work *= registers / most  # spilled
    turn = max(work, products + _LATENCY / config.num_stages)
    steps = -(-problem.seqlen // (chunk * config.segments))
    waves = -(-blocks // (device.sms * blocks_sm))
    cut = 0.0
    if config.segments > 1:
        states = problem.heads * config.segments * held * problem.block_v * 4
        inputs = problem.heads * problem.seqlen * (problem.block_k + problem.block_v) * problem.itemsize
        cut = (4 * states + inputs) / device.dram_bandwidth + 3 * _LATENCY
    return waves * steps * turn + cut


TUNABLES: dict[str, Tunable[Config]] = {
    kernel: Tunable(kernel, "triton", _space(kernel), default, table_key, SIZES) for kernel in KERNELS
}
"""The kernels of this room by name."""

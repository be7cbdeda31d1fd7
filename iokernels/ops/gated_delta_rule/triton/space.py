"""The configurations that tuning may try for the gated delta rule, and which of them look best on paper."""

from __future__ import annotations

from functools import partial

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

from .tuning import GRADS, INVERSE, KERNELS, SIZES, STEP, Config, Problem, default, shared_bytes, table_key

_TILE = ("block_k", "block_v", "num_warps")


def accumulators(problem: Problem, block_k: int, block_v: int) -> int:
    """The 32-bit registers of a block that hold states, sums and products."""
    chunk = problem.chunk
    if problem.kernel == STEP:
        return 2 * block_k * block_v
    if problem.kernel == INVERSE:
        return 4 * chunk * chunk
    if problem.kernel == GRADS:
        return 4 * chunk * chunk + 3 * chunk * block_k
    return block_k * block_v + 2 * chunk * block_v + chunk * chunk


def _space(kernel: str) -> Space[Config]:
    def words(problem: Problem, device: DeviceSpec, block_k: int, block_v: int, warps: int) -> int:
        return accumulators(problem, block_k, block_v)

    def shared(problem: Problem, device: DeviceSpec, block_k: int, block_v: int, stages: int) -> int:
        return shared_bytes(problem, Config(block_k, block_v, 4, stages))

    def columns(problem: Problem, device: DeviceSpec, block_k: int, block_v: int) -> bool:
        whole = block_k == problem.width_k or (kernel == GRADS and block_k < problem.width_k)
        return whole and (block_v == 16 if kernel == INVERSE else block_v <= problem.width_v)

    return Space(
        name=kernel,
        version=1,
        axes=(
            powers_of_two("block_k", 16, 256),
            powers_of_two("block_v", 16, 256),
            literals("num_warps", 2, 4, 8),
            literals("num_stages", 1, 2, 3),
        ),
        constraints=(
            Constraint("columns", ("block_k", "block_v"), columns),
            fits_registers(_TILE, "num_warps", words),
            fits_shared_memory(("block_k", "block_v", "num_stages"), shared),
        ),
        make=Config,
        order=partial(predicted_seconds, kernel),
    )


_LATENCY = 2e-6
"""Seconds for the products of a chunk, each of which waits for the one before: a weight of the ranking, not a measured
figure."""


def predicted_seconds(kernel: str, problem: Problem, device: DeviceSpec, config: Config) -> float:
    """What a launch would take on paper: waves of blocks, each with its chunks. Good for ranking, not for reading."""
    chunk, warps = problem.chunk, config.num_warps
    registers = accumulators(problem, config.block_k, config.block_v) / (32 * warps) + 40
    most = min(255, device.regs_sm // (32 * warps))
    blocks_sm = occupancy(
        device, warps=warps, shared=shared_bytes(problem, config), registers=int(min(registers, most))
    )
    chunks = -(-problem.seqlen // chunk)
    column_blocks = -(-problem.width_v // config.block_v)
    if kernel == STEP:
        blocks, steps, loaded = problem.heads * column_blocks, 1, 8 * config.block_k * config.block_v
    elif kernel == INVERSE:
        blocks, steps, loaded = problem.heads * chunks, 1, chunk * config.block_k * problem.itemsize
    elif kernel == GRADS:
        blocks = problem.heads * chunks * -(-problem.width_k // config.block_k)
        steps = column_blocks
        loaded = (4 * chunk + 2 * config.block_k) * config.block_v * problem.itemsize
    else:
        blocks, steps = problem.heads * column_blocks, chunks
        loaded = chunk * (2 * config.block_k + 2 * config.block_v + chunk) * problem.itemsize
    half = torch.float16 if problem.itemsize == 2 else torch.float32
    peak = (device.matmul_peak[half] if problem.tensor_cores else device.vector_peak) / device.sms
    products = 2 * chunk * (3 * config.block_k * config.block_v + chunk * (config.block_k + 2 * config.block_v)) / peak
    transfer = loaded * device.sms / device.dram_bandwidth
    work = (max(products, transfer) if config.num_stages > 1 else products + transfer) * max(1.0, registers / most)
    blocks_sm = max(blocks_sm, 1)
    waves = -(-blocks // (device.sms * blocks_sm))
    return waves * steps * max(blocks_sm * work, work + _LATENCY)


TUNABLES: dict[str, Tunable[Config]] = {
    kernel: Tunable(kernel, "triton", _space(kernel), default, table_key, SIZES) for kernel in KERNELS
}
"""The kernels of the gated delta rule by name."""

"""The configurations that tuning may try for the flash_attention kernels, and which of them look best on paper.

A block of the forward and dQ kernels owns ``block_m`` rows and walks over keys, one of dK/dV owns ``block_n`` keys and
walks over rows, and one of the bias gradient owns a tile and walks over the batch.
"""

from __future__ import annotations

from collections.abc import Callable
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

from .tuning import KERNELS, SIZES, Config, Problem, default, shared_bytes, table_key

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
        order=partial(predicted_seconds, kernel),
    )


_PRODUCTS: dict[str, Callable[[Problem], int]] = {
    "flash_attention_fwd": lambda p: p.block_d + p.block_v,
    "flash_attention_bwd_dq": lambda p: 2 * p.block_d + p.block_v,
    "flash_attention_bwd_dkv": lambda p: 2 * (p.block_d + p.block_v),
    "flash_attention_bwd_dbias": lambda p: p.block_d + p.block_v,
}
"""Summed widths of the matrix products that a tile takes part in."""

_LATENCY = 1e-6
"""Seconds from asking for a tile to having it, with one stage: a weight of the ranking, not a measured figure."""
_L2_SHARE = 3.0
"""How much faster than DRAM tiles arrive, since L2 serves most: a weight of the ranking, not a measured figure."""


def predicted_seconds(kernel: str, problem: Problem, device: DeviceSpec, config: Config) -> float:
    """What a launch would take on paper: waves of blocks, each walking its tiles. Good for ranking, not for reading.

    A step of the walk costs its matrix products at peak, or its bytes, whichever is longer; blocks that share an SM
    hide each other's latency.
    """
    rows, keys, warps, stages = config.block_m, config.block_n, config.num_warps, config.num_stages
    registers = accumulators(kernel, problem, rows, keys) / (32 * warps) + 40  # addresses, offsets and operands
    most = min(255, device.regs_sm // (32 * warps))
    held = int(min(registers, most))
    blocks_sm = max(occupancy(device, warps=warps, shared=shared_bytes(problem, config), registers=held), 1)
    tiles_m, tiles_n = -(-problem.seqlen_q // rows), -(-problem.seqlen_k // keys)
    if kernel == "flash_attention_bwd_dkv":
        blocks, steps, walked = tiles_n * problem.heads, tiles_m, rows
    elif kernel == "flash_attention_bwd_dbias":
        blocks, steps, walked = tiles_m * tiles_n, problem.heads, rows + keys
    else:
        blocks, steps, walked = tiles_m * problem.heads, tiles_n, keys
    half = torch.float16 if problem.itemsize == 2 else torch.float32
    peak = (device.matmul_peak[half] if problem.tensor_cores else device.vector_peak) / device.sms
    # Operands of a product are read again for every 16 rows and keys of a tile.
    products = 2 * rows * keys * _PRODUCTS[kernel](problem) / peak * (1 + 16 / rows + 16 / keys)
    nbytes = walked * (problem.block_d + problem.block_v) * problem.itemsize
    transfer = nbytes * device.sms / (device.dram_bandwidth * _L2_SHARE)
    work = max(products, transfer) if stages > 1 else products + transfer
    if registers > most:
        work *= registers / most  # spilled
    step = max(blocks_sm * work, work + _LATENCY / stages)
    waves = -(-blocks // (device.sms * blocks_sm))
    return waves * steps * step


TUNABLES: dict[str, Tunable[Config]] = {
    kernel: Tunable(kernel, "triton", _space(kernel), default, table_key, SIZES) for kernel in KERNELS
}
"""The kernels of this room by name."""

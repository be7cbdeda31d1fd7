"""The configurations that tuning may try for the block-sparse kernels, and which of them look best on paper."""

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

from .tuning import DKV, DQ, FWD, KERNELS, SIZES, Config, Problem, default, most_parts, shared_bytes, table_key

_TILE = ("block_m", "block_n", "num_warps")

_TYPICAL_KEYS = 3072
"""Keys that a list shows to a row, with its sink and window: a weight of the ranking. How many there are is known on
the device alone."""

_LATENCY = 1e-6
"""Seconds from asking for a tile to having it, with one stage: a weight of the ranking, not a measured figure."""

_L2_SHARE = 3.0
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
        order=partial(predicted_seconds, kernel),
    )


def predicted_seconds(kernel: str, problem: Problem, device: DeviceSpec, config: Config) -> float:
    """What a launch would take on paper: waves of blocks, each walking its tiles. Good for ranking, not for reading."""
    rows, keys, warps, stages = config.block_m, config.block_n, config.num_warps, config.num_stages
    registers = accumulators(kernel, problem, rows, keys) / (32 * warps) + 48  # addresses, offsets and operands
    most = min(255, device.regs_sm // (32 * warps))
    blocks_sm = occupancy(
        device, warps=warps, shared=shared_bytes(problem, config), registers=int(min(registers, most))
    )
    blocks_sm = max(blocks_sm, 1)
    shown = min(_TYPICAL_KEYS, problem.seqlen_k)
    if kernel == DKV:
        pairs = problem.items * problem.item_rows * shown
        blocks = max(-(-problem.seqlen_k // keys), 1)
        steps, walked = max(pairs / (blocks * keys * rows), 1.0), rows
    else:
        blocks = problem.items * -(-problem.item_rows // rows) * config.parts
        steps, walked = max(shown / keys / config.parts, 1.0), keys
    widths = {FWD: (1, 1), DQ: (2, 1), DKV: (2, 2)}[kernel]
    half = torch.float16 if problem.itemsize == 2 else torch.float32
    peak = (device.matmul_peak[half] if problem.tensor_cores else device.vector_peak) / device.sms
    flops = 2 * rows * keys * (widths[0] * problem.block_d + widths[1] * problem.block_v)
    # Operands of a product are read again for every 16 rows and keys of a tile.
    products = flops / peak * (1 + 16 / rows + 16 / keys)
    nbytes = walked * (problem.block_d + problem.block_v) * problem.itemsize
    transfer = nbytes * device.sms / (device.dram_bandwidth * _L2_SHARE)
    work = max(products, transfer) if stages > 1 else products + transfer
    if registers > most:
        work *= registers / most  # spilled
    step = max(blocks_sm * work, work + _LATENCY / stages)
    merge = 0.0 if config.parts == 1 else _LATENCY * (2 + config.parts / 16)
    return -(-blocks // (device.sms * blocks_sm)) * steps * step + merge


TUNABLES: dict[str, Tunable[Config]] = {
    kernel: Tunable(kernel, "triton", _space(kernel), default, table_key, SIZES) for kernel in KERNELS
}
"""The block-sparse kernels by name."""

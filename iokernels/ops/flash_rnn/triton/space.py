"""The configurations that tuning may try for the flash_rnn kernels, and which of them look best on paper.

A block has one head. Those of the forward and backward kernels take ``block`` sequences through time; those that
recompute values take ``block`` rows once.
"""

from __future__ import annotations

from functools import partial

import torch

from iokernels.autotune.space import Constraint, Space, fits_registers, fits_shared_memory, literals, powers_of_two
from iokernels.autotune.tunable import Tunable
from iokernels.runtime.device import DeviceSpec

from .tuning import KERNELS, SIZES, Config, Problem, default, shared_bytes, table_key


def words(kernel: str, problem: Problem, block: int) -> float:
    """The 32-bit registers of a block: the matrices, as operands, and the tiles of a step."""
    # Only a loop is worth keeping operands in registers for, and only matrix instructions let them stay there.
    resident = kernel != "flash_rnn_values" and problem.itemsize == 2
    matrices = problem.gates * problem.block_d**2 * problem.itemsize / 4 if resident else 0
    # The values of this step in float32, the inputs of the next as they are stored.
    tiles = problem.values * (1 + problem.itemsize / 4) + problem.states
    if kernel == "flash_rnn_bwd":
        tiles += problem.states
    return matrices + block * problem.block_d * tiles


def _space(kernel: str) -> Space[Config]:
    def registers(problem: Problem, device: DeviceSpec, block: int, warps: int) -> float:
        return words(kernel, problem, block)

    def shared(problem: Problem, device: DeviceSpec, block: int) -> int:
        return shared_bytes(problem, Config(block, 4, 1))

    def a_tile_a_warp(problem: Problem, device: DeviceSpec, block: int, warps: int) -> bool:
        # Of a matrix instruction, 16 rows by 8 columns; in float32, an element a thread.
        return block * problem.block_d >= (128 if problem.itemsize == 2 else 32) * warps

    def used(problem: Problem, device: DeviceSpec, block: int) -> bool:
        return kernel == "flash_rnn_values" or block <= max(16, problem.batch)

    return Space(
        name=kernel,
        version=1,
        axes=(powers_of_two("block", 16, 128), powers_of_two("num_warps", 1, 16), literals("num_stages", 1)),
        constraints=(
            Constraint("no empty rows", ("block",), used),
            fits_shared_memory(("block",), shared),
            Constraint("a tile a warp", ("block", "num_warps"), a_tile_a_warp),
            fits_registers(("block", "num_warps"), "num_warps", registers),
        ),
        make=Config,
        order=partial(predicted_seconds, kernel),
    )


_EXCHANGE = 4e-7
"""Seconds in which warps hand h to one another at a step: a weight of the ranking, not a measured figure."""


def predicted_seconds(kernel: str, problem: Problem, device: DeviceSpec, config: Config) -> float:
    """What a step would take on paper, or a block of rows: good for ranking, not for reading.

    Waves of blocks, each a product at the peak of an SM's share and an exchange that grows with the warps.
    """
    kind = torch.float16 if problem.itemsize == 2 else torch.float32
    peak = (device.matmul_peak[kind] if problem.tensor_cores else device.vector_peak) / device.sms
    product = 2 * config.block * problem.gates * problem.block_d**2 / peak
    # A warp drives one of the four quarters of an SM.
    product *= 4 / min(config.num_warps, 4)
    pointwise = config.block * problem.block_d * problem.values * 40 / (device.vector_peak / device.sms)
    blocks = problem.heads * -(-problem.batch // config.block)
    waves = -(-blocks // device.sms)
    return waves * (product + pointwise * 4 / min(config.num_warps, 4) + _EXCHANGE * (1 + config.num_warps / 16))


TUNABLES: dict[str, Tunable[Config]] = {
    kernel: Tunable(kernel, "triton", _space(kernel), default, table_key, SIZES) for kernel in KERNELS
}
"""The kernels of this room by name."""

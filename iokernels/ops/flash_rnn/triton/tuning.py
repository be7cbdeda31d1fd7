"""Launch parameters of the flash_rnn kernels: what a configuration is, its default and its space.

A block keeps the recurrent matrices of its head on chip from the first step to the last, in shared memory or in the
registers that feed the matrix instructions, which is what limits the width. A step is latency, so the default takes the
smallest tile of a matrix instruction, 16 sequences, and as few warps as hold it without spilling.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import NamedTuple

from iokernels.autotune import RESULTS, Size, Tunable
from iokernels.autotune.space import Constraint, Space, fits_registers, fits_shared_memory, literals, powers_of_two
from iokernels.runtime.device import DeviceSpec

KERNELS = ("flash_rnn_fwd", "flash_rnn_bwd", "flash_rnn_values")

MAX_WIDTH = {2: 256, 4: 64}
"""Widest head of any cell, on any GPU, by the bytes of an element. Products in full float32 run on the vector units,
whose operands do not stay in registers beyond that."""


@dataclass(frozen=True)
class Config:
    """One way to launch a kernel.

    ``block`` sequences to a tile, or rows (steps of sequences) in ``flash_rnn_values``: a power of two, 16 at least.
    """

    block: int = field(metadata=RESULTS)
    num_warps: int
    num_stages: int


class Problem(NamedTuple):
    """What the choice depends on. The width is rounded up to a power of two, 16 at least; so are batch and heads.

    The last two matter to tables, and not to the default.
    """

    kernel: str
    block_d: int
    gates: int
    values: int  # tiles of a step: the gates, and those that are apart
    states: int
    itemsize: int  # bytes an element of gates
    tensor_cores: bool  # False for float32 at full precision
    sm: int
    smem_block: int  # bytes of shared memory a thread block may use
    batch: Size = 16
    heads: Size = 16


def max_width(gates: int, itemsize: int, smem_block: int) -> int:
    """The widest head whose recurrent matrices a block of ``smem_block`` bytes keeps on chip; 0 if none."""
    width = MAX_WIDTH[itemsize]
    while width >= 16 and _bytes_of("flash_rnn_bwd", gates, width, itemsize, 16) > smem_block:
        width //= 2
    return width if width >= 16 else 0


def shared_bytes(problem: Problem, config: Config) -> int:
    """An upper estimate of the shared memory that the compiler takes, in bytes."""
    return _bytes_of(problem.kernel, problem.gates, problem.block_d, problem.itemsize, config.block)


def _bytes_of(kernel: str, gates: int, width: int, itemsize: int, block: int) -> int:
    """The matrices, and room to hand a tile from one layout to another: one of float32, or all that a product takes."""
    product = gates if kernel == "flash_rnn_bwd" else 1
    return gates * width * width * itemsize + block * width * max(4, product * itemsize)


def default(problem: Problem) -> Config:
    """A configuration that fits, for every problem the kernels accept."""
    config = _preferred(problem)
    while config.block > 16 and shared_bytes(problem, config) > problem.smem_block:
        config = replace(config, block=config.block // 2)
    return config


def _preferred(problem: Problem) -> Config:
    """The shape that the registers suggest, before shared memory has its say."""
    width = problem.block_d
    if problem.itemsize == 4:
        # Without matrix units every thread holds rows of both operands.
        return Config(16, 4 if width == 16 else 8, 1)
    if problem.kernel == "flash_rnn_values":
        return Config(64 if width <= 64 else 32, 4 if width <= 32 else 8, 1)
    warps = {16: 1, 32: 2, 64: 4, 128: 8}.get(width, 16)
    # The states of sLSTM take more room than a warp less would save.
    return Config(16, min(2 * warps, 16) if problem.states > 2 else warps, 1)


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
    )


TUNABLES: dict[str, Tunable[Config]] = {
    kernel: Tunable(kernel, "triton", _space(kernel), default, Problem) for kernel in KERNELS
}
"""The kernels of this room by name."""

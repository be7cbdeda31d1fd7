"""Launch parameters of the flash_rnn kernels: what a configuration is, and the analytic default.

The configurations that tuning may try are in :mod:`.space`.

A block keeps the recurrent matrices of its head on chip from the first step to the last, in shared memory or in the
registers that feed the matrix instructions, which is what limits the width. A step is latency, so the default takes the
smallest tile of a matrix instruction, 16 sequences, and as few warps as hold it without spilling.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from iokernels.autotune import RESULTS, precision_of, precision_word
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
    batch: int = 16
    heads: int = 16


def table_key(problem: Problem) -> dict[str, Any]:
    """What tables are looked up by: float16 and bfloat16 are alike to the hardware."""
    return {
        "dtype": precision_word(problem.itemsize, problem.tensor_cores),
        "block_d": problem.block_d,
        "gates": problem.gates,
        "values": problem.values,
        "states": problem.states,
        "batch": problem.batch,
        "heads": problem.heads,
    }


def problem_of(kernel: str, key: dict[str, Any], device: DeviceSpec) -> Problem:
    """The reverse of :func:`table_key`: a problem that has this key. Raises ``KeyError`` for a key of another make."""
    itemsize, tensor_cores = precision_of(key["dtype"])
    return Problem(
        kernel=kernel,
        itemsize=itemsize,
        tensor_cores=tensor_cores,
        sm=device.sm,
        smem_block=device.smem_block,
        **{name: value for name, value in key.items() if name != "dtype"},
    )


SIZES = ("batch", "heads")
"""The sizes of :func:`table_key` of which the nearest entry serves."""


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

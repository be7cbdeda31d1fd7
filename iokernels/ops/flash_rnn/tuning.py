"""Launch parameters of the flash_rnn kernels: what a configuration is, and the analytic default.

The configurations that tuning may try are in :mod:`.tuning_space`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

from iokernels.autotune import RESULTS
from iokernels.runtime.device import DeviceSpec

KERNELS = ("flash_rnn_fwd", "flash_rnn_bwd", "flash_rnn_values")


@dataclass(frozen=True)
class Config:
    """One way to launch a kernel. ``block`` sequences to a tile (``flash_rnn_values``: rows), a power of two, 16 at
    least."""

    block: int = field(metadata=RESULTS)
    num_warps: int
    num_stages: int


class Problem(NamedTuple):
    """What the choice depends on. The width is rounded up to a power of two, 16 at least; so are batch and heads."""

    kernel: str
    block_d: int
    gates: int
    values: int
    states: int
    itemsize: int  # bytes an element of gates
    tensor_cores: bool  # False for float32 at full precision
    sm: int
    sms: int
    smem_block: int  # bytes of shared memory a thread block may use
    batch: int = 16
    heads: int = 16


def bucket(count: int) -> int:
    """The least power of two that is no smaller than ``count``."""
    return 1 << (count - 1).bit_length() if count > 1 else 1


def max_width(gates: int, itemsize: int) -> int:
    """Widest head whose recurrent matrices the kernels keep on chip."""
    return 128 if itemsize == 2 else 64


def default(problem: Problem) -> Config:
    """A configuration that fits, for every problem the kernels accept."""
    return Config(16, 4, 1)

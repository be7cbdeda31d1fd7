"""Launch parameters of the linear_attention kernels in CUDA C++: what a configuration is, the default, and the space.

All four are one walk over x, y and z. A warp has 16 columns of z and their state in registers, so the warps of a block
say how often x and y are read. Two chunks of x, y and z lie in shared memory; the default wants room for two blocks an
SM, where registers allow two.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from iokernels.autotune import RESULTS, Size, Tunable
from iokernels.autotune.space import Constraint, Space, fits_shared_memory, literals
from iokernels.runtime.device import DeviceSpec

FORWARD, BACKWARD_Q, BACKWARD_K, BACKWARD_V = KERNELS = (
    "linear_attention_cuda_fwd",
    "linear_attention_cuda_bwd_dq",
    "linear_attention_cuda_bwd_dk",
    "linear_attention_cuda_bwd_dv",
)

MOST_WARPS = 8

SEGMENT = 1024
"""Rows after which the gradient of decays is summed anew: a power of two, of whole chunks."""


@dataclass(frozen=True)
class Config:
    """One way to walk: ``chunk`` rows at a time, in blocks of ``num_warps`` warps with 16 columns of z each."""

    chunk: int = field(metadata=RESULTS)
    num_warps: int

    @property
    def width(self) -> int:
        """Columns of z that a block has."""
        return 16 * self.num_warps


class Problem(NamedTuple):
    """What the choice depends on. Widths are rounded up to 16, counts to powers of two."""

    block_y: int  # of what is contracted: k, or in the gradients of q and k, v
    block_z: int
    crossing: bool  # backward: the gradient of decays is wanted
    sm: int
    sms: int
    smem_block: int
    smem_sm: int
    heads: Size = 64  # of v, of all sequences
    seqlen: Size = 4096  # packed: the mean length


def shared_bytes(problem: Problem, config: Config) -> int:
    """The shared memory that a kernel takes: two chunks of x, y, z and decays, and the scores of one; for the gradient
    of decays also two chunks of u, and of every row its own score and a share of each warp."""
    chunk = config.chunk
    arrays = [
        *(2 * 2 * chunk * (width + 8) for width in (problem.block_y, problem.block_y, config.width)),
        2 * chunk * (chunk + 8),
        2 * 8 * chunk,
    ]
    if problem.crossing:
        arrays += [2 * 2 * chunk * (config.width + 8), 4 * chunk, 4 * chunk * config.num_warps, 4 * config.num_warps]
    return sum(-(-nbytes // 128) * 128 for nbytes in arrays)


def slices(problem: Problem, config: Config) -> int:
    """Into how many blocks the columns of z are divided."""
    return -(-problem.block_z // config.width)


def registers(problem: Problem) -> int:
    """The 32-bit registers of a thread, about: the state, the same rounded, and what passes through."""
    return problem.block_y * 3 // 2 + 48


_REGISTERS = 65536
"""Of an SM, since sm_80."""


def default(problem: Problem) -> Config:
    """A configuration that fits, for every problem the kernels accept."""
    warps = min(problem.block_z // 16, MOST_WARPS)
    # Every slice reads x and y again: only SMs that would stand idle are worth that.
    while warps > 2 and 2 * problem.heads * -(-problem.block_z // (16 * warps)) <= problem.sms:
        warps = -(-warps // 2)
    narrow = min(warps, 4)
    for chunk, num_warps in ((64, warps), (64, narrow), (32, warps), (32, narrow), (16, warps)):
        config = Config(chunk, num_warps)
        blocks = 2 if 2 * 32 * num_warps * registers(problem) <= _REGISTERS else 1
        needed = shared_bytes(problem, config)
        if needed <= problem.smem_block and blocks * (needed + 1024) <= problem.smem_sm:
            return config
    return config


def _shared(problem: Problem, device: DeviceSpec, chunk: int, warps: int) -> int:
    return shared_bytes(problem, Config(chunk, warps))


def _space(kernel: str) -> Space[Config]:
    return Space(
        name=kernel,
        version=1,
        axes=(literals("chunk", 16, 32, 64), literals("num_warps", *range(1, MOST_WARPS + 1))),
        constraints=(
            Constraint("width", ("num_warps",), lambda problem, device, warps: 16 * warps <= problem.block_z),
            fits_shared_memory(("chunk", "num_warps"), _shared),
        ),
        make=Config,
    )


TUNABLES: dict[str, Tunable[Config]] = {
    kernel: Tunable(kernel, "cuda", _space(kernel), default, Problem) for kernel in KERNELS
}
"""The kernels in CUDA C++, by name."""

"""Launch parameters of the kernels of flash_attention in CUDA C++: configurations, defaults, and spaces."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from iokernels.autotune import RESULTS, Size, Tunable, Unkeyed
from iokernels.autotune.space import Axis, Constraint, Space, fits_shared_memory, literals
from iokernels.runtime.device import DeviceSpec

FORWARD, BACKWARD_Q, BACKWARD_KV = KERNELS = (
    "flash_attention_cuda_fwd", "flash_attention_cuda_bwd_q", "flash_attention_cuda_bwd_kv"
)  # fmt: skip


@dataclass(frozen=True)
class Config:
    """One way to run a kernel: ``warps`` warps own 16 rows each (of queries; of keys where dk and dv are made), and
    walk over the other side in tiles of ``block``."""

    block: int = field(metadata=RESULTS)
    warps: int = field(metadata=RESULTS)


class Problem(NamedTuple):
    """What the choice depends on."""

    kernel: str
    block_d: int  # widths, padded to what a fragment takes
    block_v: int
    causal: bool
    sm: int
    smem_block: int
    smem_sm: int
    heads: Size = 64  # of all sequences
    seqlen_q: Size = 4096
    seqlen_k: Size = 4096
    softcap: Unkeyed[bool] = False

    @property
    def own(self) -> int:
        """Rows of the side that blocks own."""
        return self.seqlen_k if self.kernel == BACKWARD_KV else self.seqlen_q

    @property
    def walked(self) -> int:
        """Rows of the side that blocks walk over."""
        return self.seqlen_q if self.kernel == BACKWARD_KV else self.seqlen_k


HELD = 128
"""Widest head whose fragments of q the forward kernel holds in registers, and whose dk and dv one launch makes."""


def shared_bytes(problem: Problem, config: Config) -> int:
    """The shared memory that a kernel takes.

    Forward: two stages of keys and values, and q, which where it is held in registers comes through the place of the
    second stage. Backward: two operands of the block's own rows, two stages of those that it walks over, and for dk and
    dv the statistics of the rows in them.
    """
    rows, width = 16 * config.warps, problem.block_d + problem.block_v + 16
    stage = config.block * width
    if problem.kernel != FORWARD:
        statistics = _arrays(16 * config.block) if problem.kernel == BACKWARD_KV else 0
        return _arrays(2 * (rows * width + 2 * stage)) + statistics
    q = rows * (problem.block_d + 8)
    return _arrays(2 * (stage + max(q, stage) if problem.block_d <= HELD else 2 * stage + q))


def _arrays(nbytes: int) -> int:
    """Arrays begin at multiples of 128 bytes."""
    return -(-nbytes // 128) * 128


def registers(problem: Problem, block: int) -> int:
    """The 32-bit registers of a thread, about: what it sums up, q where it is held, scores and their slopes, and
    addresses."""
    if problem.kernel == FORWARD:
        held = problem.block_d // 4 if problem.block_d <= HELD else 8
        return problem.block_v // 2 + held + block // 2 + 56
    if problem.kernel == BACKWARD_Q:
        return problem.block_d // 2 + block + 64
    sums = problem.block_d + problem.block_v
    slopes = block // 2 if problem.softcap else 0
    return (sums if max(problem.block_d, problem.block_v) > HELD else 2 * sums) // 4 + block + slopes + 88


def statistics_fit(problem: Problem, block: int, warps: int) -> bool:
    """Whether each thread asks for the statistics of at most one row, where the rows are walked over."""
    return problem.kernel != BACKWARD_KV or block <= 32 * warps


def default(problem: Problem) -> Config:
    """A configuration that fits, for every problem the kernels accept."""
    warps = 4 if problem.own > 32 else 2 if problem.own > 16 else 1
    ways = [(block, warps, 2) for block in (64, 32)]
    ways += [(block, fewer, 1) for fewer in (warps, 2, 1) if fewer <= warps for block in (32, 16)]
    for block, count, blocks in ways:
        config = Config(block, count)
        needed = shared_bytes(problem, config)
        fits = needed <= problem.smem_block and (blocks == 1 or blocks * (needed + 1024) <= problem.smem_sm)
        if fits and registers(problem, block) <= 255 and statistics_fit(problem, block, count):
            return config
    return Config(16, 1)


def _shared(problem: Problem, device: DeviceSpec, block: int, warps: int) -> int:
    return shared_bytes(problem, Config(block, warps))


def _space(kernel: str) -> Space[Config]:
    return Space(
        name=kernel,
        version=1,
        axes=(literals("block", 16, 32, 64, 128), Axis("warps", lambda problem: (1, 2, 4, 8))),
        constraints=(
            fits_shared_memory(("block", "warps"), _shared),
            Constraint("registers", ("block",), lambda problem, device, block: registers(problem, block) <= 255),
            Constraint(
                "a thread for each row's statistics",
                ("block", "warps"),
                lambda p, _, n, warps: statistics_fit(p, n, warps),
            ),
        ),
        make=Config,
    )


TUNABLES: dict[str, Tunable[Config]] = {
    kernel: Tunable(kernel, "cuda", _space(kernel), default, Problem) for kernel in KERNELS
}
"""The kernels in CUDA C++, by name."""

"""Launch parameters of the linear_attention kernel in CUDA C++: what a configuration is, the default, and the space.

A warp has 16 columns of v and their state in registers, so the warps of a block say how often q and k are read. Two
chunks of q, k and v lie in shared memory; the default wants room for two blocks an SM, where registers allow two.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

from iokernels.autotune import RESULTS, Tunable
from iokernels.autotune.space import Constraint, Space, fits_shared_memory, literals, occupancy
from iokernels.runtime.device import DeviceSpec

KERNEL = "linear_attention_cuda"

MAX_WIDTH = 128
"""Widest K and V of the kernel: the state of 16 columns takes K / 2 registers of a thread."""

MOST_WARPS = 8


@dataclass(frozen=True)
class Config:
    """One way to walk: ``chunk`` rows at a time, in blocks of ``num_warps`` warps with 16 columns of v each."""

    chunk: int = field(metadata=RESULTS)
    num_warps: int

    @property
    def width(self) -> int:
        """Columns of v that a block has."""
        return 16 * self.num_warps


class Problem(NamedTuple):
    """What the choice depends on. Widths are rounded up to 16, counts to powers of two."""

    block_k: int
    block_v: int
    sm: int
    sms: int
    smem_block: int
    smem_sm: int
    heads: int = 64  # of v, of all sequences
    seqlen: int = 4096  # packed: the mean length


SIZES = ("heads", "seqlen")
"""The sizes of :func:`table_key` of which the nearest entry serves."""


def table_key(problem: Problem) -> dict[str, Any]:
    """What tables are looked up by: float16 and bfloat16 are alike to the hardware."""
    return {name: getattr(problem, name) for name in ("block_k", "block_v", *SIZES)}


def shared_bytes(problem: Problem, config: Config) -> int:
    """The shared memory that the kernel takes: two chunks of q, k, v and decays, and the scores of one."""
    chunk = config.chunk
    arrays = (
        *(2 * 2 * chunk * (width + 8) for width in (problem.block_k, problem.block_k, config.width)),
        2 * chunk * (chunk + 8),
        2 * 4 * chunk,
    )
    return sum(-(-nbytes // 128) * 128 for nbytes in arrays)


def slices(problem: Problem, config: Config) -> int:
    """Into how many blocks the columns of v are divided."""
    return -(-problem.block_v // config.width)


def registers(problem: Problem) -> int:
    """The 32-bit registers of a thread, about: the state, the same rounded, and what passes through."""
    return problem.block_k * 3 // 2 + 48


_REGISTERS = 65536
"""Of an SM, since sm_80."""


def default(problem: Problem) -> Config:
    """A configuration that fits, for every problem the kernel accepts."""
    warps = min(problem.block_v // 16, MOST_WARPS)
    # Every slice reads q and k again: only SMs that would stand idle are worth that.
    while warps > 2 and 2 * problem.heads * -(-problem.block_v // (16 * warps)) <= problem.sms:
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


def predicted_seconds(problem: Problem, device: DeviceSpec, config: Config) -> float:
    """What a call would take on paper, for ranking: waves of blocks, and of a block its products, at a rate that grows
    with the warps of an SM up to eight, or its bytes, whichever are longer."""
    shared = shared_bytes(problem, config)
    blocks_sm = max(occupancy(device, warps=config.num_warps, shared=shared, registers=registers(problem)), 1)
    blocks = problem.heads * slices(problem, config)
    resident = min(blocks_sm, -(-blocks // device.sms))
    rows, k, v = problem.seqlen, problem.block_k, config.width
    peak = max(device.matmul_peak.values()) / device.sms * min(resident * config.num_warps / 8, 1.0)
    products = rows * ((config.chunk + 16) * (k + v) + 4 * k * v) * resident / peak
    transfer = rows * 2 * (2 * k + 2 * v) * min(blocks, resident * device.sms) / device.dram_bandwidth
    barriers = rows / config.chunk * _LATENCY
    return -(-blocks // (resident * device.sms)) * (max(products, transfer) + barriers)


_LATENCY = 2e-7
"""Seconds that a chunk waits at its barriers: a weight of the ranking, not a measured figure."""

SPACE: Space[Config] = Space(
    name=KERNEL,
    version=1,
    axes=(literals("chunk", 16, 32, 64), literals("num_warps", *range(1, MOST_WARPS + 1))),
    constraints=(
        Constraint("width", ("num_warps",), lambda problem, device, warps: 16 * warps <= problem.block_v),
        fits_shared_memory(("chunk", "num_warps"), _shared),
    ),
    make=Config,
    order=predicted_seconds,
)

TUNABLE: Tunable[Config] = Tunable(KERNEL, "cuda", SPACE, default, table_key, SIZES)
"""The kernel in CUDA C++."""

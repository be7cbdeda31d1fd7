"""Launch parameters of the selection kernel in CUDA C++: what a configuration is, the default, and the space.

A block holds rows of queries in shared memory, and each of its warps 16 candidates, whose keys pass through
registers: D / 2 of a thread. Every step of a search waits for the one before, so what counts is how many warps an
SM has; every block reads the rows of queries again, so many warps to a block save bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from iokernels.autotune import Size, Tunable
from iokernels.autotune.space import Constraint, Space, fits_shared_memory, literals, powers_of_two
from iokernels.runtime.device import DeviceSpec

KERNEL = "hip_attention_select_cuda"

HELD = 2048
"""Candidates whose scores the last block of a list holds in shared memory."""


@dataclass(frozen=True)
class Config:
    """One way to launch: ``block_r`` rows of queries in shared memory at once, and ``num_warps`` warps with 16
    candidates each. No field changes a result."""

    block_r: int
    num_warps: int

    @property
    def block_c(self) -> int:
        """Candidates of a block."""
        return 16 * self.num_warps


class Problem(NamedTuple):
    """What the choice depends on. The width is rounded up to 32, counts to powers of two."""

    block_d: int
    rows: Size  # of queries that share a list, as the kernel sees them
    sm: int
    sms: int
    smem_block: int
    smem_sm: int
    candidates: Size = 512  # of a list
    searches: Size = 1024  # searched heads of all blocks of queries


def shared_bytes(problem: Problem, config: Config) -> int:
    """The shared memory that the kernel takes: rows, whose place scores take in the end, their limits, and counts."""
    words = 4 * (4 + 2 * config.num_warps)
    arrays = (max(2 * config.block_r * problem.block_d, 4 * HELD), 4 * config.block_r, 4 * 256, words)
    return sum(-(-nbytes // 128) * 128 for nbytes in arrays)


def registers(problem: Problem) -> int:
    """The 32-bit registers of a thread, about: keys, products, intervals and addresses."""
    return problem.block_d // 2 + 80


def default(problem: Problem) -> Config:
    """A configuration that fits, for every problem the kernel accepts."""
    rows = max(16, min(problem.rows, 256))
    while shared_bytes(problem, Config(rows, 8)) > problem.smem_block:
        rows //= 2
    # Registers hold twelve warps of 128 columns, so three blocks of four; eight where rows leave room for one block.
    alone = 2 * (shared_bytes(problem, Config(rows, 4)) + 1024) > problem.smem_sm
    warps = 8 if problem.block_d <= 64 or alone else 4
    while warps > 1 and 16 * warps >= 2 * problem.candidates:
        warps //= 2
    while warps > 2 and problem.searches * -(-problem.candidates // (16 * warps)) < problem.sms:
        warps //= 2
    return Config(rows, warps)


def _shared(problem: Problem, device: DeviceSpec, rows: int, warps: int) -> int:
    return shared_bytes(problem, Config(rows, warps))


SPACE: Space[Config] = Space(
    name=KERNEL,
    version=1,
    axes=(powers_of_two("block_r", 16, 256), literals("num_warps", 1, 2, 4, 8)),
    constraints=(
        Constraint(
            "no more rows than there are", ("block_r",), lambda problem, device, rows: rows <= max(problem.rows, 16)
        ),
        fits_shared_memory(("block_r", "num_warps"), _shared),
    ),
    make=Config,
)

TUNABLE: Tunable[Config] = Tunable(KERNEL, "cuda", SPACE, default, Problem)
"""The kernel in CUDA C++."""

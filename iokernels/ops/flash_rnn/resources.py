"""What a recurrent kernel in CUDA C++ can keep on chip, and how many thread blocks have to share a head for it.

The Triton kernels of this room give a head to one block, whose shared memory then limits the width. A kernel that also
places parts of the matrix in registers by hand, and splits a head over blocks that exchange h at every step, gets
further. This is its resource model, declared before the kernel: a :class:`~iokernels.autotune.space.Space` that is
enumerated in milliseconds and explains what each limit removed. What it says is a prediction.

A head's matrix ``[G D, D]`` is cut along its rows into ``blocks`` parts of whole units, so that a block has all gates
of a unit and does its pointwise work alone. A block takes ``tile`` sequences and keeps ``eighths`` / 8 of its part in
registers, as operands of matrix instructions of 16 rows, 8 sequences and 16 columns (m16n8k16), the rest in shared
memory. Forward, the blocks of a head need all of h at every step; backward, the sums of all of dh. They wait for one
another, so all blocks of the grid must run at once: as a cluster up to 8 on Hopper and later, over a barrier in L2
beyond. One block per head waits for nobody.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from iokernels.autotune.space import Axis, Constraint, Space, at_most, divisors, literals
from iokernels.runtime.device import DeviceSpec

ROWS, SEQUENCES, COLUMNS = 16, 8, 16
"""The shape of a matrix instruction."""

MOST_IN_CLUSTER = 8
"""Blocks of a portable thread block cluster (CUDA C++ Programming Guide)."""

_OWN = 48
"""Registers a thread needs for addresses, counters and pointwise work: an allowance, not a measured figure."""


class Problem(NamedTuple):
    """One recurrent layer: ``batch`` sequences, ``heads`` of ``width`` units each."""

    width: int
    heads: int
    batch: int = 16
    gates: int = 4
    itemsize: int = 2
    backward: bool = False

    @property
    def padded_width(self) -> int:
        """The width in whole instructions."""
        return -(-self.width // COLUMNS) * COLUMNS

    @property
    def padded_batch(self) -> int:
        """The batch in whole instructions."""
        return max(-(-self.batch // SEQUENCES) * SEQUENCES, SEQUENCES)

    @property
    def matrix_bytes(self) -> int:
        """Bytes of a head's recurrent matrix."""
        return self.gates * self.padded_width**2 * self.itemsize


@dataclass(frozen=True)
class Config:
    """``blocks`` share a head, each for ``tile`` sequences, with ``warps`` and ``eighths`` / 8 of its matrix in
    registers."""

    blocks: int
    tile: int
    warps: int
    eighths: int

    def regime(self, device: DeviceSpec) -> str:
        """How the blocks of a head exchange h: not at all, in a ``cluster``, or over a ``barrier`` in L2."""
        if self.blocks == 1:
            return "block"
        return "cluster" if self.blocks <= MOST_IN_CLUSTER and device.sm >= 90 and device.sm < 120 else "barrier"


def grid(problem: Problem, blocks: int, tile: int) -> int:
    """Blocks of the whole grid."""
    return problem.heads * blocks * -(-problem.padded_batch // tile)


def shared_bytes(problem: Problem, blocks: int, tile: int, eighths: int) -> int:
    """Shared memory of a block: what registers do not hold of the matrix, h twice (one is read while the other is
    written), and the sums that cross warps."""
    rows = problem.gates * problem.padded_width // blocks
    matrix = problem.matrix_bytes // blocks * (8 - eighths) // 8
    operand, sums = (rows, problem.padded_width) if problem.backward else (problem.padded_width, rows)
    return matrix + 2 * operand * tile * problem.itemsize + sums * tile * 4


def registers(problem: Problem, blocks: int, tile: int, warps: int, eighths: int) -> float:
    """Registers of a thread: its share of the matrix and of the sums, and its own."""
    rows = problem.padded_width if problem.backward else problem.gates * problem.padded_width // blocks
    matrix = problem.matrix_bytes // blocks * eighths / 8 / 4
    return (matrix + rows * tile) / (32 * warps) + _OWN


def _one_wave(problem: Problem, device: DeviceSpec, blocks: int, tile: int) -> bool:
    return blocks == 1 or grid(problem, blocks, tile) <= device.sms


def _whole_instructions(problem: Problem, device: DeviceSpec, blocks: int) -> bool:
    return problem.gates * (problem.padded_width // blocks) % ROWS == 0


def _busy_warps(problem: Problem, device: DeviceSpec, blocks: int, warps: int) -> bool:
    # Warps share rows, and may split the columns in two.
    rows = problem.padded_width if problem.backward else problem.gates * problem.padded_width // blocks
    return warps <= 2 * rows // ROWS


def _tiles(problem: Problem) -> list[int]:
    return [size for size in (8, 16, 32, 64) if size <= problem.padded_batch or size == SEQUENCES]


def seconds(problem: Problem, device: DeviceSpec, config: Config) -> float:
    """A step on paper, to rank by: waves of a product from registers and shared memory, and the exchange of h."""
    exchange = {"block": 2e-7, "cluster": 5e-7, "barrier": 1.2e-6}[config.regime(device)]
    # Per clock an SM reads 128 bytes of shared memory; registers cost nothing.
    matrix = problem.matrix_bytes / config.blocks
    read = matrix * (8 - config.eighths) / 8 / 128 / 1.5e9
    product = matrix / problem.itemsize * config.tile * 2 / (device.vector_peak / device.sms * 8)
    waves = -(-grid(problem, config.blocks, config.tile) // device.sms)
    return waves * (max(read, product) + exchange + 2e-8 * config.warps)


SPACE: Space[Config] = Space(
    name="flash_rnn_cuda",
    version=1,
    axes=(
        Axis("blocks", lambda problem: divisors(problem.padded_width)),
        Axis("tile", _tiles),
        literals("warps", 4, 8, 16),
        literals("eighths", *range(9)),
    ),
    constraints=(
        Constraint("whole instructions", ("blocks",), _whole_instructions),
        Constraint("one wave", ("blocks", "tile"), _one_wave),
        Constraint("busy warps", ("blocks", "warps"), _busy_warps),
        at_most("shared memory", ("blocks", "tile", "eighths"), lambda p, d, *at: shared_bytes(p, *at), "smem_block"),
        at_most(
            "registers", ("blocks", "tile", "warps", "eighths"), lambda p, d, *at: registers(p, *at), 255
        ),
        at_most(
            "registers of an SM",
            ("blocks", "tile", "warps", "eighths"),
            lambda p, d, blocks, tile, warps, eighths: 32 * warps * registers(p, blocks, tile, warps, eighths),
            "regs_sm",
        ),
    ),
    make=Config,
    order=seconds,
)  # fmt: skip


def placement(problem: Problem, device: DeviceSpec) -> Config | None:
    """The best way on paper to place a layer, or None where nothing fits; ``SPACE.explain`` says why."""
    return next(iter(SPACE.ranked(problem, device)), None)


def widest(
    device: DeviceSpec, *, heads: int = 1, batch: int = 16, gates: int = 4, itemsize: int = 2, backward: bool = False,
    blocks: int | None = None,
) -> int:  # fmt: skip
    """The widest head, in steps of 16 units, that fits; with ``blocks``, in so many blocks a head at most."""
    width = 0
    for candidate in range(COLUMNS, 4096 + 1, COLUMNS):
        problem = Problem(candidate, heads, batch, gates, itemsize, backward)
        found = SPACE.candidates(problem, device)
        if any(blocks is None or config.blocks <= blocks for config in found):
            width = candidate
    return width

"""What the CUDA kernels of this room keep on chip, how many thread blocks share a head, and how they are launched.

A head's matrix is cut into ``blocks`` parts of whole units, multiples of 16, so that a block has all gates of a unit
and does its pointwise work alone. A block takes ``tile`` sequences. A warp has 16 rows of every gate's part, or, with
``split``, that share of their columns; it keeps ``eighths`` / 8 of them in registers, as operands of matrix
instructions of 16 rows, 8 sequences and 32 bytes of columns (m16n8k16, or k8 in float32), the rest in shared memory.
What a step reads comes ``stages`` - 1 steps ahead.

One block per head waits for nobody. Several need all of h at every step, backward the sums of all of dh, so they wait
for one another at a barrier in L2, and all blocks of the grid must run at once.

Launch parameters come from here as from any :class:`~iokernels.autotune.space.Space`, which explains what each limit
removed. Shared memory is counted exactly as the kernels take it; registers and seconds are estimates.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from typing import Annotated, Any, NamedTuple

from iokernels.autotune import RESULTS, RoundedSize, Tunable, Unkeyed, bucket
from iokernels.autotune.space import Axis, Constraint, Space, at_most, divisors, literals
from iokernels.ops.flash_rnn.cells import Cell
from iokernels.runtime.device import DeviceSpec

ROWS, SEQUENCES, COLUMN_BYTES = 16, 8, 32
"""The shape of a matrix instruction."""

MOST_WARPS = 16
KERNELS = ("flash_rnn_fwd_cuda", "flash_rnn_bwd_cuda", "flash_rnn_values_cuda")

_OWN = 48
"""Registers that a thread needs for addresses and counters: an allowance, after compiled kernels."""


def _padded(width: int) -> int:
    """A width in whole instructions."""
    return -(-width // ROWS) * ROWS


class Problem(NamedTuple):
    """One recurrent layer: ``batch`` sequences, ``heads`` of ``width`` units each, for one kernel of :data:`KERNELS`.

    ``values`` are the tiles of a step that a cell works on, and ``reads`` says whether its backward pass looks at h.
    The last two fields are the GPU's.
    """

    width: Annotated[int, _padded]
    heads: RoundedSize
    batch: RoundedSize = 16
    gates: int = 4
    itemsize: int = 2
    backward: Unkeyed[bool] = False
    values: int = 4
    states: int = 2
    reads: Unkeyed[bool] = False
    exact: bool = False  # whether the values are kept in float32
    parallel: Unkeyed[bool] = False  # flash_rnn_values_cuda, whose blocks wait for nobody
    tensor_cores: bool = True  # False for float32 at full precision
    sms: int = 132
    smem_block: int = 227 * 1024

    @property
    def padded_width(self) -> int:
        """The width in whole instructions."""
        return _padded(self.width)

    @property
    def padded_batch(self) -> int:
        """The batch in whole instructions."""
        return max(-(-self.batch // SEQUENCES) * SEQUENCES, SEQUENCES)

    @property
    def fragments(self) -> int:
        """Operands of matrix instructions in 16 rows of one gate's matrix."""
        return self.padded_width * self.itemsize // COLUMN_BYTES

    @property
    def unit_tiles(self) -> int:
        """16 units each."""
        return self.padded_width // ROWS


@dataclass(frozen=True)
class Config:
    """One way to launch a kernel; see the module."""

    blocks: int
    tile: int
    split: int = field(metadata=RESULTS)
    eighths: int
    stages: int

    @property
    def regime(self) -> str:
        """How the blocks of a head exchange h: there is one ``block``, or over a ``barrier`` in L2."""
        return "block" if self.blocks == 1 else "barrier"

    def units(self, problem: Problem) -> int:
        """Units of a block."""
        return problem.padded_width // self.blocks

    def held(self, problem: Problem) -> int:
        """Operands of each gate that a warp keeps in registers."""
        return held(problem, self.split, self.eighths)

    def threads(self, problem: Problem) -> int:
        """Threads of a block."""
        return 32 * warps(problem, self.blocks, self.split)


def held(problem: Problem, split: int, eighths: int) -> int:
    """See :meth:`Config.held`."""
    return problem.fragments // split * eighths // 8


def warps(problem: Problem, blocks: int, split: int) -> int:
    """Warps of a block."""
    return problem.unit_tiles // blocks * split


def grid(problem: Problem, blocks: int, tile: int) -> int:
    """Blocks of the whole grid, where none of them takes several tiles."""
    return problem.heads * blocks * -(-problem.batch // tile)


def walkers(problem: Problem, config: Config, rows: int) -> int:
    """Into how many blocks flash_rnn_values_cuda divides the rows of a head: as many as fill the GPU twice, for each of
    them fetches R."""
    shared = max(1, 2 * problem.sms // (problem.heads * config.blocks))
    return min(shared, -(-rows // config.tile))


def shared_bytes(problem: Problem, blocks: int, tile: int, split: int, eighths: int, stages: int) -> int:
    """Shared memory of a block, array by array as ``csrc/flash_rnn`` takes them."""
    units, resting = problem.padded_width // blocks, problem.fragments // split - held(problem, split, eighths)
    summed, operands = (1, problem.gates) if problem.backward else (problem.gates, 1)
    operand = tile * (problem.padded_width * problem.itemsize + 16)
    arrays = [
        operand * operands * (2 if blocks == 1 and not problem.parallel else 1),
        units // ROWS * split * problem.gates * resting * 512,
        units // ROWS * (split - 1) * summed * tile // SEQUENCES * 512,
    ]
    if not problem.backward:
        arrays.append(4 * problem.gates * units)
    if not problem.parallel:
        arrays.append(4 * tile)
        kept = 4 if problem.exact else problem.itemsize
        tiles = [(problem.values, kept), (1, problem.itemsize), (int(problem.reads), problem.itemsize),
                 (problem.states - 1, 4)] if problem.backward else [(problem.gates, problem.itemsize)]  # fmt: skip
        arrays += [stages * count * tile * (units * size + 16) for count, size in tiles]
    return sum(-(-nbytes // 128) * 128 for nbytes in arrays)


def registers(problem: Problem, tile: int, split: int, eighths: int) -> int:
    """An estimate of the registers of a thread: its operands, the tiles of a step, and its own.

    Products in full float32 are three of TF32, so an operand is two numbers.
    """
    tiles = 2 * problem.gates + problem.values + problem.states * (3 if problem.backward else 1)
    precise = not problem.tensor_cores
    operands = problem.gates * held(problem, split, eighths) * (8 if precise else 4)
    return _OWN * (2 if precise else 1) + operands + tile // 2 * tiles


def most_registers(threads: int, device: DeviceSpec) -> int:
    """What the compiler may give a thread of a block of so many."""
    return min(255, device.regs_sm // threads // 8 * 8)


def _one_wave(problem: Problem, device: DeviceSpec, blocks: int, tile: int) -> bool:
    return blocks == 1 or problem.parallel or grid(problem, blocks, tile) <= device.sms


def _whole_units(problem: Problem, device: DeviceSpec, blocks: int) -> bool:
    return problem.unit_tiles % blocks == 0


def _whole_columns(problem: Problem, device: DeviceSpec, split: int) -> bool:
    return problem.fragments % split == 0


def _busy_warps(problem: Problem, device: DeviceSpec, blocks: int, split: int) -> bool:
    return warps(problem, blocks, split) <= MOST_WARPS


def _whole_operands(problem: Problem, device: DeviceSpec, split: int, eighths: int) -> bool:
    # Of several shares that hold as many operands, the least.
    return eighths == 0 or held(problem, split, eighths - 1) < held(problem, split, eighths)


def _fit_registers(
    problem: Problem, device: DeviceSpec, blocks: int, tile: int, split: int, eighths: int
) -> bool:  # fmt: skip
    threads = 32 * warps(problem, blocks, split)
    return registers(problem, tile, split, eighths) <= most_registers(threads, device)


def _no_empty_rows(problem: Problem, device: DeviceSpec, tile: int) -> bool:
    return problem.parallel or tile <= problem.padded_batch


SPACE: Space[Config] = Space(
    name="flash_rnn_cuda",
    version=1,
    axes=(
        Axis("blocks", lambda problem: divisors(problem.unit_tiles)),
        literals("tile", 8, 16),
        literals("split", 1, 2, 3, 4, 6, 8),
        literals("eighths", *range(9)),
        literals("stages", 2, 4),
    ),
    constraints=(
        Constraint("whole units", ("blocks",), _whole_units),
        Constraint("whole columns", ("split",), _whole_columns),
        Constraint("no empty rows", ("tile",), _no_empty_rows),
        Constraint("one wave", ("blocks", "tile"), _one_wave),
        Constraint("warps of a block", ("blocks", "split"), _busy_warps),
        Constraint("whole operands", ("split", "eighths"), _whole_operands),
        Constraint("registers", ("blocks", "tile", "split", "eighths"), _fit_registers),
        at_most(
            "shared memory", ("blocks", "tile", "split", "eighths", "stages"),
            lambda p, d, *at: shared_bytes(p, *at), "smem_block",
        ),
    ),
    make=Config,
)  # fmt: skip


def _step_seconds(problem: Problem, device: DeviceSpec, config: Config) -> float:
    """A step on paper, by which the default is chosen: waves of a product from registers and shared memory, and the
    exchange of h. The weights are guesses of latencies, not measured figures."""
    exchange = 1e-7 if config.blocks == 1 else 1.2e-6 + 4e-9 * config.blocks
    threads = config.threads(problem)
    fragments = problem.fragments // config.split
    # A warp's instructions follow one another; up to four warps have matrix units of their own.
    products = problem.gates * fragments * config.tile // SEQUENCES * (1 if problem.tensor_cores else 3)
    product = products * 8 * max(threads / 128, 1) / 1.5e9
    # Per clock an SM reads 128 bytes of shared memory; registers cost nothing.
    read = threads / 32 * problem.gates * (fragments - config.held(problem)) * 512 / 128 / 1.5e9
    pointwise = config.tile / SEQUENCES * problem.values * 3e-8
    gathered = 5e-8 * (config.split > 1)
    waves = -(-grid(problem, config.blocks, config.tile) // device.sms)
    return waves * (product + read + pointwise + gathered + exchange + 1e-9 * (4 - config.stages))


def placement(problem: Problem, device: DeviceSpec) -> Config | None:
    """The best way on paper to place a layer, or None where nothing fits; ``SPACE.explain`` says why."""
    found = SPACE.candidates(problem, device)
    return min(found, key=lambda config: _step_seconds(problem, device, config), default=None)


def widest(
    device: DeviceSpec, *, heads: int = 1, batch: int = 16, gates: int = 4, itemsize: int = 2, backward: bool = False,
    blocks: int | None = None,
) -> int:  # fmt: skip
    """The widest head, in steps of 16 units, that fits; with ``blocks``, in so many blocks a head at most."""
    width = 0
    for candidate in range(ROWS, 4096 + 1, ROWS):
        problem = Problem(candidate, heads, batch, gates, itemsize, backward, gates)
        found = SPACE.candidates(problem, device)
        if any(blocks is None or config.blocks <= blocks for config in found):
            width = candidate
    return width


def problem_for(
    kernel: str, cell: Cell, width: int, heads: int, batch: int, itemsize: int, tensor_cores: bool, device: DeviceSpec
) -> Problem:
    """The problem that a launch of ``kernel`` poses. Batch and heads are rounded up to powers of two, to be few; but
    where blocks wait for one another every one counts, and then they are as they are."""
    backward, parallel = kernel == "flash_rnn_bwd_cuda", kernel == "flash_rnn_values_cuda"
    own = Problem(
        width, heads, batch, cell.gates, itemsize, backward, cell.values, len(cell.states), backward and cell.reads_h,
        cell.exact, parallel, tensor_cores, device.sms, device.smem_block,
    )  # fmt: skip
    if own.padded_width <= widest_of_one_block(cell, itemsize, tensor_cores, device):
        return own._replace(heads=bucket(heads), batch=bucket(batch))
    return own


def widest_of_one_block(cell: Cell, itemsize: int, tensor_cores: bool, device: DeviceSpec) -> int:
    """The widest head of ``cell``, in steps of 16 units, of which one block holds the matrices, in every kernel."""
    sizes = cell.gates, cell.values, len(cell.states), cell.reads_h, cell.exact
    return _widest_of_one_block(*sizes, itemsize, tensor_cores, device.smem_block)


class _Limits(NamedTuple):
    """What the space asks of a device."""

    sms: int
    smem_block: int
    regs_sm: int = 65536


def _device(problem: Problem) -> Any:
    return _Limits(problem.sms, problem.smem_block)


@cache
def _widest_of_one_block(
    gates: int, values: int, states: int, reads_h: bool, exact: bool, itemsize: int, tensor_cores: bool, smem_block: int
) -> int:
    limits: Any = _Limits(1, smem_block)

    def held_by_one(width: int, backward: bool) -> bool:
        sizes = width, 1, 1, gates, itemsize, backward, values, states, reads_h, exact
        problem = Problem(*sizes, parallel=False, tensor_cores=tensor_cores)
        # The least that any configuration takes.
        return any(
            SPACE.refusal(problem, limits, Config(1, 8, split, eighths, 2)) is None
            for split in (1, 2, 3, 4)
            for eighths in range(9)
        )

    width = MOST_WARPS * ROWS
    while width > 0 and not (held_by_one(width, False) and held_by_one(width, True)):
        width -= ROWS
    return width


@cache
def fits(problem: Problem) -> bool:
    """Whether there is any configuration."""
    return bool(SPACE.candidates(problem, _device(problem)))


def default(problem: Problem) -> Config:
    """The best on paper, for every problem that :func:`fits`."""
    found = placement(problem, _device(problem))
    assert found is not None
    return found


def _completed(kernel: str, key: dict[str, Any]) -> dict[str, Any]:
    return {"backward": kernel == "flash_rnn_bwd_cuda", "parallel": kernel == "flash_rnn_values_cuda"}


TUNABLES: dict[str, Tunable[Config]] = {
    kernel: Tunable(kernel, "cuda", SPACE, default, Problem, _completed) for kernel in KERNELS
}
"""The kernels of backend ``cuda`` by name."""

"""How many bytes the Triton kernels of flash_rnn should request from global memory: the model of their tiling.

Counted as a thread block requests them: each address once a load instruction, whatever the caches serve. The model is
exact, with every option; a test holds it to what the tracer counts. The products and sums of the gradients of R and b
are PyTorch's, and are not in it: they read h, the gradients of the gates and R's own gradient once more.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from iokernels.ops.flash_rnn.cells import CELLS, Cell
from iokernels.ops.flash_rnn.triton.tuning import Config
from iokernels.testing.case.accounts import Account, Bytes

_STATE = 4  # bytes of an element of a state
_LENGTH = 4  # of a sequence's length, int32


@dataclass(frozen=True)
class Problem:
    """One call with a backward pass. ``lengths`` are the steps of every sequence, and ``ragged`` says that the call
    names them; ``steps`` is N."""

    cell: str
    lengths: tuple[int, ...]
    steps: int
    heads: int
    width: int
    itemsize: int
    bias: bool = True
    initial: bool = False
    dstate: bool = False
    dinitial: bool = False
    ragged: bool = False
    recompute: bool = False
    cut: bool = False

    @property
    def kind(self) -> Cell:
        """The cell."""
        return CELLS[self.cell]

    @property
    def row(self) -> int:
        """Bytes of one row of a head in the dtype of the inputs."""
        return self.width * self.itemsize

    @property
    def values(self) -> int:
        """Bytes of the values of one step of a head, as they are kept for the backward pass."""
        return self.kind.values * (self.state if self.kind.exact else self.row)

    @property
    def state(self) -> int:
        """Bytes of one row of a state."""
        return self.width * _STATE

    @property
    def matrices(self) -> int:
        """Bytes of a head's recurrent matrices."""
        return self.kind.gates * self.width * self.row

    @property
    def others(self) -> int:
        """States after h."""
        return len(self.kind.states) - 1

    @property
    def total_steps(self) -> int:
        """Steps of all sequences."""
        return sum(self.lengths)

    def tiles(self, block: int) -> list[tuple[int, int]]:
        """Sequences and steps of every tile: a block walks as far as the longest of its sequences."""
        cut = [self.lengths[first : first + block] for first in range(0, len(self.lengths), block)]
        return [(len(part), max(part)) for part in cut]

    def sequences(self, per_sequence: int) -> int:
        """Bytes of what a sequence has once, for all of them."""
        return len(self.lengths) * per_sequence


def forward(problem: Problem, config: Config) -> Account:
    """R and b once for every block; gates, h and what is kept once, as far as the longest sequence of a tile goes."""
    kind, states = problem.kind, len(problem.kind.states)
    bias = problem.bias * kind.gates * problem.row
    own = problem.sequences(problem.initial * states * problem.state + problem.ragged * _LENGTH)
    walked = sum(rows * steps for rows, steps in problem.tiles(config.block))
    kept = (0 if problem.recompute else problem.values) + problem.others * problem.state

    def traffic(steps: int, blocks: int) -> Bytes:
        read = blocks * (problem.matrices + bias) + own + steps * kind.gates * problem.row
        written = problem.total_steps * problem.row + problem.sequences(states * problem.state) + steps * kept
        return Bytes(problem.heads * read, problem.heads * written)

    return Account(
        "fwd",
        floor=traffic(problem.total_steps, 1),
        model=traffic(walked, len(problem.tiles(config.block))),
    )


def backward(problem: Problem, config: Config) -> Account:
    """R once for every block; values, dout and the gradients of the gates once; the states after h, and h where the
    cell reads it, once, as far as the longest sequence of a tile goes."""
    kind, states = problem.kind, len(problem.kind.states)
    looked_at = states - 1 + kind.reads_h
    own = problem.sequences(
        problem.initial * looked_at * problem.state + problem.dstate * states * problem.state + problem.ragged * _LENGTH
    )
    tiles = problem.tiles(config.block)

    def traffic(all_steps: int, later_steps: int, blocks: int) -> Bytes:
        matrices = 0 if problem.cut else blocks * problem.matrices
        read = matrices + own + problem.total_steps * (problem.values + problem.row)
        read += all_steps * problem.others * problem.state + later_steps * kind.reads_h * problem.row
        written = problem.total_steps * kind.values * problem.row
        written += problem.sequences(problem.dinitial * states * problem.state)
        return Bytes(problem.heads * read, problem.heads * written)

    return Account(
        "bwd",
        floor=traffic(problem.total_steps, sum(max(steps - 1, 0) for steps in problem.lengths), 1),
        model=traffic(
            sum(rows * steps for rows, steps in tiles),
            sum(rows * max(steps - 1, 0) for rows, steps in tiles),
            len(tiles),
        ),
    )


def values(problem: Problem, config: Config) -> Account:
    """R and b once for every block of rows; gates, h of the step before and values once, for all N steps."""
    kind, rows = problem.kind, len(problem.lengths) * problem.steps
    bias = problem.bias * kind.gates * problem.row
    first = problem.sequences(problem.initial * problem.state if problem.steps else 0)
    earlier = len(problem.lengths) * max(problem.steps - 1, 0)

    def traffic(blocks: int) -> Bytes:
        read = blocks * (problem.matrices + bias) + first + (rows * kind.gates + earlier) * problem.row
        return Bytes(problem.heads * read, problem.heads * rows * problem.values)

    return Account("bwd", floor=traffic(1), model=traffic(-(-rows // config.block)))


def accounts(problem: Problem, configs: Mapping[str, Config]) -> dict[str, Account]:
    """Every kernel that one forward and backward pass launches, by name; ``configs`` as autotune names them."""
    found: dict[str, Account] = {}
    if problem.lengths:
        found["flash_rnn_fwd_kernel"] = forward(problem, configs["flash_rnn_fwd"])
        if problem.recompute and problem.steps:
            found["flash_rnn_values_kernel"] = values(problem, configs["flash_rnn_values"])
        found["flash_rnn_bwd_kernel"] = backward(problem, configs["flash_rnn_bwd"])
    return found

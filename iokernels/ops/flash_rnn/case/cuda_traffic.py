"""How many bytes the CUDA kernels of flash_rnn should request from global memory: the model of their tiling.

Counted as threads request them, whatever the caches serve. The model is exact, with every option; a test holds it to
what the emulator counts. The products and sums of the gradients of R and b are PyTorch's, and are not in it.
"""

from __future__ import annotations

from collections.abc import Mapping

from iokernels.ops.flash_rnn.cuda.tuning import Config
from iokernels.testing.case.accounts import Account, Bytes

from .traffic import Problem

_LENGTH = 4  # bytes of a sequence's length, int32
_COUNTER = 4


def forward(problem: Problem, config: Config) -> Account:
    """R and b once for every group of blocks; gates, h and what is kept once; and what blocks of a group exchange."""
    kind, states, steps = problem.kind, len(problem.kind.states), problem.total_steps
    bias = problem.bias * kind.gates * problem.row
    kept = (0 if problem.recompute else problem.values) + problem.others * problem.state
    tiles = problem.tiles(config.tile)
    read = problem.sequences(problem.initial * states * problem.state) + steps * kind.gates * problem.row
    written = steps * (problem.row + kept) + problem.sequences(states * problem.state)
    lengths = problem.sequences(problem.ragged * _LENGTH)
    turns = sum(most + 1 for _, most in tiles)
    met = _exchanged(problem, config, turns, 1)
    heads, groups = problem.heads, len(tiles)
    return Account(
        "fwd",
        floor=Bytes(heads * (problem.matrices + bias + read + lengths), heads * written),
        model=Bytes(
            heads * (groups * (problem.matrices + bias) + read + config.blocks * lengths + met.read),
            heads * (written + met.written),
        ),
    )


def backward(problem: Problem, config: Config) -> Account:
    """R once for every group of blocks; values, dout, the gradients of the gates and the states after h once; h, where
    the cell reads it, as far as it stands before a step of the tile."""
    kind, states, steps = problem.kind, len(problem.kind.states), problem.total_steps
    tiles = problem.tiles(config.tile)
    longest = [most for rows, most in tiles for _ in range(rows)]
    h = sum(min(own, max(most - 1, 0)) for own, most in zip(problem.lengths, longest, strict=True))
    walked = sum(rows for rows, most in tiles if most)
    matrices = 0 if problem.cut else problem.matrices
    initial = problem.initial * (states - 1 + kind.reads_h) * problem.state
    dstate = problem.sequences(problem.dstate * states * problem.state)
    lengths = problem.sequences(problem.ragged * _LENGTH)
    read = steps * (problem.values + problem.row + problem.others * problem.state) + dstate
    written = steps * kind.values * problem.row + problem.sequences(problem.dinitial * states * problem.state)
    met = _exchanged(problem, config, 0 if problem.cut else sum(most for _, most in tiles), kind.gates)
    heads, least = problem.heads, sum(max(own - 1, 0) for own in problem.lengths)
    return Account(
        "bwd",
        floor=Bytes(
            heads * (matrices + problem.sequences(initial) + lengths + read + least * kind.reads_h * problem.row),
            heads * written,
        ),
        model=Bytes(
            heads * (len(tiles) * matrices + walked * initial + config.blocks * lengths + read
                     + h * kind.reads_h * problem.row + met.read),
            heads * (written + met.written),
        ),
    )  # fmt: skip


def _exchanged(problem: Problem, config: Config, turns: int, operands: int) -> Bytes:
    """What the blocks of a head tell one another: each writes its units, and reads all; and the counter."""
    if config.blocks == 1:
        return Bytes(0, 0)
    padded = -(-problem.width // 16) * 16
    tile = operands * config.tile * padded * problem.itemsize
    counted = config.blocks * _COUNTER
    return Bytes(turns * (config.blocks * tile + counted), turns * (tile + counted))


def values(problem: Problem, config: Config, walkers: int) -> Account:
    """R and b once for every block; gates and values once, h of the step before once for every part of a head."""
    kind, rows = problem.kind, len(problem.lengths) * problem.steps
    own = problem.matrices + problem.bias * kind.gates * problem.row
    first = problem.sequences(problem.initial * problem.state if problem.steps else 0)
    h = first + len(problem.lengths) * max(problem.steps - 1, 0) * problem.row
    gates, written = rows * kind.gates * problem.row, problem.heads * rows * problem.values
    return Account(
        "bwd",
        floor=Bytes(problem.heads * (own + h + gates), written),
        model=Bytes(problem.heads * (walkers * own + config.blocks * h + gates), written),
    )


def accounts(problem: Problem, configs: Mapping[str, Config], walkers: int) -> dict[str, Account]:
    """Every kernel that one forward and backward pass launches, by name; ``configs`` as autotune names them."""
    found: dict[str, Account] = {}
    if problem.lengths:
        found["flash_rnn_fwd_cuda"] = forward(problem, configs["flash_rnn_fwd_cuda"])
        if problem.recompute and problem.steps:
            found["flash_rnn_values_cuda"] = values(problem, configs["flash_rnn_values_cuda"], walkers)
        found["flash_rnn_bwd_cuda"] = backward(problem, configs["flash_rnn_bwd_cuda"])
    return found

"""The words that describe a call of flash_rnn, and the lengths of its sequences."""

from __future__ import annotations

from iokernels.testing.case.shape import Dimension, Shape, Vocabulary

CELLS = ("lstm", "gru", "elman", "slstm")

VOCABULARY = Vocabulary(
    "flash_rnn",
    (
        Dimension("b", 16, "sequences", always=True),
        Dimension("n", 1024, "steps", always=True),
        Dimension("h", 12, "heads", least=1, always=True),
        Dimension("d", 64, "units of a head", least=1, always=True),
        Dimension("cell", 0, "0: lstm, 1: gru, 2: elman, 3: slstm", most=3, always=True),
        Dimension("bias", 1, "1: a bias", most=1),
        Dimension("state", 0, "1: an initial state, and the final one, both with gradients", most=1),
        Dimension("lengths", 0, "1: sequences of different lengths, n at most", most=1),
        Dimension("empty", 0, "1: with lengths, the last sequence has no step", most=1),
        Dimension("recompute", 0, "1: the backward pass makes the gates again", most=1),
        Dimension("clip", 0.0, "limit of the gradient through the recurrent matrices; 0: none"),
        Dimension("cut", 0, "1: no gradient through the recurrent matrices", most=1),
        Dimension("nb", 0, "1: tensors stored as [n, b, ...], passed as transposed views", most=1),
    ),
)


def cell_of(shape: Shape) -> str:
    """The name of the cell."""
    return CELLS[shape.cell]


def lengths(shape: Shape) -> list[int]:
    """Steps of every sequence: the first has all, the others fall evenly."""
    if not shape.lengths:
        return [shape.n] * shape.b
    found = [-(-shape.n * left // shape.b) for left in range(shape.b, 0, -1)]
    if shape.empty:
        found[-1] = 0
    return found

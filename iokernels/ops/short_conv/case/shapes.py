"""The words that describe a call of short_conv, and the lengths of its sequences."""

from __future__ import annotations

from iokernels.testing.case.shape import Dimension, Shape, Vocabulary

VOCABULARY = Vocabulary(
    "short_conv",
    (
        Dimension("b", 8, "sequences", always=True),
        Dimension("h", 1024, "channels", least=1, always=True),
        Dimension("n", 4096, "inputs of a sequence", always=True),
        Dimension("w", 4, "taps of the filter", least=1, always=True),
        Dimension("padding", 0, "0: causal, 1: same, 2: valid", most=2),
        Dimension("silu", 0, "1: silu after the sum", most=1),
        Dimension("bias", 0, "1: a bias for every channel", most=1),
        Dimension("state", 0, "1: an initial state, and the final one, both with gradients; causal", most=1),
        Dimension("packed", 0, "1: sequences of different lengths, n at most, one after the other", most=1),
        Dimension("empty", 0, "1: with packed, the second sequence has no rows", most=1),
        Dimension("bnh", 0, "1: tensors stored as [b, n, h], passed as transposed views", most=1),
    ),
)

PADDINGS = ("causal", "same", "valid")


def sides(shape: Shape) -> tuple[int, int]:
    """Rows of padding before and after a sequence."""
    around = shape.w - 1
    return ((around, 0), (around // 2, around - around // 2), (0, 0))[shape.padding]


def lengths(shape: Shape) -> list[int]:
    """Inputs of every sequence. Packed, the first is as long as the shape allows and the others fall evenly."""
    if not shape.packed:
        return [shape.n] * shape.b
    found = [-(-shape.n * left // shape.b) for left in range(shape.b, 0, -1)]
    if shape.empty and shape.b > 1:
        found[1] = 0
    return found


def outputs(shape: Shape) -> int:
    """Rows of all outputs together."""
    return sum(length + sum(sides(shape)) - (shape.w - 1) for length in lengths(shape))

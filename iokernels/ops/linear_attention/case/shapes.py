"""The words that describe a call of linear_attention, and the lengths of its sequences."""

from __future__ import annotations

from iokernels.testing.case.shape import Dimension, Shape, Vocabulary

DIMENSIONS = (
    Dimension("b", 4, "sequences", always=True),
    Dimension("h", 32, "heads of v and the decay", least=1, always=True),
    Dimension("hk", "h", "heads of q and k; divides h", least=1),
    Dimension("n", 4096, "tokens of a sequence", always=True),
    Dimension("d", 128, "width of q and k", least=1, always=True),
    Dimension("dv", "d", "width of v", least=1),
    Dimension("decay", 2, "0: none; 1: a decay for every token; 2: one for every head", most=2),
    Dimension("gate", 0.1, "log decays lie between 0 and minus this"),
    Dimension("taylor", 0, "1: the Taylor polynomial of exp as feature map", most=1),
    Dimension("normalize", 0, "1: divided by the sum of the weights", most=1),
    Dimension("bnhd", 0, "1: tensors stored as [b, n, h, d], passed as transposed views", most=1),
)
VOCABULARY = Vocabulary(
    "linear_attention",
    (
        *DIMENSIONS,
        Dimension("learn", 1, "0: the decays want no gradient", most=1),
        Dimension("state", 0, "1: an initial state, and a gradient into the final one", most=1),
        Dimension("packed", 0, "1: sequences of different lengths, n at most, one after the other", most=1),
        Dimension("empty", 0, "1: with packed, the second sequence has no tokens and the third has one", most=1),
    ),
)
STEP_VOCABULARY = Vocabulary("linear_attention_step", DIMENSIONS)


def lengths(shape: Shape) -> list[int]:
    """Tokens of every sequence.

    Packed, the first sequence is as long as the shape allows and the others fall evenly to a ``b``-th of that.
    """
    if not shape.get("packed"):
        return [shape.n] * shape.b
    found = [-(-shape.n * left // shape.b) for left in range(shape.b, 0, -1)]
    if shape.empty and shape.b > 2:
        found[1], found[2] = 0, 1
    return found

"""The words that describe a call of flash_attention, and the lengths of its sequences."""

from __future__ import annotations

from iokernels.testing.case.shape import Dimension, Shape, Vocabulary

VOCABULARY = Vocabulary(
    "flash_attention",
    (
        Dimension("b", 4, "sequences", always=True),
        Dimension("h", 16, "query heads", least=1, always=True),
        Dimension("hkv", "h", "key and value heads; divides h", least=1),
        Dimension("n", 4096, "queries of a sequence", always=True),
        Dimension("nk", "n", "keys of a sequence"),
        Dimension("d", 128, "width of q and k", least=1, always=True),
        Dimension("dv", "d", "width of v", least=1),
        Dimension("causal", 0, "1: row i sees the keys up to i + nk - n", most=1),
        Dimension("left", -1, "window to the left; -1 is unbounded", least=-1),
        Dimension("right", -1, "window to the right; -1 is unbounded", least=-1),
        Dimension("softcap", 0.0, "bound of the scores; 0 is none"),
        Dimension("mask", 0, "1: a random boolean mask, about a tenth hidden", most=1),
        Dimension(
            "bias", 0, "1: a bias [b, h, n, nk]; 2: one for the whole batch, [1, h, n, nk]; with gradient", most=2
        ),
        Dimension("alibi", 0, "1: ALiBi slopes, one a head", most=1),
        Dimension("sinks", 0, "1: a sink logit for every head, with gradient", most=1),
        Dimension("dropout", 0.0, "probability of dropping a weight"),
        Dimension("lse", 0, "1: the log-sum-exp is returned, and a gradient flows into it", most=1),
        Dimension("packed", 0, "1: sequences of different lengths, n and nk at most, one after the other", most=1),
        Dimension("empty", 0, "1: with packed, the second sequence has no rows and the third no keys", most=1),
        Dimension("bnhd", 0, "1: tensors stored as [b, n, h, d], passed as transposed views", most=1),
        Dimension("gain", 1.0, "factor of q: more makes the attention peaked"),
    ),
)


def lengths(shape: Shape) -> list[tuple[int, int]]:
    """Queries and keys of every sequence.

    Packed, the first sequence is as long as the shape allows and the others fall evenly to a ``b``-th of that.
    """
    if not shape.packed:
        return [(shape.n, shape.nk)] * shape.b
    sides = [(-(-shape.n * left // shape.b), -(-shape.nk * left // shape.b)) for left in range(shape.b, 0, -1)]
    if shape.empty and shape.b > 2:
        sides[1] = (0, sides[1][1])
        sides[2] = (sides[2][0], 0)
    return sides

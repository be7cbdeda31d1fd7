"""The vocabulary of fft_conv."""

from __future__ import annotations

from iokernels.testing.case.shape import Dimension, Vocabulary

VOCABULARY = Vocabulary(
    "fft_conv",
    (
        Dimension("b", 8, "sequences", always=True),
        Dimension("h", 768, "channels, each with a filter of its own", least=1, always=True),
        Dimension("n", 4096, "length of a sequence", always=True),
        Dimension("nk", "n", "taps of a filter; with causal=0 up to n (circular) or 2 n - 1 (two-sided)", least=1),
        Dimension("causal", 1, "0: circular or two-sided", most=1),
        Dimension("gated", 0, "1: a gate on the input and one on the output, with gradients", most=1),
        Dimension("skip", 0, "1: a skip weight for every channel, with gradient", most=1),
        Dimension("state", 0, "1: an initial state, with gradient, and the state after the last step", most=1),
        Dimension("keep", 1.0, "share of the filter's frequencies that is kept", most=1.0),
        Dimension("invariant", 0, "1: batch_invariant", most=1),
        Dimension("bnh", 0, "1: tensors stored as [b, n, h], passed as transposed views", most=1),
        Dimension("amp", 1.0, "amplitude of u"),
        Dimension("uneven", 0, "1: each sequence has a tenth of the amplitude of the one before it", most=1),
    ),
)

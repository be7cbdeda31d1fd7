"""How the backend ``torch`` cuts calls: one transform a row, or overlapping blocks of it if the filter is short."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

from iokernels.ops.fft_conv.options import CAUSAL, CIRCULAR, TWO_SIDED, Options, band_length
from iokernels.ops.fft_conv.real_fft import is_rough

SHORT = 8
"""A filter at least so many times shorter than the sequence is run in blocks."""
LEAST_BLOCK = 4096
"""Transforms below this length cost more in calls than they save in arithmetic."""


class Cut(NamedTuple):
    """Transforms of ``length`` of ``width`` inputs (zeros follow), of which the first ``overlap`` come before the
    ``step`` outputs that a transform makes. Without ``blocks`` one transform makes all outputs of a row."""

    length: int
    width: int
    overlap: int
    step: int
    blocks: bool


def cut(n: int, taps: int, options: Options) -> Cut:
    """The transforms for sequences of n and a filter of so many effective taps."""
    if options.mode == CAUSAL and options.keep == 1.0 and n >= 2 * LEAST_BLOCK and n >= SHORT * taps:
        length = good_length(max(LEAST_BLOCK, 1 << (4 * taps - 1).bit_length()))
        return Cut(length, length, taps - 1, length - taps + 1, True)
    past = 0 if options.initial_state is None else options.initial_state.shape[2]
    if options.mode == CIRCULAR:
        length = n
    elif options.keep < 1.0:
        length = band_length(n, options.mode)
    else:
        length = good_length(2 * n - 1 if options.mode == TWO_SIDED else n + taps - 1)
    return Cut(length, past + n, past, n, False)


@cache
def good_length(least: int) -> int:
    """The least even number from ``least`` on whose only prime factors are 2, 3 and 5, what FFT libraries are fast at,
    and whose transforms are exact (:func:`.real_fft.is_rough`).

    At least 2, so that a real transform has a last frequency of its own.
    """
    best = 1 << max(least - 1, 1).bit_length()
    if is_rough(best):
        best = best // 8 * 9
    fives = 1
    while fives < best:
        threes = fives
        while threes < best:
            candidate = 2 * threes
            while candidate < least:
                candidate *= 2
            if not is_rough(candidate):
                best = min(best, candidate)
            threes *= 3
        fives *= 5
    return best

"""The forward kernel of linear attention: the walk over q, k and v.

Maths and accounts stand in :mod:`.walk`, and with the Taylor map in :mod:`.taylor`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .chunks import VARYING, Counts
from .taylor import taylor_walk
from .walk import walk


@triton.jit(do_not_specialize=VARYING)
def linear_attention_fwd_kernel(
    inputs,
    offsets,
    out,  # [B, H, N, V]
    denominator,  # float32 [B, H, N] or none
    initial,  # float32 [S, H, K, W] before every sequence, or [P, H, K, W] before every segment, or none
    last,  # float32 [S, H, K, W] or none
    heads,
    group,
    sequences,
    seqlen,
    per_sequence,
    segment_rows,
    search_steps,
    scale,
    FEATURES: tl.constexpr,
    SIZES: tl.constexpr,
):
    """out, den and the last state of BLOCK_V columns of one head of one segment."""
    q, k, v, decay = inputs
    counts = Counts(heads, group, sequences, seqlen, per_sequence, segment_rows, search_steps)
    if FEATURES.taylor:
        taylor_walk(q, k, v, out, denominator, decay, offsets, initial, last, counts, scale, FEATURES, False, SIZES)
    else:
        walk(
            q, k, v, out, denominator, decay, offsets, initial, last, None, None, counts, scale,
            FEATURES, False, False, SIZES,
        )  # fmt: skip

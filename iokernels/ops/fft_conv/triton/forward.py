"""The forward kernel of ``fft_conv`` (FlashFFTConv, arXiv:2311.05908): one pass over memory.

Overlap-save: a block of M positions makes the last ``M - overlap`` of them. Block c of a sequence begins at time
``c step - overlap``; before time 0 lies the initial state, the sequence's own end (circular), or zeros. Where all of a
sequence is one block and its first half would be zeros, only the other half is loaded, transformed and stored.

A thread block owns a head and runs through ``units`` blocks of pairs of sequences:

    z = (2^-e0 v0) + i (2^-e1 v1)       v = pre u
    w = inverse(K * forward(z))
    y0 = post 2^e0 Re w,  y1 = post 2^e1 Im w

The skip term is a tap of the filter. Bytes a thread block requests: F1, F2 and the head's spectrum once; of each unit
u and pre (and the past) once for every position of the block inside the sequence, post and y once. FLOPs of a pair:
16 M (N1 + N2), of which a half block saves those of N1 / 2, and kept columns those of N2 - COLS.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .transform import (
    Place,
    exponent,
    inverted,
    load_inputs,
    load_spectrum,
    load_times,
    matrices,
    positions,
    power_of_two,
    scale_back,
    stop_of,
    store_times,
    transformed,
    twiddles,
)


@triton.jit
def _one_unit(
    unit, u_ptr, pre_ptr, post_ptr, state_ptr, y_ptr, stride_u, stride_pre, stride_post, stride_y,
    head, batch, heads, seqlen, overlap, step, scale, kr, ki, f1r, f1i, tr, ti, f2r, f2i,
    FEATURES: tl.constexpr, N1: tl.constexpr, N2: tl.constexpr, ROWS: tl.constexpr, MIDDLE: tl.constexpr,
    WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """y of one block of a pair of sequences."""
    members: tl.constexpr = 2 if FEATURES.pair else 1
    pairs = (batch + members - 1) // members
    offs = positions(N1, N2, ROWS)
    b0, chunk = unit % pairs * members, unit // pairs
    place = Place(chunk * step - overlap, overlap, seqlen, N1 * N2)
    v0 = load_inputs(
        u_ptr, pre_ptr, state_ptr, stride_u, stride_pre, b0, head, heads, seqlen, place, offs, FEATURES, WIDE
    )
    e0 = exponent(v0)
    zr = (v0 * power_of_two(-e0)).to(f1r.dtype)
    if FEATURES.pair:
        stop = stop_of(b0 + 1, batch, seqlen)
        v1 = load_inputs(
            u_ptr, pre_ptr, state_ptr, stride_u, stride_pre, b0 + 1, head, heads, stop, place, offs,
            FEATURES, WIDE,
        )  # fmt: skip
        e1 = exponent(v1)
        zi = (v1 * power_of_two(-e1)).to(f1r.dtype)
    else:
        e1 = e0
        zi = tl.zeros_like(zr)
    xr, xi = transformed(zr, zi, f1r, f1i, tr, ti, f2r, f2i, PRECISION)
    pr = ((xr * kr - xi * ki) * MIDDLE).to(f1r.dtype)
    pi = ((xr * ki + xi * kr) * MIDDLE).to(f1r.dtype)
    wr, wi = inverted(pr, pi, f1r, f1i, tr, ti, f2r, f2i, PRECISION)

    times = place.start + offs
    mask = (offs >= overlap) & (times < seqlen)
    y0 = wr * scale * scale_back(e0)
    if FEATURES.post:
        y0 *= load_times(post_ptr, stride_post, b0, head, place, times, mask, WIDE)
    store_times(y_ptr, stride_y, b0, head, place, times, y0, mask, WIDE)
    if FEATURES.pair:
        mask = (offs >= overlap) & (times < stop)
        y1 = wi * scale * scale_back(e1)
        if FEATURES.post:
            y1 *= load_times(post_ptr, stride_post, b0 + 1, head, place, times, mask, WIDE)
        store_times(y_ptr, stride_y, b0 + 1, head, place, times, y1, mask, WIDE)


@triton.jit(do_not_specialize=["batch", "heads", "seqlen", "overlap", "step", "chunks", "units"])
def fft_conv_fwd_kernel(
    u_ptr,  # [B, H, N]
    pre_ptr,  # [B, H, N] or None
    post_ptr,  # [B, H, N] or None
    state_ptr,  # float32 [B, H, overlap] or None
    spectrum_ptr,  # [H, 2, N1, N2], real and imaginary
    scale_ptr,  # float32 [H], what the spectrum was divided by
    f1_ptr,  # [2, N1], roots of unity
    f2_ptr,  # [2, N2]
    y_ptr,  # [B, H, N]
    stride_u,
    stride_pre,
    stride_post,
    stride_y,
    batch,
    heads,
    seqlen,
    overlap,
    step,
    chunks,
    units,  # blocks of pairs to a thread block
    FEATURES: tl.constexpr,
    N1: tl.constexpr,
    N2: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    MIDDLE: tl.constexpr,  # the power of two nearest 1 / sqrt(M), from above
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    HOIST: tl.constexpr,
):
    """y of ``units`` blocks of one head."""
    head = tl.program_id(0) % heads
    first = tl.program_id(0) // heads * units
    members: tl.constexpr = 2 if FEATURES.pair else 1
    pairs = (batch + members - 1) // members
    last = tl.minimum(first + units, pairs * chunks)

    tr, ti = twiddles(N1, N2, f1_ptr.dtype.element_ty)
    kr, ki = load_spectrum(spectrum_ptr, head, N1, N2, COLS)
    scale = tl.load(scale_ptr + head) * (1.0 / (MIDDLE * N1 * N2))

    # What does not change is moved out of a for loop: operands into shared memory, and the room of every product's
    # result, of which all together are more than Blackwell's tensor memory. Out of a while loop they are not.
    if HOIST:
        f1r, f1i, f2r, f2i = matrices(f1_ptr, f2_ptr, N1, N2, ROWS, COLS)
        for unit in tl.range(first, last):
            _one_unit(
                unit, u_ptr, pre_ptr, post_ptr, state_ptr, y_ptr, stride_u, stride_pre, stride_post, stride_y,
                head, batch, heads, seqlen, overlap, step, scale, kr, ki, f1r, f1i, tr, ti, f2r, f2i,
                FEATURES, N1, N2, ROWS, MIDDLE, WIDE, PRECISION,
            )  # fmt: skip
    else:
        unit = first
        while unit < last:
            f1r, f1i, f2r, f2i = matrices(f1_ptr, f2_ptr, N1, N2, ROWS, COLS)
            _one_unit(
                unit, u_ptr, pre_ptr, post_ptr, state_ptr, y_ptr, stride_u, stride_pre, stride_post, stride_y,
                head, batch, heads, seqlen, overlap, step, scale, kr, ki, f1r, f1i, tr, ti, f2r, f2i,
                FEATURES, N1, N2, ROWS, MIDDLE, WIDE, PRECISION,
            )  # fmt: skip
            unit += 1

"""The forward kernel of ``fft_conv`` (FlashFFTConv, arXiv:2311.05908): one pass over memory.

Overlap-save: a block of M positions makes the last ``M - overlap`` of them. Block c of a sequence begins at time
``c step - overlap``; before time 0 lies the initial state, the sequence's own end (circular), or zeros. Where all of a
sequence is one block and its first half would be zeros, only the other half is loaded, transformed and stored.

A thread block owns a head and runs through ``count`` transforms, each of a block of a pair of sequences:

    z = (2^-e0 v0) + i (2^-e1 v1)       v = pre u
    w = inverse(K * forward(z))
    y0 = post 2^e0 Re w,  y1 = post 2^e1 Im w

The skip term is a tap of the filter. Bytes a thread block requests: F1, F2 and the head's spectrum once; of each
transform u and pre (and the past) once for every position of the block inside the sequence, post and y once. FLOPs of
a pair: 16 M (N1 + N2), of which a half block saves those of N1 / 2, and kept columns those of N2 - COLS.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .transform import (
    VARYING,
    Numbers,
    Place,
    Spectrum,
    exponent,
    inverted,
    load_inputs,
    load_scale,
    load_spectrum,
    load_times,
    matrices,
    pair_of,
    positions,
    power_of_two,
    scale_back,
    stop_of,
    store_times,
    transformed,
    transforms_of,
    twiddles,
)


@triton.jit
def _convolve(
    transform, u, pre, post, state_ptr, y, numbers, spectrum, dft, FEATURES: tl.constexpr, SIZES: tl.constexpr
):  # fmt: skip
    """y of one block of a pair of sequences."""
    offs = positions(SIZES)
    b0, chunk = pair_of(transform, numbers, FEATURES)
    head, seqlen, overlap = numbers.head, numbers.seqlen, numbers.overlap
    place = Place(chunk * numbers.step - overlap, overlap, seqlen, SIZES.N1 * SIZES.N2)
    v0 = load_inputs(u, pre, state_ptr, b0, numbers, seqlen, place, offs, FEATURES, SIZES.WIDE)  # [ROWS, N2]
    e0 = exponent(v0)
    zr = (v0 * power_of_two(-e0)).to(dft.f1r.dtype)
    if FEATURES.pair:
        stop = stop_of(b0 + 1, numbers.batch, seqlen)
        v1 = load_inputs(u, pre, state_ptr, b0 + 1, numbers, stop, place, offs, FEATURES, SIZES.WIDE)
        e1 = exponent(v1)
        zi = (v1 * power_of_two(-e1)).to(dft.f1r.dtype)
    else:
        e1 = e0
        zi = tl.zeros_like(zr)
    kr, ki, scale = spectrum
    xr, xi = transformed(zr, zi, dft, SIZES)  # [N1, COLS]
    pr = ((xr * kr - xi * ki) * SIZES.MIDDLE).to(dft.f1r.dtype)
    pi = ((xr * ki + xi * kr) * SIZES.MIDDLE).to(dft.f1r.dtype)
    wr, wi = inverted(pr, pi, dft, SIZES)  # [ROWS, N2]

    times = place.start + offs
    mask = (offs >= overlap) & (times < seqlen)
    y0 = wr * scale * scale_back(e0)
    if FEATURES.post:
        y0 *= load_times(post, b0, head, place, times, mask, SIZES.WIDE)
    store_times(y, b0, head, place, times, y0, mask, SIZES.WIDE)
    if FEATURES.pair:
        mask = (offs >= overlap) & (times < stop)
        y1 = wi * scale * scale_back(e1)
        if FEATURES.post:
            y1 *= load_times(post, b0 + 1, head, place, times, mask, SIZES.WIDE)
        store_times(y, b0 + 1, head, place, times, y1, mask, SIZES.WIDE)


@triton.jit(do_not_specialize=VARYING)
def fft_conv_fwd_kernel(
    inputs,
    y,  # [B, H, N]
    filter,
    batch,
    heads,
    seqlen,
    overlap,
    step,
    chunks,
    count,  # transforms of a thread block
    FEATURES: tl.constexpr,
    SIZES: tl.constexpr,
):
    """y of ``count`` transforms of one head."""
    head, first, last = transforms_of(batch, heads, chunks, count, FEATURES)
    numbers = Numbers(head, batch, heads, seqlen, overlap, step)
    u, pre, post, state_ptr = inputs
    f1_ptr, f2_ptr = filter.f1_ptr, filter.f2_ptr
    tr, ti = twiddles(SIZES, f1_ptr.dtype.element_ty)
    kr, ki = load_spectrum(filter.spectrum_ptr, head, SIZES)
    spectrum = Spectrum(kr, ki, load_scale(filter.scale_ptr, head, SIZES))

    # What does not change is moved out of a for loop: operands into shared memory, and the room of every product's
    # result, of which all together are more than Blackwell's tensor memory. Out of a while loop they are not.
    if SIZES.HOIST:
        dft = matrices(f1_ptr, f2_ptr, tr, ti, SIZES)
        for transform in tl.range(first, last):
            _convolve(transform, u, pre, post, state_ptr, y, numbers, spectrum, dft, FEATURES, SIZES)
    else:
        transform = first
        while transform < last:
            dft = matrices(f1_ptr, f2_ptr, tr, ti, SIZES)
            _convolve(transform, u, pre, post, state_ptr, y, numbers, spectrum, dft, FEATURES, SIZES)
            transform += 1

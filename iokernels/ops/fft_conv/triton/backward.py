"""The backward kernel of ``fft_conv``: all gradients in one pass over the blocks of :mod:`.forward`.

Of long transforms the registers hold one at a time: there the launcher asks for dv, dk and dpost one after the other.

With g = post dy, of the positions that a block makes (``now``) and of those after them (``rest``),

    G = forward(g_now),  V = forward(v)
    dK += G conj(V)                                      float32, summed in the order of the blocks
    dv = inverse(conj(K) (G + forward(g_rest)))          du = pre dv,  dpre = u dv
    w  = inverse(K V)                                    dpost = dy w

A block whose first half is zero reaches nothing after it, so there ``rest`` is empty. The gradient of the initial state
is dv of a block before the first, at times -step to -1, of which only ``rest`` is not empty. Position i < overlap of a
block stands for time ``start + i`` of v and for ``start + i + M`` of g: behind its last position comes its first.

Scaling. G of a pair is scaled as v in the forward pass, each part by itself. In dK the parts of a pair are added up, so
there V is scaled to the same product ``2^-e`` for both parts, e from the larger; the smaller part has less to add. For
dpost, V is transformed again with each part scaled by itself.

Every thread block writes its own sum of dK, as frequencies; PyTorch adds those of a head up and brings them back to
taps. No atomics: the bits are the same on every run. Bytes a thread block requests: F1, F2, the
spectrum and its dK once; of each transform u and pre (and the past) once for every position, post and dy once for
those of ``now`` and of ``rest``; then u, pre and dy again where a gate's gradient or pre needs them; du, dpre, dpost
once. FLOPs of a pair: 8 M (N1 + N2) a transform, of which there are 3, one more for ``rest`` and two more for dpost.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .transform import (
    VARYING,
    Numbers,
    Place,
    Spectrum,
    Sums,
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
def _load_gradient(dy, post, batch, head, place, times, mask, FEATURES: tl.constexpr, WIDE: tl.constexpr):
    """g at ``times``, float32."""
    g = load_times(dy, batch, head, place, times, mask, WIDE)
    if FEATURES.post:
        g *= load_times(post, batch, head, place, times, mask, WIDE)
    return g


@triton.jit
def _later(place, offs, stop, FEATURES: tl.constexpr):
    """Times and mask of the gradient that is not ``now``: after the block, or, circular, after the sequence's end."""
    times = place.start + offs + tl.where(offs < place.overlap, place.length, 0)
    if FEATURES.periodic:
        wrapped = tl.where(times >= place.seqlen, times - place.seqlen, times)
        other = (offs < place.overlap) | (times >= place.seqlen)  # than the block makes
        return wrapped, (wrapped < stop) & other
    else:
        return times, (offs < place.overlap) & (times < stop)


@triton.jit
def _store_inputs(
    dv, batch, u, pre, du, dpre, dstate_ptr, numbers, stop, place, offs, mask,
    FEATURES: tl.constexpr, WANTED: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """du, dpre and dstate of dv."""
    head, times = numbers.head, place.start + offs
    if WANTED.state:
        at = dstate_ptr + (tl.cast(batch, tl.int64) * numbers.heads + head) * place.overlap + (times + place.overlap)
        before = (offs >= place.overlap) & (times + place.overlap >= 0) & (times < 0) & (times < stop)
        tl.store(at, dv, mask=before)
    if WANTED.pre:
        factor = load_times(u, batch, head, place, times, mask, WIDE)
        store_times(dpre, batch, head, place, times, dv * factor, mask, WIDE)
    if WANTED.u:
        if FEATURES.pre:
            dv *= load_times(pre, batch, head, place, times, mask, WIDE)
        store_times(du, batch, head, place, times, dv, mask, WIDE)


@triton.jit
def _store_gate(w, dy, dpost, batch, head, place, times, mask, WIDE: tl.constexpr):
    """dpost of w."""
    w *= load_times(dy, batch, head, place, times, mask, WIDE)
    store_times(dpost, batch, head, place, times, w, mask, WIDE)


@triton.jit
def _gradients(
    transform, sums, dy, u, pre, post, state_ptr, du, dpre, dpost, dstate_ptr, numbers, spectrum, dft,
    FEATURES: tl.constexpr, WANTED: tl.constexpr, REST: tl.constexpr, SIZES: tl.constexpr,
):  # fmt: skip
    """Gradients of one block of a pair of sequences; returns the sums of dK with its part."""
    WIDE: tl.constexpr = SIZES.WIDE
    batch, seqlen, overlap = numbers.batch, numbers.seqlen, numbers.overlap
    kr, ki, scale = spectrum
    sum_r, sum_i = sums
    offs = positions(SIZES)
    b0, chunk = pair_of(transform, numbers, FEATURES)
    if WANTED.state:
        chunk -= 1  # one more, before time 0
    place = Place(chunk * numbers.step - overlap, overlap, seqlen, SIZES.N1 * SIZES.N2)
    times = place.start + offs
    makes = offs >= overlap
    if WANTED.state:
        makes = makes & (times >= 0)
    now0 = makes & (times < seqlen)
    stop = stop_of(b0 + 1, batch, seqlen)
    now1 = makes & (times < stop)

    if WANTED.v or WANTED.k:
        g0 = _load_gradient(dy, post, b0, numbers.head, place, times, now0, FEATURES, WIDE)
        c0 = exponent(g0)
        if REST:
            later, mask = _later(place, offs, seqlen, FEATURES)
            h0 = _load_gradient(dy, post, b0, numbers.head, place, later, mask, FEATURES, WIDE)
            c0 = tl.maximum(c0, exponent(h0))
        zr = (g0 * power_of_two(-c0)).to(dft.f1r.dtype)
        if FEATURES.pair:
            g1 = _load_gradient(dy, post, b0 + 1, numbers.head, place, times, now1, FEATURES, WIDE)
            c1 = exponent(g1)
            if REST:
                later, mask = _later(place, offs, stop, FEATURES)
                h1 = _load_gradient(dy, post, b0 + 1, numbers.head, place, later, mask, FEATURES, WIDE)
                c1 = tl.maximum(c1, exponent(h1))
            zi = (g1 * power_of_two(-c1)).to(dft.f1r.dtype)
        else:
            c1 = c0
            zi = tl.zeros_like(zr)
        gr, gi = transformed(zr, zi, dft, SIZES)

    if WANTED.k or WANTED.post:
        v0 = load_inputs(u, pre, state_ptr, b0, numbers, seqlen, place, offs, FEATURES, WIDE)
        e0 = exponent(v0)
        if FEATURES.pair:
            v1 = load_inputs(u, pre, state_ptr, b0 + 1, numbers, stop, place, offs, FEATURES, WIDE)
            e1 = exponent(v1)
        else:
            e1 = e0
    if WANTED.k:
        product = tl.maximum(e0 + c0, e1 + c1)
        zr = (v0 * power_of_two(c0 - product)).to(dft.f1r.dtype)
        if FEATURES.pair:
            zi = (v1 * power_of_two(c1 - product)).to(dft.f1r.dtype)
        else:
            zi = tl.zeros_like(zr)
        xr, xi = transformed(zr, zi, dft, SIZES)
        factor = power_of_two(product)
        sum_r += (gr * xr + gi * xi) * factor
        sum_i += (gi * xr - gr * xi) * factor

    if WANTED.v:
        if REST:
            zr = (h0 * power_of_two(-c0)).to(dft.f1r.dtype)
            if FEATURES.pair:
                zi = (h1 * power_of_two(-c1)).to(dft.f1r.dtype)
            else:
                zi = tl.zeros_like(zr)
            hr, hi = transformed(zr, zi, dft, SIZES)
            gr += hr
            gi += hi
        pr = ((gr * kr + gi * ki) * SIZES.MIDDLE).to(dft.f1r.dtype)
        pi = ((gi * kr - gr * ki) * SIZES.MIDDLE).to(dft.f1r.dtype)
        wr, wi = inverted(pr, pi, dft, SIZES)
        dv = wr * scale * scale_back(c0)
        _store_inputs(dv, b0, u, pre, du, dpre, dstate_ptr, numbers, seqlen, place, offs, now0, FEATURES, WANTED, WIDE)
        if FEATURES.pair:
            dv = wi * scale * scale_back(c1)
            _store_inputs(
                dv, b0 + 1, u, pre, du, dpre, dstate_ptr, numbers, stop, place, offs, now1, FEATURES, WANTED, WIDE
            )

    if WANTED.post:
        zr = (v0 * power_of_two(-e0)).to(dft.f1r.dtype)
        if FEATURES.pair:
            zi = (v1 * power_of_two(-e1)).to(dft.f1r.dtype)
        else:
            zi = tl.zeros_like(zr)
        xr, xi = transformed(zr, zi, dft, SIZES)
        pr = ((xr * kr - xi * ki) * SIZES.MIDDLE).to(dft.f1r.dtype)
        pi = ((xr * ki + xi * kr) * SIZES.MIDDLE).to(dft.f1r.dtype)
        wr, wi = inverted(pr, pi, dft, SIZES)
        w0 = wr * scale * scale_back(e0)
        _store_gate(w0, dy, dpost, b0, numbers.head, place, times, now0, WIDE)
        if FEATURES.pair:
            w1 = wi * scale * scale_back(e1)
            _store_gate(w1, dy, dpost, b0 + 1, numbers.head, place, times, now1, WIDE)
    return Sums(sum_r, sum_i)


@triton.jit(do_not_specialize=VARYING)
def fft_conv_bwd_kernel(
    dy,  # [B, H, N]
    inputs,
    results,
    dk_ptr,  # float32 [parts, H, 2, N1, COLS] or None
    filter,
    batch,
    heads,
    seqlen,
    overlap,
    step,
    chunks,  # with the one before time 0, if the state's gradient is wanted
    count,  # transforms of a thread block
    FEATURES: tl.constexpr,
    WANTED: tl.constexpr,
    REST: tl.constexpr,  # gradients after a block reach it
    SIZES: tl.constexpr,
):
    """Gradients of ``count`` transforms of one head."""
    N1: tl.constexpr = SIZES.N1
    COLS: tl.constexpr = SIZES.COLS
    head, first, last = transforms_of(batch, heads, chunks, count, FEATURES)
    numbers = Numbers(head, batch, heads, seqlen, overlap, step)
    u, pre, post, state_ptr = inputs
    du, dpre, dpost, dstate_ptr = results
    f1_ptr, f2_ptr = filter.f1_ptr, filter.f2_ptr
    tr, ti = twiddles(SIZES, f1_ptr.dtype.element_ty)
    if WANTED.v or WANTED.post:
        kr, ki = load_spectrum(filter.spectrum_ptr, head, SIZES)
    else:
        kr, ki = tr, ti  # unused
    spectrum = Spectrum(kr, ki, load_scale(filter.scale_ptr, head, SIZES))
    sum_r = tl.zeros([N1, COLS] if WANTED.k else [1, 1], tl.float32)
    sum_i = tl.zeros([N1, COLS] if WANTED.k else [1, 1], tl.float32)
    sums = Sums(sum_r, sum_i)

    if SIZES.HOIST:
        dft = matrices(f1_ptr, f2_ptr, tr, ti, SIZES)
        for transform in tl.range(first, last):
            sums = _gradients(
                transform, sums, dy, u, pre, post, state_ptr, du, dpre, dpost, dstate_ptr, numbers, spectrum, dft,
                FEATURES, WANTED, REST, SIZES,
            )  # fmt: skip
    else:
        transform = first
        while transform < last:
            dft = matrices(f1_ptr, f2_ptr, tr, ti, SIZES)
            sums = _gradients(
                transform, sums, dy, u, pre, post, state_ptr, du, dpre, dpost, dstate_ptr, numbers, spectrum, dft,
                FEATURES, WANTED, REST, SIZES,
            )  # fmt: skip
            transform += 1

    if WANTED.k:
        at = dk_ptr + tl.cast(tl.program_id(0), tl.int64) * (2 * N1 * COLS)
        at = at + tl.arange(0, N1)[:, None] * COLS + tl.arange(0, COLS)[None, :]
        tl.store(at, sums.re)
        tl.store(at + N1 * COLS, sums.im)

"""The backward kernel of ``fft_conv``: all gradients in one pass over the blocks of :mod:`.triton_fwd`.

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
spectrum and its dK once; of each unit u and pre (and the past) once for every position, post and dy once for those of
``now`` and of ``rest``; then u, pre and dy again where a gate's gradient or pre needs them; du, dpre, dpost once. FLOPs
of a pair: 8 M (N1 + N2) a transform, of which there are 3, one more for ``rest`` and two more for dpost.
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
def _load_gradient(
    dy_ptr,
    post_ptr,
    stride_dy,
    stride_post,
    batch,
    head,
    place,
    times,
    mask,
    FEATURES: tl.constexpr,
    WIDE: tl.constexpr,
):
    """g at ``times``, float32."""
    g = load_times(dy_ptr, stride_dy, batch, head, place, times, mask, WIDE)
    if FEATURES.post:
        g *= load_times(post_ptr, stride_post, batch, head, place, times, mask, WIDE)
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
    dv, u_ptr, pre_ptr, du_ptr, dpre_ptr, dstate_ptr, stride_u, stride_pre, stride_du, stride_dpre,
    batch, head, heads, stop, place, offs, mask,
    FEATURES: tl.constexpr, WANTED: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """du, dpre and dstate of dv."""
    times = place.start + offs
    if WANTED.state:
        at = dstate_ptr + (tl.cast(batch, tl.int64) * heads + head) * place.overlap + (times + place.overlap)
        before = (offs >= place.overlap) & (times + place.overlap >= 0) & (times < 0) & (times < stop)
        tl.store(at, dv, mask=before)
    if WANTED.pre:
        u = load_times(u_ptr, stride_u, batch, head, place, times, mask, WIDE)
        store_times(dpre_ptr, stride_dpre, batch, head, place, times, dv * u, mask, WIDE)
    if WANTED.u:
        if FEATURES.pre:
            dv *= load_times(pre_ptr, stride_pre, batch, head, place, times, mask, WIDE)
        store_times(du_ptr, stride_du, batch, head, place, times, dv, mask, WIDE)


@triton.jit
def _store_gate(w, dy_ptr, dpost_ptr, stride_dy, stride_dpost, batch, head, place, times, mask, WIDE: tl.constexpr):
    """dpost of w."""
    w *= load_times(dy_ptr, stride_dy, batch, head, place, times, mask, WIDE)
    store_times(dpost_ptr, stride_dpost, batch, head, place, times, w, mask, WIDE)


@triton.jit
def _one_unit(
    unit, dy_ptr, u_ptr, pre_ptr, post_ptr, state_ptr, du_ptr, dpre_ptr, dpost_ptr, dstate_ptr, stride_dy, stride_u,
    stride_pre, stride_post, stride_du, stride_dpre, stride_dpost, head, batch, heads, seqlen, overlap, step,
    scale,
    sum_r, sum_i, kr, ki, f1r, f1i, tr, ti, f2r, f2i,
    FEATURES: tl.constexpr, WANTED: tl.constexpr, REST: tl.constexpr, N1: tl.constexpr, N2: tl.constexpr,
    ROWS: tl.constexpr, MIDDLE: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of one block of a pair of sequences; returns the sums of dK with its part."""
    members: tl.constexpr = 2 if FEATURES.pair else 1
    pairs = (batch + members - 1) // members
    offs = positions(N1, N2, ROWS)
    b0, chunk = unit % pairs * members, unit // pairs
    if WANTED.state:
        chunk -= 1  # one more, before time 0
    place = Place(chunk * step - overlap, overlap, seqlen, N1 * N2)
    times = place.start + offs
    makes = offs >= overlap
    if WANTED.state:
        makes = makes & (times >= 0)
    now0 = makes & (times < seqlen)
    stop = stop_of(b0 + 1, batch, seqlen)
    now1 = makes & (times < stop)

    if WANTED.v or WANTED.k:
        g0 = _load_gradient(dy_ptr, post_ptr, stride_dy, stride_post, b0, head, place, times, now0, FEATURES, WIDE)
        c0 = exponent(g0)
        if REST:
            later, mask = _later(place, offs, seqlen, FEATURES)
            h0 = _load_gradient(dy_ptr, post_ptr, stride_dy, stride_post, b0, head, place, later, mask, FEATURES, WIDE)
            c0 = tl.maximum(c0, exponent(h0))
        zr = (g0 * power_of_two(-c0)).to(f1r.dtype)
        if FEATURES.pair:
            g1 = _load_gradient(
                dy_ptr, post_ptr, stride_dy, stride_post, b0 + 1, head, place, times, now1, FEATURES, WIDE
            )
            c1 = exponent(g1)
            if REST:
                later, mask = _later(place, offs, stop, FEATURES)
                h1 = _load_gradient(
                    dy_ptr, post_ptr, stride_dy, stride_post, b0 + 1, head, place, later, mask, FEATURES, WIDE
                )
                c1 = tl.maximum(c1, exponent(h1))
            zi = (g1 * power_of_two(-c1)).to(f1r.dtype)
        else:
            c1 = c0
            zi = tl.zeros_like(zr)
        gr, gi = transformed(zr, zi, f1r, f1i, tr, ti, f2r, f2i, PRECISION)

    if WANTED.k or WANTED.post:
        v0 = load_inputs(
            u_ptr, pre_ptr, state_ptr, stride_u, stride_pre, b0, head, heads, seqlen, place, offs, FEATURES, WIDE
        )
        e0 = exponent(v0)
        if FEATURES.pair:
            v1 = load_inputs(
                u_ptr, pre_ptr, state_ptr, stride_u, stride_pre, b0 + 1, head, heads, stop, place, offs,
                FEATURES, WIDE,
            )  # fmt: skip
            e1 = exponent(v1)
        else:
            e1 = e0
    if WANTED.k:
        product = tl.maximum(e0 + c0, e1 + c1)
        zr = (v0 * power_of_two(c0 - product)).to(f1r.dtype)
        if FEATURES.pair:
            zi = (v1 * power_of_two(c1 - product)).to(f1r.dtype)
        else:
            zi = tl.zeros_like(zr)
        xr, xi = transformed(zr, zi, f1r, f1i, tr, ti, f2r, f2i, PRECISION)
        factor = power_of_two(product)
        sum_r += (gr * xr + gi * xi) * factor
        sum_i += (gi * xr - gr * xi) * factor

    if WANTED.v:
        if REST:
            zr = (h0 * power_of_two(-c0)).to(f1r.dtype)
            if FEATURES.pair:
                zi = (h1 * power_of_two(-c1)).to(f1r.dtype)
            else:
                zi = tl.zeros_like(zr)
            hr, hi = transformed(zr, zi, f1r, f1i, tr, ti, f2r, f2i, PRECISION)
            gr += hr
            gi += hi
        pr = ((gr * kr + gi * ki) * MIDDLE).to(f1r.dtype)
        pi = ((gi * kr - gr * ki) * MIDDLE).to(f1r.dtype)
        wr, wi = inverted(pr, pi, f1r, f1i, tr, ti, f2r, f2i, PRECISION)
        _store_inputs(
            wr * scale * scale_back(c0), u_ptr, pre_ptr, du_ptr, dpre_ptr, dstate_ptr, stride_u, stride_pre, stride_du,
            stride_dpre, b0, head, heads, seqlen, place, offs, now0, FEATURES, WANTED, WIDE,
        )  # fmt: skip
        if FEATURES.pair:
            _store_inputs(
                wi * scale * scale_back(c1), u_ptr, pre_ptr, du_ptr, dpre_ptr, dstate_ptr, stride_u, stride_pre,
                stride_du, stride_dpre, b0 + 1, head, heads, stop, place, offs, now1, FEATURES, WANTED, WIDE,
            )  # fmt: skip

    if WANTED.post:
        zr = (v0 * power_of_two(-e0)).to(f1r.dtype)
        if FEATURES.pair:
            zi = (v1 * power_of_two(-e1)).to(f1r.dtype)
        else:
            zi = tl.zeros_like(zr)
        xr, xi = transformed(zr, zi, f1r, f1i, tr, ti, f2r, f2i, PRECISION)
        pr = ((xr * kr - xi * ki) * MIDDLE).to(f1r.dtype)
        pi = ((xr * ki + xi * kr) * MIDDLE).to(f1r.dtype)
        wr, wi = inverted(pr, pi, f1r, f1i, tr, ti, f2r, f2i, PRECISION)
        w0 = wr * scale * scale_back(e0)
        _store_gate(w0, dy_ptr, dpost_ptr, stride_dy, stride_dpost, b0, head, place, times, now0, WIDE)
        if FEATURES.pair:
            w1 = wi * scale * scale_back(e1)
            _store_gate(w1, dy_ptr, dpost_ptr, stride_dy, stride_dpost, b0 + 1, head, place, times, now1, WIDE)
    return sum_r, sum_i


@triton.jit(do_not_specialize=["batch", "heads", "seqlen", "overlap", "step", "chunks", "units"])
def fft_conv_bwd_kernel(
    dy_ptr,  # [B, H, N]
    u_ptr,  # [B, H, N]
    pre_ptr,  # [B, H, N] or None
    post_ptr,  # [B, H, N] or None
    state_ptr,  # float32 [B, H, overlap] or None
    spectrum_ptr,  # [H, 2, N1, N2], real and imaginary
    scale_ptr,  # float32 [H], what the spectrum was divided by
    f1_ptr,  # [2, N1], roots of unity
    f2_ptr,  # [2, N2]
    du_ptr,  # [B, H, N] or None
    dpre_ptr,  # [B, H, N] or None
    dpost_ptr,  # [B, H, N] or None
    dstate_ptr,  # float32 [B, H, overlap] or None
    dk_ptr,  # float32 [parts, H, 2, N1, COLS] or None
    stride_dy,
    stride_u,
    stride_pre,
    stride_post,
    stride_du,
    stride_dpre,
    stride_dpost,
    batch,
    heads,
    seqlen,
    overlap,
    step,
    chunks,  # with the one before time 0, if the state's gradient is wanted
    units,  # blocks of pairs to a thread block
    FEATURES: tl.constexpr,
    WANTED: tl.constexpr,
    REST: tl.constexpr,  # gradients after a block reach it
    N1: tl.constexpr,
    N2: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    MIDDLE: tl.constexpr,  # the power of two nearest 1 / sqrt(M), from above
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    HOIST: tl.constexpr,  # what does not change moves out of the loop: see the forward kernel
):
    """Gradients of ``units`` blocks of one head."""
    head = tl.program_id(0) % heads
    first = tl.program_id(0) // heads * units
    members: tl.constexpr = 2 if FEATURES.pair else 1
    pairs = (batch + members - 1) // members
    last = tl.minimum(first + units, pairs * chunks)

    tr, ti = twiddles(N1, N2, f1_ptr.dtype.element_ty)
    if WANTED.v or WANTED.post:
        kr, ki = load_spectrum(spectrum_ptr, head, N1, N2, COLS)
    else:
        kr, ki = tr, ti  # unused
    scale = tl.load(scale_ptr + head) * (1.0 / (MIDDLE * N1 * N2))
    sum_r = tl.zeros([N1, COLS] if WANTED.k else [1, 1], tl.float32)
    sum_i = tl.zeros([N1, COLS] if WANTED.k else [1, 1], tl.float32)

    if HOIST:
        f1r, f1i, f2r, f2i = matrices(f1_ptr, f2_ptr, N1, N2, ROWS, COLS)
        for unit in tl.range(first, last):
            sum_r, sum_i = _one_unit(
                unit, dy_ptr, u_ptr, pre_ptr, post_ptr, state_ptr, du_ptr, dpre_ptr, dpost_ptr, dstate_ptr, stride_dy,
                stride_u, stride_pre, stride_post, stride_du, stride_dpre, stride_dpost, head, batch, heads, seqlen,
                overlap, step, scale, sum_r, sum_i, kr, ki, f1r, f1i, tr, ti, f2r, f2i,
                FEATURES, WANTED, REST, N1, N2, ROWS, MIDDLE, WIDE, PRECISION,
            )  # fmt: skip
    else:
        unit = first
        while unit < last:
            f1r, f1i, f2r, f2i = matrices(f1_ptr, f2_ptr, N1, N2, ROWS, COLS)
            sum_r, sum_i = _one_unit(
                unit, dy_ptr, u_ptr, pre_ptr, post_ptr, state_ptr, du_ptr, dpre_ptr, dpost_ptr, dstate_ptr, stride_dy,
                stride_u, stride_pre, stride_post, stride_du, stride_dpre, stride_dpost, head, batch, heads, seqlen,
                overlap, step, scale, sum_r, sum_i, kr, ki, f1r, f1i, tr, ti, f2r, f2i,
                FEATURES, WANTED, REST, N1, N2, ROWS, MIDDLE, WIDE, PRECISION,
            )  # fmt: skip
            unit += 1

    if WANTED.k:
        at = dk_ptr + tl.cast(tl.program_id(0), tl.int64) * (2 * N1 * COLS)
        at = at + tl.arange(0, N1)[:, None] * COLS + tl.arange(0, COLS)[None, :]
        tl.store(at, sum_r)
        tl.store(at + N1 * COLS, sum_i)

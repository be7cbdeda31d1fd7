"""Transforms on chip: what the forward and the backward kernel share (arXiv:2311.05908, sections 3.1 and 3.2).

A transform of M = N1 N2 numbers is two products of matrices (Bailey, 1990). With ``w_M = exp(-2 pi i / M)`` and the M
numbers as rows of N2, z[n1, n2] the one at ``N2 n1 + n2``,

    Z[k1, k2] = sum_n2 w_N2^(n2 k2) w_M^(n2 k1) sum_n1 w_N1^(n1 k1) z[n1, n2]  =  X[k1 + N1 k2]
    Z = ((F1 z) * T) F2,    back:    z = conj(F1) (((Z conj(F2)) * conj(T))) / M

The result stays in this order; the filter was brought into it once. F1 [N1, N1] and F2 [N2, N2] are constants that are
loaded, T [N1, N2] is made on chip.

Two sequences are the real and the imaginary part of one: for a real filter k, ``(v0 + i v1) * k`` has the parts
``v0 * k`` and ``v1 * k``. Each part is first scaled by a power of two so that its largest element is in [1, 2): then
16-bit floats hold it whatever its amplitude, and neither part is lost in the rounding of the other. Of the factor 1 / M
one half, 1 / sqrt(M) as a power of two, is applied between the two transforms, so nothing overflows: the first gives
2 sqrt(2) M at most, the second, whose input has an energy bounded by Parseval's equation, sqrt(8 N2 M) in its first
stage.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from iokernels.ops.shared.triton_tiles import View, at_head


class Features(NamedTuple):
    """What a kernel is compiled for."""

    pre: Any  # there is a gate on the input
    post: Any  # and on the output
    state: Any  # the past is in a tensor of its own
    periodic: Any  # the past is the end of the sequence
    pair: Any  # two sequences to a transform


class Sizes(NamedTuple):
    """What a kernel on chip is compiled for, beside features."""

    N1: Any
    N2: Any
    ROWS: Any  # the last rows of a block, of which the others are zeros
    COLS: Any  # columns of frequencies that are kept
    MIDDLE: Any  # the power of two nearest 1 / sqrt(M), from above
    WIDE: Any  # offsets in a block need 64 bits
    PRECISION: Any  # of products
    HOIST: Any  # what does not change moves out of the loop: see the forward kernel


VARYING = (
    "batch", "heads", "seqlen", "overlap", "step", "chunks", "stop", "limit", "first", "blocks", "total", "count",
)  # fmt: skip
"""Integers that change from call to call: no kernel is compiled anew for a value of theirs."""


class Filter(NamedTuple):
    """A filter and the roots of unity, contiguous."""

    spectrum_ptr: Any  # [H, 2, N1, N2], real and imaginary; through memory [H, N0 / 2 + 1, 2, N1, N2]
    scale_ptr: Any  # float32 [H], what the spectrum was divided by
    f1_ptr: Any  # [2, N1]
    f2_ptr: Any  # [2, N2]


class Inputs(NamedTuple):
    """What makes v, and the gate on the output."""

    u: View  # [B, H, N]
    pre: View
    post: View
    state_ptr: Any  # float32 [B, H, overlap] or None


class Results(NamedTuple):
    """Gradients, of which those that nobody wants are None."""

    u: View  # [B, H, N]
    pre: View
    post: View
    state_ptr: Any  # float32 [B, H, overlap]


class Numbers(NamedTuple):
    """The integers of a call, and the head of a thread block."""

    head: Any
    batch: Any
    heads: Any
    seqlen: Any
    overlap: Any
    step: Any


class Spectrum(NamedTuple):
    """The frequencies [N1, COLS] of a head, both parts, and the scale of a result."""

    re: Any
    im: Any
    scale: Any


class Sums(NamedTuple):
    """dK so far [N1, COLS], float32."""

    re: Any
    im: Any


class Matrices(NamedTuple):
    """F1 [N1, ROWS], T [N1, N2] and F2 [N2, COLS], both parts of each."""

    f1r: Any
    f1i: Any
    tr: Any
    ti: Any
    f2r: Any
    f2i: Any


class Place(NamedTuple):
    """Where a block of a sequence lies: position i of it is at time ``start + i``; ``overlap`` positions are past."""

    start: Any
    overlap: Any
    seqlen: Any
    length: Any


@triton.jit
def complex_dot(ar, ai, br, bi, PRECISION: tl.constexpr):
    """``(ar + i ai) @ (br + i bi)``, float32."""
    real = tl.dot(ar, br, input_precision=PRECISION)
    real = tl.dot(-ai, bi, real, input_precision=PRECISION)
    imag = tl.dot(ar, bi, input_precision=PRECISION)
    imag = tl.dot(ai, br, imag, input_precision=PRECISION)
    return real, imag


@triton.jit
def transformed(zr, zi, dft, SIZES: tl.constexpr):
    """Z [N1, COLS] float32 of z [ROWS, N2]."""
    f1r, f1i, tr, ti, f2r, f2i = dft
    ar, ai = complex_dot(f1r, f1i, zr, zi, SIZES.PRECISION)  # [N1, N2]
    br = (ar * tr - ai * ti).to(zr.dtype)
    bi = (ar * ti + ai * tr).to(zr.dtype)
    return complex_dot(br, bi, f2r, f2i, SIZES.PRECISION)  # [N1, COLS]


@triton.jit
def inverted(pr, pi, dft, SIZES: tl.constexpr):
    """M z [ROWS, N2] float32 of Z [N1, COLS]. F1 and F2 are symmetric, so the same tiles serve."""
    f1r, f1i, tr, ti, f2r, f2i = dft
    ar, ai = complex_dot(pr, pi, tl.trans(f2r), tl.trans(-f2i), SIZES.PRECISION)  # [N1, N2]
    br = (ar * tr + ai * ti).to(pr.dtype)
    bi = (ai * tr - ar * ti).to(pr.dtype)
    return complex_dot(tl.trans(f1r), tl.trans(-f1i), br, bi, SIZES.PRECISION)  # [ROWS, N2]


@triton.jit
def root_of_unity(power, ORDER: tl.constexpr, DTYPE: tl.constexpr):
    """exp(-2 pi i power / ORDER), both parts, to float32 accuracy before they are rounded.

    The angle is brought to within pi / 4 of a multiple of pi / 2 as a whole number, exactly; there a few terms of the
    series do. No table is loaded, and the general functions, which reduce any angle, would need local memory.
    """
    quarter: tl.constexpr = ORDER // 4
    power = power % ORDER
    turns = (power + quarter // 2) // quarter
    x = (power - turns * quarter).to(tl.float32) * (6.283185307179586 / ORDER)
    y = x * x
    sine = x * (1.0 + y * (-1 / 6 + y * (1 / 120 + y * (-1 / 5040 + y * (1 / 362880)))))
    cosine = 1.0 + y * (-1 / 2 + y * (1 / 24 + y * (-1 / 720 + y * (1 / 40320 - y * (1 / 3628800)))))
    swap = turns % 2 == 1
    real = tl.where(swap, sine, cosine)
    imag = tl.where(swap, cosine, sine)
    # cos(x + j pi / 2) is cos, -sin, -cos, sin; sin(x + j pi / 2) is sin, cos, -sin, -cos.
    real = tl.where((turns % 4 == 1) | (turns % 4 == 2), -real, real)
    imag = tl.where(turns % 4 >= 2, imag, -imag)
    return real.to(DTYPE), imag.to(DTYPE)


@triton.jit
def matrices(f1_ptr, f2_ptr, tr, ti, SIZES: tl.constexpr):
    """F1 [N1, ROWS] (of the last rows of a block), F2 [N2, COLS] (of the kept frequencies), with the given T.

    They are loaded, because what is computed the compiler would keep in registers; of the N roots of unity that a
    matrix of N by N is made of, because those are few bytes.
    """
    N1: tl.constexpr = SIZES.N1
    N2: tl.constexpr = SIZES.N2
    rows, cols = N1 - SIZES.ROWS + tl.arange(0, SIZES.ROWS), kept_columns(N2, SIZES.COLS)
    f1 = f1_ptr + tl.arange(0, N1)[:, None] * rows[None, :] % N1
    f2 = f2_ptr + tl.arange(0, N2)[:, None] * cols[None, :] % N2
    return Matrices(tl.load(f1), tl.load(f1 + N1), tr, ti, tl.load(f2), tl.load(f2 + N2))


@triton.jit
def twiddles(SIZES: tl.constexpr, DTYPE: tl.constexpr):
    """T [N1, N2]."""
    N1: tl.constexpr = SIZES.N1
    N2: tl.constexpr = SIZES.N2
    return root_of_unity(tl.arange(0, N1)[:, None] * tl.arange(0, N2)[None, :], N1 * N2, DTYPE)


@triton.jit
def load_spectrum(spectrum_ptr, index, SIZES: tl.constexpr):
    """The planes [N1, COLS] at ``index``, of a head or of a row of one."""
    N1: tl.constexpr = SIZES.N1
    N2: tl.constexpr = SIZES.N2
    at = spectrum_ptr + tl.cast(index, tl.int64) * (2 * N1 * N2)
    at = at + tl.arange(0, N1)[:, None] * N2 + kept_columns(N2, SIZES.COLS)[None, :]
    return tl.load(at), tl.load(at + N1 * N2)


@triton.jit
def load_scale(scale_ptr, head, SIZES: tl.constexpr):
    """What a head's results are multiplied by: of 1 / M the part that MIDDLE leaves, and the filter's scale."""
    N1: tl.constexpr = SIZES.N1
    N2: tl.constexpr = SIZES.N2
    MIDDLE: tl.constexpr = SIZES.MIDDLE
    return tl.load(scale_ptr + head) * (1.0 / (MIDDLE * N1 * N2))


@triton.jit
def kept_columns(N2: tl.constexpr, COLS: tl.constexpr):
    """Which k2 are kept: the first half and the last of so many columns, that is, low frequencies of both signs."""
    cols = tl.arange(0, COLS)
    return tl.where(cols < COLS // 2, cols, cols + (N2 - COLS))


@triton.jit
def positions(SIZES: tl.constexpr):
    """The positions in a block of the tile [ROWS, N2] that is loaded and stored."""
    N1: tl.constexpr = SIZES.N1
    N2: tl.constexpr = SIZES.N2
    ROWS: tl.constexpr = SIZES.ROWS
    return (N1 - ROWS + tl.arange(0, ROWS))[:, None] * N2 + tl.arange(0, N2)[None, :]


@triton.jit
def load_times(x, batch, head, place, times, mask, WIDE: tl.constexpr):
    """x[batch, head, times] as float32, 0 where masked."""
    row = at_head(x.ptr, x, batch, head, place.start)
    offset = times - place.start
    if WIDE:
        offset = offset.to(tl.int64)
    return tl.load(row + offset * x.n, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def store_times(x, batch, head, place, times, values, mask, WIDE: tl.constexpr):
    """Store x[batch, head, times]."""
    row = at_head(x.ptr, x, batch, head, place.start)
    offset = times - place.start
    if WIDE:
        offset = offset.to(tl.int64)
    tl.store(row + offset * x.n, values.to(x.ptr.dtype.element_ty), mask=mask)


@triton.jit
def stop_of(sequence, batch, seqlen):
    """Where a sequence ends; before all times if there is none, when the last one has no second beside it."""
    return tl.where(sequence < batch, seqlen, -(2**30))


@triton.jit
def pair_of(transform, numbers, FEATURES: tl.constexpr):
    """The first sequence and the chunk of a transform."""
    a_transform: tl.constexpr = 2 if FEATURES.pair else 1
    pairs = (numbers.batch + a_transform - 1) // a_transform
    return transform % pairs * a_transform, transform // pairs


@triton.jit
def transforms_of(batch, heads, chunks, count, FEATURES: tl.constexpr):
    """The head of this thread block, the first of its transforms, and where they end."""
    head = tl.program_id(0) % heads
    first = tl.program_id(0) // heads * count
    a_transform: tl.constexpr = 2 if FEATURES.pair else 1
    pairs = (batch + a_transform - 1) // a_transform
    return head, first, tl.minimum(first + count, pairs * chunks)


@triton.jit
def load_inputs(
    u, pre, state_ptr, batch, numbers, stop, place, offs, FEATURES: tl.constexpr, WIDE: tl.constexpr
):  # fmt: skip
    """v of a block before the time ``stop``, float32, with its past."""
    head = numbers.head
    times = place.start + offs
    mask = times < stop
    if FEATURES.periodic:
        times = tl.where(times < 0, times + place.seqlen, times)
    else:
        mask = mask & (times >= 0)
    v = load_times(u, batch, head, place, times, mask, WIDE)
    if FEATURES.pre:
        v *= load_times(pre, batch, head, place, times, mask, WIDE)
    if FEATURES.state:
        # [B, H, overlap] contiguous; the block that starts before time 0 sees it.
        past = state_ptr + (tl.cast(batch, tl.int64) * numbers.heads + head) * place.overlap
        mask = (times < 0) & (times < stop) & (times + place.overlap >= 0)
        v += tl.load(past + (times + place.overlap), mask=mask, other=0.0)
    return v


@triton.jit
def scale_back(e):
    """2^e, but 0 for what was scaled as zeros: of those nothing may be left but zeros."""
    return tl.where(e < -126, 0.0, power_of_two(e))


@triton.jit
def exponent(x):
    """e such that the largest magnitude of x is in [2^e, 2^(e + 1)); -127 of zeros."""
    return (tl.max(tl.abs(x)).to(tl.int32, bitcast=True) >> 23) - 127


@triton.jit
def power_of_two(e):
    """2^e, exact; e is clamped to the exponents of normal float32 numbers."""
    return ((tl.minimum(tl.maximum(e, -126), 127) + 127) << 23).to(tl.float32, bitcast=True)

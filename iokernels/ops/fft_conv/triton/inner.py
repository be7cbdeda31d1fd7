"""Transforms longer than a tile, through memory: the convolution of the rows in between.

Row k0 of A (:mod:`.outer`) with its twiddle factors, ``w_L^(m k0) A[k0, m]``, is transformed on chip as the
blocks of :mod:`.forward` are, multiplied by the filter's frequencies ``k0 + N0 k``, brought back, and written where
it came from. Rows 0 and N0 / 2 hold real numbers: one part is loaded and stored. Each row is scaled by itself.

A thread block owns a row of a head and runs through ``count`` sequences and blocks of them. Bytes it requests: its part
of the filter's frequencies once (and of the sum of dK); of each sequence its row once, and its result; two rows and one
or two results in the backward pass. FLOPs of a row: 16 M (N1 + N2) a convolution, 8 M (N1 + N2) a transform.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .transform import (
    VARYING,
    Spectrum,
    Sums,
    exponent,
    inverted,
    load_scale,
    load_spectrum,
    matrices,
    power_of_two,
    root_of_unity,
    scale_back,
    transformed,
    twiddles,
)


class RowSizes(NamedTuple):
    """What the kernels of this step are compiled for."""

    OUTER: Any  # rows of the whole transform
    N1: Any
    N2: Any
    ROWS: Any  # as many as N1
    COLS: Any  # columns of frequencies that are kept
    MIDDLE: Any  # the power of two nearest 1 / sqrt(M), from above
    PRECISION: Any  # of products
    HOIST: Any  # what does not change moves out of the loop: see forward
    TILE_ROWS: Any  # of the tiles in which the first step scaled A
    TILE_COLUMNS: Any


class Rows(NamedTuple):
    """A of one signal, and later what became of it, with the scales of both; None where it takes no part."""

    values_ptr: Any  # [chunks B H, N0, M]
    scales_ptr: Any  # float32 [chunks B H, N0 / ROWS, M / COLUMNS], of A
    out_scales_ptr: Any  # float32 [chunks B H, N0 / 2 + 1], of the result


class RowTwiddles(NamedTuple):
    """The twiddle factors of a row, a column of numbers and a row of them, of which they are the products."""

    ar: Any
    ai: Any
    br: Any
    bi: Any


@triton.jit
def _twiddles(row, SIZES: tl.constexpr):
    """``w_L^(m row)`` at m = N2 n1 + n2."""
    N1: tl.constexpr = SIZES.N1
    N2: tl.constexpr = SIZES.N2
    ORDER: tl.constexpr = SIZES.OUTER * SIZES.N1 * SIZES.N2
    ar, ai = root_of_unity(tl.arange(0, N1) * (N2 * row), ORDER, tl.float32)
    br, bi = root_of_unity(tl.arange(0, N2) * row, ORDER, tl.float32)
    return RowTwiddles(ar[:, None], ai[:, None], br[None, :], bi[None, :])


@triton.jit
def _turned(xr, xi, twiddle):
    """x times the twiddle factors."""
    ar, ai, br, bi = twiddle
    yr, yi = xr * ar - xi * ai, xr * ai + xi * ar
    return yr * br - yi * bi, yr * bi + yi * br


@triton.jit
def _turned_back(xr, xi, twiddle):
    """x times the conjugate twiddle factors."""
    return _turned(xr, xi, RowTwiddles(twiddle.ar, -twiddle.ai, twiddle.br, -twiddle.bi))


@triton.jit
def _load_row(rows, at, row, SIZES: tl.constexpr):
    """Row ``row`` of A, both parts float32 [N1, N2]; TILE_COLUMNS is a multiple of N2."""
    N1: tl.constexpr = SIZES.N1
    N2: tl.constexpr = SIZES.N2
    ROWS: tl.constexpr = SIZES.TILE_ROWS
    COLUMNS: tl.constexpr = SIZES.TILE_COLUMNS
    OUTER: tl.constexpr = SIZES.OUTER
    half: tl.constexpr = OUTER // 2
    tiles: tl.constexpr = N1 * N2 // COLUMNS
    offs = tl.arange(0, N1)[:, None] * N2 + tl.arange(0, N2)[None, :]
    tile = tl.arange(0, N1) * N2 // COLUMNS
    mirrored = row % half
    below = tl.where(mirrored == 0, 0, N1)  # rows of the tile that the imaginary part has
    values = rows.values_ptr + tl.cast(at, tl.int64) * (OUTER * N1 * N2)
    scales = rows.scales_ptr + tl.cast(at, tl.int64) * (OUTER // ROWS * tiles)
    xr = tl.load(values + (row * (N1 * N2) + offs)).to(tl.float32)
    xr *= tl.load(scales + (row // ROWS * tiles + tile))[:, None]
    second = half + mirrored
    xi = tl.load(values + (second * (N1 * N2) + offs), mask=offs < below * N2, other=0.0).to(tl.float32)
    xi *= tl.load(scales + (second // ROWS * tiles + tile), mask=tl.arange(0, N1) < below, other=0.0)[:, None]
    return xr, xi


@triton.jit
def _store_row(rows, at, row, xr, xi, SIZES: tl.constexpr):
    """Store row ``row``, scaled."""
    N1: tl.constexpr = SIZES.N1
    N2: tl.constexpr = SIZES.N2
    OUTER: tl.constexpr = SIZES.OUTER
    half: tl.constexpr = OUTER // 2
    offs = tl.arange(0, N1)[:, None] * N2 + tl.arange(0, N2)[None, :]
    mirrored = row % half
    below = tl.where(mirrored == 0, 0, N1 * N2)
    e = tl.maximum(exponent(xr), exponent(xi))
    factor = power_of_two(-e)
    values = rows.values_ptr + tl.cast(at, tl.int64) * (OUTER * N1 * N2)
    tl.store(values + (row * (N1 * N2) + offs), (xr * factor).to(rows.values_ptr.dtype.element_ty))
    values += (half + mirrored) * (N1 * N2)
    tl.store(values + offs, (xi * factor).to(rows.values_ptr.dtype.element_ty), mask=offs < below)
    tl.store(rows.out_scales_ptr + tl.cast(at, tl.int64) * (half + 1) + row, scale_back(e))


@triton.jit
def _forward_transform(rows, at, row, twiddle, dft, SIZES: tl.constexpr):
    """The frequencies of a row divided by 2^e, and e."""
    xr, xi = _load_row(rows, at, row, SIZES)
    xr, xi = _turned(xr, xi, twiddle)
    e = tl.maximum(exponent(xr), exponent(xi))
    zr, zi = (xr * power_of_two(-e)).to(dft.f1r.dtype), (xi * power_of_two(-e)).to(dft.f1r.dtype)
    xr, xi = transformed(zr, zi, dft, SIZES)  # [N1, COLS]
    return xr, xi, e


@triton.jit
def _and_back(pr, pi, e, scale, rows, at, row, twiddle, dft, SIZES: tl.constexpr):
    """Bring frequencies that were divided by 2^e back, and store the row."""
    pr, pi = (pr * SIZES.MIDDLE).to(dft.f1r.dtype), (pi * SIZES.MIDDLE).to(dft.f1r.dtype)
    wr, wi = inverted(pr, pi, dft, SIZES)  # [N1, N2]
    factor = scale * scale_back(e)
    wr, wi = _turned_back(wr * factor, wi * factor, twiddle)
    _store_row(rows, at, row, wr, wi, SIZES)


@triton.jit
def _constants(filter, head, row, FILTERED: tl.constexpr, SIZES: tl.constexpr):
    """T, the twiddle factors of a row, and the filter's frequencies of it, unless nothing is FILTERED."""
    tr, ti = twiddles(SIZES, filter.f1_ptr.dtype.element_ty)
    twiddle = _twiddles(row, SIZES)
    if FILTERED:
        index = tl.cast(head, tl.int64) * (SIZES.OUTER // 2 + 1) + row
        kr, ki = load_spectrum(filter.spectrum_ptr, index, SIZES)
    else:
        kr, ki = tr, ti  # unused
    return tr, ti, twiddle, Spectrum(kr, ki, load_scale(filter.scale_ptr, head, SIZES))


@triton.jit
def _one_row(at, row, rows, spectrum, twiddle, dft, SIZES: tl.constexpr):
    """Convolve one row of one sequence."""
    kr, ki, scale = spectrum
    xr, xi, e = _forward_transform(rows, at, row, twiddle, dft, SIZES)
    _and_back(xr * kr - xi * ki, xr * ki + xi * kr, e, scale, rows, at, row, twiddle, dft, SIZES)


@triton.jit(do_not_specialize=VARYING)
def fft_conv_fwd_inner_kernel(
    rows,
    filter,
    total,  # chunks B
    heads,
    count,  # of them to a thread block
    SIZES: tl.constexpr,
):
    """Convolve a row of ``count`` sequences of one head."""
    a_head: tl.constexpr = SIZES.OUTER // 2 + 1
    row, head = tl.program_id(0) % a_head, tl.program_id(0) // a_head % heads
    first = tl.program_id(0) // a_head // heads * count
    last = tl.minimum(first + count, total)
    f1_ptr, f2_ptr = filter.f1_ptr, filter.f2_ptr
    tr, ti, twiddle, spectrum = _constants(filter, head, row, True, SIZES)
    if SIZES.HOIST:
        dft = matrices(f1_ptr, f2_ptr, tr, ti, SIZES)
        for sequence in tl.range(first, last):
            _one_row(sequence * heads + head, row, rows, spectrum, twiddle, dft, SIZES)
    else:
        sequence = first
        while sequence < last:
            dft = matrices(f1_ptr, f2_ptr, tr, ti, SIZES)
            _one_row(sequence * heads + head, row, rows, spectrum, twiddle, dft, SIZES)
            sequence += 1


@triton.jit
def _one_gradient(
    at, row, sums, v_rows, g_rows, spectrum, twiddle, dft, WANTED: tl.constexpr, SIZES: tl.constexpr
):  # fmt: skip
    """dv and w of one row of one sequence; returns the sums of dK with its part."""
    kr, ki, scale = spectrum
    sum_r, sum_i = sums
    if WANTED.k or WANTED.post:
        xr, xi, e = _forward_transform(v_rows, at, row, twiddle, dft, SIZES)
    if WANTED.post:
        _and_back(xr * kr - xi * ki, xr * ki + xi * kr, e, scale, v_rows, at, row, twiddle, dft, SIZES)
    if WANTED.v or WANTED.k:
        gr, gi, c = _forward_transform(g_rows, at, row, twiddle, dft, SIZES)
    if WANTED.k:
        factor = scale_back(c) * scale_back(e)
        sum_r += (gr * xr + gi * xi) * factor
        sum_i += (gi * xr - gr * xi) * factor
    if WANTED.v:
        _and_back(gr * kr + gi * ki, gi * kr - gr * ki, c, scale, g_rows, at, row, twiddle, dft, SIZES)
    return Sums(sum_r, sum_i)


@triton.jit(do_not_specialize=VARYING)
def fft_conv_bwd_inner_kernel(
    v_rows,  # A of v, and of it that of w
    g_rows,  # A of g, and of it that of dv
    dk_ptr,  # float32 [parts, H, N0 / 2 + 1, 2, N1, COLS] or None
    filter,
    total,  # chunks B
    heads,
    count,  # of them to a thread block
    WANTED: tl.constexpr,
    SIZES: tl.constexpr,
):
    """dK, dv and w of a row of ``count`` sequences of one head; dK summed in float32 in the order of the sequences."""
    N1: tl.constexpr = SIZES.N1
    COLS: tl.constexpr = SIZES.COLS
    a_head: tl.constexpr = SIZES.OUTER // 2 + 1
    row, head = tl.program_id(0) % a_head, tl.program_id(0) // a_head % heads
    part = tl.program_id(0) // a_head // heads
    first = part * count
    last = tl.minimum(first + count, total)
    f1_ptr, f2_ptr = filter.f1_ptr, filter.f2_ptr
    tr, ti, twiddle, spectrum = _constants(filter, head, row, WANTED.v or WANTED.post, SIZES)
    sum_r = tl.zeros([N1, COLS] if WANTED.k else [1, 1], tl.float32)
    sum_i = tl.zeros([N1, COLS] if WANTED.k else [1, 1], tl.float32)
    sums = Sums(sum_r, sum_i)
    if SIZES.HOIST:
        dft = matrices(f1_ptr, f2_ptr, tr, ti, SIZES)
        for sequence in tl.range(first, last):
            sums = _one_gradient(
                sequence * heads + head, row, sums, v_rows, g_rows, spectrum, twiddle, dft, WANTED, SIZES
            )
    else:
        sequence = first
        while sequence < last:
            dft = matrices(f1_ptr, f2_ptr, tr, ti, SIZES)
            sums = _one_gradient(
                sequence * heads + head, row, sums, v_rows, g_rows, spectrum, twiddle, dft, WANTED, SIZES
            )
            sequence += 1
    if WANTED.k:
        at = dk_ptr + ((tl.cast(part, tl.int64) * heads + head) * a_head + row) * (2 * N1 * COLS)
        at = at + tl.arange(0, N1)[:, None] * COLS + tl.arange(0, COLS)[None, :]
        tl.store(at, sums.re)
        tl.store(at + N1 * COLS, sums.im)

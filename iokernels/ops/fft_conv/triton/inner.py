"""Transforms longer than a tile, through memory: the convolution of the rows in between.

Row k0 of A (:mod:`.triton_outer`) with its twiddle factors, ``w_L^(m k0) A[k0, m]``, is transformed on chip as the
blocks of :mod:`.triton_fwd` are, multiplied by the filter's frequencies ``k0 + N0 k``, brought back, and written where
it came from. Rows 0 and N0 / 2 hold real numbers: one part is loaded and stored. Each row is scaled by itself.

A thread block owns a row of a head and runs through ``units`` sequences and blocks of them. Bytes it requests: its part
of the filter's frequencies once (and of the sum of dK); of each unit its row once, and its result; two rows and one or
two results in the backward pass. FLOPs of a row: 16 M (N1 + N2) a convolution, 8 M (N1 + N2) a transform.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .transform import exponent, inverted, matrices, power_of_two, root_of_unity, scale_back, transformed, twiddles


@triton.jit
def _twiddles(row, OUTER: tl.constexpr, N1: tl.constexpr, N2: tl.constexpr):
    """``w_L^(m row)`` at m = N2 n1 + n2, as a column and a row of which it is the product."""
    ar, ai = root_of_unity(tl.arange(0, N1) * (N2 * row), OUTER * N1 * N2, tl.float32)
    br, bi = root_of_unity(tl.arange(0, N2) * row, OUTER * N1 * N2, tl.float32)
    return ar[:, None], ai[:, None], br[None, :], bi[None, :]


@triton.jit
def _turned(xr, xi, ar, ai, br, bi):
    """``x a b``."""
    yr, yi = xr * ar - xi * ai, xr * ai + xi * ar
    return yr * br - yi * bi, yr * bi + yi * br


@triton.jit
def _load_row(
    rows_ptr, scales_ptr, unit, row, OUTER: tl.constexpr, N1: tl.constexpr, N2: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """Row ``row`` of A, both parts float32 [N1, N2]; COLUMNS is a multiple of N2."""
    half: tl.constexpr = OUTER // 2
    tiles: tl.constexpr = N1 * N2 // COLUMNS
    offs = tl.arange(0, N1)[:, None] * N2 + tl.arange(0, N2)[None, :]
    tile = tl.arange(0, N1) * N2 // COLUMNS
    mirrored = row % half
    below = tl.where(mirrored == 0, 0, N1)  # rows of the tile that the imaginary part has
    at = rows_ptr + tl.cast(unit, tl.int64) * (OUTER * N1 * N2)
    scales = scales_ptr + tl.cast(unit, tl.int64) * (OUTER // ROWS * tiles)
    xr = tl.load(at + (row * (N1 * N2) + offs)).to(tl.float32)
    xr *= tl.load(scales + (row // ROWS * tiles + tile))[:, None]
    second = half + mirrored
    xi = tl.load(at + (second * (N1 * N2) + offs), mask=offs < below * N2, other=0.0).to(tl.float32)
    xi *= tl.load(scales + (second // ROWS * tiles + tile), mask=tl.arange(0, N1) < below, other=0.0)[:, None]
    return xr, xi


@triton.jit
def _store_row(
    rows_ptr, scales_ptr, unit, row, xr, xi, OUTER: tl.constexpr, N1: tl.constexpr, N2: tl.constexpr
):  # fmt: skip
    """Store row ``row``, scaled."""
    half: tl.constexpr = OUTER // 2
    offs = tl.arange(0, N1)[:, None] * N2 + tl.arange(0, N2)[None, :]
    mirrored = row % half
    below = tl.where(mirrored == 0, 0, N1 * N2)
    e = tl.maximum(exponent(xr), exponent(xi))
    factor = power_of_two(-e)
    at = rows_ptr + tl.cast(unit, tl.int64) * (OUTER * N1 * N2)
    tl.store(at + (row * (N1 * N2) + offs), (xr * factor).to(rows_ptr.dtype.element_ty))
    at += (half + mirrored) * (N1 * N2)
    tl.store(at + offs, (xi * factor).to(rows_ptr.dtype.element_ty), mask=offs < below)
    tl.store(scales_ptr + tl.cast(unit, tl.int64) * (half + 1) + row, scale_back(e))


@triton.jit
def _forward_transform(
    rows_ptr, scales_ptr, unit, row, ar, ai, br, bi, f1r, f1i, tr, ti, f2r, f2i,
    OUTER: tl.constexpr, N1: tl.constexpr, N2: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The frequencies of a row divided by 2^e, and e."""
    xr, xi = _load_row(rows_ptr, scales_ptr, unit, row, OUTER, N1, N2, ROWS, COLUMNS)
    xr, xi = _turned(xr, xi, ar, ai, br, bi)
    e = tl.maximum(exponent(xr), exponent(xi))
    zr, zi = (xr * power_of_two(-e)).to(f1r.dtype), (xi * power_of_two(-e)).to(f1r.dtype)
    xr, xi = transformed(zr, zi, f1r, f1i, tr, ti, f2r, f2i, PRECISION)
    return xr, xi, e


@triton.jit
def _and_back(
    pr, pi, e, scale, rows_ptr, scales_ptr, unit, row, ar, ai, br, bi, f1r, f1i, tr, ti, f2r, f2i,
    OUTER: tl.constexpr, N1: tl.constexpr, N2: tl.constexpr, MIDDLE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Bring frequencies that were divided by 2^e back, and store the row."""
    pr, pi = (pr * MIDDLE).to(f1r.dtype), (pi * MIDDLE).to(f1r.dtype)
    wr, wi = inverted(pr, pi, f1r, f1i, tr, ti, f2r, f2i, PRECISION)
    factor = scale * scale_back(e)
    wr, wi = _turned(wr * factor, wi * factor, ar, -ai, br, -bi)
    _store_row(rows_ptr, scales_ptr, unit, row, wr, wi, OUTER, N1, N2)


@triton.jit
def _load_frequencies(
    spectrum_ptr, head, row, OUTER: tl.constexpr, N1: tl.constexpr, N2: tl.constexpr, COLS: tl.constexpr
):  # fmt: skip
    """The filter's frequencies of a row, [N1, COLS]."""
    cols = tl.arange(0, COLS)
    cols = tl.where(cols < COLS // 2, cols, cols + (N2 - COLS))
    at = spectrum_ptr + (tl.cast(head, tl.int64) * (OUTER // 2 + 1) + row) * (2 * N1 * N2)
    at = at + tl.arange(0, N1)[:, None] * N2 + cols[None, :]
    return tl.load(at), tl.load(at + N1 * N2)


@triton.jit
def _one_row(
    at, row, rows_ptr, scales_ptr, out_scales_ptr, scale, kr, ki, ar, ai, br, bi, f1r, f1i, tr, ti, f2r, f2i,
    OUTER: tl.constexpr, N1: tl.constexpr, N2: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    MIDDLE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Convolve one row of one sequence."""
    xr, xi, e = _forward_transform(
        rows_ptr, scales_ptr, at, row, ar, ai, br, bi, f1r, f1i, tr, ti, f2r, f2i,
        OUTER, N1, N2, ROWS, COLUMNS, PRECISION,
    )  # fmt: skip
    _and_back(
        xr * kr - xi * ki, xr * ki + xi * kr, e, scale, rows_ptr, out_scales_ptr, at, row, ar, ai, br, bi,
        f1r, f1i, tr, ti, f2r, f2i, OUTER, N1, N2, MIDDLE, PRECISION,
    )  # fmt: skip


@triton.jit(do_not_specialize=["total", "heads", "units"])
def fft_conv_fwd_inner_kernel(
    rows_ptr,  # [chunks, B, H, N0, M]: A, and what becomes of it
    scales_ptr,  # float32 [chunks, B, H, N0 / ROWS, M / COLUMNS], of A
    out_scales_ptr,  # float32 [chunks, B, H, N0 / 2 + 1], of the result
    spectrum_ptr,  # [H, N0 / 2 + 1, 2, N1, N2]
    scale_ptr,  # float32 [H], what the spectrum was divided by
    f1_ptr,  # [2, N1], roots of unity
    f2_ptr,  # [2, N2]
    total,  # chunks B
    heads,
    units,  # of them to a thread block
    OUTER: tl.constexpr,
    N1: tl.constexpr,
    N2: tl.constexpr,
    COLS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    MIDDLE: tl.constexpr,
    PRECISION: tl.constexpr,
    HOIST: tl.constexpr,  # what does not change moves out of the loop: see forward
):
    """Convolve a row of ``units`` sequences of one head."""
    rows: tl.constexpr = OUTER // 2 + 1
    row, head = tl.program_id(0) % rows, tl.program_id(0) // rows % heads
    first = tl.program_id(0) // rows // heads * units
    last = tl.minimum(first + units, total)
    tr, ti = twiddles(N1, N2, f1_ptr.dtype.element_ty)
    ar, ai, br, bi = _twiddles(row, OUTER, N1, N2)
    kr, ki = _load_frequencies(spectrum_ptr, head, row, OUTER, N1, N2, COLS)
    scale = tl.load(scale_ptr + head) * (1.0 / (MIDDLE * N1 * N2))
    if HOIST:
        f1r, f1i, f2r, f2i = matrices(f1_ptr, f2_ptr, N1, N2, N1, COLS)
        for unit in tl.range(first, last):
            _one_row(
                unit * heads + head, row, rows_ptr, scales_ptr, out_scales_ptr, scale, kr, ki, ar, ai, br, bi,
                f1r, f1i, tr, ti, f2r, f2i, OUTER, N1, N2, ROWS, COLUMNS, MIDDLE, PRECISION,
            )  # fmt: skip
    else:
        unit = first
        while unit < last:
            f1r, f1i, f2r, f2i = matrices(f1_ptr, f2_ptr, N1, N2, N1, COLS)
            _one_row(
                unit * heads + head, row, rows_ptr, scales_ptr, out_scales_ptr, scale, kr, ki, ar, ai, br, bi,
                f1r, f1i, tr, ti, f2r, f2i, OUTER, N1, N2, ROWS, COLUMNS, MIDDLE, PRECISION,
            )  # fmt: skip
            unit += 1


@triton.jit
def _one_gradient(
    at, row, v_rows_ptr, v_scales_ptr, w_scales_ptr, g_rows_ptr, g_scales_ptr, dv_scales_ptr, scale, kr, ki,
    sum_r, sum_i, ar, ai, br, bi, f1r, f1i, tr, ti, f2r, f2i,
    WANTED: tl.constexpr, OUTER: tl.constexpr, N1: tl.constexpr, N2: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, MIDDLE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dv and w of one row of one sequence; returns the sums of dK with its part."""
    if WANTED.k or WANTED.post:
        xr, xi, e = _forward_transform(
            v_rows_ptr, v_scales_ptr, at, row, ar, ai, br, bi, f1r, f1i, tr, ti, f2r, f2i,
            OUTER, N1, N2, ROWS, COLUMNS, PRECISION,
        )  # fmt: skip
    if WANTED.post:
        _and_back(
            xr * kr - xi * ki, xr * ki + xi * kr, e, scale, v_rows_ptr, w_scales_ptr, at, row, ar, ai, br, bi,
            f1r, f1i, tr, ti, f2r, f2i, OUTER, N1, N2, MIDDLE, PRECISION,
        )  # fmt: skip
    if WANTED.v or WANTED.k:
        gr, gi, c = _forward_transform(
            g_rows_ptr, g_scales_ptr, at, row, ar, ai, br, bi, f1r, f1i, tr, ti, f2r, f2i,
            OUTER, N1, N2, ROWS, COLUMNS, PRECISION,
        )  # fmt: skip
    if WANTED.k:
        factor = scale_back(c) * scale_back(e)
        sum_r += (gr * xr + gi * xi) * factor
        sum_i += (gi * xr - gr * xi) * factor
    if WANTED.v:
        _and_back(
            gr * kr + gi * ki, gi * kr - gr * ki, c, scale, g_rows_ptr, dv_scales_ptr, at, row, ar, ai, br, bi,
            f1r, f1i, tr, ti, f2r, f2i, OUTER, N1, N2, MIDDLE, PRECISION,
        )  # fmt: skip
    return sum_r, sum_i


@triton.jit(do_not_specialize=["total", "heads", "units"])
def fft_conv_bwd_inner_kernel(
    v_rows_ptr,  # [chunks, B, H, N0, M]: A of v, and of it that of w; or None
    v_scales_ptr,  # float32 [chunks, B, H, N0 / ROWS, M / COLUMNS], of A
    w_scales_ptr,  # float32 [chunks, B, H, N0 / 2 + 1], of the result
    g_rows_ptr,  # the same for g, and of it that of dv; or None
    g_scales_ptr,
    dv_scales_ptr,
    spectrum_ptr,  # [H, N0 / 2 + 1, 2, N1, N2]
    scale_ptr,  # float32 [H], what the spectrum was divided by
    f1_ptr,  # [2, N1], roots of unity
    f2_ptr,  # [2, N2]
    dk_ptr,  # float32 [parts, H, N0 / 2 + 1, 2, N1, COLS] or None
    total,  # chunks B
    heads,
    units,  # of them to a thread block
    WANTED: tl.constexpr,
    OUTER: tl.constexpr,
    N1: tl.constexpr,
    N2: tl.constexpr,
    COLS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    MIDDLE: tl.constexpr,
    PRECISION: tl.constexpr,
    HOIST: tl.constexpr,
):
    """dK, dv and w of a row of ``units`` sequences of one head; dK summed in float32 in the order of the sequences."""
    rows: tl.constexpr = OUTER // 2 + 1
    row, head = tl.program_id(0) % rows, tl.program_id(0) // rows % heads
    part = tl.program_id(0) // rows // heads
    first = part * units
    last = tl.minimum(first + units, total)
    tr, ti = twiddles(N1, N2, f1_ptr.dtype.element_ty)
    ar, ai, br, bi = _twiddles(row, OUTER, N1, N2)
    if WANTED.v or WANTED.post:
        kr, ki = _load_frequencies(spectrum_ptr, head, row, OUTER, N1, N2, COLS)
    else:
        kr, ki = tr, ti  # unused
    scale = tl.load(scale_ptr + head) * (1.0 / (MIDDLE * N1 * N2))
    sum_r = tl.zeros([N1, COLS] if WANTED.k else [1, 1], tl.float32)
    sum_i = tl.zeros([N1, COLS] if WANTED.k else [1, 1], tl.float32)
    if HOIST:
        f1r, f1i, f2r, f2i = matrices(f1_ptr, f2_ptr, N1, N2, N1, COLS)
        for unit in tl.range(first, last):
            sum_r, sum_i = _one_gradient(
                unit * heads + head, row, v_rows_ptr, v_scales_ptr, w_scales_ptr, g_rows_ptr, g_scales_ptr,
                dv_scales_ptr, scale, kr, ki, sum_r, sum_i, ar, ai, br, bi, f1r, f1i, tr, ti, f2r, f2i,
                WANTED, OUTER, N1, N2, ROWS, COLUMNS, MIDDLE, PRECISION,
            )  # fmt: skip
    else:
        unit = first
        while unit < last:
            f1r, f1i, f2r, f2i = matrices(f1_ptr, f2_ptr, N1, N2, N1, COLS)
            sum_r, sum_i = _one_gradient(
                unit * heads + head, row, v_rows_ptr, v_scales_ptr, w_scales_ptr, g_rows_ptr, g_scales_ptr,
                dv_scales_ptr, scale, kr, ki, sum_r, sum_i, ar, ai, br, bi, f1r, f1i, tr, ti, f2r, f2i,
                WANTED, OUTER, N1, N2, ROWS, COLUMNS, MIDDLE, PRECISION,
            )  # fmt: skip
            unit += 1
    if WANTED.k:
        at = dk_ptr + ((tl.cast(part, tl.int64) * heads + head) * rows + row) * (2 * N1 * COLS)
        at = at + tl.arange(0, N1)[:, None] * COLS + tl.arange(0, COLS)[None, :]
        tl.store(at, sum_r)
        tl.store(at + N1 * COLS, sum_i)

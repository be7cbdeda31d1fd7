"""Transforms longer than a tile, through memory: the first and the last step, which see a whole sequence.

With L = N0 M points, of which position ``n = M n0 + m``, and ``w_L = exp(-2 pi i / L)`` (Bailey, 1990),

    X[k0 + N0 k] = sum_m w_M^(m k) w_L^(m k0) A[k0, m],        A[k0, m] = sum_n0 w_N0^(n0 k0) x[n0, m]

The kernels here make A of x, and x of A; those of :mod:`.inner` work on the rows of A, each a transform of M
points on chip. x is real, so A[N0 - k0] = conj(A[k0]): the rows from 0 to N0 / 2 are all there is. Rows 0 and N0 / 2
are real, and the second of them takes the place of the first one's imaginary part. So A is a matrix [N0, M] of real
numbers (first the real, then the imaginary parts), and both ways are one product with a real matrix [N0, N0]: half the
operations of complex ones on pairs of sequences, as many bytes, and no sequence meets another.

In memory A is of the kernels' own dtype, each tile divided by a power of two that is kept beside it, so that 16-bit
floats hold it whatever its amplitude. Bytes a thread block requests: its part of the matrix; of A or x the columns of
its tile, without the rows that are zeros; gates; its tile of the result. FLOPs of a sequence: 2 N0 L each way, of which
rows of zeros, and rows that nobody wants, save their share.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from iokernels.ops.shared.triton_tiles import View

from .transform import VARYING, Place, exponent, load_times, power_of_two, scale_back, store_times


class Source(NamedTuple):
    """What a signal is made of, at compile time."""

    gate: Any  # it has a factor
    state: Any  # what lies before time 0 is in a tensor of its own
    periodic: Any  # what lies before time 0 and after the end is the other end


class TileSizes(NamedTuple):
    """What the kernels of these steps are compiled for: tiles of ROWS by COLUMNS, from products of DEPTH at a time."""

    OUTER: Any  # N0
    LENGTH: Any  # M
    ROWS: Any
    COLUMNS: Any
    DEPTH: Any
    PRECISION: Any  # of products
    WIDE: Any  # offsets from a block's first position need 64 bits


class Signal(NamedTuple):
    """What is transformed: v is made of u, pre and the initial state, g of dy and post."""

    x: View  # [B, H, N]
    gate: View
    state_ptr: Any  # float32 [B, H, overlap] or None


class Scaled(NamedTuple):
    """A as it is stored, and the matrix of the transform."""

    values_ptr: Any  # [chunks, B, H, N0, M]
    scales_ptr: Any  # float32, what it was divided by: of tiles [chunks, B, H, N0 / ROWS, M / COLUMNS], or of rows
    basis_ptr: Any  # [N0, N0], real


class Extent(NamedTuple):
    """What position i of block ``chunk`` stands for: time ``start + i``, if i is below ``stop`` and the time below
    ``limit``; ``past`` times before 0 have a tensor of their own."""

    start: Any
    stop: Any
    limit: Any
    past: Any
    seqlen: Any


@triton.jit
def _signal(x, gate, state_ptr, batch, head, channel, extent, offs, SOURCE: tl.constexpr, WIDE: tl.constexpr):
    """``gate x`` at the positions ``offs``, float32."""
    times = extent.start + offs
    mask = (offs < extent.stop) & (times < extent.limit)
    inside = mask
    if SOURCE.periodic:
        times = tl.where(times < 0, times + extent.seqlen, times)
        times = tl.where(times >= extent.seqlen, times - extent.seqlen, times)
    else:
        inside = mask & (times >= 0)
    place = Place(extent.start, extent.past, extent.seqlen, extent.stop)
    values = load_times(x, batch, head, place, times, inside, WIDE)
    if SOURCE.gate:
        values *= load_times(gate, batch, head, place, times, inside, WIDE)
    if SOURCE.state:
        # [B, H, past] contiguous.
        before = state_ptr + tl.cast(channel, tl.int64) * extent.past
        values += tl.load(before + (times + extent.past), mask=mask & (times < 0), other=0.0)
    return values


@triton.jit
def _into_rows(
    signal, rows, batch, heads, seqlen, overlap, step, stop, limit, SOURCE: tl.constexpr, SIZES: tl.constexpr
):  # fmt: skip
    """One tile of A, of one block of one sequence."""
    OUTER: tl.constexpr = SIZES.OUTER
    LENGTH: tl.constexpr = SIZES.LENGTH
    ROWS: tl.constexpr = SIZES.ROWS
    COLUMNS: tl.constexpr = SIZES.COLUMNS
    DEPTH: tl.constexpr = SIZES.DEPTH
    x, gate, state_ptr = signal
    rows_ptr, scales_ptr, basis_ptr = rows
    blocks: tl.constexpr = OUTER // ROWS
    tiles: tl.constexpr = LENGTH // COLUMNS
    # Neighbours read the same columns of x.
    block, tile = tl.program_id(0) % blocks, tl.program_id(0) // blocks % tiles
    row = tl.program_id(0) // (blocks * tiles)  # of [chunks, B, H]
    head, sequence = row % heads, row // heads % batch
    start = row // heads // batch * step - overlap
    extent = Extent(start, stop, limit, overlap, seqlen)

    frequencies = block * ROWS + tl.arange(0, ROWS)
    columns = tile * COLUMNS + tl.arange(0, COLUMNS)
    filled = tl.maximum(tl.minimum(stop, limit - start), 0)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for step_of in tl.range(0, tl.cdiv(filled, LENGTH * DEPTH)):
        n0 = step_of * DEPTH + tl.arange(0, DEPTH)
        offs = n0[:, None] * LENGTH + columns[None, :]
        channel = sequence * heads + head
        values = _signal(x, gate, state_ptr, sequence, head, channel, extent, offs, SOURCE, SIZES.WIDE)
        e = exponent(values)
        basis = tl.load(basis_ptr + frequencies[:, None] * OUTER + n0[None, :])
        values = (values * power_of_two(-e)).to(basis.dtype)
        total += tl.dot(basis, values, input_precision=SIZES.PRECISION) * power_of_two(e)

    e = exponent(total)
    at = rows_ptr + tl.cast(row, tl.int64) * (OUTER * LENGTH)
    at = at + (frequencies[:, None] * LENGTH + columns[None, :])
    tl.store(at, (total * power_of_two(-e)).to(rows_ptr.dtype.element_ty))
    tl.store(scales_ptr + tl.cast(row, tl.int64) * (blocks * tiles) + (block * tiles + tile), scale_back(e))


@triton.jit
def _tile_of(first, blocks, SIZES: tl.constexpr):
    """The row [chunks, B, H] of this thread block, its rows n0 and columns of x, from the tile ``first`` of rows on."""
    tiles: tl.constexpr = SIZES.LENGTH // SIZES.COLUMNS
    block, tile = tl.program_id(0) % blocks, tl.program_id(0) // blocks % tiles
    n0 = (first + block) * SIZES.ROWS + tl.arange(0, SIZES.ROWS)
    columns = tile * SIZES.COLUMNS + tl.arange(0, SIZES.COLUMNS)
    return tl.program_id(0) // blocks // tiles, n0, columns


@triton.jit
def _out_of_rows(rows, row, n0, columns, SIZES: tl.constexpr):
    """A tile of x [n0, columns], float32, of A whose rows are scaled each by itself."""
    OUTER: tl.constexpr = SIZES.OUTER
    LENGTH: tl.constexpr = SIZES.LENGTH
    ROWS: tl.constexpr = SIZES.ROWS
    COLUMNS: tl.constexpr = SIZES.COLUMNS
    DEPTH: tl.constexpr = SIZES.DEPTH
    rows_ptr, scales_ptr, basis_ptr = rows
    half: tl.constexpr = OUTER // 2
    at = rows_ptr + tl.cast(row, tl.int64) * (OUTER * LENGTH)
    scales = scales_ptr + tl.cast(row, tl.int64) * (half + 1)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for step_of in tl.range(0, OUTER // DEPTH):
        k = step_of * DEPTH + tl.arange(0, DEPTH)
        # Real parts, and the row N0 / 2 in the place of row 0's imaginary part.
        scale = tl.load(scales + tl.where(k <= half, k, k - half))
        e = (tl.max(scale, 0).to(tl.int32, bitcast=True) >> 23) - 127
        basis = tl.load(basis_ptr + n0[:, None] * OUTER + k[None, :])
        values = tl.load(at + (k[:, None] * LENGTH + columns[None, :])).to(tl.float32)
        values = (values * (scale * power_of_two(-e))[:, None]).to(basis.dtype)
        total += tl.dot(basis, values, input_precision=SIZES.PRECISION) * power_of_two(e)
    # The matrix holds the weights 1 and 2 of single and of mirrored frequencies, halved.
    return total * (2.0 / OUTER)


@triton.jit(do_not_specialize=VARYING)
def fft_conv_outer_fwd_in_kernel(
    signal, rows, batch, heads, seqlen, overlap, step, stop, limit, SOURCE: tl.constexpr, SIZES: tl.constexpr
):  # fmt: skip
    """A of v = pre u."""
    _into_rows(signal, rows, batch, heads, seqlen, overlap, step, stop, limit, SOURCE, SIZES)


@triton.jit(do_not_specialize=VARYING)
def fft_conv_outer_bwd_in_kernel(
    signal, rows, batch, heads, seqlen, overlap, step, stop, limit, SOURCE: tl.constexpr, SIZES: tl.constexpr
):  # fmt: skip
    """A of v = pre u, or of g = post dy, for the backward pass."""
    _into_rows(signal, rows, batch, heads, seqlen, overlap, step, stop, limit, SOURCE, SIZES)


@triton.jit(do_not_specialize=VARYING)
def fft_conv_outer_fwd_out_kernel(
    rows,
    post,  # [B, H, N]
    y,  # [B, H, N]
    batch,
    heads,
    seqlen,
    overlap,
    step,
    first,  # tile of rows n0 that is wanted
    blocks,  # how many of them are
    POST: tl.constexpr,
    SIZES: tl.constexpr,
):
    """y = post w of one tile; positions before ``overlap`` are no results."""
    row, n0, columns = _tile_of(first, blocks, SIZES)
    head, sequence, chunk = row % heads, row // heads % batch, row // heads // batch
    values = _out_of_rows(rows, row, n0, columns, SIZES)  # [ROWS, COLUMNS]
    place = Place(chunk * step - overlap, overlap, seqlen, SIZES.OUTER * SIZES.LENGTH)
    offs = n0[:, None] * SIZES.LENGTH + columns[None, :]
    times = place.start + offs
    mask = (offs >= overlap) & (times < seqlen)
    if POST:
        values *= load_times(post, sequence, head, place, times, mask, SIZES.WIDE)
    store_times(y, sequence, head, place, times, values, mask, SIZES.WIDE)


@triton.jit(do_not_specialize=VARYING)
def fft_conv_outer_bwd_out_kernel(
    rows,
    u,  # [B, H, N]
    pre,  # [B, H, N]
    dy,  # [B, H, N]
    grads,
    batch,
    heads,
    seqlen,
    overlap,
    step,
    stop,  # positions from here on are no results
    first,  # tile of rows n0 that is wanted
    blocks,  # how many of them are
    SOURCE: tl.constexpr,
    WANTED: tl.constexpr,
    SIZES: tl.constexpr,
):
    """du, dpre and dstate of one tile of dv, or dpost of one of w."""
    WIDE: tl.constexpr = SIZES.WIDE
    row, n0, columns = _tile_of(first, blocks, SIZES)
    head, sequence, chunk = row % heads, row // heads % batch, row // heads // batch
    x = _out_of_rows(rows, row, n0, columns, SIZES)  # [ROWS, COLUMNS]
    place = Place(chunk * step - overlap, overlap, seqlen, SIZES.OUTER * SIZES.LENGTH)
    offs = n0[:, None] * SIZES.LENGTH + columns[None, :]
    times = place.start + offs
    mask = (offs < stop) & (times >= 0) & (times < seqlen)
    if WANTED.post:
        mask = mask & (offs >= overlap)
        x *= load_times(dy, sequence, head, place, times, mask, WIDE)
        store_times(grads.post, sequence, head, place, times, x, mask, WIDE)
    else:
        if WANTED.state:
            at = grads.state_ptr + (tl.cast(sequence, tl.int64) * heads + head) * overlap + (times + overlap)
            tl.store(at, x, mask=(offs < stop) & (times < 0))
        if WANTED.pre:
            factor = load_times(u, sequence, head, place, times, mask, WIDE)
            store_times(grads.pre, sequence, head, place, times, x * factor, mask, WIDE)
        if WANTED.u:
            if SOURCE.gate:
                x *= load_times(pre, sequence, head, place, times, mask, WIDE)
            store_times(grads.u, sequence, head, place, times, x, mask, WIDE)

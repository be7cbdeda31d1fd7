"""Transforms longer than a tile, through memory: the first and the last step, which see a whole sequence.

With L = N0 M points, of which position ``n = M n0 + m``, and ``w_L = exp(-2 pi i / L)`` (Bailey, 1990),

    X[k0 + N0 k] = sum_m w_M^(m k) w_L^(m k0) A[k0, m],        A[k0, m] = sum_n0 w_N0^(n0 k0) x[n0, m]

The kernels here make A of x, and x of A; those of :mod:`.triton_inner` work on the rows of A, each a transform of M
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

from .transform import Place, exponent, load_times, power_of_two, scale_back, store_times


class Source(NamedTuple):
    """What a signal is made of, at compile time."""

    gate: Any  # it has a factor
    state: Any  # what lies before time 0 is in a tensor of its own
    periodic: Any  # what lies before time 0 and after the end is the other end


class Extent(NamedTuple):
    """What position i of block ``chunk`` stands for: time ``start + i``, if i is below ``stop`` and the time below
    ``limit``; ``past`` times before 0 have a tensor of their own."""

    start: Any
    stop: Any
    limit: Any
    past: Any
    seqlen: Any


@triton.jit
def _signal(
    x_ptr, gate_ptr, state_ptr, stride_x, stride_gate, batch, head, channel, extent, offs,
    SOURCE: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """``gate x`` at the positions ``offs``, float32."""
    times = extent.start + offs
    mask = (offs < extent.stop) & (times < extent.limit)
    here = mask
    if SOURCE.periodic:
        times = tl.where(times < 0, times + extent.seqlen, times)
        times = tl.where(times >= extent.seqlen, times - extent.seqlen, times)
    else:
        here = mask & (times >= 0)
    place = Place(extent.start, extent.past, extent.seqlen, extent.stop)
    x = load_times(x_ptr, stride_x, batch, head, place, times, here, WIDE)
    if SOURCE.gate:
        x *= load_times(gate_ptr, stride_gate, batch, head, place, times, here, WIDE)
    if SOURCE.state:
        # [B, H, past] contiguous.
        before = state_ptr + tl.cast(channel, tl.int64) * extent.past
        x += tl.load(before + (times + extent.past), mask=mask & (times < 0), other=0.0)
    return x


@triton.jit
def _into_rows(
    x_ptr, gate_ptr, state_ptr, basis_ptr, rows_ptr, scales_ptr, stride_x, stride_gate,
    batch, heads, seqlen, overlap, step, stop, limit,
    SOURCE: tl.constexpr, OUTER: tl.constexpr, LENGTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of A, of one block of one sequence."""
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
        x = _signal(
            x_ptr, gate_ptr, state_ptr, stride_x, stride_gate, sequence, head, sequence * heads + head, extent, offs,
            SOURCE, WIDE,
        )  # fmt: skip
        e = exponent(x)
        basis = tl.load(basis_ptr + frequencies[:, None] * OUTER + n0[None, :])
        x = (x * power_of_two(-e)).to(basis.dtype)
        total += tl.dot(basis, x, input_precision=PRECISION) * power_of_two(e)

    e = exponent(total)
    at = rows_ptr + tl.cast(row, tl.int64) * (OUTER * LENGTH)
    at = at + (frequencies[:, None] * LENGTH + columns[None, :])
    tl.store(at, (total * power_of_two(-e)).to(rows_ptr.dtype.element_ty))
    tl.store(scales_ptr + tl.cast(row, tl.int64) * (blocks * tiles) + (block * tiles + tile), scale_back(e))


@triton.jit
def _out_of_rows(
    rows_ptr, scales_ptr, basis_ptr, row, n0, columns,
    OUTER: tl.constexpr, LENGTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of x [n0, columns], float32, of A whose rows are scaled each by itself."""
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
        total += tl.dot(basis, values, input_precision=PRECISION) * power_of_two(e)
    # The matrix holds the weights 1 and 2 of single and of mirrored frequencies, halved.
    return total * (2.0 / OUTER)


@triton.jit(do_not_specialize=["batch", "heads", "seqlen", "overlap", "step", "stop", "limit"])
def fft_conv_outer_fwd_in_kernel(
    u_ptr,  # [B, H, N]
    pre_ptr,  # [B, H, N] or None
    state_ptr,  # float32 [B, H, overlap] or None
    basis_ptr,  # [N0, N0], real
    rows_ptr,  # [chunks, B, H, N0, M]
    scales_ptr,  # float32 [chunks, B, H, N0 / ROWS, M / COLUMNS], what those tiles were divided by
    stride_u,
    stride_pre,
    batch,
    heads,
    seqlen,
    overlap,
    step,
    stop,
    limit,
    SOURCE: tl.constexpr,
    OUTER: tl.constexpr,
    LENGTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A of v = pre u."""
    _into_rows(
        u_ptr, pre_ptr, state_ptr, basis_ptr, rows_ptr, scales_ptr, stride_u, stride_pre,
        batch, heads, seqlen, overlap, step, stop, limit,
        SOURCE, OUTER, LENGTH, ROWS, COLUMNS, DEPTH, WIDE, PRECISION,
    )  # fmt: skip


@triton.jit(do_not_specialize=["batch", "heads", "seqlen", "overlap", "step", "stop", "limit"])
def fft_conv_outer_bwd_in_kernel(
    x_ptr,  # [B, H, N]: u, or dy
    gate_ptr,  # [B, H, N] or None: pre, or post
    state_ptr,  # float32 [B, H, overlap] or None
    basis_ptr,  # [N0, N0], real
    rows_ptr,  # [chunks, B, H, N0, M]
    scales_ptr,  # float32 [chunks, B, H, N0 / ROWS, M / COLUMNS], what those tiles were divided by
    stride_x,
    stride_gate,
    batch,
    heads,
    seqlen,
    overlap,
    step,
    stop,
    limit,
    SOURCE: tl.constexpr,
    OUTER: tl.constexpr,
    LENGTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A of v = pre u, or of g = post dy, for the backward pass."""
    _into_rows(
        x_ptr, gate_ptr, state_ptr, basis_ptr, rows_ptr, scales_ptr, stride_x, stride_gate,
        batch, heads, seqlen, overlap, step, stop, limit,
        SOURCE, OUTER, LENGTH, ROWS, COLUMNS, DEPTH, WIDE, PRECISION,
    )  # fmt: skip


@triton.jit(do_not_specialize=["batch", "heads", "seqlen", "overlap", "step", "first", "blocks"])
def fft_conv_outer_fwd_out_kernel(
    rows_ptr,  # [chunks, B, H, N0, M]
    scales_ptr,  # float32 [chunks, B, H, N0 / 2 + 1]
    basis_ptr,  # [N0, N0], real
    post_ptr,  # [B, H, N] or None
    y_ptr,  # [B, H, N]
    stride_post,
    stride_y,
    batch,
    heads,
    seqlen,
    overlap,
    step,
    first,  # tile of rows n0 that is wanted
    blocks,  # how many of them are
    POST: tl.constexpr,
    OUTER: tl.constexpr,
    LENGTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """y = post w of one tile; positions before ``overlap`` are no results."""
    tiles: tl.constexpr = LENGTH // COLUMNS
    block, tile = tl.program_id(0) % blocks, tl.program_id(0) // blocks % tiles
    row = tl.program_id(0) // blocks // tiles
    head, sequence, chunk = row % heads, row // heads % batch, row // heads // batch
    n0 = (first + block) * ROWS + tl.arange(0, ROWS)
    columns = tile * COLUMNS + tl.arange(0, COLUMNS)
    y = _out_of_rows(rows_ptr, scales_ptr, basis_ptr, row, n0, columns, OUTER, LENGTH, ROWS, COLUMNS, DEPTH, PRECISION)
    place = Place(chunk * step - overlap, overlap, seqlen, OUTER * LENGTH)
    offs = n0[:, None] * LENGTH + columns[None, :]
    times = place.start + offs
    mask = (offs >= overlap) & (times < seqlen)
    if POST:
        y *= load_times(post_ptr, stride_post, sequence, head, place, times, mask, WIDE)
    store_times(y_ptr, stride_y, sequence, head, place, times, y, mask, WIDE)


@triton.jit(do_not_specialize=["batch", "heads", "seqlen", "overlap", "step", "stop", "first", "blocks"])
def fft_conv_outer_bwd_out_kernel(
    rows_ptr,  # [chunks, B, H, N0, M]
    scales_ptr,  # float32 [chunks, B, H, N0 / 2 + 1]
    basis_ptr,  # [N0, N0], real
    u_ptr,  # [B, H, N]
    pre_ptr,  # [B, H, N] or None
    dy_ptr,  # [B, H, N]
    du_ptr,  # [B, H, N] or None
    dpre_ptr,  # [B, H, N] or None
    dpost_ptr,  # [B, H, N] or None
    dstate_ptr,  # float32 [B, H, overlap] or None
    stride_u,
    stride_pre,
    stride_dy,
    stride_du,
    stride_dpre,
    stride_dpost,
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
    OUTER: tl.constexpr,
    LENGTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """du, dpre and dstate of one tile of dv, or dpost of one of w."""
    tiles: tl.constexpr = LENGTH // COLUMNS
    block, tile = tl.program_id(0) % blocks, tl.program_id(0) // blocks % tiles
    row = tl.program_id(0) // blocks // tiles
    head, sequence, chunk = row % heads, row // heads % batch, row // heads // batch
    n0 = (first + block) * ROWS + tl.arange(0, ROWS)
    columns = tile * COLUMNS + tl.arange(0, COLUMNS)
    x = _out_of_rows(rows_ptr, scales_ptr, basis_ptr, row, n0, columns, OUTER, LENGTH, ROWS, COLUMNS, DEPTH, PRECISION)
    place = Place(chunk * step - overlap, overlap, seqlen, OUTER * LENGTH)
    offs = n0[:, None] * LENGTH + columns[None, :]
    times = place.start + offs
    mask = (offs < stop) & (times >= 0) & (times < seqlen)
    if WANTED.post:
        mask = mask & (offs >= overlap)
        x *= load_times(dy_ptr, stride_dy, sequence, head, place, times, mask, WIDE)
        store_times(dpost_ptr, stride_dpost, sequence, head, place, times, x, mask, WIDE)
    else:
        if WANTED.state:
            at = dstate_ptr + (tl.cast(sequence, tl.int64) * heads + head) * overlap + (times + overlap)
            tl.store(at, x, mask=(offs < stop) & (times < 0))
        if WANTED.pre:
            u = load_times(u_ptr, stride_u, sequence, head, place, times, mask, WIDE)
            store_times(dpre_ptr, stride_dpre, sequence, head, place, times, x * u, mask, WIDE)
        if WANTED.u:
            if SOURCE.gate:
                x *= load_times(pre_ptr, stride_pre, sequence, head, place, times, mask, WIDE)
            store_times(du_ptr, stride_du, sequence, head, place, times, x, mask, WIDE)

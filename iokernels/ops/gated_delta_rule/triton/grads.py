"""The gated delta rule backward in Triton: gradients of q, k, beta and the decays, every chunk at once.

From the state H before a chunk and the gradient D of the state after it, n and r (:mod:`.backward`), with
G = exp(b_i - b_j) for i >= j:

    dP = scale do n^T G                 dA = -tril(r n^T, -1) G            e = exp(b) r H^T
    dq = scale exp(b) do H^T + dP K
    dk = exp(b_C - b) n D^T + dP^T Q + beta (dA K - e) + dA^T (beta K)
    dbeta = rowsum(r v) + k . (dA K - e)
    db = q . dq - k . (exp(b_C - b) n D^T + dP^T Q) + beta k . (dA K - e) - k . dA^T (beta K)

and the gradient of the log decays is the sum of db over the rest of the chunk, plus that of b_C, sum k . exp(b_C - b) n
D^T + exp(b_C) <H, D> (derived from arXiv:2412.06464, section 3.3; see the portable
backend's ``chunks``).

A thread block owns one chunk, one head and BLOCK_K columns of q and k, and sums over v in blocks of BLOCK_V, one loop.
Terms that are sums over K come out in parts, one for each block of columns. Transposed products are formed from their
transposed operands, and rounded like the others: what cancels between their sums in db is then alike to the bit.

FLOPs a row and head: 6 K V + C (8 V + 8 K), the 8 C V once for each block of columns. Bytes: q, k, dq, dk once, K V / C
elements of H and of D once a row; do, n, r, v and the rows' numbers once for each block of columns.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from iokernels.ops.shared.triton_sums import from_start, to_end, whole
from iokernels.ops.shared.triton_tiles import View, at_head, load_tile, store_tile, tile_offsets

from .chunks import VARYING, between, chunk_at, load_rows, load_sums


class Given(NamedTuple):
    """What the walks left, and the gradient of out."""

    dout: View  # [B, H, N, V]
    written: View  # [B, H, N, V]
    right: View  # [B, H, N, V]
    states: View  # [P, H, K, V]
    dstates: View  # [P, H, K, V]


@triton.jit
def _load(block, x, local, columns, rows, WIDTH: tl.constexpr, PADDED: tl.constexpr, SIZES: tl.constexpr):
    """Columns of the rows of a chunk."""
    offsets = tile_offsets(x, local, columns, SIZES.WIDE)
    return load_tile(block, offsets, local, columns, rows, WIDTH, PADDED, True)


@triton.jit
def _load_state(block, x, columns, offs_v, SIZES: tl.constexpr):
    """A tile [BLOCK_K, BLOCK_V] of a state."""
    offsets = tile_offsets(x, columns, offs_v, False)
    masked: tl.constexpr = SIZES.PADDED_K > SIZES.KEY_DIM
    return load_tile(block, offsets, columns, offs_v, SIZES.KEY_DIM, SIZES.VALUE_DIM, SIZES.PADDED_V, masked)


@triton.jit(do_not_specialize=VARYING)
def gated_delta_rule_bwd_grads_kernel(
    inputs,
    given,
    dq,  # [B, H, N, K]
    dk,  # [B, H, N, K]
    dbeta_ptr,  # float32 [K / BLOCK_K, B, H, N]
    ddecay_ptr,  # float32 [K / BLOCK_K, B, H, N] or None
    places,
    heads,
    group,
    seqlen,
    total,  # N of the tensors
    batch_rows,  # int64 B * H * N
    scale,
    FEATURES: tl.constexpr,
    SIZES: tl.constexpr,
):
    """dq and dk of BLOCK_K columns of one chunk of one head, and their part of dbeta and of the decays' gradient."""
    parts: tl.constexpr = (SIZES.KEY_DIM + SIZES.BLOCK_K - 1) // SIZES.BLOCK_K
    part = tl.program_id(0) % parts
    index_head = tl.program_id(0) // parts
    index, head = index_head // heads, index_head % heads
    batch, first_row, rows = chunk_at(places.table_ptr, index, seqlen, FEATURES.varlen, SIZES.BLOCK_C)
    if rows > 0:
        local = tl.arange(0, SIZES.BLOCK_C)
        columns = part * SIZES.BLOCK_K + tl.arange(0, SIZES.BLOCK_K)
        beta = load_rows(inputs.beta.ptr, inputs.beta, batch, head, first_row, rows, SIZES.BLOCK_C)
        sums = load_sums(inputs.decay.ptr, inputs.decay, batch, head, first_row, rows, FEATURES.decay, SIZES.BLOCK_C)
        v_block = at_head(inputs.v.ptr, inputs.v, batch, head, first_row)
        dout_block = at_head(given.dout.ptr, given.dout, batch, head, first_row)
        written_block = at_head(given.written.ptr, given.written, batch, head, first_row)
        right_block = at_head(given.right.ptr, given.right, batch, head, first_row)
        states = at_head(given.states.ptr, given.states, index, head, 0)
        dstates = at_head(given.dstates.ptr, given.dstates, index, head, 0)

        dscores = tl.full([SIZES.BLOCK_C, SIZES.BLOCK_C], 0.0, tl.float32)
        dscores_t = tl.full([SIZES.BLOCK_C, SIZES.BLOCK_C], 0.0, tl.float32)
        dsystem = tl.full([SIZES.BLOCK_C, SIZES.BLOCK_C], 0.0, tl.float32)
        dsystem_t = tl.full([SIZES.BLOCK_C, SIZES.BLOCK_C], 0.0, tl.float32)
        acc_q = tl.full([SIZES.BLOCK_C, SIZES.BLOCK_K], 0.0, tl.float32)
        held = tl.full([SIZES.BLOCK_C, SIZES.BLOCK_K], 0.0, tl.float32)
        acc_k = tl.full([SIZES.BLOCK_C, SIZES.BLOCK_K], 0.0, tl.float32)
        dbeta = tl.full([SIZES.BLOCK_C], 0.0, tl.float32)
        dlast = 0.0
        for first_column in tl.range(0, SIZES.VALUE_DIM, SIZES.BLOCK_V):
            offs_v = first_column + tl.arange(0, SIZES.BLOCK_V)
            v = _load(v_block, inputs.v, local, offs_v, rows, SIZES.VALUE_DIM, SIZES.PADDED_V, SIZES)
            dout = _load(dout_block, given.dout, local, offs_v, rows, SIZES.VALUE_DIM, SIZES.PADDED_V, SIZES)
            written = _load(written_block, given.written, local, offs_v, rows, SIZES.VALUE_DIM, SIZES.PADDED_V, SIZES)
            right = _load(right_block, given.right, local, offs_v, rows, SIZES.VALUE_DIM, SIZES.PADDED_V, SIZES)
            state = _load_state(states, given.states, columns, offs_v, SIZES)
            dstate = _load_state(dstates, given.dstates, columns, offs_v, SIZES)
            dscores = tl.dot(dout, tl.trans(written), dscores, input_precision=SIZES.PRECISION)
            dscores_t = tl.dot(written, tl.trans(dout), dscores_t, input_precision=SIZES.PRECISION)
            dsystem = tl.dot(right, tl.trans(written), dsystem, input_precision=SIZES.PRECISION)
            dsystem_t = tl.dot(written, tl.trans(right), dsystem_t, input_precision=SIZES.PRECISION)
            acc_q = tl.dot(dout, tl.trans(state), acc_q, input_precision=SIZES.PRECISION)
            held = tl.dot(right, tl.trans(state), held, input_precision=SIZES.PRECISION)
            acc_k = tl.dot(written, tl.trans(dstate), acc_k, input_precision=SIZES.PRECISION)
            dbeta += tl.sum(right.to(tl.float32) * v.to(tl.float32), 1)
            dlast += tl.sum(state.to(tl.float32) * dstate.to(tl.float32))

        q_block = at_head(inputs.q.ptr, inputs.q, batch, head // group, first_row)
        q = load_tile(
            q_block,
            tile_offsets(inputs.q, local, columns, SIZES.WIDE),
            local,
            columns,
            rows,
            SIZES.KEY_DIM,
            SIZES.PADDED_K,
            True,
        )
        k_block = at_head(inputs.k.ptr, inputs.k, batch, head // group, first_row)
        k = load_tile(
            k_block,
            tile_offsets(inputs.k, local, columns, SIZES.WIDE),
            local,
            columns,
            rows,
            SIZES.KEY_DIM,
            SIZES.PADDED_K,
            True,
        )
        decayed = from_start(sums)[:, None]
        weights, weights_t = between(sums, False, SIZES.BLOCK_C), between(sums, True, SIZES.BLOCK_C)
        acc_q = tl.dot(
            (dscores * weights * scale).to(k.dtype), k, acc_q * decayed * scale, input_precision=SIZES.PRECISION
        )
        acc_k *= to_end(sums)[:, None]
        keys = k.to(tl.float32)
        dlast = dlast * whole(sums) + tl.sum(keys * acc_k)
        acc_k = tl.dot((dscores_t * weights_t * scale).to(k.dtype), q, acc_k, input_precision=SIZES.PRECISION)
        db = tl.sum(q.to(tl.float32) * acc_q - keys * acc_k, 1)
        dsystem = tl.where(local[:, None] > local[None, :], -dsystem * weights, 0.0)
        dsystem_t = tl.where(local[:, None] < local[None, :], -dsystem_t * weights_t * beta[None, :], 0.0)
        own = tl.dot(dsystem.to(k.dtype), k, -held * decayed, input_precision=SIZES.PRECISION)
        others = tl.dot(dsystem_t.to(k.dtype), k, input_precision=SIZES.PRECISION)
        along_own = tl.sum(keys * own, 1)
        db += beta * along_own - tl.sum(keys * others, 1)
        acc_k += beta[:, None] * own + others
        if part > 0:
            dbeta = dbeta * 0.0  # rowsum(r v) belongs to the first part
        dbeta += along_own

        dq_block = at_head(dq.ptr, dq, batch, head, first_row)
        store_tile(
            dq_block, tile_offsets(dq, local, columns, SIZES.WIDE), acc_q.to(dq.ptr.dtype.element_ty), local, columns,
            rows, SIZES.KEY_DIM,
        )  # fmt: skip
        dk_block = at_head(dk.ptr, dk, batch, head, first_row)
        store_tile(
            dk_block, tile_offsets(dk, local, columns, SIZES.WIDE), acc_k.to(dk.ptr.dtype.element_ty), local, columns,
            rows, SIZES.KEY_DIM,
        )  # fmt: skip
        batch_head = tl.cast(batch, tl.int64) * heads + head
        at = tl.cast(part, tl.int64) * batch_rows + batch_head * total + first_row + local
        tl.store(dbeta_ptr + at, dbeta, mask=local < rows)
        if FEATURES.decay:
            tl.store(ddecay_ptr + at, tl.cumsum(db, 0, reverse=True) + dlast, mask=local < rows)

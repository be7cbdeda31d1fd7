"""One or a few tokens of linear attention in Triton, with the state updated in place: what generation calls.

    S = exp(g) S + f(k) w^T        num = s q . S        out = num, or num / den

A block owns BLOCK_V columns of the state of one head and takes the tokens one after the other, on the vector units: the
time is that of reading and writing the state once. FLOPs: 5 F V a token and head. Bytes: the state twice, float32; q
and k once for each slice of V, v and out once; a decay for each token, or each block. With the normaliser one block
takes all slices of a head in turns, and reads its column of the state, and the decays of tokens, once a turn.
"""

from __future__ import annotations

import triton
import triton.language as tl

from iokernels.ops.shared.triton_sums import clamped
from iokernels.ops.shared.triton_tiles import LOG2E, at_head

from .chunks import square_rows


@triton.jit(do_not_specialize=["heads", "group", "seqlen"])
def linear_attention_step_kernel(
    inputs,
    state_ptr,  # float32 [B, H, F, W], contiguous, in place
    out_view,  # [B, H, N, V]
    heads,
    group,
    seqlen,
    scale,
    FEATURES: tl.constexpr,
    K_WIDTH: tl.constexpr,
    V_WIDTH: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """BLOCK_V columns of out and of the state of one head."""
    q_view, k_view, v_view, decay = inputs
    SLICES: tl.constexpr = (V_WIDTH + BLOCK_V - 1) // BLOCK_V
    COLUMNS: tl.constexpr = V_WIDTH + 1 if FEATURES.normalize else V_WIDTH
    ROWS: tl.constexpr = 1 + K_WIDTH + K_WIDTH * K_WIDTH if FEATURES.taylor else K_WIDTH
    # The normaliser is read by every slice and moved on in place, so then one block takes them all, in turns.
    TURNS: tl.constexpr = SLICES if FEATURES.normalize else 1
    batch_head = tl.program_id(0) // (SLICES // TURNS)
    batch, head = batch_head // heads, batch_head % heads
    offs_k = tl.arange(0, BLOCK_K)
    mask_k = offs_k < K_WIDTH
    state = state_ptr + tl.cast(batch_head, tl.int64) * (ROWS * COLUMNS)
    keys = offs_k
    z_linear = tl.zeros([BLOCK_K], tl.float32)
    if FEATURES.taylor:
        keys = 1 + offs_k
        pairs, _exchanged = square_rows(tl.arange(0, BLOCK_K * BLOCK_K), K_WIDTH, BLOCK_K)
        mask_p = pairs < ROWS
        z_constant, z_square = 0.0, tl.zeros([BLOCK_K * BLOCK_K], tl.float32)
    kept = 1.0
    if FEATURES.decay == 1:
        kept = keep(decay, batch, head, 0)

    for turn in tl.range(0, TURNS):
        slice_v = tl.program_id(0) % (SLICES // TURNS) + turn
        offs_v = slice_v * BLOCK_V + tl.arange(0, BLOCK_V)
        mask_v = offs_v < V_WIDTH
        at_linear = state + keys[:, None] * COLUMNS + offs_v[None, :]
        linear = tl.load(at_linear, mask=mask_k[:, None] & mask_v[None, :], other=0.0)
        if FEATURES.taylor:
            constant = tl.load(state + offs_v, mask=mask_v, other=0.0)
            at_square = state + pairs[:, None] * COLUMNS + offs_v[None, :]
            square = tl.load(at_square, mask=mask_p[:, None] & mask_v[None, :], other=0.0)
        if FEATURES.normalize:
            z_linear = tl.load(state + keys * COLUMNS + V_WIDTH, mask=mask_k, other=0.0)
            if FEATURES.taylor:
                z_constant = tl.load(state + V_WIDTH)
                z_square = tl.load(state + pairs * COLUMNS + V_WIDTH, mask=mask_p, other=0.0)

        for token in tl.range(0, seqlen):
            q_row = at_head(q_view.ptr, q_view, batch, head // group, token)
            k_row = at_head(k_view.ptr, k_view, batch, head // group, token)
            v_row = at_head(v_view.ptr, v_view, batch, head, token)
            q = tl.load(q_row + offs_k * q_view.d, mask=mask_k, other=0.0).to(tl.float32) * scale
            k = tl.load(k_row + offs_k * k_view.d, mask=mask_k, other=0.0).to(tl.float32)
            v = tl.load(v_row + offs_v * v_view.d, mask=mask_v, other=0.0).to(tl.float32)
            if FEATURES.decay == 2:
                kept = keep(decay, batch, head, token)
            linear = linear * kept + k[:, None] * v[None, :]
            out = tl.sum(q[:, None] * linear, 0)
            if FEATURES.taylor:
                k_pairs = tl.reshape(k[:, None] * k[None, :], (BLOCK_K * BLOCK_K,))
                q_pairs = tl.reshape(q[:, None] * q[None, :], (BLOCK_K * BLOCK_K,)) * 0.5
                constant = constant * kept + v
                square = square * kept + k_pairs[:, None] * v[None, :]
                out += constant + tl.sum(q_pairs[:, None] * square, 0)
            if FEATURES.normalize:
                z_linear = z_linear * kept + k
                denominator = tl.sum(q * z_linear, 0)
                if FEATURES.taylor:
                    z_constant = z_constant * kept + 1.0
                    z_square = z_square * kept + k_pairs
                    denominator += z_constant + tl.sum(q_pairs * z_square, 0)
                out = out * tl.where(denominator == 0.0, 0.0, 1.0 / denominator)
            out_row = at_head(out_view.ptr, out_view, batch, head, token)
            tl.store(out_row + offs_v * out_view.d, out.to(out_view.ptr.dtype.element_ty), mask=mask_v)

        # Threads that hold the same element have all read it before one of them writes it.
        tl.debug_barrier()
        tl.store(at_linear, linear, mask=mask_k[:, None] & mask_v[None, :])
        if FEATURES.taylor:
            tl.store(state + offs_v, constant, mask=mask_v)
            tl.store(at_square, square, mask=mask_p[:, None] & mask_v[None, :])
    if FEATURES.normalize:
        tl.store(state + keys * COLUMNS + V_WIDTH, z_linear, mask=mask_k)
        if FEATURES.taylor:
            tl.store(state + V_WIDTH, z_constant)
            tl.store(state + pairs * COLUMNS + V_WIDTH, z_square, mask=mask_p)


@triton.jit
def keep(decay, batch, head, token):
    """What one token keeps of the state."""
    return tl.exp2(clamped(tl.load(at_head(decay.ptr, decay, batch, head, token))) * LOG2E)

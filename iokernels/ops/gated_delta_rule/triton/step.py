"""One step, or a few, of the gated delta rule in Triton, for generation: the state is read and written once.

A thread block owns BLOCK_V columns of the state of one head, in registers, and takes the tokens one after the other:

    S = exp(log_decay) S      u = beta (v - S^T k)      S = S + k u^T      o = scale S^T q

FLOPs: 7 K V a token and head. Bytes: 8 K V a head whatever the number of tokens, and the tokens; q and k once for each
block of columns. Far below one FLOP a byte: only bandwidth counts.
"""

from __future__ import annotations

import triton
import triton.language as tl

from iokernels.ops.shared.triton_sums import clamped
from iokernels.ops.shared.triton_tiles import LOG2E, at_head

from .forward import block_of_columns, load_state, store_state


@triton.jit
def _load_row(ptr, stride, batch, head, row, columns, WIDTH: tl.constexpr):
    at = at_head(ptr, stride, batch, head, row) + columns.to(tl.int64) * stride.d
    return tl.load(at, mask=columns < WIDTH, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["heads", "group", "seqlen", "scale"])
def gated_delta_rule_step_kernel(
    q_ptr,  # [B, Hk, N, K]
    k_ptr,  # [B, Hk, N, K]
    v_ptr,  # [B, H, N, V]
    beta_ptr,  # [B, H, N]
    decay_ptr,  # [B, H, N] or None
    state_ptr,  # float32 [B, H, K, V], read and written
    out_ptr,  # [B, H, N, V]
    stride_q,
    stride_k,
    stride_v,
    stride_beta,
    stride_decay,
    stride_state,
    stride_out,
    heads,
    group,
    seqlen,
    scale,
    DECAY: tl.constexpr,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """out of BLOCK_V columns of one head, and their part of the state after the last token."""
    batch, head, columns = block_of_columns(heads, VALUE_DIM, BLOCK_V)
    offs_k = tl.arange(0, BLOCK_K)
    state = load_state(state_ptr, stride_state, batch, head, columns, True, KEY_DIM, VALUE_DIM, BLOCK_K, BLOCK_V)
    for row in tl.range(0, seqlen):
        q = _load_row(q_ptr, stride_q, batch, head // group, row, offs_k, KEY_DIM)
        k = _load_row(k_ptr, stride_k, batch, head // group, row, offs_k, KEY_DIM)
        v = _load_row(v_ptr, stride_v, batch, head, row, columns, VALUE_DIM)
        beta = tl.load(at_head(beta_ptr, stride_beta, batch, head, row)).to(tl.float32)
        if DECAY:
            decay = clamped(tl.load(at_head(decay_ptr, stride_decay, batch, head, row)))
            state *= tl.exp2(decay * LOG2E)
        written = beta * (v - tl.sum(k[:, None] * state, 0))
        state += k[:, None] * written[None, :]
        out = scale * tl.sum(q[:, None] * state, 0)
        at = at_head(out_ptr, stride_out, batch, head, row) + columns.to(tl.int64) * stride_out.d
        tl.store(at, out.to(out_ptr.dtype.element_ty), mask=columns < VALUE_DIM)
    store_state(state_ptr, stride_state, batch, head, state, columns, KEY_DIM, VALUE_DIM, BLOCK_K)

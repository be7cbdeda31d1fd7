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

from .chunks import VARYING
from .forward import block_of_columns, load_state, store_state


@triton.jit
def _load_row(x, batch, head, row, columns, WIDTH: tl.constexpr):
    at = at_head(x.ptr, x, batch, head, row) + columns.to(tl.int64) * x.d
    return tl.load(at, mask=columns < WIDTH, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=VARYING)
def gated_delta_rule_step_kernel(
    inputs,
    state,  # float32 [B, H, K, V], read and written
    out,  # [B, H, N, V]
    heads,
    group,
    seqlen,
    scale,
    FEATURES: tl.constexpr,
    SIZES: tl.constexpr,
):
    """out of BLOCK_V columns of one head, and their part of the state after the last token."""
    batch, head, columns = block_of_columns(heads, SIZES.VALUE_DIM, SIZES.BLOCK_V)
    offs_k = tl.arange(0, SIZES.BLOCK_K)
    held = load_state(state, batch, head, columns, True, SIZES)
    for row in tl.range(0, seqlen):
        q = _load_row(inputs.q, batch, head // group, row, offs_k, SIZES.KEY_DIM)
        k = _load_row(inputs.k, batch, head // group, row, offs_k, SIZES.KEY_DIM)
        v = _load_row(inputs.v, batch, head, row, columns, SIZES.VALUE_DIM)
        beta = tl.load(at_head(inputs.beta.ptr, inputs.beta, batch, head, row)).to(tl.float32)
        if FEATURES.decay:
            decay = clamped(tl.load(at_head(inputs.decay.ptr, inputs.decay, batch, head, row)))
            held *= tl.exp2(decay * LOG2E)
        written = beta * (v - tl.sum(k[:, None] * held, 0))
        held += k[:, None] * written[None, :]
        read = scale * tl.sum(q[:, None] * held, 0)
        at = at_head(out.ptr, out, batch, head, row) + columns.to(tl.int64) * out.d
        tl.store(at, read.to(out.ptr.dtype.element_ty), mask=columns < SIZES.VALUE_DIM)
    store_state(state, batch, head, held, columns, SIZES)

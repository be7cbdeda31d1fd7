"""The gated delta rule forward in Triton: one walk along each sequence, with the state on chip.

A thread block owns one head of one sequence and BLOCK_V columns of v, keeps the state H ``[K, BLOCK_V]`` in float32
registers, and takes chunks of C rows; with b the running sum of the log decays in the chunk and T the inverse, of which
:mod:`.triton_delta_inverse` left what is below the diagonal (the ones on it are added in float32):

    n  = T beta (v - exp(b) K H)                    what each row writes
    o  = scale (exp(b) Q H + tril(Q K^T exp(b_i - b_j)) n)
    H' = exp(b_C) H + (exp(b_C - b) K)^T n

(arXiv:2412.06464, section 3.3). Columns of v never meet, so the blocks of a head share nothing. The backward pass makes
H and n again with the same walk, and keeps them: the second kernel.

FLOPs a row and head: 6 K V + C (2 K + 4 V), and 2 C K again for every further block of columns. Bytes that blocks
request: v and out once; q, k, beta, log_decay and the C float32 elements of the inverse once for each block of columns;
the states at both ends. No state in between is written.
"""

from __future__ import annotations

import triton
import triton.language as tl

from iokernels.ops.shared.triton_sums import from_start, to_end, whole
from iokernels.ops.shared.triton_tiles import at_head, load_tile, locate, store_tile, tile_offsets

from .chunks import between, load_rows, load_sums


@triton.jit
def block_of_columns(heads, VALUE_DIM: tl.constexpr, BLOCK_V: tl.constexpr):
    """Sequence, head and columns of v of this block: columns within heads within sequences, so that neighbours read
    the same q and k."""
    blocks: tl.constexpr = (VALUE_DIM + BLOCK_V - 1) // BLOCK_V
    columns = tl.program_id(0) % blocks * BLOCK_V + tl.arange(0, BLOCK_V)
    sequence_head = tl.program_id(0) // blocks
    return sequence_head // heads, sequence_head % heads, columns


@triton.jit
def load_state(
    ptr, stride, sequence, head, columns, PRESENT: tl.constexpr, KEY_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """The state ``[S, H, K, V]`` of a head in float32, zeros where there is none."""
    if PRESENT:
        offs_k = tl.arange(0, BLOCK_K)
        offsets = tile_offsets(stride, offs_k, columns, True)
        mask = (offs_k[:, None] < KEY_DIM) & (columns[None, :] < VALUE_DIM)
        return tl.load(at_head(ptr, stride, sequence, head, 0) + offsets, mask=mask, other=0.0).to(tl.float32)
    else:
        return tl.zeros([BLOCK_K, BLOCK_V], tl.float32)


@triton.jit
def store_state(ptr, stride, sequence, head, state, columns, KEY_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
                BLOCK_K: tl.constexpr):  # fmt: skip
    """The reverse of :func:`load_state`, in the dtype of ``ptr``."""
    offs_k = tl.arange(0, BLOCK_K)
    offsets = tile_offsets(stride, offs_k, columns, True)
    at = at_head(ptr, stride, sequence, head, 0)
    store_tile(at, offsets, state.to(ptr.dtype.element_ty), offs_k, columns, KEY_DIM, VALUE_DIM)


@triton.jit
def write_rows(state, k, v, inverse, beta, sums, PRECISION: tl.constexpr, SOLVE_PRECISION: tl.constexpr):
    """What the rows of a chunk write, n, and the state after them."""
    held = tl.dot(k, state.to(k.dtype), input_precision=PRECISION) * from_start(sums)[:, None]
    right = (v.to(tl.float32) - held) * beta[:, None]
    written = tl.dot(inverse, right, right, input_precision=SOLVE_PRECISION)
    kept = (written * to_end(sums)[:, None]).to(k.dtype)
    after = tl.dot(tl.trans(k), kept, state * whole(sums), input_precision=PRECISION)
    return written.to(k.dtype), after


@triton.jit(do_not_specialize=["heads", "group", "seqlen", "total", "scale"])
def gated_delta_rule_fwd_kernel(
    q_ptr,  # [B, Hk, N, K]
    k_ptr,  # [B, Hk, N, K]
    v_ptr,  # [B, H, N, V]
    beta_ptr,  # [B, H, N]
    decay_ptr,  # [B, H, N] or None
    inverse_ptr,  # float32 [B, H, N, C]
    initial_ptr,  # float32 [S, H, K, V] or None
    out_ptr,  # [B, H, N, V]
    final_ptr,  # float32 [S, H, K, V]
    cu_seqlens_ptr,  # int32 [S + 1] or None
    stride_q,
    stride_k,
    stride_v,
    stride_beta,
    stride_decay,
    stride_inverse,
    stride_initial,
    stride_out,
    stride_final,
    heads,
    group,
    seqlen,
    total,
    scale,
    FEATURES: tl.constexpr,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PADDED_V: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    SOLVE_PRECISION: tl.constexpr,
):
    """out of BLOCK_V columns of one head of one sequence, and their part of the final state."""
    sequence, head, columns = block_of_columns(heads, VALUE_DIM, BLOCK_V)
    start, length = locate(cu_seqlens_ptr, sequence, seqlen, total, FEATURES.varlen)
    batch = 0 if FEATURES.varlen else sequence
    local, offs_k = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_K)
    q_offsets = tile_offsets(stride_q, local, offs_k, WIDE)
    k_offsets = tile_offsets(stride_k, local, offs_k, WIDE)
    v_offsets = tile_offsets(stride_v, local, columns, WIDE)
    out_offsets = tile_offsets(stride_out, local, columns, WIDE)
    inverse_offsets = tile_offsets(stride_inverse, local, local, False)

    state = load_state(
        initial_ptr, stride_initial, sequence, head, columns, FEATURES.state, KEY_DIM, VALUE_DIM, BLOCK_K, BLOCK_V
    )
    for first in tl.range(0, length, BLOCK_C):
        row, rows = start + first, length - first
        q_block = at_head(q_ptr, stride_q, batch, head // group, row)
        q = load_tile(q_block, q_offsets, local, offs_k, rows, KEY_DIM, BLOCK_K, True)
        k_block = at_head(k_ptr, stride_k, batch, head // group, row)
        k = load_tile(k_block, k_offsets, local, offs_k, rows, KEY_DIM, BLOCK_K, True)
        v_block = at_head(v_ptr, stride_v, batch, head, row)
        v = load_tile(v_block, v_offsets, local, columns, rows, VALUE_DIM, PADDED_V, True)
        inverse_block = at_head(inverse_ptr, stride_inverse, batch, head, row)
        inverse = load_tile(inverse_block, inverse_offsets, local, local, rows, BLOCK_C, BLOCK_C, True)
        beta = load_rows(beta_ptr, stride_beta, batch, head, row, rows, BLOCK_C)
        sums = load_sums(decay_ptr, stride_decay, batch, head, row, rows, FEATURES.decay, BLOCK_C)

        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * between(sums, False, BLOCK_C)
        scores = scores.to(q.dtype)  # now: half the registers
        out = tl.dot(q, state.to(q.dtype), input_precision=PRECISION) * from_start(sums)[:, None]
        written, state = write_rows(state, k, v, inverse, beta, sums, PRECISION, SOLVE_PRECISION)
        out = tl.dot(scores, written, out, input_precision=PRECISION) * scale
        out_block = at_head(out_ptr, stride_out, batch, head, row)
        store_tile(out_block, out_offsets, out.to(out_ptr.dtype.element_ty), local, columns, rows, VALUE_DIM)
    store_state(final_ptr, stride_final, sequence, head, state, columns, KEY_DIM, VALUE_DIM, BLOCK_K)


@triton.jit(do_not_specialize=["heads", "group", "seqlen", "total"])
def gated_delta_rule_bwd_states_kernel(
    k_ptr,  # [B, Hk, N, K]
    v_ptr,  # [B, H, N, V]
    beta_ptr,  # [B, H, N]
    decay_ptr,  # [B, H, N] or None
    inverse_ptr,  # float32 [B, H, N, C]
    initial_ptr,  # float32 [S, H, K, V] or None
    states_ptr,  # [P, H, K, V]: the state before each chunk
    written_ptr,  # [B, H, N, V]
    cu_seqlens_ptr,  # int32 [S + 1] or None
    chunk_starts_ptr,  # int32 [S] or None: how many chunks stand before a sequence
    stride_k,
    stride_v,
    stride_beta,
    stride_decay,
    stride_inverse,
    stride_initial,
    stride_states,
    stride_written,
    heads,
    group,
    seqlen,
    total,
    FEATURES: tl.constexpr,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PADDED_V: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    SOLVE_PRECISION: tl.constexpr,
):
    """The walk of the forward pass again, which keeps the state before each chunk and what its rows write."""
    sequence, head, columns = block_of_columns(heads, VALUE_DIM, BLOCK_V)
    start, length = locate(cu_seqlens_ptr, sequence, seqlen, total, FEATURES.varlen)
    batch = 0 if FEATURES.varlen else sequence
    chunk = first_chunk(chunk_starts_ptr, sequence, seqlen, FEATURES.varlen, BLOCK_C)
    local, offs_k = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_K)
    k_offsets = tile_offsets(stride_k, local, offs_k, WIDE)
    v_offsets = tile_offsets(stride_v, local, columns, WIDE)
    written_offsets = tile_offsets(stride_written, local, columns, WIDE)
    inverse_offsets = tile_offsets(stride_inverse, local, local, False)

    state = load_state(
        initial_ptr, stride_initial, sequence, head, columns, FEATURES.state, KEY_DIM, VALUE_DIM, BLOCK_K, BLOCK_V
    )
    for first in tl.range(0, length, BLOCK_C):
        row, rows = start + first, length - first
        store_state(
            states_ptr, stride_states, chunk + first // BLOCK_C, head, state, columns, KEY_DIM, VALUE_DIM, BLOCK_K
        )
        k_block = at_head(k_ptr, stride_k, batch, head // group, row)
        k = load_tile(k_block, k_offsets, local, offs_k, rows, KEY_DIM, BLOCK_K, True)
        v_block = at_head(v_ptr, stride_v, batch, head, row)
        v = load_tile(v_block, v_offsets, local, columns, rows, VALUE_DIM, PADDED_V, True)
        inverse_block = at_head(inverse_ptr, stride_inverse, batch, head, row)
        inverse = load_tile(inverse_block, inverse_offsets, local, local, rows, BLOCK_C, BLOCK_C, True)
        beta = load_rows(beta_ptr, stride_beta, batch, head, row, rows, BLOCK_C)
        sums = load_sums(decay_ptr, stride_decay, batch, head, row, rows, FEATURES.decay, BLOCK_C)
        written, state = write_rows(state, k, v, inverse, beta, sums, PRECISION, SOLVE_PRECISION)
        written_block = at_head(written_ptr, stride_written, batch, head, row)
        store_tile(written_block, written_offsets, written, local, columns, rows, VALUE_DIM)


@triton.jit
def first_chunk(chunk_starts_ptr, sequence, seqlen, VARLEN: tl.constexpr, BLOCK_C: tl.constexpr):
    """How many chunks stand before a sequence."""
    if VARLEN:
        return tl.load(chunk_starts_ptr + sequence)
    else:
        return sequence * tl.cdiv(seqlen, BLOCK_C)

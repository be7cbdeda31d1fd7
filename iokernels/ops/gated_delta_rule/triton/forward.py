"""The gated delta rule forward in Triton: one walk along each sequence, with the state on chip.

A thread block owns one head of one sequence and BLOCK_V columns of v, keeps the state H ``[K, BLOCK_V]`` in float32
registers, and takes chunks of C rows; with b the running sum of the log decays in the chunk and T the inverse, of which
:mod:`.inverse` left what is below the diagonal (the ones on it are added in float32):

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

from .chunks import VARYING, between, load_rows, load_sums


@triton.jit
def block_of_columns(heads, VALUE_DIM: tl.constexpr, BLOCK_V: tl.constexpr):
    """Sequence, head and columns of v of this block: columns within heads within sequences, so that neighbours read
    the same q and k."""
    blocks: tl.constexpr = (VALUE_DIM + BLOCK_V - 1) // BLOCK_V
    columns = tl.program_id(0) % blocks * BLOCK_V + tl.arange(0, BLOCK_V)
    sequence_head = tl.program_id(0) // blocks
    return sequence_head // heads, sequence_head % heads, columns


@triton.jit
def load_state(x, sequence, head, columns, PRESENT: tl.constexpr, SIZES: tl.constexpr):
    """The state ``[S, H, K, V]`` of a head in float32, zeros where there is none."""
    if PRESENT:
        offs_k = tl.arange(0, SIZES.BLOCK_K)
        offsets = tile_offsets(x, offs_k, columns, True)
        mask = (offs_k[:, None] < SIZES.KEY_DIM) & (columns[None, :] < SIZES.VALUE_DIM)
        return tl.load(at_head(x.ptr, x, sequence, head, 0) + offsets, mask=mask, other=0.0).to(tl.float32)
    else:
        return tl.full([SIZES.BLOCK_K, SIZES.BLOCK_V], 0.0, tl.float32)


@triton.jit
def store_state(x, sequence, head, state, columns, SIZES: tl.constexpr):
    """The reverse of :func:`load_state`, in the dtype of the tensor."""
    offs_k = tl.arange(0, SIZES.BLOCK_K)
    offsets = tile_offsets(x, offs_k, columns, True)
    at = at_head(x.ptr, x, sequence, head, 0)
    store_tile(at, offsets, state.to(x.ptr.dtype.element_ty), offs_k, columns, SIZES.KEY_DIM, SIZES.VALUE_DIM)


@triton.jit
def write_rows(state, k, v, inverse, beta, sums, PRECISION: tl.constexpr, SOLVE_PRECISION: tl.constexpr):
    """What the rows of a chunk write, n, and the state after them."""
    held = tl.dot(k, state.to(k.dtype), input_precision=PRECISION) * from_start(sums)[:, None]
    right = (v.to(tl.float32) - held) * beta[:, None]
    written = tl.dot(inverse, right, right, input_precision=SOLVE_PRECISION)
    kept = (written * to_end(sums)[:, None]).to(k.dtype)
    after = tl.dot(tl.trans(k), kept, state * whole(sums), input_precision=PRECISION)
    return written.to(k.dtype), after


@triton.jit(do_not_specialize=VARYING)
def gated_delta_rule_fwd_kernel(
    inputs,
    initial,  # float32 [S, H, K, V] or None
    out,  # [B, H, N, V]
    final,  # float32 [S, H, K, V]
    places,
    heads,
    group,
    seqlen,
    total,
    scale,
    FEATURES: tl.constexpr,
    SIZES: tl.constexpr,
):
    """out of BLOCK_V columns of one head of one sequence, and their part of the final state."""
    sequence, head, columns = block_of_columns(heads, SIZES.VALUE_DIM, SIZES.BLOCK_V)
    start, length = locate(places.cu_seqlens_ptr, sequence, seqlen, total, FEATURES.varlen)
    batch = 0 if FEATURES.varlen else sequence
    local, offs_k = tl.arange(0, SIZES.BLOCK_C), tl.arange(0, SIZES.BLOCK_K)
    q_offsets = tile_offsets(inputs.q, local, offs_k, SIZES.WIDE)
    k_offsets = tile_offsets(inputs.k, local, offs_k, SIZES.WIDE)
    v_offsets = tile_offsets(inputs.v, local, columns, SIZES.WIDE)
    out_offsets = tile_offsets(out, local, columns, SIZES.WIDE)
    inverse_offsets = tile_offsets(inputs.inverse, local, local, False)

    state = load_state(initial, sequence, head, columns, FEATURES.state, SIZES)
    for first in tl.range(0, length, SIZES.BLOCK_C):
        row, rows = start + first, length - first
        q_block = at_head(inputs.q.ptr, inputs.q, batch, head // group, row)
        q = load_tile(q_block, q_offsets, local, offs_k, rows, SIZES.KEY_DIM, SIZES.BLOCK_K, True)
        k_block = at_head(inputs.k.ptr, inputs.k, batch, head // group, row)
        k = load_tile(k_block, k_offsets, local, offs_k, rows, SIZES.KEY_DIM, SIZES.BLOCK_K, True)
        v_block = at_head(inputs.v.ptr, inputs.v, batch, head, row)
        v = load_tile(v_block, v_offsets, local, columns, rows, SIZES.VALUE_DIM, SIZES.PADDED_V, True)
        inverse_block = at_head(inputs.inverse.ptr, inputs.inverse, batch, head, row)
        inverse = load_tile(inverse_block, inverse_offsets, local, local, rows, SIZES.BLOCK_C, SIZES.BLOCK_C, True)
        beta = load_rows(inputs.beta.ptr, inputs.beta, batch, head, row, rows, SIZES.BLOCK_C)
        sums = load_sums(inputs.decay.ptr, inputs.decay, batch, head, row, rows, FEATURES.decay, SIZES.BLOCK_C)

        scores = tl.dot(q, tl.trans(k), input_precision=SIZES.PRECISION) * between(sums, False, SIZES.BLOCK_C)
        scores = scores.to(q.dtype)  # now: half the registers
        read = tl.dot(q, state.to(q.dtype), input_precision=SIZES.PRECISION) * from_start(sums)[:, None]
        written, state = write_rows(state, k, v, inverse, beta, sums, SIZES.PRECISION, SIZES.SOLVE_PRECISION)
        read = tl.dot(scores, written, read, input_precision=SIZES.PRECISION) * scale
        out_block = at_head(out.ptr, out, batch, head, row)
        store_tile(out_block, out_offsets, read.to(out.ptr.dtype.element_ty), local, columns, rows, SIZES.VALUE_DIM)
    store_state(final, sequence, head, state, columns, SIZES)


@triton.jit(do_not_specialize=VARYING)
def gated_delta_rule_bwd_states_kernel(
    inputs,
    initial,  # float32 [S, H, K, V] or None
    states,  # [P, H, K, V]: the state before each chunk
    written,  # [B, H, N, V]
    places,
    heads,
    group,
    seqlen,
    total,
    FEATURES: tl.constexpr,
    SIZES: tl.constexpr,
):
    """The walk of the forward pass again, which keeps the state before each chunk and what its rows write."""
    sequence, head, columns = block_of_columns(heads, SIZES.VALUE_DIM, SIZES.BLOCK_V)
    start, length = locate(places.cu_seqlens_ptr, sequence, seqlen, total, FEATURES.varlen)
    batch = 0 if FEATURES.varlen else sequence
    chunk = first_chunk(places.chunk_starts_ptr, sequence, seqlen, FEATURES.varlen, SIZES.BLOCK_C)
    local, offs_k = tl.arange(0, SIZES.BLOCK_C), tl.arange(0, SIZES.BLOCK_K)
    k_offsets = tile_offsets(inputs.k, local, offs_k, SIZES.WIDE)
    v_offsets = tile_offsets(inputs.v, local, columns, SIZES.WIDE)
    written_offsets = tile_offsets(written, local, columns, SIZES.WIDE)
    inverse_offsets = tile_offsets(inputs.inverse, local, local, False)

    state = load_state(initial, sequence, head, columns, FEATURES.state, SIZES)
    for first in tl.range(0, length, SIZES.BLOCK_C):
        row, rows = start + first, length - first
        store_state(states, chunk + first // SIZES.BLOCK_C, head, state, columns, SIZES)
        k_block = at_head(inputs.k.ptr, inputs.k, batch, head // group, row)
        k = load_tile(k_block, k_offsets, local, offs_k, rows, SIZES.KEY_DIM, SIZES.BLOCK_K, True)
        v_block = at_head(inputs.v.ptr, inputs.v, batch, head, row)
        v = load_tile(v_block, v_offsets, local, columns, rows, SIZES.VALUE_DIM, SIZES.PADDED_V, True)
        inverse_block = at_head(inputs.inverse.ptr, inputs.inverse, batch, head, row)
        inverse = load_tile(inverse_block, inverse_offsets, local, local, rows, SIZES.BLOCK_C, SIZES.BLOCK_C, True)
        beta = load_rows(inputs.beta.ptr, inputs.beta, batch, head, row, rows, SIZES.BLOCK_C)
        sums = load_sums(inputs.decay.ptr, inputs.decay, batch, head, row, rows, FEATURES.decay, SIZES.BLOCK_C)
        new, state = write_rows(state, k, v, inverse, beta, sums, SIZES.PRECISION, SIZES.SOLVE_PRECISION)
        written_block = at_head(written.ptr, written, batch, head, row)
        store_tile(written_block, written_offsets, new, local, columns, rows, SIZES.VALUE_DIM)


@triton.jit
def first_chunk(chunk_starts_ptr, sequence, seqlen, VARLEN: tl.constexpr, BLOCK_C: tl.constexpr):
    """How many chunks stand before a sequence."""
    if VARLEN:
        return tl.load(chunk_starts_ptr + sequence)
    else:
        return sequence * tl.cdiv(seqlen, BLOCK_C)

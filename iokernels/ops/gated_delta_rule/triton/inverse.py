"""The triangular systems of the gated delta rule in Triton: (I + A)^-1 for every chunk, all at once.

A = tril(beta (K K^T) exp(b_i - b_j), -1), so that (I + A) n = beta (v - what the state held) gives what the rows of a
chunk write (see the portable backend's ``chunks`` and arXiv:2406.06484, section 3). It depends on neither v nor the
state: a thread block takes one chunk of one head, and the walk over the state finds the inverses ready.

The 16 x 16 blocks on the diagonal are inverted together by elimination, one column a step. Then neighbours join,

    [L1  0 ]^-1   [T1            0 ]
    [A21 L2]    = [-T2 A21 T1    T2]       that is  T' = T - T (A in the joined corners) T

to 32, to 64 rows: products on matrix units, in more than half precision, because errors grow with the norm of the
inverse. Powers of A, which would need no elimination, grow as 2^C where beta is 2 and keys are alike.

FLOPs a chunk: 2 C^2 K + 4 C^3 for each joining. Bytes: k, beta, log_decay once, C float32 elements written a row. Half
precision would be the largest of all errors where keys are alike and there are more of them than K.
"""

from __future__ import annotations

import triton
import triton.language as tl

from iokernels.ops.shared.triton_tiles import at_head, load_tile, store_tile, tile_offsets

from .chunks import VARYING, between, chunk_at, load_rows, load_sums


@triton.jit
def _diagonal_blocks(lower, BLOCK_C: tl.constexpr):
    """The 16 x 16 blocks on the diagonal of [C, C]: [C / 16, 16, 16]."""
    count: tl.constexpr = BLOCK_C // 16
    blocks = tl.reshape(lower, (count, 16, count, 16))
    number = tl.arange(0, count)
    diagonal = number[:, None, None, None] == number[None, None, :, None]
    return tl.sum(tl.where(diagonal, blocks, 0.0), 2)


@triton.jit
def _on_diagonal(blocks, BLOCK_C: tl.constexpr):
    """The reverse of :func:`_diagonal_blocks`, zeros elsewhere."""
    count: tl.constexpr = BLOCK_C // 16
    number = tl.arange(0, count)
    diagonal = number[:, None, None, None] == number[None, None, :, None]
    return tl.reshape(tl.where(diagonal, blocks[:, :, None, :], 0.0), (BLOCK_C, BLOCK_C))


@triton.jit
def unit_triangular_inverse(lower, BLOCK_C: tl.constexpr, PRECISION: tl.constexpr):
    """(I + lower)^-1 of a strictly lower triangular [C, C], float32. C is 16, 32 or 64."""
    local = tl.arange(0, 16)
    blocks = _diagonal_blocks(lower, BLOCK_C)
    identity = tl.where(local[:, None] == local[None, :], 1.0, 0.0)
    inverse = blocks * 0.0 + identity[None, :, :]
    for column in tl.static_range(15):
        # Row ``column`` of the inverse is done; every row below takes its share of it off.
        factor = tl.sum(tl.where(local[None, None, :] == column, blocks, 0.0), 2)
        row = tl.sum(tl.where(local[None, :, None] == column, inverse, 0.0), 1)
        inverse -= factor[:, :, None] * row[:, None, :]
    result = _on_diagonal(inverse, BLOCK_C)
    rows = tl.arange(0, BLOCK_C)
    if BLOCK_C > 16:
        result = _join(result, lower, rows, 16, PRECISION)
    if BLOCK_C > 32:
        result = _join(result, lower, rows, 32, PRECISION)
    return result


@triton.jit
def _join(inverse, lower, rows, SIZE: tl.constexpr, PRECISION: tl.constexpr):
    """From inverses of blocks of SIZE on the diagonal to those of twice that."""
    block = rows // SIZE
    corner = (block[:, None] == block[None, :] + 1) & (block[:, None] % 2 == 1)
    product = tl.dot(tl.where(corner, lower, 0.0), inverse, input_precision=PRECISION)
    return inverse - tl.dot(inverse, product, input_precision=PRECISION)


@triton.jit(do_not_specialize=VARYING)
def gated_delta_rule_inverse_kernel(
    inputs,
    inverse,  # float32 [B, H, N, C]: below its diagonal, row i of an inverse in the place of row i of the chunk
    places,
    heads,
    group,
    seqlen,
    FEATURES: tl.constexpr,
    SIZES: tl.constexpr,
):
    """The inverse of one chunk of one head."""
    index, head = tl.program_id(0) // heads, tl.program_id(0) % heads
    batch, first_row, rows = chunk_at(places.table_ptr, index, seqlen, FEATURES.varlen, SIZES.BLOCK_C)
    if rows > 0:
        local, offs_k = tl.arange(0, SIZES.BLOCK_C), tl.arange(0, SIZES.BLOCK_K)
        k_block = at_head(inputs.k.ptr, inputs.k, batch, head // group, first_row)
        k = load_tile(
            k_block,
            tile_offsets(inputs.k, local, offs_k, SIZES.WIDE),
            local,
            offs_k,
            rows,
            SIZES.KEY_DIM,
            SIZES.BLOCK_K,
            True,
        )
        beta = load_rows(inputs.beta.ptr, inputs.beta, batch, head, first_row, rows, SIZES.BLOCK_C)
        sums = load_sums(inputs.decay.ptr, inputs.decay, batch, head, first_row, rows, FEATURES.decay, SIZES.BLOCK_C)
        products = tl.dot(k, tl.trans(k), input_precision=SIZES.PRECISION)
        lower = beta[:, None] * products * between(sums, False, SIZES.BLOCK_C)
        lower = tl.where(local[:, None] > local[None, :], lower, 0.0)
        found = unit_triangular_inverse(lower, SIZES.BLOCK_C, SIZES.INVERSE_PRECISION)
        found = tl.where(local[:, None] > local[None, :], found, 0.0)
        at = at_head(inverse.ptr, inverse, batch, head, first_row)
        offsets = tile_offsets(inverse, local, local, False)
        store_tile(at, offsets, found, local, local, rows, SIZES.BLOCK_C)

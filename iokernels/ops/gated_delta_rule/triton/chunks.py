"""What the kernels of the gated delta rule share: where a chunk lies, and its decays."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from iokernels.ops.shared.triton_sums import clamped, log2_between, no_sums, sums_of
from iokernels.ops.shared.triton_tiles import View


class Features(NamedTuple):
    """What a kernel is compiled for."""

    varlen: bool
    decay: bool
    state: bool  # an initial state; in the backward pass, a gradient of the final one


class Inputs(NamedTuple):
    """What the kernels read; a kernel that does not look at one of them gets none."""

    q: View  # [B, Hk, N, K]
    k: View  # [B, Hk, N, K]
    v: View  # [B, H, N, V]
    beta: View  # [B, H, N]
    decay: View  # [B, H, N] or None
    inverse: View  # float32 [B, H, N, C]


class Places(NamedTuple):
    """Where packed sequences and their chunks lie; all None where every sequence has the same length."""

    cu_seqlens_ptr: Any  # int32 [S + 1]
    chunk_starts_ptr: Any  # int32 [S]: how many chunks stand before a sequence
    table_ptr: Any  # int32 [P, 2]: first row and number of rows of each chunk


class Sizes(NamedTuple):
    """Tile shapes and precisions, as a kernel is compiled for them."""

    KEY_DIM: int
    VALUE_DIM: int
    BLOCK_K: int
    BLOCK_V: int
    BLOCK_C: int  # rows of a chunk
    PADDED_K: int
    PADDED_V: int
    WIDE: bool  # offsets inside a tile need 64 bits
    PRECISION: str
    SOLVE_PRECISION: str  # of products with an inverse
    INVERSE_PRECISION: str  # of those that make it


VARYING = ("heads", "group", "seqlen", "total", "scale")
"""Numbers that vary between calls: one compiled kernel serves all of them. ``group`` is heads of v to a head of k."""


@triton.jit
def chunk_at(table_ptr, index, seqlen, VARLEN: tl.constexpr, BLOCK_C: tl.constexpr):
    """Sequence, first row and number of rows of a chunk.

    Packed: from a table [P, 2] of first rows and counts, all in "sequence" 0, the only one of the tensors.
    """
    if VARLEN:
        return 0, tl.load(table_ptr + 2 * index), tl.load(table_ptr + 2 * index + 1)
    else:
        chunks = tl.cdiv(seqlen, BLOCK_C)
        first_row = index % chunks * BLOCK_C
        return index // chunks, first_row, tl.minimum(seqlen - first_row, BLOCK_C)


@triton.jit
def load_rows(ptr, strides, batch, head, first_row, rows, BLOCK_C: tl.constexpr):
    """A number a row, float32 [C], zeros past ``rows``: ``ptr [B, H, N]``."""
    batch, head, first_row = tl.cast(batch, tl.int64), tl.cast(head, tl.int64), tl.cast(first_row, tl.int64)
    local = tl.arange(0, BLOCK_C)
    at = ptr + batch * strides.b + head * strides.h + (first_row + local) * strides.n
    return tl.load(at, mask=local < rows, other=0.0).to(tl.float32)


@triton.jit
def load_sums(ptr, strides, batch, head, first_row, rows, DECAY: tl.constexpr, BLOCK_C: tl.constexpr):
    """The running sums of a chunk's log decays; rows past its end add nothing."""
    if DECAY:
        return sums_of(clamped(load_rows(ptr, strides, batch, head, first_row, rows, BLOCK_C)), BLOCK_C)
    else:
        return no_sums(BLOCK_C)


@triton.jit
def between(sums, TRANSPOSED: tl.constexpr, BLOCK_C: tl.constexpr):
    """exp(b_i - b_j) for i >= j, and 0 elsewhere: as [i, j], or as [j, i]."""
    local = tl.arange(0, BLOCK_C)
    if TRANSPOSED:
        seen = local[:, None] <= local[None, :]
    else:
        seen = local[:, None] >= local[None, :]
    return tl.exp2(tl.where(seen, log2_between(sums, TRANSPOSED), float("-inf")))

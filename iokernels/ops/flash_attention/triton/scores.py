"""What the forward and backward kernels share: where a sequence lies, and what the scores of a tile are.

Scores leave :func:`tile_scores` in base 2 (multiplied by log2 e), because ``exp2`` is the instruction that the
hardware has. Where a bias or slopes are added to them they stay natural until the LSE or the maximum is subtracted:
log2 e times ``finfo.min``, with which people pad, is -inf. A tile may lie as [queries, keys] or as [keys, queries]:
the index arguments ``rows`` and ``keys`` are two-dimensional and say which, so each formula is written once.

Bytes beside those that each kernel names: of a bias and a mask, the elements of every visited block; 4 of an ALiBi
slope and 8 of the dropout seed whenever a block turns to a head; 16 of offsets a block of packed sequences.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from iokernels.ops.shared.triton_tiles import LOG2E, View, at_head, locate, tanh


class Inputs(NamedTuple):
    """What every kernel reads."""

    q: View  # [B, Hq, Nq, D]
    k: View  # [B, Hkv, Nk, D]
    v: View  # [B, Hkv, Nk, Dv]
    cu_seqlens_q_ptr: Any  # int32 [S + 1] or None
    cu_seqlens_k_ptr: Any  # int32 [S + 1] or None


class Extras(NamedTuple):
    """What changes scores and weights; each may be absent."""

    bias: View  # [B|1, Hq|1, Nq|1, Nk|1]
    mask: View  # bytes, like bias
    alibi: View  # float32 [B|1, Hq]
    sinks_ptr: Any  # [Hq]
    seed_ptr: Any  # int64 [1]


class Scales(NamedTuple):
    """Factors. ``qk_scale`` is scale in the unit of the scores (log2 e, or 1 where they are natural), or
    scale / softcap where there is a softcap, and ``softcap`` is in that unit."""

    scale: Any
    qk_scale: Any
    softcap: Any
    dropout_scale: Any  # 1 / (1 - p)


class Sizes(NamedTuple):
    """Tile shapes, as a kernel is compiled for them."""

    HEAD_DIM: int
    VALUE_DIM: int
    BLOCK_D: int  # HEAD_DIM, rounded up to a power of two
    BLOCK_V: int
    BLOCK_M: int
    BLOCK_N: int
    WIDE: bool  # offsets inside a tile need 64 bits
    PRECISION: str


VARYING = (
    "heads", "group", "seqlen_q", "seqlen_k", "total_q", "total_k", "window_left", "window_right", "dropout_threshold",
)  # fmt: skip
"""Integers that vary between calls: one compiled kernel serves all of them. ``group`` is query heads to a key head,
``total_q`` and ``total_k`` are rows of the tensors."""


class Features(NamedTuple):
    """What a kernel is compiled for."""

    varlen: bool
    left: bool  # the window is bounded on the left
    right: bool  # and on the right; causal is this with window_right = 0
    softcap: bool
    bias: bool
    mask: bool
    alibi: bool
    sinks: bool
    dropout: bool
    natural: bool  # bias or alibi: scores are in natural units, and the LSE has a tail (options.empty_statistics)
    fold_scale: bool  # forward: scale > 0 and nothing is added to q . k, so the scale can wait (see forward)


class ScoreNumbers(NamedTuple):
    """Numbers that shape the scores and weights of one sequence."""

    seqlen_q: Any
    seqlen_k: Any
    window_left: Any
    window_right: Any
    dropout_threshold: Any
    qk_scale: Any
    softcap: Any
    dropout_scale: Any


class HeadScores(NamedTuple):
    """The same for one head of one sequence: what a tile needs beside its indices."""

    bias_ptr: Any
    bias: View  # its strides
    mask_ptr: Any
    mask: View
    alibi_slope: Any
    seed: Any
    sequence_head: Any  # b * Hq + h


@triton.jit
def row_block(seqlen_q, heads, FEATURES: tl.constexpr, BLOCK_M: tl.constexpr):
    """Which sequence, head and first row this block owns: row blocks within heads within sequences.

    One grid axis, because the others end at 65,535. Where a right bound makes the last rows the longest, they start
    first, so that the short ones fill the gaps at the end.
    """
    row_blocks = tl.cdiv(seqlen_q, BLOCK_M)
    block = tl.program_id(0) % row_blocks
    sequence_head = tl.program_id(0) // row_blocks
    if FEATURES.right:
        block = row_blocks - 1 - block
    return sequence_head // heads, sequence_head % heads, block * BLOCK_M


@triton.jit
def place_q(inputs, sequence, seqlen_q, total_q, FEATURES: tl.constexpr):
    """First row and length of a sequence of queries."""
    return locate(inputs.cu_seqlens_q_ptr, sequence, seqlen_q, total_q, FEATURES.varlen)


@triton.jit
def place_k(inputs, sequence, seqlen_k, total_k, FEATURES: tl.constexpr):
    """First row and length of a sequence of keys."""
    return locate(inputs.cu_seqlens_k_ptr, sequence, seqlen_k, total_k, FEATURES.varlen)


@triton.jit
def head_scores(extras, batch, head, heads, FEATURES: tl.constexpr):
    """Move the pointers to one head of one sequence, and read its ALiBi slope and the dropout seed."""
    # Zeros stand for what is absent: a function cannot return None among other values.
    bias_ptr, mask_ptr, alibi_slope, seed = 0, 0, 0.0, 0
    if FEATURES.bias:
        bias_ptr = at_head(extras.bias.ptr, extras.bias, batch, head, 0)
    if FEATURES.mask:
        mask_ptr = at_head(extras.mask.ptr, extras.mask, batch, head, 0)
    if FEATURES.alibi:
        alibi_slope = tl.load(at_head(extras.alibi.ptr, extras.alibi, batch, head, 0))
    if FEATURES.dropout:
        seed = tl.load(extras.seed_ptr)
    return HeadScores(bias_ptr, extras.bias, mask_ptr, extras.mask, alibi_slope, seed, batch * heads + head)


@triton.jit
def tile_scores(qk, rows, keys, numbers, head, FEATURES: tl.constexpr, MASKED: tl.constexpr):
    """Scores of a tile of ``q . k``, -inf where hidden, and their derivative with respect to ``scale * q . k``
    (1 where there is no softcap).

    MASKED says that the tile may cross the end of the keys or an edge of the window.
    """
    slope = 1.0
    if FEATURES.softcap:
        capped = tanh(qk * numbers.qk_scale)
        scores = capped * numbers.softcap
        slope = 1.0 - capped * capped
    elif FEATURES.fold_scale:
        scores = qk
    else:
        scores = qk * numbers.qk_scale
    inside = (rows < numbers.seqlen_q) & (keys < numbers.seqlen_k)
    if FEATURES.bias:
        offsets = rows.to(tl.int64) * head.bias.n + keys.to(tl.int64) * head.bias.d
        scores += narrowed(tl.load(head.bias_ptr + offsets, mask=inside, other=0.0))
    if FEATURES.alibi:
        distance = tl.abs(rows + (numbers.seqlen_k - numbers.seqlen_q) - keys)
        scores -= head.alibi_slope * distance.to(tl.float32)
    if FEATURES.mask:
        offsets = rows.to(tl.int64) * head.mask.n + keys.to(tl.int64) * head.mask.d
        scores = tl.where(tl.load(head.mask_ptr + offsets, mask=inside, other=0) != 0, scores, float("-inf"))
    if MASKED:
        scores = tl.where(visible(rows, keys, numbers, FEATURES), scores, float("-inf"))
    return scores, slope


@triton.jit
def narrowed(bias):
    """A bias in float32; what is finite in float64 stays finite."""
    if bias.dtype == tl.float64:
        most = 3.4028234663852886e38
        bias = tl.where(tl.abs(bias) < float("inf"), tl.minimum(tl.maximum(bias, -most), most), bias)
    return bias.to(tl.float32)


@triton.jit
def exponential(difference, FEATURES: tl.constexpr):
    """exp of a difference of scores."""
    if FEATURES.natural:
        return tl.exp2(difference * LOG2E)
    else:
        return tl.exp2(difference)


@triton.jit
def visible(rows, keys, numbers, FEATURES: tl.constexpr):
    """Where the window and the end of the keys let a query see a key. Rows are aligned at the end of the keys."""
    position = rows + (numbers.seqlen_k - numbers.seqlen_q)
    shown = (keys < numbers.seqlen_k) & (rows < numbers.seqlen_q)
    if FEATURES.left:
        shown = shown & (keys >= position - numbers.window_left)
    if FEATURES.right:
        shown = shown & (keys <= position + numbers.window_right)
    return shown


@triton.jit
def key_range(first_row, last_row, numbers, FEATURES: tl.constexpr, BLOCK_N: tl.constexpr):
    """The keys that rows ``first_row .. last_row`` see: ``[start, stop)``, of which ``[full_start, full_stop)`` are
    whole blocks that each of these rows sees entirely. All but ``stop`` are multiples of BLOCK_N."""
    shift = numbers.seqlen_k - numbers.seqlen_q
    start = 0
    full_start = 0
    stop = numbers.seqlen_k
    full_stop = numbers.seqlen_k // BLOCK_N * BLOCK_N
    if FEATURES.right:
        ahead = shift + numbers.window_right + 1
        stop = tl.maximum(tl.minimum(numbers.seqlen_k, last_row + ahead), 0)
        full_stop = tl.maximum(tl.minimum(numbers.seqlen_k, first_row + ahead), 0) // BLOCK_N * BLOCK_N
    if FEATURES.left:
        behind = shift - numbers.window_left
        start = tl.maximum(first_row + behind, 0) // BLOCK_N * BLOCK_N
        full_start = (tl.maximum(last_row + behind, 0) + BLOCK_N - 1) // BLOCK_N * BLOCK_N
        # Where no block is whole, the blocks before full_start are all there is.
        full_start = tl.minimum(full_start, (stop + BLOCK_N - 1) // BLOCK_N * BLOCK_N)
        full_stop = tl.maximum(full_stop, full_start)
    return start, full_start, full_stop, stop


@triton.jit
def row_range(first_key, last_key, numbers, FEATURES: tl.constexpr, BLOCK_M: tl.constexpr):
    """The rows that see any of the keys ``first_key .. last_key``, in parts like those of :func:`key_range`: the right
    edge of the window passes between ``start`` and ``full_start``, the left one between ``full_stop`` and ``stop``.

    Rows past the end of the queries count as seeing every key: they weigh nothing (``backward_q.load_statistics``).
    """
    shift = numbers.seqlen_k - numbers.seqlen_q
    start = 0
    full_start = 0
    stop = numbers.seqlen_q
    full_stop = (numbers.seqlen_q + BLOCK_M - 1) // BLOCK_M * BLOCK_M
    if FEATURES.left:
        ahead = numbers.window_left - shift + 1
        stop = tl.maximum(tl.minimum(numbers.seqlen_q, last_key + ahead), 0)
        full_stop = tl.maximum(tl.minimum(full_stop, first_key + ahead), 0) // BLOCK_M * BLOCK_M
    if FEATURES.right:
        behind = shift + numbers.window_right
        start = tl.maximum(first_key - behind, 0) // BLOCK_M * BLOCK_M
        full_start = (tl.maximum(last_key - behind, 0) + BLOCK_M - 1) // BLOCK_M * BLOCK_M
        full_start = tl.minimum(full_start, (stop + BLOCK_M - 1) // BLOCK_M * BLOCK_M)
        full_stop = tl.maximum(full_stop, full_start)
    return start, full_start, full_stop, stop


@triton.jit
def keep_mask(head, threshold, first_row, first_key, ROWS: tl.constexpr, KEYS: tl.constexpr, KEYS_FIRST: tl.constexpr):
    """``dropout.keep_mask`` of a tile: one Philox call makes the words of four neighbouring keys.

    ``first_key`` and KEYS are multiples of 4. The result is [ROWS, KEYS], or [KEYS, ROWS] with KEYS_FIRST.
    """
    rows = first_row + tl.arange(0, ROWS)
    fours = first_key // 4 + tl.arange(0, KEYS // 4)
    if KEYS_FIRST:
        rows, fours = tl.broadcast(rows[None, :], fours[:, None])
    else:
        rows, fours = tl.broadcast(rows[:, None], fours[None, :])
    zeros = rows * 0
    w0, w1, w2, w3 = tl.philox(head.seed, fours, rows, zeros + head.sequence_head, zeros)
    # Lane 2x + y of the joined words is word 2x + y.
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))
    if KEYS_FIRST:
        words = tl.reshape(tl.permute(words, (0, 2, 3, 1)), (KEYS, ROWS))
    else:
        words = tl.reshape(words, (ROWS, KEYS))
    return (words >> 1).to(tl.int32) >= threshold

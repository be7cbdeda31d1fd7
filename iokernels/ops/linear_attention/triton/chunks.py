"""What the Triton kernels of this room share: where a segment lies, its decays, and the layout of a state.

A sequence is cut into segments of ``segment_rows`` tokens where heads alone do not fill the GPU, and a segment into
chunks of BLOCK_C, which a block walks in order. Decays leave :func:`chunk_decay` as the sums of :mod:`.triton_sums`.

Bytes beside those that each kernel names: of a decay, an element a token or one a block; of packed sequences, 8 of
offsets a block and, where they are split, 4 for every step of the search for the sequence and 4 for its first segment.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from iokernels.ops.shared.triton_sums import clamped, from_start, log2_between, no_sums, sums_of, sums_of_one, to_end
from iokernels.ops.shared.triton_tiles import at_head, locate

NO_DECAY, PER_HEAD, PER_TOKEN = 0, 1, 2
"""Values of ``Features.decay``."""


class Features(NamedTuple):
    """What a kernel is compiled for."""

    varlen: bool
    split: bool  # several segments a sequence
    decay: int  # none, one a head, one a token
    normalize: bool
    taylor: bool
    has_state: bool  # the walk starts from a state in memory, else from zeros
    writes_state: bool  # the last state goes to memory: unsplit walks
    crossing: bool  # backward: the gradient of decays is wanted


@triton.jit
def segment_of(
    segment, cu_seqlens_ptr, segments_ptr, sequences, seqlen, per_sequence, segment_rows, search_steps,
    FEATURES: tl.constexpr,
):  # fmt: skip
    """The sequence of a segment, its batch index, its first row, how many rows it has, and whether it is the last.

    Packed: ``seqlen`` counts all rows, and ``segments_ptr`` holds each sequence's first segment, int32 [S + 1]. A
    segment past the last one has no rows.
    """
    index = 0
    if FEATURES.varlen:
        sequence = segment
        if FEATURES.split:
            low = segment * 0
            high = low + sequences
            for _ in range(search_steps):
                middle = (low + high) // 2
                starts_before = tl.load(segments_ptr + middle) <= segment
                low = tl.where(starts_before, middle, low)
                high = tl.where(starts_before, high, middle)
            sequence = low
            index = segment - tl.load(segments_ptr + low)
        batch = 0
        start, length = locate(cu_seqlens_ptr, sequence, seqlen, seqlen, True)
    else:
        sequence = segment // per_sequence
        index = segment % per_sequence
        batch = sequence
        start = 0
        length = seqlen
    if FEATURES.split:
        first = tl.minimum(index * segment_rows, length)
        return sequence, batch, start + first, tl.minimum(length - first, segment_rows), first + segment_rows >= length
    else:
        return sequence, batch, start, length, True


@triton.jit
def head_decay(decay_ptr, strides, batch, head, start, FEATURES: tl.constexpr):
    """Where the decays of a segment lie in one head, and the one of all tokens where there is one."""
    if FEATURES.decay == 2:
        return at_head(decay_ptr, strides, batch, head, start), 0.0
    elif FEATURES.decay == 1:
        return 0, tl.load(at_head(decay_ptr, strides, batch, head, start)).to(tl.float32)
    else:
        return 0, 0.0


@triton.jit
def chunk_decay(decay_head, decay, stride_n, first_row, length, BLOCK_C: tl.constexpr, FEATURES: tl.constexpr):
    """The running sums of a chunk's log decays. Rows past the end repeat the last."""
    if FEATURES.decay == 2:
        rows = first_row + tl.arange(0, BLOCK_C)
        g = tl.load(decay_head + rows.to(tl.int64) * stride_n, mask=rows < length, other=0.0)
        return sums_of(clamped(g), BLOCK_C)
    elif FEATURES.decay == 1:
        return sums_of_one(clamped(decay), tl.minimum(length - first_row, BLOCK_C), BLOCK_C)
    else:
        return no_sums(BLOCK_C)


@triton.jit
def weigh_pairs(tile, sums, REVERSE: tl.constexpr, STRICT: tl.constexpr, BLOCK_C: tl.constexpr, FEATURES: tl.constexpr):
    """``tile [rows, others]`` times the decay between both, 0 where the other does not come before the row (or after
    it, with REVERSE); STRICT leaves out the row itself."""
    rows, others = tl.arange(0, BLOCK_C)[:, None], tl.arange(0, BLOCK_C)[None, :]
    if REVERSE:
        early, late = rows, others
    else:
        early, late = others, rows
    if STRICT:
        seen = early < late
    else:
        seen = early <= late
    tile = tl.where(seen, tile, 0.0)  # not a product with 0, for what is not seen may have overflowed
    if FEATURES.decay > 0:
        # Masked before the exponential: the other half would be positive.
        return tile * tl.exp2(tl.where(seen, log2_between(sums, REVERSE), float("-inf")))
    else:
        return tile


@triton.jit
def state_weights(sums, REVERSE: tl.constexpr):
    """What a row sees of the state that the walk brings, and what the state that it takes on keeps of the row."""
    if REVERSE:
        return to_end(sums), from_start(sums)
    else:
        return from_start(sums), to_end(sums)


@triton.jit
def load_state(
    ptr, strides, outer, head, rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, FEATURES: tl.constexpr,
):  # fmt: skip
    """The part ``[rows, columns]`` of a state, float32, or zeros where there is none."""
    if FEATURES.has_state:
        place = at_head(ptr, strides, outer, head, 0) + rows[:, None] * strides.n + columns[None, :] * strides.d
        return tl.load(place, mask=(rows[:, None] < ROWS) & (columns[None, :] < COLUMNS), other=0.0)
    else:
        return tl.zeros([BLOCK_R, BLOCK_C], tl.float32)


@triton.jit
def load_line(ptr, stride, offsets, WIDTH: tl.constexpr, BLOCK: tl.constexpr, FEATURES: tl.constexpr):
    """A row or column of a state from its first element, or zeros where there is none."""
    if FEATURES.has_state:
        return tl.load(ptr + offsets * stride, mask=offsets < WIDTH, other=0.0)
    else:
        return tl.zeros([BLOCK], tl.float32)


@triton.jit
def square_rows(offsets, K_WIDTH: tl.constexpr, BLOCK_K: tl.constexpr):
    """The rows of a Taylor state that hold products of two keys, for the BLOCK_K x BLOCK_K of a tile, and the same with
    both keys exchanged. A product that is only padding gets a row past the last."""
    a, c = offsets // BLOCK_K, offsets % BLOCK_K
    valid = (a < K_WIDTH) & (c < K_WIDTH)
    past: tl.constexpr = 1 + K_WIDTH + K_WIDTH * K_WIDTH
    return tl.where(valid, 1 + K_WIDTH + a * K_WIDTH + c, past), tl.where(valid, 1 + K_WIDTH + c * K_WIDTH + a, past)


@triton.jit
def squares(x, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr):
    """The products of all pairs of columns, [BLOCK_C, BLOCK_K * BLOCK_K], made in registers."""
    wide = x.to(tl.float32)
    return tl.reshape(wide[:, :, None] * wide[:, None, :], (BLOCK_C, BLOCK_K * BLOCK_K)).to(x.dtype)

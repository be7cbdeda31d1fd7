"""What the Triton kernels of this room share: where a segment lies, its decays, and the layout of a state.

A sequence is cut into segments of ``segment_rows`` tokens where heads alone do not fill the GPU, and a segment into
chunks of BLOCK_C, which a block walks in order. Decays leave :func:`chunk_decay` as the sums of
``ops.shared.triton_sums``.

Bytes beside those that each kernel names: of a decay, an element a token or one a block; of packed sequences, 8 of
offsets a block and, where they are split, 4 for every step of the search for the sequence and 4 for its first segment.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from iokernels.ops.shared.triton_sums import clamped, from_start, log2_between, no_sums, sums_of, sums_of_one, to_end
from iokernels.ops.shared.triton_tiles import View, at_head, locate

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
    decay_gradient: bool  # backward: the gradient of decays is wanted


class Inputs(NamedTuple):
    """What the operator reads."""

    q: View  # [B, Hk, N, K]
    k: View  # [B, Hk, N, K]
    v: View  # [B, H, N, V]
    decay: View  # [1, H, 1] or [B, H, N], or none


class Offsets(NamedTuple):
    """Where packed sequences begin, int32 [S + 1] both: their rows, and where they are cut their segments."""

    rows_ptr: Any
    segments_ptr: Any


class Sizes(NamedTuple):
    """Tile shapes, as a kernel is compiled for them."""

    K_WIDTH: int
    V_WIDTH: int
    BLOCK_K: int  # K_WIDTH rounded up to a power of two, or a slice of it
    BLOCK_V: int
    BLOCK_C: int  # rows of a chunk
    WIDE: bool  # offsets inside a tile need 64 bits
    PRECISION: str


VARYING = ("heads", "group", "sequences", "seqlen", "per_sequence", "segment_rows", "search_steps")
"""Integers that vary between calls: one compiled kernel serves all of them. ``group`` is heads of v to one of q and k,
``per_sequence`` the segments of each sequence unless they are packed, ``search_steps`` those of :func:`segment_of`."""


class Counts(NamedTuple):
    """What ``VARYING`` names, inside a kernel."""

    heads: Any
    group: Any
    sequences: Any
    seqlen: Any
    per_sequence: Any
    segment_rows: Any
    search_steps: Any


@triton.jit
def segment_of(segment, offsets, counts, FEATURES: tl.constexpr):
    """The sequence of a segment, its batch index, its first row, how many rows it has, and whether it is the last.

    Packed: ``counts.seqlen`` counts all rows. A segment past the last one has no rows.
    """
    seqlen, segment_rows = counts.seqlen, counts.segment_rows
    index = 0
    if FEATURES.varlen:
        sequence = segment
        if FEATURES.split:
            segments_ptr = offsets.segments_ptr
            low = segment * 0
            high = low + counts.sequences
            for _ in range(counts.search_steps):
                middle = (low + high) // 2
                starts_before = tl.load(segments_ptr + middle) <= segment
                low = tl.where(starts_before, middle, low)
                high = tl.where(starts_before, high, middle)
            sequence = low
            index = segment - tl.load(segments_ptr + low)
        batch = 0
        start, length = locate(offsets.rows_ptr, sequence, seqlen, seqlen, True)
    else:
        sequence = segment // counts.per_sequence
        index = segment % counts.per_sequence
        batch = sequence
        start = 0
        length = seqlen
    if FEATURES.split:
        first = tl.minimum(index * segment_rows, length)
        return sequence, batch, start + first, tl.minimum(length - first, segment_rows), first + segment_rows >= length
    else:
        return sequence, batch, start, length, True


@triton.jit
def head_decay(decay, batch, head, start, FEATURES: tl.constexpr):
    """Where the decays of a segment lie in one head, and the one of all tokens where there is one."""
    if FEATURES.decay == 2:
        return at_head(decay.ptr, decay, batch, head, start), 0.0
    elif FEATURES.decay == 1:
        return 0, tl.load(at_head(decay.ptr, decay, batch, head, start)).to(tl.float32)
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
    if FEATURES.decay > 0:
        tile = tile * tl.exp2(log2_between(sums, REVERSE))
    # Chosen and not multiplied by 0: what is not seen may have overflowed, and the decay between grows there.
    return tl.where(seen, tile, 0.0)


@triton.jit
def state_weights(sums, REVERSE: tl.constexpr):
    """What a row sees of the state that the walk brings, and what the state that it takes on keeps of the row."""
    if REVERSE:
        return to_end(sums), from_start(sums)
    else:
        return from_start(sums), to_end(sums)


@triton.jit
def load_state(
    state, outer, head, rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, FEATURES: tl.constexpr,
):  # fmt: skip
    """The part ``[rows, columns]`` of a state, float32, or zeros where there is none."""
    if FEATURES.has_state:
        place = at_head(state.ptr, state, outer, head, 0) + rows[:, None] * state.n + columns[None, :] * state.d
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
def load_column(column, batch, head, start, rows, length):
    """The normaliser's numbers of these rows, 0 past the end."""
    return tl.load(at_head(column.ptr, column, batch, head, start) + rows, mask=rows < length, other=0.0)


@triton.jit
def ones(rows, length):
    """A column of ones, 0 past the end."""
    return tl.where(rows < length, 1.0, 0.0)


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

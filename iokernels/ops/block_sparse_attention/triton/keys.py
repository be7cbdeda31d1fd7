"""Which rows a block of the forward and dQ kernels owns, and which keys each step of its walk looks at.

An *item* is one list: the rows of a query block, of all the query heads that share it. Row ``r = i * packed + g`` of an
item is row i of the query block in the g-th of those heads, so that the rows of a tile of BLOCK_M stand close together
and keys are read once for all heads. The walk over keys is one flat sequence of steps of BLOCK_N keys, in three parts,

    the list        keys of the listed blocks, several blocks to a step where they are smaller than BLOCK_N; or, in
                    a dense row, all keys
    the sink        keys [0, sink)
    the window      keys (first position - window, last position] of the tile

and a key that several parts show to a row counts in one: in the sink's if it is one of its keys, else in the window's,
else in the list's. So each part hides what belongs to an earlier one, and no key counts twice.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from iokernels.ops.shared.triton_tiles import at_head, load_tile

UNBOUNDED = tl.constexpr(1 << 30)


class Features(NamedTuple):
    """What a kernel is compiled for."""

    causal: bool
    block_k: int  # keys of a key block
    page: int  # keys of a page; 0: the keys are dense
    sink_heads: bool  # sinks differ by head
    window_heads: bool  # windows differ by head
    one_list: bool  # all heads share one list, and its sink and window
    lengths: bool  # sequences have lengths of their own
    wide: bool  # offsets inside one head need 64 bits


class Numbers(NamedTuple):
    """Numbers that every block needs."""

    packed: Any  # query heads that share a list
    packs: Any  # such groups of heads
    group: Any  # query heads of a key head
    rows: Any  # of a query block
    query_blocks: Any
    row_tiles: Any  # of an item
    entries: Any  # room in a list
    seqlen_q: Any
    seqlen_k: Any
    sink: Any
    window: Any


class Rows(NamedTuple):
    """The rows of a tile: where they are, and the positions of the first and the last one."""

    batch: Any
    pack: Any
    kv_head: Any
    query_block: Any
    offs_m: Any  # [BLOCK_M], rows of the tile
    used: Any  # of which so many exist
    heads: Any  # [BLOCK_M], query heads
    rows: Any  # [BLOCK_M], rows of the sequence
    first: Any
    last: Any
    length: Any  # keys of the sequence


class Walk(NamedTuple):
    """The parts of a walk, in steps and in keys."""

    slots: Any  # keys in the list
    loaded: Any  # of which so many are named by entries: all of them, or none in a dense row
    list_steps: Any
    sink_steps: Any
    steps: Any
    sink: Any
    window: Any
    window_start: Any
    window_stop: Any
    stop: Any  # no row of the tile sees this key or one after it


@triton.jit
def length_of(seqlens_ptr, batch, numbers, FEATURES: tl.constexpr):
    """Keys of a sequence, within the capacity whatever the tensor says."""
    if FEATURES.lengths:
        return tl.minimum(tl.maximum(tl.load(seqlens_ptr + batch), 0), numbers.seqlen_k)
    else:
        return numbers.seqlen_k


@triton.jit
def tile_of(block, seqlens_ptr, numbers, FEATURES: tl.constexpr, BLOCK_M: tl.constexpr):
    """The rows of tile ``block``: row tiles within query blocks within groups of heads within sequences. The last
    query blocks come first, since a causal walk is longest there."""
    row_tile = block % numbers.row_tiles
    item = block // numbers.row_tiles
    query_block = numbers.query_blocks - 1 - item % numbers.query_blocks
    pack = item // numbers.query_blocks % numbers.packs
    batch = item // numbers.query_blocks // numbers.packs

    first_row = query_block * numbers.rows
    own = tl.minimum(numbers.rows, numbers.seqlen_q - first_row) * numbers.packed
    offs_m = tl.arange(0, BLOCK_M)
    row = row_tile * BLOCK_M + offs_m
    used = tl.minimum(own - row_tile * BLOCK_M, BLOCK_M)
    heads = pack * numbers.packed + row % numbers.packed
    length = length_of(seqlens_ptr, batch, numbers, FEATURES)
    shift = first_row + length - numbers.seqlen_q
    first = shift + row_tile * BLOCK_M // numbers.packed
    last = shift + (row_tile * BLOCK_M + used - 1) // numbers.packed
    kv_head = pack * numbers.packed // numbers.group
    rows = first_row + row // numbers.packed
    return Rows(batch, pack, kv_head, query_block, offs_m, used, heads, rows, first, last, length)


@triton.jit
def of_head(ptr, value, pack, PER_HEAD: tl.constexpr, ONE_LIST: tl.constexpr):
    """A sink or window: one number for all, or that of a list."""
    if PER_HEAD:
        of_list = pack
        if ONE_LIST:
            of_list = pack * 0
        return tl.maximum(tl.load(ptr + of_list), 0)
    else:
        return value


@triton.jit
def walk_of(
    tile, counts_ptr, stride_counts, sink_ptr, window_ptr, numbers, FEATURES: tl.constexpr, BLOCK_N: tl.constexpr
):
    """The walk of a tile of rows over its keys."""
    count = tl.load(at_head(counts_ptr, stride_counts, tile.batch, tile.pack, tile.query_block))
    sink = of_head(sink_ptr, numbers.sink, tile.pack, FEATURES.sink_heads, FEATURES.one_list)
    window = of_head(window_ptr, numbers.window, tile.pack, FEATURES.window_heads, FEATURES.one_list)
    stop = tile.length
    if FEATURES.causal:
        stop = tl.maximum(tl.minimum(stop, tile.last + 1), 0)
    loaded = tl.minimum(tl.maximum(count, 0), numbers.entries) * FEATURES.block_k
    slots = tl.where(count < 0, stop, loaded)
    sink = tl.minimum(sink, stop)
    window = tl.minimum(window, 1 << 29)
    window_start = tl.maximum(tile.first - window + 1, sink)
    window_stop = tl.where(window > 0, tl.minimum(tile.last + 1, tile.length), 0)
    list_steps = tl.cdiv(slots, BLOCK_N)
    sink_steps = tl.cdiv(sink, BLOCK_N)
    steps = list_steps + sink_steps + tl.cdiv(tl.maximum(window_stop - window_start, 0), BLOCK_N)
    return Walk(slots, loaded, list_steps, sink_steps, steps, sink, window, window_start, window_stop, stop)


@triton.jit
def keys_of(step, walk, list_ptr, stride_entry, offs_n, FEATURES: tl.constexpr, BLOCK_N: tl.constexpr):
    """The keys of a step [BLOCK_N], and which of them the step is about.

    Keys that every row of the tile counts elsewhere, or does not see, are left out, and need not be loaded.
    """
    slot = step * BLOCK_N + offs_n
    entry = tl.load(
        list_ptr + (slot // FEATURES.block_k).to(tl.int64) * stride_entry, mask=slot < walk.loaded, other=0
    )  # fmt: skip
    # A number that no block has, however large, must not come back as a key's when it is multiplied.
    entry = tl.minimum(tl.maximum(entry, -1), UNBOUNDED // FEATURES.block_k)
    listed = tl.where(slot < walk.loaded, entry * FEATURES.block_k + slot % FEATURES.block_k, slot)
    after = step - walk.list_steps
    in_list = after < 0
    in_window = after >= walk.sink_steps
    first = tl.where(in_window, walk.window_start + (after - walk.sink_steps) * BLOCK_N, after * BLOCK_N)
    keys = tl.where(in_list, listed, first + offs_n)
    # Bounds as numbers, for one comparison whatever the part is.
    least = tl.where(in_list, walk.sink, 0)
    stop = tl.where(in_list, walk.stop, tl.where(in_window, walk.window_stop, walk.sink))
    slots = tl.where(in_list, walk.slots, slot + 1)
    shown = (slot < slots) & (keys >= least) & (keys < stop)
    return keys, shown


@triton.jit
def visible(step, walk, keys, shown, position, FEATURES: tl.constexpr):
    """Where rows at ``position`` count keys in this step. Both are two-dimensional, in either order."""
    in_list = step < walk.list_steps
    in_sink = (step < walk.list_steps + walk.sink_steps) & (step >= walk.list_steps)
    if FEATURES.causal:
        # The list ends where the window begins; the sink reaches up to the row itself.
        behind = tl.where(in_list, walk.window, 0)
        ahead = tl.where(in_list | in_sink, UNBOUNDED, walk.window)
        return shown & (keys <= position - behind) & (keys > position - ahead)
    else:
        inside = (keys <= position) & (keys > position - walk.window)
        return shown & (tl.where(inside, tl.where(in_list, 0, 1), tl.where(in_list | in_sink, 1, 0)) != 0)


@triton.jit
def is_partial(step, walk, keys, shown, tile):
    """Whether a step has a pair of a row and a key that do not see each other, or may have."""
    least = tl.min(tl.where(shown, 0, -1), 0)
    highest = tl.max(keys, 0)
    behind = tl.where(step < walk.list_steps, walk.window, 0)
    in_window = step >= walk.list_steps + walk.sink_steps
    return (least < 0) | (highest > tile.first - behind) | in_window


@triton.jit
def row_offsets(strides, heads, rows, FEATURES: tl.constexpr):
    """Offsets of rows of several heads from the first row of a sequence."""
    if FEATURES.wide:
        return heads.to(tl.int64) * strides.h + rows.to(tl.int64) * strides.n
    else:
        return heads * strides.h + rows * strides.n


@triton.jit
def load_rows(
    ptr, strides, tile, columns, WIDTH: tl.constexpr, BLOCK: tl.constexpr, FEATURES: tl.constexpr
):  # fmt: skip
    """The rows of a tile of queries, or of what has their shape; zeros past the last."""
    sequence = at_head(ptr, strides, tile.batch, 0, 0)
    offsets = row_offsets(strides, tile.heads, tile.rows, FEATURES)[:, None] + columns[None, :] * strides.d
    return load_tile(sequence, offsets, tile.offs_m, columns, tile.used, WIDTH, BLOCK, True)


@triton.jit
def key_head(ptr, strides, batch, kv_head, FEATURES: tl.constexpr):
    """Address of the first key of one head: of a sequence, or of all pages."""
    if FEATURES.page > 0:
        batch = batch * 0
    return at_head(ptr, strides, batch, kv_head, 0)


@triton.jit
def pages_of(table_ptr, stride_table, batch, keys, shown, FEATURES: tl.constexpr):
    """The page of each key; where there are no pages, anything."""
    if FEATURES.page > 0:
        pages_ptr = table_ptr + tl.cast(batch, tl.int64) * stride_table
        return tl.load(pages_ptr + keys // FEATURES.page, mask=shown, other=0)
    else:
        return keys


@triton.jit
def key_rows(strides, keys, pages, FEATURES: tl.constexpr):
    """Offsets of keys from :func:`key_head`."""
    if FEATURES.page > 0:
        return pages.to(tl.int64) * strides.b + (keys % FEATURES.page).to(tl.int64) * strides.n
    elif FEATURES.wide:
        return keys.to(tl.int64) * strides.n
    else:
        return keys * strides.n


@triton.jit
def load_keys(
    ptr, strides, offsets, shown, columns, WIDTH: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Keys or values ``[BLOCK_N, BLOCK]``; zeros for those that are not shown."""
    mask = shown[:, None]
    if BLOCK > WIDTH:
        mask = mask & (columns[None, :] < WIDTH)
    return tl.load(ptr + offsets[:, None] + columns[None, :] * strides.d, mask=mask, other=0.0)

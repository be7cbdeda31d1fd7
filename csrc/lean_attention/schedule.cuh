// How lean_attention divides the keys among thread blocks: the device side of the schedule that docs/ops describes.
//
// An item is a row tile of one key head of one sequence; the tiles of BLOCK_N keys of all items, sequence after
// sequence and key head by key head, form one line. Equal shares: of P blocks the first T mod P take T div P + 1
// consecutive tiles of the T, the others one less; P and T follow from the lengths, which only the device knows. Fixed
// parts: block p of an item takes its tiles from p * part_tiles on. Either way a block gets segments, pieces of items,
// and knows without asking which other blocks hold the rest of an item, in which slots of the workspace.
#pragma once
#include "common/memory.cuh"
#include "common/warp.cuh"

struct Sizes {
    int batch, rows, kv_heads, row_tiles, capacity, window_left;

    DEVICE int lanes() const { return kv_heads * row_tiles; }  // items of a sequence

    // Keys of a sequence, within the capacity whatever the tensor says.
    DEVICE int length(int said) const { return least(most(said, 0), capacity); }

    // The first key that any row of a sequence sees, and the tile that it is in.
    DEVICE int first_key(int length) const { return window_left < 0 ? 0 : most(length - rows - window_left, 0); }
    DEVICE int first_tile(int length) const { return first_key(length) / BLOCK_N; }

    // Tiles of an item. Without keys it is one, of which nothing is read, so that every item has a block that writes
    // its result.
    DEVICE int tiles(int length) const { return most(ceil_div(length, BLOCK_N) - first_tile(length), 1); }
};

// A block's place in the line, between two segments.
struct Line {
    int tile, stop;        // what is left of its share
    int sequence, before;  // the sequence of `tile`, and where in the line that begins
    int total, parts;      // tiles of the line, and blocks that share it
};

// The tiles `begin` to `end` of an item, which has `tiles`. The item's partial results stand in the slots first, next,
// next + step, ..., `count` in all, of which `own` is this block's.
struct Segment {
    int sequence, lane, length, begin, end, tiles;
    int own, first, next, step, count;

    DEVICE bool whole() const { return end - begin == tiles; }
};

DEVICE int share_start(int block, int total, int parts) {
    return block * (total / parts) + least(block, total % parts);
}

// Whose share a tile is in.
DEVICE int owner(int tile, int total, int parts) {
    const int each = total / parts, more = total % parts, larger = more * (each + 1);
    return tile < larger ? tile / (each + 1) : more + (tile - larger) / each;
}

// This block's share, found by one warp: the lengths are added up, 32 at a time, and searched for the share's start.
// Every share has `fewest` tiles at least, and no item is cut into more than about `most_parts`.
DEVICE Line equal_share(const int* seqlens_ptr, const Sizes& sizes, int fewest, int most_parts) {
    auto tiles_at = [&](int sequence) {
        return sequence < sizes.batch ? sizes.tiles(sizes.length(load_global(seqlens_ptr + sequence))) : 0;
    };
    int sum = 0, longest = 0;
    for (int first = 0; first < sizes.batch; first += WARP) {
        const int tiles = tiles_at(first + lane_id());
        sum += tiles;
        longest = most(longest, tiles);
    }
    Line line;
    line.total = warp_reduce(sum, Sum{}) * sizes.lanes();
    const int share = most(ceil_div(warp_reduce(longest, Max{}), most_parts), fewest);
    line.parts = most(least(static_cast<int>(gridDim.x), line.total / share), 1);
    const int block = static_cast<int>(blockIdx.x);
    line.tile = block < line.parts ? share_start(block, line.total, line.parts) : 0;
    line.stop = block < line.parts ? share_start(block + 1, line.total, line.parts) : 0;
    line.sequence = line.before = 0;
    if (block >= line.parts) return line;

    const int target = line.tile / sizes.lanes();
    for (int first = 0; first < sizes.batch; first += WARP) {
        const int tiles = tiles_at(first + lane_id());
        int reached = tiles;
#pragma unroll
        for (int distance = 1; distance < WARP; distance *= 2) {
            const int below = shuffle_up(reached, distance);
            if (lane_id() >= distance) reached += below;
        }
        const bool passed = tiles > 0 && line.before + reached <= target;
        const int passes = warp_reduce(static_cast<int>(passed), Sum{});
        line.before += warp_reduce(passed ? tiles : 0, Sum{});
        line.sequence += passes;
        if (passes < WARP) break;
    }
    line.before *= sizes.lanes();
    return line;
}

// The next segment of an equal share; false where nothing is left of it.
DEVICE bool next_segment(Line& line, Segment& segment, const int* seqlens_ptr, const Sizes& sizes) {
    if (line.tile >= line.stop) return false;
    segment.sequence = line.sequence;
    segment.length = sizes.length(load_global_uniform(seqlens_ptr + line.sequence));
    segment.tiles = sizes.tiles(segment.length);
    segment.lane = (line.tile - line.before) / segment.tiles;
    const int item_start = line.before + segment.lane * segment.tiles, item_stop = item_start + segment.tiles;
    const int stop = least(item_stop, line.stop);
    segment.begin = line.tile - item_start;
    segment.end = stop - item_start;

    // A block writes partials of its first and of its last segment only: two slots a block. The item begins inside the
    // share of the first of its blocks, in that one's last segment, or together with it.
    const int block = static_cast<int>(blockIdx.x);
    const int first = owner(item_start, line.total, line.parts);
    segment.own = 2 * block + (line.tile > share_start(block, line.total, line.parts) ? 1 : 0);
    segment.first = 2 * first + (share_start(first, line.total, line.parts) < item_start ? 1 : 0);
    segment.next = 2 * first + 2;
    segment.step = 2;
    segment.count = owner(item_stop - 1, line.total, line.parts) - first + 1;

    if (stop == line.before + segment.tiles * sizes.lanes()) {
        line.before = stop;
        ++line.sequence;
    }
    line.tile = stop;
    return true;
}

// Part blockIdx % most_parts of item blockIdx / most_parts; false where the item has no such part. The keys of a prefix
// are those of no one sequence: all of `prefix`.
DEVICE bool fixed_part(Segment& segment, const int* seqlens_ptr, const Sizes& sizes, int part_tiles, int most_parts,
                       [[maybe_unused]] int prefix) {
    const int block = static_cast<int>(blockIdx.x);
    const int item = block / most_parts, part = block % most_parts;
    segment.sequence = item / sizes.lanes();
    segment.lane = item % sizes.lanes();
    if constexpr (OF_PREFIX) {
        segment.length = prefix;
        segment.tiles = most(ceil_div(prefix, BLOCK_N), 1);
    } else {
        segment.length = sizes.length(load_global_uniform(seqlens_ptr + segment.sequence));
        segment.tiles = sizes.tiles(segment.length);
    }
    segment.begin = part * part_tiles;
    segment.end = least(segment.begin + part_tiles, segment.tiles);
    segment.own = block;
    segment.first = item * most_parts;
    segment.next = segment.first + 1;
    segment.step = 1;
    segment.count = ceil_div(segment.tiles, part_tiles);
    return part < segment.count;
}

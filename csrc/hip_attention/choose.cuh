// Choosing the best candidates of one list: top-k, sort and count by one thread block, without a sort.
//
// Scores become integers of the same order. The value t of the K-th best is found digit by digit, 256 counts in shared
// memory at a time; then what is above t, and of those at t as many as there is room for, the first ones, are written
// where counts of what lies before them say. Candidates ascend, so the list does, and each comes once; -inf and what is
// not a number are never kept, so the count is right. Equal scores: the lower candidate comes first.
//
// Every warp has a run of candidates, and a lane the same ones in all six passes: the first one reads the scores of all
// heads that share the list and keeps the highest, in shared memory where HELD are enough, else in place of the scores
// of the first head. Counts are sums of integers: no order of warps or blocks changes a list.
//
// Constants: WARPS.
#pragma once
#include "common/barriers.cuh"
#include "common/math.cuh"
#include "common/warp.cuh"

constexpr int DIGITS = 256, DIGIT_BITS = 8;
constexpr int HELD = 2048;  // candidates whose orders shared memory has room for, as cuda/tuning.py has it

struct Choice {
    float* scores;     // of the candidates, by the first head that shares the list
    i64 stride_heads;  // to the next
    int heads, candidates, most;
};

struct Scratch {
    Shared<u32> orders;  // HELD
    Shared<u32> counts;  // DIGITS
    Shared<u32> found;   // 4
    Shared<u32> totals;  // 2 WARPS
};

// An integer that is higher where the score is; 0 is -inf, and no number.
DEVICE u32 order_of(float score) {
    const u32 bits = bits_as<u32>(score);
    if (!(score > -infinity())) return 0;
    return bits >> 31 != 0 ? ~bits : bits | 0x80000000u;
}

// Counts the digits of the lanes that say so. First digits are mostly alike: lanes with that of lane 0 are one update.
DEVICE void tally(Shared<u32> counts, bool counted, u32 digit) {
    const bool alike = digit == shuffle(digit, 0);
    const int together = count_bits(warp_ballot(counted && alike));
    if (lane_id() == 0 && together > 0) atomic_add_shared(counts + static_cast<int>(digit), static_cast<u32>(together));
    if (counted && !alike) atomic_add_shared(counts + static_cast<int>(digit), 1u);
}

// found[0] = the highest digit at and above which `wanted` are counted, 0 if there are fewer; found[1] = how many of
// those at it are still wanted. By one warp, which leaves the counts at 0. Lane 0 has the highest eight digits.
DEVICE void cut(Shared<u32> counts, u32 wanted, Shared<u32> found) {
    const int first = 8 * (WARP - 1 - lane_id());
    const auto low = load_shared_vector<4>(counts + first), high = load_shared_vector<4>(counts + first + 4);
    store_shared_vector<4>(counts + first, Vector<u32, 4>{});
    store_shared_vector<4>(counts + first + 4, Vector<u32, 4>{});
    u32 own = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) own += low.at[i] + high.at[i];
    u32 reached = own;
#pragma unroll
    for (int distance = 1; distance < WARP; distance *= 2) {
        const u32 before = shuffle_up(reached, distance);
        if (lane_id() >= distance) reached += before;
    }
    u32 above = reached - own;
    if (above >= wanted || (reached < wanted && lane_id() != WARP - 1)) return;
    int digit = first + 7;
#pragma unroll
    for (int i = 7; i > 0; --i) {
        const u32 here = i < 4 ? low.at[i] : high.at[i - 4];
        if (digit == first + i && above + here < wanted) above += here, --digit;
    }
    store_shared(found, static_cast<u32>(digit));
    store_shared(found + 1, wanted - above);
}

// Writes the numbers of the best candidates to ids_ptr, ascending, and how many they are to count_ptr. number_of(i) is
// the number of candidate i. All threads of the block; `scratch` may be in use until all have come here.
template <class Number>
DEVICE void choose(const Choice& choice, const Scratch& scratch, int* ids_ptr, int* count_ptr,
                   const Number& number_of) {
    const int each = ceil_div(ceil_div(choice.candidates, WARPS), WARP) * WARP;
    const int begin = warp_id() * each, end = least(begin + each, choice.candidates);
    const bool held = choice.candidates <= HELD;
    u32* instead = reinterpret_cast<u32*>(choice.scores);

    auto gather = [&](int index) {
        float score = -infinity();
        for (int head = 0; head < choice.heads; ++head) {
            const float* from = choice.scores + head * choice.stride_heads;
            score = most(score, load_global_coherent<1>(from + index).at[0]);
        }
        const u32 order = order_of(score);
        if (held) {
            store_shared(scratch.orders + index, order);
        } else {
            store_global(instead + index, order);
        }
        return order;
    };
    auto order_at = [&](int index) {
        if (index >= end) return 0u;
        return held ? load_shared(scratch.orders + index) : load_global(instead + index);
    };

    for (int i = static_cast<int>(threadIdx.x); i < DIGITS; i += WARP * WARPS) store_shared(scratch.counts + i, 0u);
    __syncthreads();
    u32 threshold = 0, room = static_cast<u32>(choice.most);
#pragma unroll 1
    for (int shift = 32 - DIGIT_BITS; shift >= 0; shift -= DIGIT_BITS) {
        const bool first = shift == 32 - DIGIT_BITS;
        for (int base = begin; base < end; base += WARP) {
            const int index = base + lane_id();
            const u32 order = first && index < end ? gather(index) : order_at(index);
            const bool counted = index < end && (first || order >> (shift + DIGIT_BITS) == threshold);
            tally(scratch.counts, counted, order >> shift & (DIGITS - 1));
        }
        __syncthreads();
        if (warp_id() == 0) cut(scratch.counts, room, scratch.found);
        __syncthreads();
        threshold = threshold << DIGIT_BITS | load_shared(scratch.found);
        room = load_shared(scratch.found + 1);
    }

    // Fewer candidates than there is room for: t is 0, everything above it is kept, and nothing at it is a candidate.
    if (threshold == 0) room = 0;
    u32 above = 0, level = 0;
    for (int base = begin; base < end; base += WARP) {
        const u32 order = order_at(base + lane_id());
        above += count_bits(warp_ballot(order > threshold));
        level += count_bits(warp_ballot(order == threshold));
    }
    if (lane_id() == 0) {
        store_shared(scratch.totals + 2 * warp_id(), above);
        store_shared(scratch.totals + 2 * warp_id() + 1, level);
    }
    __syncthreads();
    u32 all = 0, all_level = 0;
    for (int warp = 0; warp < WARPS; ++warp) {
        if (warp == warp_id()) above = all, level = all_level;
        all += load_shared(scratch.totals + 2 * warp);
        all_level += load_shared(scratch.totals + 2 * warp + 1);
    }
    for (int base = begin; base < end; base += WARP) {
        const u32 order = order_at(base + lane_id());
        const u32 higher = warp_ballot(order > threshold), equal = warp_ballot(order == threshold);
        const u32 rank = level + count_bits(equal & lanes_below());
        const u32 at = above + count_bits(higher & lanes_below()) + least(rank, room);
        if (order > threshold || (order == threshold && rank < room)) {
            store_global(ids_ptr + at, number_of(base + lane_id()));
        }
        above += count_bits(higher);
        level += count_bits(equal);
    }
    if (threadIdx.x == 0) store_global(count_ptr, static_cast<int>(all + least(all_level, room)));
}

// What the 32 lanes of a warp, or the warps of a block, do together. All lanes of the warp take part, with the same
// call.
#pragma once
#include "barriers.cuh"
#include "memory.cuh"

// ---- shuffles: of 4- or 8-byte values ------------------------------------------------------------------------------

// The value of lane `source`.
template <class T>
DEVICE T shuffle(T value, int source, Here at = HERE) {
    static_assert(sizeof(T) == 4 || sizeof(T) == 8, "shuffle: 4 or 8 bytes");
#ifdef IOKERNELS_EMULATE
    T out;
    emulate::shuffle(&out, &value, sizeof(T), source, at);
    return out;
#else
    return __shfl_sync(ALL_LANES, value, source);
#endif
}

// The value of lane `lane ^ mask`.
template <class T>
DEVICE T shuffle_xor(T value, int mask, Here at = HERE) {
#ifdef IOKERNELS_EMULATE
    return shuffle(value, lane_id() ^ mask, at);
#else
    return __shfl_xor_sync(ALL_LANES, value, mask);
#endif
}

// The value of lane `lane - distance`; the lowest lanes keep their own.
template <class T>
DEVICE T shuffle_up(T value, int distance, Here at = HERE) {
#ifdef IOKERNELS_EMULATE
    return shuffle(value, lane_id() < distance ? lane_id() : lane_id() - distance, at);
#else
    return __shfl_up_sync(ALL_LANES, value, distance);
#endif
}

// The value of lane `lane + distance`; the highest lanes keep their own.
template <class T>
DEVICE T shuffle_down(T value, int distance, Here at = HERE) {
#ifdef IOKERNELS_EMULATE
    return shuffle(value, lane_id() + distance >= WARP ? lane_id() : lane_id() + distance, at);
#else
    return __shfl_down_sync(ALL_LANES, value, distance);
#endif
}

// Bit i is set where lane i says so.
DEVICE u32 warp_ballot(bool vote, Here at = HERE) {
#ifdef IOKERNELS_EMULATE
    return emulate::ballot(vote, at);
#else
    return __ballot_sync(ALL_LANES, vote);
#endif
}

DEVICE bool any_lane(bool vote, Here at = HERE) { return warp_ballot(vote, at) != 0; }
DEVICE bool every_lane(bool vote, Here at = HERE) { return warp_ballot(vote, at) == ALL_LANES; }

// How many bits are set: of a ballot, how many lanes said so.
DEVICE int count_bits(u32 bits) {
#ifdef IOKERNELS_EMULATE
    return __builtin_popcount(bits);
#else
    return __popc(bits);
#endif
}

// Bits of the lanes below this one.
DEVICE u32 lanes_below() { return (1u << lane_id()) - 1; }

// ---- reductions: op(a, b) is associative and commutative; every participant receives the result -------------------

struct Sum {
    template <class T>
    DEVICE T operator()(T a, T b) const {
        return a + b;
    }
};
struct Max {
    template <class T>
    DEVICE T operator()(T a, T b) const {
        return a < b ? b : a;
    }
};

// Over groups of WIDTH lanes that differ only in their lowest bits: 4 is one row of an mma accumulator.
template <int WIDTH = WARP, class T, class Op>
DEVICE T warp_reduce(T value, Op op, Here at = HERE) {
#pragma unroll
    for (int mask = WIDTH / 2; mask > 0; mask /= 2) value = op(value, shuffle_xor(value, mask, at));
    return value;
}

// Over all threads of a block of WARPS warps. `scratch` holds WARPS values, and may be written again after the next
// barrier.
template <int WARPS, class T, class Op>
DEVICE T block_reduce(T value, Op op, Shared<T> scratch, Here at = HERE) {
    value = warp_reduce(value, op, at);
    if (lane_id() == 0) store_shared(scratch + warp_id(), value, at);
    block_sync(at);
    T total = load_shared(scratch, at);
#pragma unroll
    for (int warp = 1; warp < WARPS; ++warp) total = op(total, load_shared(scratch + warp, at));
    return total;
}

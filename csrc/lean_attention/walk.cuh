// The walk of lean_attention over the keys of one segment: online softmax of 16 rows, in the registers of a warp.
//
// For each row, (m, l, acc) sums up the keys that were seen:
//
//     m = max_j s_j        l = sum_j exp(s_j - m)        acc = sum_j exp(s_j - m) v_j
//
// A warp takes its KEYS keys of every tile of the segment, so that KEY_WARPS sums of the same rows arise side by side;
// nothing is exchanged before the end. Its tiles come through a ring of STAGES stages of its own, which only the warps
// with the same keys (ROW_WARPS of them, with other rows) fill and read together.
#pragma once
#include "common/barriers.cuh"
#include "common/softmax.cuh"
#include "tiles.cuh"

// A warp's part of the block: which rows of an item, and which keys of a tile.
DEVICE int row_warp() { return warp_id() / KEY_WARPS; }
DEVICE int key_warp() { return warp_id() % KEY_WARPS; }

// Waits for the warps that have the same keys.
DEVICE void keys_sync() {
    if constexpr (ROW_WARPS == 1) {
        __syncwarp();
    } else {
        barrier_wait(1 + key_warp(), WARP * ROW_WARPS);
    }
}

// The keys of one head of one sequence, or of all pages.
struct Keys {
    const Cache *k, *v;
    const float *k_factor, *v_factor;
    const int* pages;  // of the sequence
    Strides stride_k, stride_v;
    RowStrides stride_k_factor, stride_v_factor;
    int page, page_count;
};

// Where this warp's rings lie.
struct Rings {
    Shared<u8> tiles;                   // [STAGES][KEY_WARPS] of K and V
    Shared<float> k_factors, v_factors;  // [STAGES][KEY_WARPS][KEYS]

    DEVICE Shared<u8> k_tile(int stage) const { return tiles + (stage * KEY_WARPS + key_warp()) * KEYS_BYTES; }
    DEVICE Shared<u8> v_tile(int stage) const { return k_tile(stage) + KEYS * K_ROW; }
    DEVICE Shared<float> k_factor(int stage) const { return k_factors + (stage * KEY_WARPS + key_warp()) * KEYS; }
    DEVICE Shared<float> v_factor(int stage) const { return v_factors + (stage * KEY_WARPS + key_warp()) * KEYS; }
};

struct Softmax {
    float scale;    // over the softcap, where there is one
    float softcap;  // 0: there is none
    Sight sight;    // of the warp's 16 rows
};

using Sums = SoftmaxSums<BLOCK_V>;

// Lane r has the r-th of the keys of a tile that its warp fetches, and the number of its page.
struct Place {
    int key, page;
    bool exists;
};

DEVICE Place place_of(const Keys& keys, int first, int low, int stop) {
    Place place;
    place.key = first + OWN * row_warp() + least(lane_id(), OWN - 1);
    place.exists = lane_id() < OWN && place.key >= low && place.key < stop;
    place.page = 0;
    if constexpr (PAGED) {
        // No number in the table leads out of the cache.
        if (place.exists) {
            place.page = least(most(load_global(keys.pages + place.key / keys.page), 0), keys.page_count - 1);
        }
    }
    return place;
}

DEVICE i64 factor_offset(const Keys& keys, const Place& place, const RowStrides& stride) {
    if constexpr (PAGED) return place.page * stride.b + place.key % keys.page * stride.n;
    return place.key * stride.n;
}

// Starts copying the keys of a tile that this warp fetches: all lanes, with the place of each lane's key. Nothing
// before `low` or from `stop` on is read, and zeros stand there: a weight of 0 does not undo a NaN.
DEVICE void fetch(const Keys& keys, const Rings& rings, const Place& place, int first, int low, int stop, int stage) {
    const int own = OWN * row_warp(), start = first + own, from = low - start, there = stop - start;
    const int in_page = PAGED ? place.key % keys.page : 0;
    auto rows_of = [&](const Strides& stride) {
        return [&, stride](int row) -> i64 {
            if constexpr (PAGED) return shuffle(place.page, row) * stride.b + shuffle(in_page, row) * stride.n;
            return (start + row) * stride.n;
        };
    };
    fetch_rows<HEAD_DIM, BLOCK_D>(rings.k_tile(stage) + own * K_ROW, keys.k, keys.stride_k.d, from, there,
                                  rows_of(keys.stride_k));
    fetch_rows<VALUE_DIM, BLOCK_V>(rings.v_tile(stage) + own * V_ROW, keys.v, keys.stride_v.d, from, there,
                                   rows_of(keys.stride_v));
}

// The factors of each lane's own key: asked for early, and put down once a tile has been dealt with in between.
struct Factors {
    float k, v;

    DEVICE void ask(const Keys& keys, const Place& place) {
        k = v = 0.0f;
        if (!place.exists) return;
        if constexpr (K_BY_KEY) k = load_global(keys.k_factor + factor_offset(keys, place, keys.stride_k_factor));
        if constexpr (V_BY_KEY) v = load_global(keys.v_factor + factor_offset(keys, place, keys.stride_v_factor));
    }

    DEVICE void put(const Rings& rings, int stage) const {
        if (lane_id() >= OWN) return;
        const int own = OWN * row_warp() + lane_id();
        if constexpr (K_BY_KEY) store_shared(rings.k_factor(stage) + own, k);
        if constexpr (V_BY_KEY) store_shared(rings.v_factor(stage) + own, v);
    }
};

// One tile: scores of the warp's keys from `first` on, and what they add to the sums.
template <class Q>
DEVICE void fold(Sums& sums, const Q& q_of, const Rings& rings, int stage, const Softmax& softmax, int first) {
    const int pair = lane_id() % 4;
    float scores[KEYS / 16][2][4] = {};
#pragma unroll
    for (int jj = 0; jj < KEYS / 16; ++jj) {
        multiply_keys(scores[jj], rings.k_tile(stage) + 16 * jj * K_ROW, q_of);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            Vector<float, 2> factor{{softmax.scale, softmax.scale}};
            if constexpr (K_BY_KEY) {
                const auto own = load_shared_vector<2>(rings.k_factor(stage) + (16 * jj + 8 * half + 2 * pair));
                factor.at[0] *= own.at[0];
                factor.at[1] *= own.at[1];
            }
#pragma unroll
            for (int i = 0; i < 4; ++i) scores[jj][half][i] *= factor.at[i % 2];
            if (softmax.softcap > 0.0f) {
#pragma unroll
                for (int i = 0; i < 4; ++i) scores[jj][half][i] = tanh_exact(scores[jj][half][i]) * softmax.softcap;
            }
        }
    }

    if (softmax.sight.hides(first, KEYS)) softmax.sight.hide(scores, first, -infinity());

    const float alpha[2] = {sums.include(scores, 0, LOG2E), sums.include(scores, 1, LOG2E)};
    // Most tiles leave the maxima as they are, and a factor of 1 changes no bit.
    if (any_lane(alpha[0] != 1.0f || alpha[1] != 1.0f)) {
#pragma unroll
        for (int n = 0; n < BLOCK_V / 8; ++n) {
#pragma unroll
            for (int i = 0; i < 4; ++i) sums.acc[n][i] *= alpha[i / 2];
        }
    }
#pragma unroll
    for (int jj = 0; jj < KEYS / 16; ++jj) {
        multiply_values(sums.acc, as_left<Element>(scores[jj]), rings.v_tile(stage) + 16 * jj * V_ROW,
                        rings.v_factor(stage) + 16 * jj);
    }
}

// The sums of this warp's rows over its keys of the tiles `tile` to `tile + tiles` of a sequence of `length` keys, of
// which no row sees those before `low`.
// get_q() waits for q, which is on its way, while the first tiles are too; STAGES - 1 younger groups of copies are.
template <class GetQ, class Q>
DEVICE Sums walk(const GetQ& get_q, const Q& q_of, const Keys& keys, const Rings& rings, const Softmax& softmax,
                 int tile, int tiles, int low, int length) {
    constexpr int AHEAD = STAGES - 1;
    const int stop = least((tile + tiles) * BLOCK_N, length);
    auto first_of = [&](int t) { return (tile + t) * BLOCK_N + key_warp() * KEYS; };

    Sums sums;
    Place places[STAGES];
#pragma unroll
    for (int t = 0; t < STAGES; ++t) places[t] = place_of(keys, first_of(t), low, t < tiles ? stop : 0);
    Factors factors;
#pragma unroll
    for (int t = 0; t < AHEAD; ++t) {
        if (t < tiles) {
            fetch(keys, rings, places[t], first_of(t), low, stop, t);
            factors.ask(keys, places[t]);
            factors.put(rings, t);
        }
        commit_copies();
    }
    Place next = places[AHEAD];
    get_q();
    int stage = 0, free = AHEAD;
    for (int t = 0; t < tiles; ++t) {
        wait_copies<AHEAD - 1>();
        keys_sync();  // all of tile t is here, and nobody reads tile t - 1 any more
        const bool more = t + AHEAD < tiles;
        if (more) {
            fetch(keys, rings, next, first_of(t + AHEAD), low, stop, free);
            factors.ask(keys, next);
            next = place_of(keys, first_of(t + STAGES), low, t + STAGES < tiles ? stop : 0);
        }
        commit_copies();
        if (first_of(t) < stop) fold(sums, q_of, rings, stage, softmax, first_of(t));
        if (more) factors.put(rings, free);
        stage = stage + 1 == STAGES ? 0 : stage + 1;
        free = free + 1 == STAGES ? 0 : free + 1;
    }
    sums.l[0] = warp_reduce<4>(sums.l[0], Sum{});
    sums.l[1] = warp_reduce<4>(sums.l[1], Sum{});
    return sums;
}

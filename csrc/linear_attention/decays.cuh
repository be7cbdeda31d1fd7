// The log decays of one head, and their running sums from the beginning of a chunk.
//
// Constants: CHUNK, DECAY (0: none, 1: one a head, 2: one a token).
#pragma once
#include "common/math.cuh"
#include "common/memory.cuh"
#include "common/warp.cuh"

constexpr int NO_DECAY = 0, PER_HEAD = 1;
constexpr float LEAST_LOG_DECAY = -110.0f;  // as options.py has it
constexpr int PARTS = (CHUNK + WARP - 1) / WARP;  // rows of a chunk for each lane

// The log decays of one head, in base 2. One warp makes the running sums, a chunk ahead.
struct Decays {
    const float* at;
    i64 stride_n;
    int length;
    float each;  // the one of all tokens

    DEVICE static float in_base_2(float g) { return least(most(g, LEAST_LOG_DECAY), 0.0f) * LOG2E; }

    // The decays of a chunk from row `first` on; 0 past the ends.
    DEVICE void ask(float (&g)[PARTS], int first) const {
#pragma unroll
        for (int part = 0; part < PARTS; ++part) {
            const int row = part * WARP + lane_id();
            g[part] = 0.0f;
            if constexpr (DECAY == PER_HEAD) {
                g[part] = each;
            } else {
                const bool exists = row < CHUNK && first >= 0 && first + row < length;
                if (exists) g[part] = in_base_2(load_global(at + (first + row) * stride_n));
            }
        }
    }

    // Their running sums; rows past the end repeat the last.
    DEVICE void put(Shared<float> sums, const float (&g)[PARTS], int first) const {
        float before = 0.0f;
#pragma unroll
        for (int part = 0; part < PARTS; ++part) {
            const int row = part * WARP + lane_id();
            float sum = g[part];
            if constexpr (DECAY == PER_HEAD) {
                sum *= static_cast<float>(least(row + 1, length - first));
            } else {
#pragma unroll
                for (int distance = 1; distance < WARP; distance *= 2) {
                    const float lower = shuffle_up(sum, distance);
                    if (lane_id() >= distance) sum += lower;
                }
                sum += before;
                before = shuffle(sum, WARP - 1);
            }
            if (row < CHUNK) store_shared(sums + row, sum);
        }
    }
};

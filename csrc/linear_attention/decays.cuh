// The log decays of one head, and their running sums from the beginning of a chunk.
//
// Weights are exponentials of differences of these sums. They are summed in float64 and kept as two float32 numbers
// each, `high + low`: after a strong decay in the chunk a sum is large, and its float32 rounding would be a relative
// error of every later weight.
//
// Constants: CHUNK, DECAY (0: none, 1: one a head, 2: one a token).
#pragma once
#include "common/math.cuh"
#include "common/memory.cuh"
#include "common/warp.cuh"

constexpr int NO_DECAY = 0, PER_HEAD = 1;
constexpr float LEAST_LOG_DECAY = -110.0f;  // as options.py has it
constexpr int PARTS = (CHUNK + WARP - 1) / WARP;  // rows of a chunk for each lane

// A running sum of log decays. In shared memory two floats for each row.
struct Sum2 {
    float high, low;

    DEVICE static Sum2 of(double exact) {
        const float high = static_cast<float>(exact);
        return {high, static_cast<float>(exact - high)};
    }
    DEVICE static Sum2 at(Shared<float> sums, int row) {
        const Vector<float, 2> both = load_shared_vector<2>(sums + 2 * row);
        return {both.at[0], both.at[1]};
    }
    DEVICE float value() const { return high + low; }
    DEVICE float minus(Sum2 other) const { return (high - other.high) + (low - other.low); }
};

// Those of two neighbouring rows, the first of them even.
struct TwoSums {
    Sum2 at[2];

    DEVICE static TwoSums of(Shared<float> sums, int row) {
        const Vector<float, 4> both = load_shared_vector<4>(sums + 2 * row);
        return {{{both.at[0], both.at[1]}, {both.at[2], both.at[3]}}};
    }
};

// The log decays of one head, in base 2. One warp makes the running sums, a chunk ahead.
struct Decays {
    const float* at;
    i64 stride_n;
    int length;
    float each;  // the one of all tokens

    // In this order what is not a number stays so.
    DEVICE static float in_base_2(float g) { return least(0.0f, most(g, LEAST_LOG_DECAY)) * LOG2E; }

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
        double before = 0.0;
#pragma unroll
        for (int part = 0; part < PARTS; ++part) {
            const int row = part * WARP + lane_id();
            double sum = g[part];
            if constexpr (DECAY == PER_HEAD) {
                sum *= least(row + 1, length - first);
            } else {
#pragma unroll
                for (int distance = 1; distance < WARP; distance *= 2) {
                    const double lower = shuffle_up(sum, distance);
                    if (lane_id() >= distance) sum += lower;
                }
                sum += before;
                before = shuffle(sum, WARP - 1);
            }
            const Sum2 both = Sum2::of(sum);
            if (row < CHUNK) store_shared_vector<2>(sums + 2 * row, Vector<float, 2>{{both.high, both.low}});
        }
    }
};

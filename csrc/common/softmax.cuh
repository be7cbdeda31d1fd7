// Softmax of rows whose scores come tile by tile, 16 rows to a warp, all in its registers.
//
// Scores are accumulators [N][2][4] of a tile [16, 16 N]; a lane has rows lane / 4 and lane / 4 + 8. For each, m is the
// largest so far, l the sum of 2^(unit (s - m)), and acc the sum of 2^(unit (s - m)) v. The unit is 1 for scores in
// base 2, and log2 e for natural ones, which stay finite where their products with log2 e would not.
#pragma once
#include "math.cuh"
#include "warp.cuh"

// Which columns the rows see, all from a first one to a last.
struct Sight {
    int low[2], high[2];  // of each of the lane's rows
    int lowest, highest;  // the last of the firsts, and the first of the lasts, of all 16

    // low_of(half) and high_of(half) are those of row lane / 4 + 8 half.
    template <class Low, class High>
    DEVICE Sight(const Low& low_of, const High& high_of) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            low[half] = low_of(half);
            high[half] = high_of(half);
        }
        lowest = warp_reduce(most(low[0], low[1]), Max{});
        highest = -warp_reduce(-least(high[0], high[1]), Max{});
    }

    // Whether some of the columns first .. first + columns - 1 are hidden from some row.
    DEVICE bool hides(int first, int columns) const { return first < lowest || first + columns - 1 > highest; }

    // Puts `hidden` where a row does not see a column, in the accumulators of a tile that begins at column `first`.
    template <int N>
    DEVICE void hide(float (&tile)[N][2][4], int first, float hidden) const {
#pragma unroll
        for (int jj = 0; jj < N; ++jj) {
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                const int column = first + 16 * jj + 8 * (i / 4) + lane_id() % 4 * 2 + i % 2, half = i % 4 / 2;
                if (column < low[half] || column > high[half]) tile[jj][i / 4][i % 4] = hidden;
            }
        }
    }
};

// One lane's share of the sums over the columns so far. l is that of the lane's own columns.
template <int WIDTH>
struct SoftmaxSums {
    float m[2] = {-infinity(), -infinity()}, l[2] = {};
    float acc[WIDTH / 8][4] = {};

    // Turns a row's scores into 2^(unit (s - m)), with m now the largest of these too, and adds them to l. Returns the
    // factor that l was multiplied with, and that acc has to be.
    template <int N>
    DEVICE float include(float (&scores)[N][2][4], int half, float unit = 1.0f) {
        float largest = m[half];
#pragma unroll
        for (int jj = 0; jj < N; ++jj) {
#pragma unroll
            for (int i = 0; i < 4; ++i) largest = most(largest, scores[jj][i / 2][2 * half + i % 2]);
        }
        largest = warp_reduce<4>(largest, Max{});
        const float finite = finite_or_0(largest), factor = exp2_fast(unit * (m[half] - finite));
        m[half] = largest;
        l[half] *= factor;
#pragma unroll
        for (int jj = 0; jj < N; ++jj) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                float& score = scores[jj][i / 2][2 * half + i % 2];
                score = exp2_fast(unit * (score - finite));
                l[half] += score;
            }
        }
        return factor;
    }
};

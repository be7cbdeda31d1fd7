// Where the sequences of a batch lie, and which keys a row sees.
//
// Rows are aligned at the end of the keys: row i of Nq stands at position i + Nk - Nq, and sees the keys from
// position - window_left to position + window_right; -1 is an unbounded side. Causal is window_right = 0.
#pragma once
#include "common/memory.cuh"
#include "common/warp.cuh"

struct Strides {
    i64 b, h, n, d;
};
struct RowStrides {
    i64 b, h, n;
};

// The rows of one sequence within a tensor.
struct Rows {
    int start, length;
};

// Packed sequences: rows offsets[sequence] to offsets[sequence + 1] of `total`, at most `seqlen`; whatever the offsets
// say, the result lies inside the tensor. Dense ones (no offsets): all of `seqlen`.
DEVICE Rows rows_of(const int* offsets, int sequence, int seqlen, int total) {
    if (!offsets) return {0, seqlen};
    const int start = least(most(load_global_uniform(offsets + sequence), 0), total);
    const int stop = least(load_global_uniform(offsets + sequence + 1), total);
    return {start, least(most(stop - start, 0), seqlen)};
}

struct Window {
    int left, right, rows, keys;

    DEVICE int position(int row) const { return row + keys - rows; }

    // The first and the last key that a row sees.
    DEVICE int low(int row) const { return left < 0 ? 0 : most(position(row) - left, 0); }
    DEVICE int high(int row) const { return right < 0 ? keys - 1 : least(position(row) + right, keys - 1); }

    // The first and the last row that sees a key.
    DEVICE int first_row(int key) const { return right < 0 ? 0 : most(key - right - (keys - rows), 0); }
    DEVICE int last_row(int key) const { return left < 0 ? rows - 1 : least(key + left - (keys - rows), rows - 1); }
};

// What the 16 rows of a warp see of the columns of a tile: a lane's rows are lane / 4 and lane / 4 + 8.
struct Sight {
    int low[2], high[2];  // the first and the last column that each of the lane's rows sees
    int lowest, highest;  // the last of the firsts, and the first of the lasts, of all 16

    // low_of(i) and high_of(i) are those of row i.
    template <class Low, class High>
    DEVICE Sight(const Low& low_of, const High& high_of) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            low[half] = low_of(lane_id() / 4 + 8 * half);
            high[half] = high_of(lane_id() / 4 + 8 * half);
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

// The query rows that share a list, in shared memory, and their products with the keys that a warp holds.
//
// The rows of all query heads that share a list are one matrix: with R means of neighbouring rows in a block of
// queries, row r of it belongs to head r / R of the group. Its limit is the last key that counts for any of its rows; a
// row that does not exist has the limit -1, before every key.
//
// A product sums over the columns in an order of our own, the same for both operands: where a fragment has columns 2 p,
// 2 p + 1, 2 p + 8 and 2 p + 9 of sixteen, for p = lane % 4, a lane here has four neighbours of eight, 8 p to 8 p + 7
// of 32 columns, for two fragments. So a vector of a key is right operands as it comes from global memory. Rows take
// that order on their way into shared memory: word c of the p-th sixteen bytes becomes word p of the c-th, and an
// ldmatrix finds its eight rows in different banks, because rows have their vectors exchanged by their number.
//
// Constants: Element (fp16, bf16), HEAD_DIM, BLOCK_R, WARPS, ALIGNED (16-byte rows of q and k).
#pragma once
#include "common/math.cuh"
#include "common/matrix.cuh"
#include "common/tensors.cuh"
#include "common/warp.cuh"

constexpr int THREADS = WARP * WARPS;
constexpr int BLOCK_D = (HEAD_DIM + 31) / 32 * 32, EIGHTS = BLOCK_D / 8, PARTS = BLOCK_D / 32;
static_assert(BLOCK_R % 16 == 0, "rows are multiplied sixteen at a time");

// Where a vector of a row lies in the tile of rows.
DEVICE int place(int row, int eight) {
    return row * BLOCK_D + 8 * (eight ^ (BLOCK_D % 64 == 0 ? row % 8 : row / 2 % 4));
}

// Columns `column` to `column + 7` of a row in global memory, in pairs; zeros past the head and where nothing exists.
DEVICE Vector<u32, 4> load_eight(const Element* row, int column, i64 stride_d, bool exists) {
    Vector<u32, 4> pairs{};
    if constexpr (ALIGNED) {
        if (exists && column < HEAD_DIM) pairs = load_global_vector<4>(reinterpret_cast<const u32*>(row + column));
    } else {
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            if (exists && column + i < HEAD_DIM) {
                const u32 bits = load_global(row + (column + i) * stride_d).bits;
                pairs.at[i / 2] |= bits << (i % 2 * 16);
            }
        }
    }
    return pairs;
}

// The rows of one block of queries, of `group` heads.
struct QueryRows {
    const Element* q;  // the block's first row in the first of the heads
    i64 stride_h, stride_n, stride_d;
    int group, means, stride_q;  // heads, means of each, rows to a mean
    int held;                    // rows of the block
    int before, causal;          // the limit of the row before the block's first; of every row where not causal

    DEVICE int count() const { return group * means; }

    // The least limit of any row of the tiles; -1 where some rows of them do not exist.
    DEVICE int least_limit() const {
        const bool all = count() % 16 == 0 && (means - 1) * stride_q < held;
        return !all ? -1 : before + (causal ? least(stride_q, held) : 0);
    }

    // Brings BLOCK_R rows from row `from` on, or as many as there are, in sixteens, and their limits.
    DEVICE void fetch(Shared<Element> tile, Shared<int> limits, int from) const {
        const int there = ceil_div(least(count() - from, BLOCK_R), 16) * 16;
        for (int eighth = static_cast<int>(threadIdx.x); eighth < there * EIGHTS; eighth += THREADS) {
            const int row = eighth / EIGHTS, eight = eighth % EIGHTS;
            const int member = (from + row) / means, start = (from + row) % means * stride_q;
            const bool exists = member < group && start < held;
            const int after = least(start + stride_q, held);
            if (eight == 0) store_shared(limits + row, exists ? before + (causal ? after : 0) : -1);
            const Element* source = q + member * stride_h + start * stride_n;
            const Vector<u32, 4> pairs = mean(source, 8 * eight, exists ? after - start : 0);
#pragma unroll
            for (int c = 0; c < 4; ++c) {
                store_shared((tile + place(row, eight / 4 * 4 + c)).template as<u32>() + eight % 4, pairs.at[c]);
            }
        }
    }

    // The mean of `number` rows, in float32, rounded to the dtype of q; zeros of none.
    DEVICE Vector<u32, 4> mean(const Element* source, int column, int number) const {
        float sum[8] = {};
#pragma unroll 2
        for (int i = 0; i < number; ++i) {
            const Vector<u32, 4> pairs = load_eight(source + i * stride_n, column, stride_d, true);
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                sum[2 * j] += low_of<Element>(pairs.at[j]);
                sum[2 * j + 1] += high_of<Element>(pairs.at[j]);
            }
        }
        const float divisor = static_cast<float>(most(number, 1)), inverse = 1.0f / divisor;
        const bool exact = (number & (number - 1)) == 0;  // a power of two: the product is the quotient
        Vector<u32, 4> mean;
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            const float low = exact ? sum[2 * j] * inverse : sum[2 * j] / divisor;
            const float high = exact ? sum[2 * j + 1] * inverse : sum[2 * j + 1] / divisor;
            mean.at[j] = pack<Element>(low, high);
        }
        return mean;
    }
};

// Sixteen keys as right operands: of keys lane / 4 and lane / 4 + 8, the lane's eight columns of every 32.
struct Keys {
    Vector<u32, 4> at[PARTS][2];

    DEVICE void load(const Element* head, i64 stride_n, i64 stride_d, const int (&number)[2], const bool (&wanted)[2]) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const Element* row = head + number[half] * stride_n;
#pragma unroll
            for (int part = 0; part < PARTS; ++part) {
                at[part][half] = load_eight(row, 32 * part + lane_id() % 4 * 8, stride_d, wanted[half]);
            }
        }
    }
};

// What a lane finds of the two keys of sixteen candidates: [side][half][i] is of candidate 8 half + 2 (lane % 4) + i.
struct Found {
    float at[2][2][2];
};

// The largest products of keys with the rows of a tile, as far as this lane sees: two rows of every sixteen. A key
// counts for rows whose limit it is within; where `clear`, for all. number[side][half] is the key of candidate
// 8 half + lane / 4.
DEVICE void multiply(Found& found, const Keys (&keys)[2], const int (&number)[2][2], bool clear, Shared<Element> tile,
                     Shared<int> limits, int rows) {
#pragma unroll 1
    for (int from = 0; from < rows; from += 16) {
        float acc[2][2][4] = {};
#pragma unroll
        for (int kk = 0; kk < 2 * PARTS; ++kk) {
            u32 a[4];
            ldmatrix_x4(a, tile + place(from + lane_id() % 16, 2 * kk + lane_id() / 16));
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const auto& four = keys[i / 2].at[kk / 2][i % 2];
                const u32 b[2] = {four.at[kk % 2 * 2], four.at[kk % 2 * 2 + 1]};
                mma_16x8x16<Element>(acc[i / 2][i % 2], a, b);
            }
        }
        if (!clear) {
            const int row = from + lane_id() / 4, limit[2] = {load_shared(limits + row), load_shared(limits + row + 8)};
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                const int own = shuffle(number[i / 4][i / 2 % 2], 8 * (lane_id() % 4) + i % 2 * 4);
#pragma unroll
                for (int below = 0; below < 2; ++below) {
                    float& product = acc[i / 4][i / 2 % 2][2 * below + i % 2];
                    if (own > limit[below]) product = -infinity();
                }
            }
        }
#pragma unroll
        for (int i = 0; i < 16; ++i) {
            float& most_found = found.at[i / 8][i / 4 % 2][i % 2];
            most_found = most(most_found, acc[i / 8][i / 4 % 2][i % 4]);
        }
    }
}

// The same over all rows: best[side][half] is of the key of candidate 8 half + lane / 4. Each exchange halves what a
// lane is in charge of, first the sides, then the halves, then the columns.
DEVICE void reduce(float (&best)[2][2], const Found& found) {
    const bool side = lane_id() & 16, half = lane_id() & 8, column = lane_id() & 4;
    float four[2][2], two[2];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const float low = found.at[0][i / 2][i % 2], high = found.at[1][i / 2][i % 2];
        four[i / 2][i % 2] = most(side ? high : low, shuffle_xor(side ? low : high, 16));
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        two[i] = most(half ? four[1][i] : four[0][i], shuffle_xor(half ? four[0][i] : four[1][i], 8));
    }
    const float one = most(column ? two[1] : two[0], shuffle_xor(column ? two[0] : two[1], 4));
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const int candidate = lane_id() / 4;
        best[i / 2][i % 2] = shuffle(one, i / 2 * 16 + i % 2 * 8 + candidate % 2 * 4 + candidate / 2);
    }
}

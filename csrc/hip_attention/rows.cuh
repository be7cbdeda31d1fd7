// The query rows that share a list, in shared memory, and their products with the keys that a warp holds.
//
// The rows of all query heads that share a list are one matrix: with R means of STRIDE_Q neighbouring rows in a block of
// queries, row r of it belongs to head r / R of the group. Its limit is the last key that counts for any of its rows; a
// row that does not exist has the limit -1, before every key.
//
// A product sums over the columns in an order of our own, the same for both operands: where a fragment has columns 2 p,
// 2 p + 1, 2 p + 8 and 2 p + 9 of sixteen, for p = lane % 4, a lane here has eight neighbours for two fragments, 8 p to
// 8 p + 7 of 32 columns. So keys come as whole vectors from global memory, and rows as vectors from shared memory; the
// eight lanes that read two rows at a time find them in different banks, because every other row has the halves of its
// 128 bytes exchanged.
//
// Constants: Element (fp16, bf16), HEAD_DIM, BLOCK_R, WARPS, ALIGNED (16-byte rows of q and k).
#pragma once
#include "common/async_copy.cuh"
#include "common/math.cuh"
#include "common/matrix.cuh"
#include "common/warp.cuh"

constexpr int THREADS = WARP * WARPS;
constexpr int BLOCK_D = (HEAD_DIM + 31) / 32 * 32, EIGHTS = BLOCK_D / 8, PARTS = BLOCK_D / 32;
constexpr int TILES = BLOCK_R < 32 ? BLOCK_R / 8 : 4;  // of eight rows, multiplied together
constexpr int ROWS = 8 * TILES;
static_assert(BLOCK_R % ROWS == 0, "BLOCK_R is 8, 16 or a multiple of 32");

struct Strides {
    i64 b, h, n, d;
};

// Where eight columns of a row lie in the tile of rows.
DEVICE int place(int row, int eight) {
    if constexpr (BLOCK_D % 64 == 0) eight ^= row % 2 * 4;
    return row * BLOCK_D + 8 * eight;
}

// Columns `column` to `column + 7` of a row in global memory, zeros past the head and of rows that do not exist.
DEVICE Vector<Element, 8> load_eight(const Element* row, int column, i64 stride_d, bool exists) {
    Vector<Element, 8> eight;
#pragma unroll
    for (int i = 0; i < 8; ++i) eight.at[i] = Element(0.0f);
    if constexpr (ALIGNED) {
        if (exists && column < HEAD_DIM) eight = load_global_vector<8>(row + column);
    } else {
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            if (exists && column + i < HEAD_DIM) eight.at[i] = load_global(row + (column + i) * stride_d);
        }
    }
    return eight;
}

// The rows of one block of queries, of `group` heads.
struct Rows {
    const Element* q;  // the block's first row in the first of the heads
    i64 stride_h, stride_n, stride_d;
    int group, means, stride_q;  // heads, means of each, rows to a mean
    int held;                    // rows of the block
    int before, causal;          // the limit of the row before the block's first; of every row where not causal

    DEVICE int count() const { return group * means; }

    // Starts bringing BLOCK_R rows from row `from` on, or as many as there are, rounded up to ROWS, and their limits.
    DEVICE void fetch(Shared<Element> tile, Shared<int> limits, int from) const {
        const int there = ceil_div(least(count() - from, BLOCK_R), ROWS) * ROWS;
        for (int eighth = static_cast<int>(threadIdx.x); eighth < there * EIGHTS; eighth += THREADS) {
            const int row = eighth / EIGHTS, column = eighth % EIGHTS * 8;
            const int member = (from + row) / means, start = (from + row) % means * stride_q;
            const bool exists = member < group && start < held;
            const int after = least(start + stride_q, held);
            if (column == 0) store_shared(limits + row, exists ? before + (causal ? after : 0) : -1);
            const Element* source = q + member * stride_h + start * stride_n;
            const Shared<Element> target = tile + place(row, column / 8);
            if (ALIGNED && stride_q == 1) {
                const bool inside = exists && column < HEAD_DIM;
                copy_async(target, inside ? source + column : q, inside);
            } else {
                store_shared_vector<8>(target, mean(source, column, exists ? after - start : 0));
            }
        }
        commit_copies();
    }

    // The mean of `number` rows, in float32, rounded to the dtype of q.
    DEVICE Vector<Element, 8> mean(const Element* source, int column, int number) const {
        float sum[8] = {};
#pragma unroll 4
        for (int i = 0; i < number; ++i) {
            const Vector<Element, 8> eight = load_eight(source + i * stride_n, column, stride_d, true);
#pragma unroll
            for (int j = 0; j < 8; ++j) sum[j] += float(eight.at[j]);
        }
        Vector<Element, 8> mean;
#pragma unroll
        for (int j = 0; j < 8; ++j) mean.at[j] = Element(sum[j] / static_cast<float>(most(number, 1)));
        return mean;
    }
};

// Sixteen keys as the left operand: of keys lane / 4 and lane / 4 + 8, the lane's eight columns of every 32.
struct Keys {
    Vector<u32, 4> at[PARTS][2];

    DEVICE void load(const Element* head, i64 stride_n, i64 stride_d, const int (&number)[2], const bool (&wanted)[2]) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const Element* row = head + number[half] * stride_n;
#pragma unroll
            for (int part = 0; part < PARTS; ++part) {
                const int column = 32 * part + lane_id() % 4 * 8;
                at[part][half] = bits_as<Vector<u32, 4>>(load_eight(row, column, stride_d, wanted[half]));
            }
        }
    }
};

// found[side][half] = the largest product of the key number[side][half], of keys[side], with the rows of a tile for
// which it is within the limit, as far as this lane sees: two rows of every eight.
DEVICE void multiply(float (&found)[2][2], const Keys (&keys)[2], const int (&number)[2][2], Shared<Element> tile,
                     Shared<int> limits, int rows) {
    const int group = lane_id() / 4, pair = lane_id() % 4;
#pragma unroll 1
    for (int from = 0; from < rows; from += ROWS) {
        float acc[2][TILES][4] = {};
#pragma unroll
        for (int part = 0; part < PARTS; ++part) {
#pragma unroll
            for (int n = 0; n < TILES; ++n) {
                const auto row = load_shared_vector<4>((tile + place(from + 8 * n + group, 4 * part + pair))
                                                           .template as<u32>());
#pragma unroll
                for (int side = 0; side < 2; ++side) {
#pragma unroll
                    for (int i = 0; i < 4; i += 2) {
                        const auto& low = keys[side].at[part][0];
                        const auto& high = keys[side].at[part][1];
                        const u32 a[4] = {low.at[i], high.at[i], low.at[i + 1], high.at[i + 1]};
                        const u32 b[2] = {row.at[i], row.at[i + 1]};
                        mma_16x8x16<Element>(acc[side][n], a, b);
                    }
                }
            }
        }
#pragma unroll
        for (int n = 0; n < TILES; ++n) {
            const auto limit = load_shared_vector<2>(limits + (from + 8 * n + 2 * pair));
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                const int side = i / 4, half = i % 4 / 2;
                if (number[side][half] <= limit.at[i % 2]) {
                    found[side][half] = most(found[side][half], acc[side][n][i % 4]);
                }
            }
        }
    }
}

// Tiles of x, y and z in shared memory (common/tiles.cuh), as the walk has them.
//
// Constants: Element (fp16, bf16), Y_WIDTH, Z_WIDTH, CHUNK, WARPS, ALIGNED.
#pragma once
#include "common/tensors.cuh"
#include "common/tiles.cuh"
#include "common/warp.cuh"

constexpr int THREADS = WARP * WARPS;
constexpr int BLOCK_Y = whole_fragments(Y_WIDTH), BLOCK_Z = 16 * WARPS;
constexpr int Y_ROW = padded_row(BLOCK_Y), Z_ROW = padded_row(BLOCK_Z), P_ROW = padded_row(CHUNK);
constexpr int STRIPS = CHUNK / 16;
static_assert(CHUNK % 16 == 0 && CHUNK <= 2 * WARP, "a chunk is 16, 32, 48 or 64 rows");

// Starts copying CHUNK rows, of which the first `there` exist, of `columns` columns; zeros elsewhere, up to PADDED.
template <int PADDED>
DEVICE void fetch_tile(Shared<Element> tile, const Element* source, const Strides& stride, int there, int columns) {
    copy_tile<CHUNK, PADDED, THREADS, ALIGNED>(tile, source, stride.n, stride.d, there, columns);
}

// d[16, 16] += a b, of which `b` is the right operand: two fragments, for the columns 0 to 7 and 8 to 15.
DEVICE void multiply(float (&left)[4], float (&right)[4], const Fragment& a, const u32 (&b)[4]) {
    multiply<Element>(left, right, a, b);
}

// Writes a warp's 16 by 16 accumulators to the rows of `to` that are fewer than `there`, and the columns fewer than
// `columns`. Where rows are aligned two lanes exchange pairs, so that each stores four neighbours.
DEVICE void store_strip(Element* to, const Strides& stride, const float (&acc)[2][4], int there, int columns) {
    const int group = lane_id() / 4, pair = lane_id() % 4;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int row = group + 8 * half;
        Element* at = to + row * stride.n;
        if constexpr (ALIGNED) {
            const u32 left = pack<Element>(acc[0][2 * half], acc[0][2 * half + 1]);
            const u32 right = pack<Element>(acc[1][2 * half], acc[1][2 * half + 1]);
            const bool odd = pair % 2 != 0;
            const u32 other = shuffle_xor(odd ? left : right, 1);
            const Vector<u32, 2> four{{odd ? other : left, odd ? right : other}};
            const int column = odd ? 8 + 2 * (pair - 1) : 2 * pair;
            if (row < there && column < columns) {
                store_global_vector<2>(reinterpret_cast<u32*>(at + column), four);
            }
        } else {
#pragma unroll
            for (int n = 0; n < 2; ++n) {
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    const int column = 8 * n + 2 * pair + i;
                    if (row < there && column < columns) {
                        store_global(at + column * stride.d, Element(acc[n][2 * half + i]));
                    }
                }
            }
        }
    }
}

// The same in float32, which nothing rounds.
DEVICE void store_strip(float* to, const Strides& stride, const float (&acc)[2][4], int there, int columns) {
    const int group = lane_id() / 4, pair = lane_id() % 4;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const int half = i / 2, n = i % 2, row = group + 8 * half, column = 8 * n + 2 * pair;
        float* at = to + (row * stride.n + column * stride.d);
        const Vector<float, 2> two{{acc[n][2 * half], acc[n][2 * half + 1]}};
        if constexpr (ALIGNED) {
            if (row < there && column < columns) store_global_vector<2>(at, two);
        } else {
#pragma unroll
            for (int j = 0; j < 2; ++j) {
                if (row < there && column + j < columns) store_global(at + j * stride.d, two.at[j]);
            }
        }
    }
}

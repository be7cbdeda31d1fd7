// Tiles of q, k, v and their gradients in shared memory (common/tiles.cuh), rows of a head each, and the products made
// of them.
//
// Constants: Element (fp16, bf16), HEAD_DIM, VALUE_DIM, ALIGNED, THREADS.
#pragma once
#include "common/softmax.cuh"
#include "common/tensors.cuh"
#include "common/tiles.cuh"
#include "window.cuh"

constexpr int BLOCK_D = whole_fragments(HEAD_DIM), BLOCK_V = whole_fragments(VALUE_DIM);
template <int WIDTH>
constexpr int ROW = padded_row(WIDTH);  // elements between two rows of a tile

// ---- in and out ----------------------------------------------------------------------------------------------------

// Starts copying ROWS rows of WIDTH elements, of which the first `there` exist, into a tile; zeros for the others.
template <int ROWS, int WIDTH>
DEVICE void fetch_tile(Shared<Element> tile, const Element* source, i64 stride_n, i64 stride_d, int there) {
    copy_tile<ROWS, WIDTH, THREADS, ALIGNED>(tile, source, stride_n, stride_d, there, WIDTH);
}

// Writes a warp's 16 rows, which lie in shared memory from `tile` on, to the first `there` of 16 rows of a tensor.
template <int WIDTH>
DEVICE void store_rows(Element* to, i64 stride_n, i64 stride_d, Shared<Element> tile, int there) {
    constexpr int PADDED = whole_fragments(WIDTH), CHUNKS = PADDED / 8;
#pragma unroll
    for (int i = 0; i < 16 * CHUNKS / WARP; ++i) {
        const int chunk = i * WARP + lane_id(), row = chunk / CHUNKS, column = chunk % CHUNKS * 8;
        if (row >= there || column >= WIDTH) continue;
        const auto eight = load_shared_vector<8>(tile + (row * ROW<PADDED> + column));
        Element* at = to + row * stride_n;
        if constexpr (ALIGNED) {
            store_global_vector(at + column, eight);
        } else {
#pragma unroll
            for (int j = 0; j < 8; ++j) {
                if (column + j < WIDTH) store_global(at + (column + j) * stride_d, eight.at[j]);
            }
        }
    }
}

// Puts a warp's accumulators, 16 rows of PADDED columns, down as elements, from `tile` on.
template <int PADDED>
DEVICE void put_rows(Shared<Element> tile, const float (&acc)[PADDED / 8][4], const float (&factor)[2]) {
    const int group = lane_id() / 4, pair = lane_id() % 4;
#pragma unroll
    for (int n = 0; n < PADDED / 8; ++n) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const auto both = pack<Element>(acc[n][2 * half] * factor[half], acc[n][2 * half + 1] * factor[half]);
            store_shared((tile + ((group + 8 * half) * ROW<PADDED> + 8 * n + 2 * pair)).template as<u32>(), both);
        }
    }
}

// ---- products ------------------------------------------------------------------------------------------------------

// d[16, 16 N] += a b^T, b being 16 N rows of a tile, and left(kk) the columns 16 kk to 16 kk + 15 of a.
template <int PADDED, int N, class Left>
DEVICE void multiply_transposed(float (&d)[N][2][4], const Left& left, Shared<Element> tile) {
#pragma unroll
    for (int kk = 0; kk < PADDED / 16; ++kk) {
        const Fragment a = left(kk);
#pragma unroll
        for (int jj = 0; jj < N; ++jj) {
            u32 b[4];
            load_right_transposed<ROW<PADDED>>(b, tile + 16 * jj * ROW<PADDED>, kk);
            multiply<Element>(d[jj][0], d[jj][1], a, b);
        }
    }
}

// The same, a being the first 16 rows of a tile.
template <int PADDED, int N>
DEVICE void multiply_transposed(float (&d)[N][2][4], Shared<Element> rows, Shared<Element> tile) {
    multiply_transposed<PADDED>(d, [&](int kk) { return load_left<ROW<PADDED>>(rows, kk); }, tile);
}

// d[16, PADDED] += a[16, 16] b, b being 16 rows of a tile.
template <int PADDED>
DEVICE void multiply(float (&d)[PADDED / 8][4], const Fragment& a, Shared<Element> tile) {
#pragma unroll
    for (int n = 0; n < PADDED / 16; ++n) {
        u32 b[4];
        load_right<ROW<PADDED>>(b, tile + 16 * n);
        multiply<Element>(d[2 * n], d[2 * n + 1], a, b);
    }
}

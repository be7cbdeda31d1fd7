// Tiles of q, k, v and their gradients in shared memory, rows of a head each, and the fragments made of them.
//
// Rows are 16 bytes longer than their data, so that the eight rows of an ldmatrix lie in different banks. Where rows
// in global memory do not begin at multiples of 16 bytes (ALIGNED is false), elements come and go one by one.
//
// Constants: Element (fp16, bf16), HEAD_DIM, VALUE_DIM, ALIGNED, THREADS.
#pragma once
#include "common/async_copy.cuh"
#include "common/matrix.cuh"
#include "common/memory.cuh"
#include "common/warp.cuh"
#include "window.cuh"

constexpr int BLOCK_D = (HEAD_DIM + 15) / 16 * 16, BLOCK_V = (VALUE_DIM + 15) / 16 * 16;
template <int WIDTH>
constexpr int ROW = WIDTH + 8;  // elements between two rows of a tile

struct Fragment {
    u32 at[4];
};

// ---- in and out ----------------------------------------------------------------------------------------------------

// Starts copying ROWS rows of WIDTH elements, of which the first `there` exist, into a tile; zeros for the others.
template <int ROWS, int WIDTH>
DEVICE void fetch_tile(Shared<Element> tile, const Element* source, i64 stride_n, i64 stride_d, int there) {
    constexpr int PADDED = (WIDTH + 15) / 16 * 16, CHUNKS = PADDED / 8, COUNT = ROWS * CHUNKS;
#pragma unroll 2
    for (int i = 0; i < (COUNT + THREADS - 1) / THREADS; ++i) {
        const int chunk = i * THREADS + static_cast<int>(threadIdx.x);
        const int row = chunk / CHUNKS, column = chunk % CHUNKS * 8;
        if (COUNT % THREADS != 0 && chunk >= COUNT) break;
        const Shared<Element> target = tile + (row * ROW<PADDED> + column);
        const Element* from = source + row * stride_n;
        if constexpr (ALIGNED) {
            const bool exists = row < there && column < WIDTH;
            copy_async(target, exists ? from + column : source, exists);
        } else {
            Vector<Element, 8> eight;
#pragma unroll
            for (int j = 0; j < 8; ++j) {
                eight.at[j] = Element(0.0f);
                if (row < there && column + j < WIDTH) eight.at[j] = load_global(from + (column + j) * stride_d);
            }
            store_shared_vector<8>(target, eight);
        }
    }
}

// Writes a warp's 16 rows, which lie in shared memory from `tile` on, to the first `there` of 16 rows of a tensor.
template <int WIDTH>
DEVICE void store_rows(Element* to, i64 stride_n, i64 stride_d, Shared<Element> tile, int there) {
    constexpr int PADDED = (WIDTH + 15) / 16 * 16, CHUNKS = PADDED / 8;
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

// ---- fragments -----------------------------------------------------------------------------------------------------

// Rows 0 to 15 of a tile, columns 16 kk to 16 kk + 15, as the left operand.
template <int PADDED>
DEVICE Fragment load_rows(Shared<Element> tile, int kk) {
    Fragment a;
    ldmatrix_x4(a.at, tile + (lane_id() % 16 * ROW<PADDED> + 16 * kk + lane_id() / 16 * 8));
    return a;
}

// d[16, 16] += a[16, 16] b^T, b being 16 rows of a tile and its columns 16 kk on.
template <int PADDED>
DEVICE void multiply_transposed(float (&d)[2][4], const Fragment& a, Shared<Element> tile, int kk) {
    const int row = lane_id() % 8 + lane_id() / 16 * 8, column = 16 * kk + lane_id() / 8 % 2 * 8;
    u32 b[4];
    ldmatrix_x4(b, tile + (row * ROW<PADDED> + column));
    const u32 left[2] = {b[0], b[1]}, right[2] = {b[2], b[3]};
    mma_16x8x16<Element>(d[0], a.at, left);
    mma_16x8x16<Element>(d[1], a.at, right);
}

// d[16, PADDED] += a[16, 16] b, b being 16 rows of a tile.
template <int PADDED>
DEVICE void multiply(float (&d)[PADDED / 8][4], const Fragment& a, Shared<Element> tile) {
    const Shared<Element> start = tile + (lane_id() % 16 * ROW<PADDED> + lane_id() / 16 * 8);
#pragma unroll
    for (int n = 0; n < PADDED / 16; ++n) {
        u32 b[4];
        ldmatrix_x4_transposed(b, start + 16 * n);
        const u32 left[2] = {b[0], b[1]}, right[2] = {b[2], b[3]};
        mma_16x8x16<Element>(d[2 * n], a.at, left);
        mma_16x8x16<Element>(d[2 * n + 1], a.at, right);
    }
}

// A [16, 16] piece of accumulators as the left operand: what a lane holds of the one is what it holds of the other.
DEVICE Fragment as_left(const float (&d)[2][4]) {
    Fragment a;
#pragma unroll
    for (int i = 0; i < 4; ++i) a.at[i] = pack<Element>(d[i / 2][i % 2 * 2], d[i / 2][i % 2 * 2 + 1]);
    return a;
}

// Tiles of 16-bit elements in shared memory: how they come from global memory, and the fragments of mma_16x8x16.
//
// Rows are ROW elements apart, 16 bytes more than their data, so that the eight rows of an ldmatrix lie in different
// banks. Where rows in global memory do not begin at multiples of 16 bytes (not ALIGNED), elements come one by one.
#pragma once
#include "async_copy.cuh"
#include "matrix.cuh"

// The elements of a width in whole fragments, and from one such row to the next.
DEVICE constexpr int whole_fragments(int width) { return (width + 15) / 16 * 16; }
DEVICE constexpr int padded_row(int width) { return whole_fragments(width) + 8; }

// ---- in ------------------------------------------------------------------------------------------------------------

// Starts copying the 16 bytes from `column` on of the row that begins at source[offset]; zeros for the columns from
// `columns` on, and where the row does not exist.
template <bool ALIGNED, class T>
DEVICE void copy_chunk(Shared<T> target, const T* source, i64 offset, i64 stride_d, int column, int columns,
                       bool exists) {
    if constexpr (ALIGNED) {
        exists = exists && column < columns;
        copy_async(target, exists ? source + offset + column : source, exists);
    } else {
        constexpr int CHUNK = 16 / sizeof(T);
        Vector<T, CHUNK> chunk;
#pragma unroll
        for (int i = 0; i < CHUNK; ++i) {
            chunk.at[i] = T{};
            if (exists && column + i < columns) chunk.at[i] = load_global(source + offset + (column + i) * stride_d);
        }
        store_shared_vector<CHUNK>(target, chunk);
    }
}

// The same for a tile of ROWS rows, of which the first `there` exist, by all THREADS threads of a block. The tile is as
// wide as WIDTH in whole fragments.
template <int ROWS, int WIDTH, int THREADS, bool ALIGNED, class T>
DEVICE void copy_tile(Shared<T> tile, const T* source, i64 stride_n, i64 stride_d, int there, int columns) {
    constexpr int CHUNKS = whole_fragments(WIDTH) / 8, COUNT = ROWS * CHUNKS;
#pragma unroll 2
    for (int i = 0; i < (COUNT + THREADS - 1) / THREADS; ++i) {
        const int chunk = i * THREADS + static_cast<int>(threadIdx.x);
        const int row = chunk / CHUNKS, column = chunk % CHUNKS * 8;
        if (COUNT % THREADS != 0 && chunk >= COUNT) break;
        copy_chunk<ALIGNED>(tile + (row * padded_row(WIDTH) + column), source, row * stride_n, stride_d, column,
                            columns, row < there);
    }
}

// ---- fragments -----------------------------------------------------------------------------------------------------

struct Fragment {
    u32 at[4];
};

// Rows 0 to 15 of a tile, columns 16 kk to 16 kk + 15, as the left operand.
template <int ROW, class T>
DEVICE Fragment load_left(Shared<T> tile, int kk) {
    Fragment a;
    ldmatrix_x4(a.at, tile + (lane_id() % 16 * ROW + 16 * kk + lane_id() / 16 * 8));
    return a;
}

// The first 16 by 16 elements of a tile transposed, as the left operand.
template <int ROW, class T>
DEVICE Fragment load_left_transposed(Shared<T> tile) {
    Fragment a;
    ldmatrix_x4_transposed(a.at, tile + ((lane_id() % 8 + lane_id() / 16 * 8) * ROW + lane_id() / 8 % 2 * 8));
    return a;
}

// 16 rows of a tile and its first 16 columns as the right operand: two of them, for columns 0 to 7 and 8 to 15.
template <int ROW, class T>
DEVICE void load_right(u32 (&b)[4], Shared<T> tile) {
    ldmatrix_x4_transposed(b, tile + (lane_id() % 16 * ROW + lane_id() / 16 * 8));
}

// 16 rows of a tile, columns 16 kk on, as the right operands whose columns are these rows.
template <int ROW, class T>
DEVICE void load_right_transposed(u32 (&b)[4], Shared<T> tile, int kk) {
    ldmatrix_x4(b, tile + ((lane_id() % 8 + lane_id() / 16 * 8) * ROW + 16 * kk + lane_id() / 8 % 2 * 8));
}

// The two halves of d[16, 16] += a b.
template <class T>
DEVICE void multiply(float (&left)[4], float (&right)[4], const Fragment& a, const u32 (&b)[4]) {
    const u32 of_left[2] = {b[0], b[1]}, of_right[2] = {b[2], b[3]};
    mma_16x8x16<T>(left, a.at, of_left);
    mma_16x8x16<T>(right, a.at, of_right);
}

// A [16, 16] piece of accumulators as the left operand: what a lane holds of the one is what it holds of the other.
template <class T>
DEVICE Fragment as_left(const float (&d)[2][4]) {
    Fragment a;
#pragma unroll
    for (int i = 0; i < 4; ++i) a.at[i] = pack<T>(d[i / 2][i % 2 * 2], d[i / 2][i % 2 * 2 + 1]);
    return a;
}

// Two neighbours, each times its factor.
template <class T>
DEVICE u32 scaled(u32 pair, Vector<float, 2> factor) {
    return pack<T>(low_of<T>(pair) * factor.at[0], high_of<T>(pair) * factor.at[1]);
}

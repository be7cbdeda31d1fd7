// Tiles of x, y and z in shared memory, and the products of the walk that are made of them.
//
// Rows are 16 bytes longer than their data, so that the eight rows of an ldmatrix lie in different banks. Where rows in
// global memory do not begin at multiples of 16 bytes (ALIGNED is false), elements come one by one, by plain loads.
//
// Constants: Element (fp16, bf16), Y_WIDTH, Z_WIDTH, CHUNK, WARPS, ALIGNED.
#pragma once
#include "common/async_copy.cuh"
#include "common/matrix.cuh"
#include "common/memory.cuh"
#include "common/warp.cuh"

constexpr int THREADS = WARP * WARPS;
constexpr int BLOCK_Y = (Y_WIDTH + 15) / 16 * 16, BLOCK_Z = 16 * WARPS;
constexpr int Y_ROW = BLOCK_Y + 8, Z_ROW = BLOCK_Z + 8, P_ROW = CHUNK + 8;  // elements between rows
constexpr int STRIPS = CHUNK / 16;
static_assert(CHUNK % 16 == 0 && CHUNK <= 2 * WARP, "a chunk is 16, 32, 48 or 64 rows");

struct Strides {
    i64 b, h, n, d;
};

struct Fragment {
    u32 at[4];
};

// Starts copying CHUNK rows, of which the first `there` exist, of `columns` columns; zeros elsewhere, up to PADDED.
template <int PADDED>
DEVICE void fetch_tile(Shared<Element> tile, const Element* source, const Strides& stride, int there, int columns) {
    constexpr int CHUNKS = PADDED / 8, COUNT = CHUNK * CHUNKS;
#pragma unroll 2
    for (int i = 0; i < (COUNT + THREADS - 1) / THREADS; ++i) {
        const int chunk = i * THREADS + static_cast<int>(threadIdx.x);
        const int row = chunk / CHUNKS, column = chunk % CHUNKS * 8;
        if (COUNT % THREADS != 0 && chunk >= COUNT) break;
        const Shared<Element> target = tile + (row * (PADDED + 8) + column);
        const Element* from = source + row * stride.n;
        if constexpr (ALIGNED) {
            const bool exists = row < there && column < columns;
            copy_async(target, exists ? from + column : source, exists);
        } else {
            Vector<Element, 8> eight;
#pragma unroll
            for (int j = 0; j < 8; ++j) {
                eight.at[j] = Element(0.0f);
                if (row < there && column + j < columns) eight.at[j] = load_global(from + (column + j) * stride.d);
            }
            store_shared_vector<8>(target, eight);
        }
    }
}

// Rows 0 to 15 of a tile, columns 16 kk to 16 kk + 15, as the left operand.
template <int ROW>
DEVICE Fragment load_left(Shared<Element> tile, int kk) {
    Fragment a;
    ldmatrix_x4(a.at, tile + (lane_id() % 16 * ROW + 16 * kk + lane_id() / 16 * 8));
    return a;
}

// The same 16 by 16 elements of a tile transposed, as the left operand.
template <int ROW>
DEVICE Fragment load_left_transposed(Shared<Element> tile) {
    Fragment a;
    ldmatrix_x4_transposed(a.at, tile + ((lane_id() % 8 + lane_id() / 16 * 8) * ROW + lane_id() / 8 % 2 * 8));
    return a;
}

// d[16, 16] += a b, of which `b` is the right operand: two fragments, for the columns 0 to 7 and 8 to 15.
DEVICE void multiply(float (&left_half)[4], float (&right_half)[4], const Fragment& a, const u32 (&b)[4]) {
    const u32 left[2] = {b[0], b[1]}, right[2] = {b[2], b[3]};
    mma_16x8x16<Element>(left_half, a.at, left);
    mma_16x8x16<Element>(right_half, a.at, right);
}

// 16 rows of a tile, columns 16 kk on, as the right operand whose columns are these rows.
template <int ROW>
DEVICE void load_right_transposed(u32 (&b)[4], Shared<Element> tile, int kk) {
    ldmatrix_x4(b, tile + ((lane_id() % 8 + lane_id() / 16 * 8) * ROW + 16 * kk + lane_id() / 8 % 2 * 8));
}

// 16 rows of a tile and its first 16 columns as the right operand.
template <int ROW>
DEVICE void load_right(u32 (&b)[4], Shared<Element> tile) {
    ldmatrix_x4_transposed(b, tile + (lane_id() % 16 * ROW + lane_id() / 16 * 8));
}

// Two neighbours, each times its factor.
DEVICE u32 weighed(u32 pair, Vector<float, 2> factor) {
    return pack<Element>(low_of<Element>(pair) * factor.at[0], high_of<Element>(pair) * factor.at[1]);
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

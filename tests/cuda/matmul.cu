// c[M, N] = a[M, K] b[K, N], float32 sums: how a kernel of this library looks.
//
// A block of WARPS warps computes BLOCK_M = 16 WARPS rows and BLOCK_N columns. Tiles of a and b come through two stages
// of shared memory by cp.async, so that the next pair arrives while this one is multiplied. Rows in shared memory are 8
// elements longer than the tile, so that the eight rows of an ldmatrix lie in different banks.
// Bytes read: a once for each column of blocks, b once for each row of blocks; written: c once.
//
// Constants: Element (fp16 or bf16), WARPS, BLOCK_N, BLOCK_K (multiples of 16). K and N are multiples of 8.
#include "common/async_copy.cuh"
#include "common/barriers.cuh"
#include "common/matrix.cuh"

constexpr int BLOCK_M = 16 * WARPS;
constexpr int THREADS = WARP * WARPS;
constexpr int A_ROW = BLOCK_K + 8;
constexpr int B_ROW = BLOCK_N + 8;

// Copies a tile of ROWS x COLUMNS; rows and columns that the matrix does not have become zeros.
template <int ROWS, int COLUMNS, int PADDED>
DEVICE void copy_tile(Shared<Element> tile, const Element* matrix, int first_row, int first_column, int rows,
                      int columns) {
    for (int chunk = threadIdx.x; chunk < ROWS * COLUMNS / 8; chunk += THREADS) {
        const int row = chunk / (COLUMNS / 8), column = chunk % (COLUMNS / 8) * 8;
        const bool exists = first_row + row < rows && first_column + column < columns;
        copy_async(tile + (row * PADDED + column),
                   exists ? matrix + static_cast<i64>(first_row + row) * columns + first_column + column : matrix,
                   exists);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS) matmul(const Element* a_ptr,  // [M, K]
                                                             const Element* b_ptr,  // [K, N]
                                                             float* c_ptr,          // [M, N]
                                                             int m, int n, int k) {
    SharedMemory arena;
    Shared<Element> a_tiles = arena.take<Element>(2 * BLOCK_M * A_ROW);
    Shared<Element> b_tiles = arena.take<Element>(2 * BLOCK_K * B_ROW);

    const int blocks_n = ceil_div(n, BLOCK_N);
    const int first_m = blockIdx.x / blocks_n * BLOCK_M, first_n = blockIdx.x % blocks_n * BLOCK_N;
    const int lane = lane_id(), first_row = 16 * warp_id();

    float sums[BLOCK_N / 8][4] = {};
    auto fetch = [&](int step) {
        copy_tile<BLOCK_M, BLOCK_K, A_ROW>(a_tiles + step % 2 * BLOCK_M * A_ROW, a_ptr, first_m, step * BLOCK_K, m, k);
        copy_tile<BLOCK_K, BLOCK_N, B_ROW>(b_tiles + step % 2 * BLOCK_K * B_ROW, b_ptr, step * BLOCK_K, first_n, k, n);
    };

    const int steps = ceil_div(k, BLOCK_K);
    fetch(0);
    commit_copies();
    for (int step = 0; step < steps; ++step) {
        if (step + 1 < steps) fetch(step + 1);
        commit_copies();
        wait_copies<1>();
        __syncthreads();
        const Shared<Element> a_tile = a_tiles + step % 2 * BLOCK_M * A_ROW;
        const Shared<Element> b_tile = b_tiles + step % 2 * BLOCK_K * B_ROW;
#pragma unroll
        for (int kk = 0; kk < BLOCK_K; kk += 16) {
            u32 a[4];
            ldmatrix_x4(a, a_tile + ((first_row + lane % 16) * A_ROW + kk + lane / 16 * 8));
#pragma unroll
            for (int nn = 0; nn < BLOCK_N; nn += 8) {
                u32 b[2];
                ldmatrix_x2_transposed(b, b_tile + ((kk + lane % 16) * B_ROW + nn));
                mma_16x8x16<Element>(sums[nn / 8], a, b);
            }
        }
        __syncthreads();  // the next copy goes where these warps read
    }

#pragma unroll
    for (int nn = 0; nn < BLOCK_N; nn += 8) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int row = first_m + first_row + lane / 4 + 8 * half, column = first_n + nn + lane % 4 * 2;
            if (row < m && column < n) {
                store_global_vector(c_ptr + static_cast<i64>(row) * n + column,
                                    Vector<float, 2>{{sums[nn / 8][2 * half], sums[nn / 8][2 * half + 1]}});
            }
        }
    }
}

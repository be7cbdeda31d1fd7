// One kernel for each family of primitives, for comparison with PyTorch.
#include "common/async_copy.cuh"
#include "common/atomics.cuh"
#include "common/barriers.cuh"
#include "common/math.cuh"
#include "common/matrix.cuh"
#include "common/warp.cuh"

// y = [2^x, log2 |x|, sigmoid x, tanh x], one row each.
extern "C" __global__ void elementary(const float* x_ptr, float* y_ptr, int n) {
    for (int i = threadIdx.x; i < n; i += blockDim.x) {
        const float x = load_global(x_ptr + i);
        store_global(y_ptr + i, exp2_fast(x));
        store_global(y_ptr + (n + i), log2_fast(x < 0 ? -x : x));
        store_global(y_ptr + (2 * n + i), sigmoid(x));
        store_global(y_ptr + (3 * n + i), tanh_exact(x));
    }
}

// Of 128 threads: the sum and the maximum over the block, over groups of 4 lanes; neighbours; who is positive.
extern "C" __global__ void reductions(const float* x_ptr, float* y_ptr, u32* votes_ptr) {
    SharedMemory arena;
    const Shared<float> scratch = arena.take<float>(4);
    const int t = threadIdx.x;
    const float x = load_global(x_ptr + t);
    store_global(y_ptr + t, block_reduce<4>(x, Sum{}, scratch));
    __syncthreads();
    store_global(y_ptr + (128 + t), block_reduce<4>(x, Max{}, scratch));
    store_global(y_ptr + (256 + t), warp_reduce<4>(x, Sum{}));
    store_global(y_ptr + (384 + t), shuffle_up(x, 1) + 1000.0f * shuffle_down(x, 2));
    const u32 votes = warp_ballot(x > 0.0f);
    if (lane_id() == 0) store_global(votes_ptr + warp_id(), votes);
}

// c[16, 8] = a[16, K] b[K, 8] by one warp. b is read as it lies and transposed from its transpose bt[8, K]: both agree.
extern "C" __global__ void fragments(const Element* a_ptr, const Element* b_ptr, const Element* bt_ptr, float* c_ptr,
                                     float* ct_ptr) {
    constexpr int K = 16;
    SharedMemory arena;
    const Shared<Element> a_tile = arena.take<Element>(16 * K), b_tile = arena.take<Element>(K * 8),
                          bt_tile = arena.take<Element>(8 * K);
    const int lane = lane_id();
    store_shared_vector(a_tile + 8 * lane, load_global_vector<8>(a_ptr + 8 * lane));
    if (lane < 16) {
        store_shared_vector(b_tile + 8 * lane, load_global_vector<8>(b_ptr + 8 * lane));
        store_shared_vector(bt_tile + 8 * lane, load_global_vector<8>(bt_ptr + 8 * lane));
    }
    __syncwarp();
    u32 a[4], b[2], bt[2];
    ldmatrix_x4(a, a_tile + (lane % 16 * K + lane / 16 * 8));
    ldmatrix_x2_transposed(b, b_tile + lane % 16 * 8);
    ldmatrix_x2(bt, bt_tile + (lane % 8 * K + lane / 8 % 2 * 8));
    float c[4] = {}, ct[4] = {};
    mma_16x8x16<Element>(c, a, b);
    mma_16x8x16<Element>(ct, a, bt);
    for (int i = 0; i < 4; ++i) {
        const int place = (lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2;
        store_global(c_ptr + place, c[i]);
        store_global(ct_ptr + place, ct[i]);
    }
}

// c[16, 8] = a[16, 8] b[8, 8] in tf32.
extern "C" __global__ void fragments_tf32(const float* a_ptr, const float* b_ptr, float* c_ptr) {
    const int group = lane_id() / 4, pair = lane_id() % 4;
    u32 a[4], b[2];
    for (int i = 0; i < 4; ++i) a[i] = tf32_bits(load_global(a_ptr + ((group + i % 2 * 8) * 8 + pair + i / 2 * 4)));
    for (int i = 0; i < 2; ++i) b[i] = tf32_bits(load_global(b_ptr + ((pair + i * 4) * 8 + group)));
    float c[4] = {};
    mma_16x8x8_tf32(c, a, b);
    for (int i = 0; i < 4; ++i) store_global(c_ptr + ((group + i / 2 * 8) * 8 + pair * 2 + i % 2), c[i]);
}

// x[blocks]: each step, every block adds what all blocks held before; a cooperative launch.
extern "C" __global__ void in_step(u32* held_ptr, u32* counter, int blocks, int steps) {
    const int block = blockIdx.x;
    u32 passed = 0;
    for (int step = 0; step < steps; ++step) {
        const u32* now = held_ptr + step % 2 * blocks;
        u32* next = held_ptr + (1 - step % 2) * blocks;
        u32 sum = 0;
        for (int b = 0; b < blocks; ++b) sum += load_global_coherent<1>(now + b).at[0];
        if (threadIdx.x == 0) store_global(next + block, sum + block);
        blocks_wait(counter, blocks, passed);
    }
    blocks_leave(counter, blocks, passed);
}

// sum[0] = the sum of x[blocks * 64], by the block that comes last; counts[0] = how many were last.
extern "C" __global__ void merged(const float* x_ptr, float* partial_ptr, float* sum_ptr, u32* counter, u32* counts) {
    SharedMemory arena;
    const Shared<float> scratch = arena.take<float>(2);
    const Shared<u32> flag = arena.take<u32>(1);
    const float mine = block_reduce<2>(load_global(x_ptr + (blockIdx.x * 64 + threadIdx.x)), Sum{}, scratch);
    if (threadIdx.x == 0) store_global(partial_ptr + blockIdx.x, mine);
    if (!last_arriver(counter, gridDim.x, flag)) return;
    if (threadIdx.x == 0) {
        float sum = 0.0f;
        for (int b = 0; b < static_cast<int>(gridDim.x); ++b) sum += load_global_coherent<1>(partial_ptr + b).at[0];
        store_global(sum_ptr, sum);
        atomic_add(counts, 1u);
    }
}

// Two warps hand numbers to two others, who hand the buffer back: named barriers 1 (full) and 2 (free).
extern "C" __global__ void producer_consumer(const float* x_ptr, float* y_ptr, int rounds) {
    SharedMemory arena;
    const Shared<float> buffer = arena.take<float>(64);
    const int t = threadIdx.x;
    for (int round = 0; round < rounds; ++round) {
        if (t < 64) {
            if (round > 0) barrier_wait(2, 128);
            store_shared(buffer + t, load_global(x_ptr + (round * 64 + t)));
            barrier_arrive(1, 128);
        } else {
            barrier_wait(1, 128);
            const float value = load_shared(buffer + (127 - t));
            if (round + 1 < rounds) barrier_arrive(2, 128);
            store_global(y_ptr + (round * 64 + t - 64), value);
        }
    }
}

struct Strides {
    i64 row, column;
};

// y[m, n] = x[m, n] + bias, where the rows of x lie anywhere; x may be null, and counts as 0.
extern "C" __global__ void arguments(const float* __restrict__ x_ptr, float* y_ptr, Strides stride_x, int n, i64 total,
                                     float bias) {
    for (i64 i = threadIdx.x; i < total; i += blockDim.x) {
        const float x = x_ptr ? load_global(x_ptr + i / n * stride_x.row + i % n * stride_x.column) : 0.0f;
        store_global(y_ptr + i, x + bias);
    }
}

// Blocks that exchange numbers through global memory, with one fault each, chosen by FAULT; 0 is right.
#include "common/atomics.cuh"
#include "common/barriers.cuh"

constexpr int SAME_BLOCK = 1, NO_WAIT_FOR_BLOCKS = 2, LATE_STORE = 3, TOO_EARLY_AGAIN = 4, BY_TICKET = 5;

// x[2, blocks, 64]: each step, every block hands its row to the next block.
extern "C" __global__ void exchange(float* x_ptr, u32* counter, int blocks, int steps) {
    u32 passed = 0;
    const int t = threadIdx.x, block = blockIdx.x;
    for (int step = 0; step < steps; ++step) {
        // With one buffer instead of two, a block overwrites what another has not read yet.
        float* now = x_ptr + (FAULT == TOO_EARLY_AGAIN ? 0 : step % 2 * blocks * 64);
        store_global(now + (block * 64 + t), static_cast<float>(block));
        if (FAULT != NO_WAIT_FOR_BLOCKS) blocks_wait(counter, blocks, passed);
        if (FAULT == SAME_BLOCK) store_global(now + (block * 64 + (63 - t)), 0.0f);
        const float got = load_global_coherent<1>(now + ((block + 1) % blocks * 64 + t)).at[0];
        if (got < 0.0f) return;
    }
    blocks_leave(counter, blocks, passed);
}

// partial[blocks, 64]: the last block sums up what all have written.
extern "C" __global__ void last(float* partial_ptr, float* sum_ptr, u32* counter, int blocks) {
    SharedMemory arena;
    const Shared<u32> flag = arena.take<u32>(1);
    const int t = threadIdx.x;
    if (FAULT != LATE_STORE) store_global(partial_ptr + (blockIdx.x * 64 + t), 1.0f);
    const bool is_last = last_arriver(counter, blocks, flag);
    if (FAULT == LATE_STORE) store_global(partial_ptr + (blockIdx.x * 64 + t), 1.0f);
    if (!is_last) return;
    float sum = 0.0f;
    for (int b = 0; b < blocks; ++b) sum += load_global_coherent<1>(partial_ptr + (b * 64 + t)).at[0];
    store_global(sum_ptr + t, sum);
}

// Blocks count themselves. x[blocks] is 1, or how many came before, which is no race and depends on their order.
extern "C" __global__ void tickets(float* x_ptr, u32* counter) {
    if (threadIdx.x > 0) return;
    const u32 ticket = atomic_count_wrapping(counter, gridDim.x);
    store_global(x_ptr + blockIdx.x, FAULT == BY_TICKET ? static_cast<float>(ticket) : 1.0f);
}

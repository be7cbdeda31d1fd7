// Kernels with one fault each, chosen by FAULT; with FAULT = 0 the same kernel is right. Each reverses 64 numbers
// through shared memory, so that every thread reads what a thread of the other warp wrote.
#include "common/async_copy.cuh"
#include "common/barriers.cuh"
#include "common/matrix.cuh"
#include "common/warp.cuh"

constexpr int N = 64;
constexpr int NONE = 0, NO_BARRIER = 1, STRAY_WRITE = 2, STRAY_READ = 3, STRAY_SHARED = 4, HALF_BARRIER = 5,
              DEADLOCK = 6, NO_WAIT = 7, NO_WARP_SYNC = 8, OVERWRITE = 9, MISMATCH = 10, LONE_SHUFFLE = 11,
              MISALIGNED = 12, COUNT_DEADLOCK = 13, NAMED_TOO_FEW = 14, TOO_MUCH_SHARED = 15;

extern "C" __global__ void reverse(const float* x_ptr, float* y_ptr, u32* counter, int n) {
    const int t = threadIdx.x;
    SharedMemory arena;
    Shared<float> tile = arena.take<float>(FAULT == TOO_MUCH_SHARED ? 2 * N : N);
    if (FAULT == HALF_BARRIER && t >= 32) return;
    if (FAULT == NO_WAIT) {
        if (t < N / 4) copy_async(tile + 4 * t, x_ptr + 4 * t);
        commit_copies();
    } else if (FAULT == MISALIGNED) {
        store_shared(tile + t, load_global_vector<2>(x_ptr + t).at[0]);
    } else {
        store_shared(tile + (FAULT == STRAY_SHARED ? t + 1 : t),
                     load_global(x_ptr + (FAULT == STRAY_READ ? t - 1 : t)));
    }
    if (FAULT == NO_WARP_SYNC) {
        store_global(y_ptr + (n - 1 - t), load_shared(tile + (t ^ 1)));
        return;
    }
    if (FAULT == LONE_SHUFFLE && t % WARP < 16) store_shared(tile, shuffle(1.0f, 0));
    if (FAULT == MISMATCH && t < WARP) {
        __syncthreads();
    } else if (FAULT == NAMED_TOO_FEW) {
        if (t >= WARP) return;
        barrier_wait(1, 64);
    } else if (FAULT != NO_BARRIER) {
        __syncthreads();
    }
    if (FAULT == COUNT_DEADLOCK && t == 0) wait_for_count(counter, 1);
    if (FAULT == DEADLOCK) {
        // Each warp waits at the barrier that the other one comes to next.
        barrier_wait(t < WARP ? 1 : 2, 64);
        barrier_wait(t < WARP ? 2 : 1, 64);
    }
    const float value = load_shared(tile + (n - 1 - t));
    if (FAULT == OVERWRITE) store_shared(tile + t, value);
    store_global(y_ptr + (FAULT == STRAY_WRITE ? t + 1 : t), value);
}

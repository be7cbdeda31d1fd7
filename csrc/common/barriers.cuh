// Who waits for whom: threads of a block, and blocks of a launch.
//
// __syncthreads() and __syncwarp() are CUDA's. A warp comes to a barrier whole.
//
// Blocks wait for one another only in cooperative launches, where all of them are on the GPU at once; elsewhere the
// last one to arrive does what is left (last_arriver). Counters live in global memory, and are left as they were found.
#pragma once
#include "atomics.cuh"
#include "memory.cuh"

#ifdef IOKERNELS_EMULATE
inline void __syncthreads(Here at = HERE) { emulate::barrier(0, 0, true, at); }
inline void __syncwarp(Here at = HERE) { emulate::sync_warp(at); }
#endif

// __syncthreads() of a helper that stands for its caller.
DEVICE void block_sync([[maybe_unused]] Here at) {
#ifdef IOKERNELS_EMULATE
    __syncthreads(at);
#else
    __syncthreads();
#endif
}

// Barrier `id` (1 to 15) for `threads` threads of the block, a multiple of 32.
DEVICE void barrier_wait(int id, int threads, Here at = HERE) {
#ifdef IOKERNELS_EMULATE
    emulate::barrier(id, threads, true, at);
#else
    asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
#endif
}

// Counts this warp at barrier `id` and goes on: for a producer, whose consumers barrier_wait.
DEVICE void barrier_arrive(int id, int threads, Here at = HERE) {
#ifdef IOKERNELS_EMULATE
    emulate::barrier(id, threads, false, at);
#else
    asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
#endif
}

// ---- between blocks ------------------------------------------------------------------------------------------------

// Until *counter has been counted up to `goal` (as differences, so it may wrap around). Only in cooperative launches.
DEVICE void wait_for_count(const u32* counter, u32 goal, Here at = HERE) {
#ifdef IOKERNELS_EMULATE
    emulate::wait_for_count(counter, goal, at);
#else
    u32 seen;
    do {
        asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(seen) : "l"(counter) : "memory");
    } while (static_cast<int>(seen - goal) < 0);
#endif
}

// A barrier of `blocks` blocks of a cooperative launch, which share `counter`: what each wrote to global memory before
// it, all may read after it (load_global_coherent). `passed` counts the times that this block came by, from 0; *counter
// is 0 when the launch begins, and after blocks_leave.
DEVICE void blocks_wait(u32* counter, u32 blocks, u32& passed, Here at = HERE) {
    block_sync(at);
    ++passed;
    if (threadIdx.x == 0) {
        atomic_count_release(counter, at);
        wait_for_count(counter, passed * blocks, at);
    }
    block_sync(at);
}

// After the last blocks_wait: the last block to leave puts the counter back to 0, for the next launch.
DEVICE void blocks_leave(u32* counter, u32 blocks, u32 passed, Here at = HERE) {
    if (threadIdx.x == 0) atomic_count_wrapping(counter, passed * blocks + blocks - 1, at);
}

// Whether this block is the last of `blocks` to come here; then it may read what the others wrote before they came.
// The counter wraps to 0 with the last one, so the next launch finds it as this one did. `flag` holds one u32.
DEVICE bool last_arriver(u32* counter, u32 blocks, Shared<u32> flag, Here at = HERE) {
    block_sync(at);
    if (threadIdx.x == 0) store_shared(flag, atomic_count_wrapping(counter, blocks - 1, at), at);
    block_sync(at);
    return load_shared(flag, at) == blocks - 1;
}

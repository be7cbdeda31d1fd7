// cp.async: sixteen bytes from global to shared memory, past the registers, while the thread goes on.
//
//     copy_async(tile + offset, source + offset, row < rows);   // a row that does not exist becomes zeros
//     commit_copies();                                          // all copies since the last commit are one group
//     wait_copies<1>();                                         // all groups but the newest one have arrived
//     __syncthreads();                                          // and now for the other threads too
//
// In the emulator nothing arrives before it is waited for: until then the target holds NaN, and touching it is an
// error.
#pragma once
#include "memory.cuh"

template <class T>
DEVICE void copy_async(Shared<T> target, const T* source, bool exists = true, Here at = HERE) {
#ifdef IOKERNELS_EMULATE
    emulate::copy_async(target.p, target.begin, target.end, source, exists, at);
#else
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(target.address()), "l"(source),
                 "r"(exists ? 16 : 0)
                 : "memory");
#endif
}

DEVICE void commit_copies() {
#ifdef IOKERNELS_EMULATE
    emulate::commit_copies();
#else
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits until at most NEWEST of this thread's groups are under way.
template <int NEWEST>
DEVICE void wait_copies(Here at = HERE) {
#ifdef IOKERNELS_EMULATE
    emulate::wait_copies(NEWEST, at);
#else
    asm volatile("cp.async.wait_group %0;" ::"n"(NEWEST) : "memory");
#endif
}

// Atomic updates of global and shared memory.
#pragma once
#include "memory.cuh"

// *p += value, in no particular order.
template <class T>
DEVICE void atomic_add(T* p, T value, Here at = HERE) {
    static_assert(sizeof(T) == 4, "atomic_add: float, int or u32");
#ifdef IOKERNELS_EMULATE
    emulate::global(p, sizeof(T), emulate::Access::atomic, at);
    *p += value;
    emulate::give_way();
#else
    atomicAdd(p, value);
#endif
}

template <class T>
DEVICE void atomic_add_shared(Shared<T> s, T value, Here at = HERE) {
    static_assert(sizeof(T) == 4, "atomic_add_shared: float, int or u32");
#ifdef IOKERNELS_EMULATE
    emulate::shared(s.p, sizeof(T), s.begin, s.end, emulate::Access::atomic, at);
    *s.p += value;
#else
    atomicAdd(s.p, value);
#endif
}

// ++*counter, after all that this thread wrote, and what it saw others write.
DEVICE void atomic_count_release(u32* counter, Here at = HERE) {
#ifdef IOKERNELS_EMULATE
    emulate::release(counter);
    atomic_add(counter, 1u, at);
#else
    asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(counter) : "memory");
#endif
}

// *counter = *counter == highest ? 0 : *counter + 1, with the memory order of a lock; returns what it was.
DEVICE u32 atomic_count_wrapping(u32* counter, u32 highest, Here at = HERE) {
#ifdef IOKERNELS_EMULATE
    emulate::global(counter, sizeof(u32), emulate::Access::atomic, at);
    emulate::release(counter);
    emulate::acquire(counter);
    const u32 was = *counter;
    *counter = was >= highest ? 0 : was + 1;
    emulate::give_way();
    return was;
#else
    u32 was;
    asm volatile("atom.acq_rel.gpu.global.inc.u32 %0, [%1], %2;" : "=r"(was) : "l"(counter), "r"(highest) : "memory");
    return was;
#endif
}

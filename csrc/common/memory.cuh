// Loads and stores. Global memory is reached through raw pointers, shared memory through Shared<T>, a pointer that
// knows that it points there; no kernel dereferences either. The emulator checks bounds and alignment of each access,
// counts the bytes of global memory, and watches shared memory for races.
//
// A vector access moves up to 16 bytes, and its address is a multiple of its size.
#pragma once
#include "platform.cuh"

template <class T, int N>
struct alignas(sizeof(T) * N) Vector {
    static_assert(sizeof(T) * N <= 16, "Vector: one access moves at most 16 bytes");
    T at[N];
};

// ---- global memory -------------------------------------------------------------------------------------------------

template <class T>
DEVICE T load_global(const T* p, Here at = HERE) {
#ifdef IOKERNELS_EMULATE
    emulate::global(p, sizeof(T), emulate::Access::read, at);
#endif
    return *p;
}

template <class T>
DEVICE void store_global(T* p, T value, Here at = HERE) {
#ifdef IOKERNELS_EMULATE
    emulate::global(p, sizeof(T), emulate::Access::write, at);
#endif
    *p = value;
}

// The same N elements in one access: p is a multiple of N elements from an aligned address.
template <int N, class T>
DEVICE Vector<T, N> load_global_vector(const T* p, Here at = HERE) {
    return load_global(reinterpret_cast<const Vector<T, N>*>(p), at);
}

template <int N, class T>
DEVICE void store_global_vector(T* p, Vector<T, N> value, Here at = HERE) {
    store_global(reinterpret_cast<Vector<T, N>*>(p), value, at);
}

// One address for the whole warp, such as a length or an offset: requested once for all lanes, and so counted.
template <class T>
DEVICE T load_global_uniform(const T* p, Here at = HERE) {
#ifdef IOKERNELS_EMULATE
    emulate::global(p, sizeof(T), emulate::Access::uniform_read, at);
#endif
    return *p;
}

// Past the first-level cache, which is not kept coherent: for what another block wrote during this launch.
template <int N, class T>
DEVICE Vector<T, N> load_global_coherent(const T* p, Here at = HERE) {
#ifdef IOKERNELS_EMULATE
    return load_global_vector<N>(p, at);
#else
    constexpr int BYTES = sizeof(T) * N;
    static_assert(BYTES == 4 || BYTES == 8 || BYTES == 16, "load_global_coherent: 4, 8 or 16 bytes");
    u32 r[BYTES / 4];
    if constexpr (BYTES == 4) {
        asm volatile("ld.global.cg.b32 %0, [%1];" : "=r"(r[0]) : "l"(p) : "memory");
    } else if constexpr (BYTES == 8) {
        asm volatile("ld.global.cg.v2.b32 {%0, %1}, [%2];" : "=r"(r[0]), "=r"(r[1]) : "l"(p) : "memory");
    } else {
        asm volatile("ld.global.cg.v4.b32 {%0, %1, %2, %3}, [%4];"
                     : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                     : "l"(p)
                     : "memory");
    }
    Vector<T, N> value;
    memcpy(&value, r, BYTES);
    return value;
#endif
}

// ---- shared memory -------------------------------------------------------------------------------------------------

// A pointer into the block's shared memory. In the emulator it carries the bounds of the array that it was taken from.
template <class T>
struct Shared {
    T* p;
#ifdef IOKERNELS_EMULATE
    const char* begin;
    const char* end;
#endif

    DEVICE Shared operator+(int elements) const {
        Shared moved = *this;
        moved.p += elements;
        return moved;
    }

    template <class U>
    DEVICE Shared<U> as() const {
#ifdef IOKERNELS_EMULATE
        return {reinterpret_cast<U*>(p), begin, end};
#else
        return {reinterpret_cast<U*>(p)};
#endif
    }

#ifndef IOKERNELS_EMULATE
    // The address within shared memory, for PTX.
    DEVICE u32 address() const { return static_cast<u32>(__cvta_generic_to_shared(p)); }
#endif
};

// Hands out the dynamic shared memory of the launch, array by array, each aligned to 128 bytes:
//
//     SharedMemory arena;
//     Shared<fp16> a_tile = arena.take<fp16>(BLOCK_M * BLOCK_K);
//
// Every thread takes the same arrays in the same order. What the launch passes as smem is bytes() after the last.
struct SharedMemory {
    char* base;
    int used = 0;

    DEVICE SharedMemory() {
#ifdef IOKERNELS_EMULATE
        base = emulate::shared_base();
#else
        extern __shared__ __align__(128) char dynamic_shared_memory[];
        base = dynamic_shared_memory;
#endif
    }

    template <class T>
    DEVICE Shared<T> take(int elements, Here at = HERE) {
        char* start = base + used;
        used += ceil_div(elements * static_cast<int>(sizeof(T)), 128) * 128;
#ifdef IOKERNELS_EMULATE
        emulate::shared_taken(used, at);
        return {reinterpret_cast<T*>(start), start, start + elements * sizeof(T)};
#else
        return {reinterpret_cast<T*>(start)};
#endif
    }

    DEVICE int bytes() const { return used; }
};

template <class T>
DEVICE T load_shared(Shared<T> s, Here at = HERE) {
#ifdef IOKERNELS_EMULATE
    emulate::shared(s.p, sizeof(T), s.begin, s.end, emulate::Access::read, at);
#endif
    return *s.p;
}

template <class T>
DEVICE void store_shared(Shared<T> s, T value, Here at = HERE) {
#ifdef IOKERNELS_EMULATE
    emulate::shared(s.p, sizeof(T), s.begin, s.end, emulate::Access::write, at);
#endif
    *s.p = value;
}

template <int N, class T>
DEVICE Vector<T, N> load_shared_vector(Shared<T> s, Here at = HERE) {
    return load_shared(s.template as<Vector<T, N>>(), at);
}

template <int N, class T>
DEVICE void store_shared_vector(Shared<T> s, Vector<T, N> value, Here at = HERE) {
    store_shared(s.template as<Vector<T, N>>(), value, at);
}

// What every kernel source stands on: the names of integer types, the keywords of CUDA C++, and Here.
//
// A kernel here is compiled twice. For a GPU, by NVRTC or nvcc: then the primitives of common/ are a few lines of PTX
// each. For tests without a GPU, by g++ with IOKERNELS_EMULATE defined: then they are calls into csrc/emulate, which
// runs blocks and threads as fibers. No header of the CUDA toolkit is needed in either case.
#pragma once

using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;
using i64 = long long;

#ifdef IOKERNELS_EMULATE

#include "../emulate/machine.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __restrict__ __restrict

#define threadIdx (emulate::self->thread)
#define blockIdx (emulate::self->block)
#define blockDim (emulate::self->block_dim)
#define gridDim (emulate::self->grid_dim)

// The line of the kernel that called a primitive, for reports. Each primitive takes one last, by default its caller's;
// a helper of common/ that calls another primitive hands its own on.
#define HERE (Here::now())

#else

struct Here {};
#define HERE (Here{})

#endif

#define DEVICE __device__ __forceinline__

constexpr int WARP = 32;
constexpr u32 ALL_LANES = 0xffffffffu;

DEVICE int lane_id() { return static_cast<int>(threadIdx.x) % WARP; }  // blocks are one-dimensional
DEVICE int warp_id() { return static_cast<int>(threadIdx.x) / WARP; }

template <class T>
DEVICE constexpr T least(T a, T b) {
    return a < b ? a : b;
}

template <class T>
DEVICE constexpr T most(T a, T b) {
    return a < b ? b : a;
}

DEVICE constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }

// The bits of one type as those of another of the same size.
template <class To, class From>
DEVICE To bits_as(const From& from) {
    static_assert(sizeof(To) == sizeof(From), "bits_as: the sizes differ");
    To to;
    memcpy(&to, &from, sizeof(To));
    return to;
}

// x, of which the compiler knows nothing: what follows from it is computed where it is used, and does not wait in
// registers for the next turn of a loop.
DEVICE int afresh(int x) {
#ifndef IOKERNELS_EMULATE
    asm volatile("" : "+r"(x));
#endif
    return x;
}

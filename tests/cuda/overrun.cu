// Faults that only the sanitizers see: FAULT 1 reads past a local array, 2 dereferences a pointer past a tensor
// without a primitive, 3 overflows an int.
#include "common/memory.cuh"
#include "common/warp.cuh"

extern "C" __global__ void overrun(const float* x_ptr, float* y_ptr, int n) {
    float held[4];
    for (int i = 0; i < 4; ++i) held[i] = shuffle(load_global(x_ptr + i), 0);
    int sum = n * 0x1000000;
    if (FAULT == 3) sum += 0x7fffffff;
    const float past = FAULT == 2 ? x_ptr[n + 1] : 0.0f;
    if (threadIdx.x == 0) store_global(y_ptr, held[FAULT == 1 ? n : n - 1] + static_cast<float>(sum) + past);
}

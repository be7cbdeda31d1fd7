// Numbers rounded to sixteen and to eight bits.
#include "common/memory.cuh"
#include "common/numbers.cuh"

// Every float rounded to Element and back; and its bits.
extern "C" __global__ void round_trip(const float* x_ptr, float* y_ptr, Element* bits_ptr, int n) {
    for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x) {
        const Element rounded(load_global(x_ptr + i));
        store_global(y_ptr + i, float(rounded));
        store_global(bits_ptr + i, rounded);
    }
}

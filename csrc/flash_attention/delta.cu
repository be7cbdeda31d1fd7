// delta_i = dout_i . out_i - dlse_i, which FlashAttention-2's backward subtracts from dout_i . v_j.
//
// A warp takes a row. Bytes: out and dout once, 4 written for each row (and 4 read where there is dlse). FLOPs: 2 Dv a
// row. Constants: Element, VALUE_DIM, WARPS.
#include "common/tensors.cuh"
#include "common/warp.cuh"

extern "C" __global__ void __launch_bounds__(32 * WARPS)
flash_attention_delta(const Element* out_ptr,   // [B, Hq, Nq, Dv]
                      const Element* dout_ptr,  // [B, Hq, Nq, Dv]
                      const float* dlse_ptr,    // [B, Hq, Nq] or null
                      float* delta_ptr,         // [B, Hq, Nq], contiguous
                      Strides stride_out, Strides stride_dout, RowStrides stride_dlse, int heads, int rows, i64 total) {
    const i64 index = static_cast<i64>(blockIdx.x) * WARPS + warp_id();
    if (index >= total) return;
    const i64 batch = index / rows / heads;
    const int head = static_cast<int>(index / rows % heads), row = static_cast<int>(index % rows);
    const Element* out = out_ptr + batch * stride_out.b + head * stride_out.h + row * stride_out.n;
    const Element* dout = dout_ptr + batch * stride_dout.b + head * stride_dout.h + row * stride_dout.n;
    float sum = 0.0f;
    for (int column = lane_id(); column < VALUE_DIM; column += WARP) {
        sum += float(load_global(out + column * stride_out.d)) * float(load_global(dout + column * stride_dout.d));
    }
    sum = warp_reduce(sum, Sum{});
    if (lane_id() == 0) {
        const i64 at = batch * stride_dlse.b + head * stride_dlse.h + row * stride_dlse.n;
        store_global(delta_ptr + index, dlse_ptr ? sum - load_global(dlse_ptr + at) : sum);
    }
}

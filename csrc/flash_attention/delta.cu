// delta_i = dout_i . out_i - dlse_i, which FlashAttention-2's backward subtracts from dout_i . v_j.
//
// As many lanes take a row as it has eights of columns, up to the next power of two: 16 bytes each, and several rows to
// a warp. Bytes: out and dout once, 4 written for each row (and 4 read where there is dlse). FLOPs: 2 Dv a row.
//
// Constants: Element, VALUE_DIM, WARPS, ALIGNED (16-byte rows of out and dout).
#include "common/tensors.cuh"
#include "common/warp.cuh"

constexpr int lanes_of_row() {
    int lanes = 1;
    while (lanes < WARP && 8 * lanes < VALUE_DIM) lanes *= 2;
    return lanes;
}
constexpr int LANES = lanes_of_row(), ROWS = WARP / LANES;

// What one lane adds to out . dout.
DEVICE float share(const Element* out, const Element* dout, i64 stride_out, i64 stride_dout, int lane) {
    float sum = 0.0f;
    if constexpr (ALIGNED) {
        for (int column = 8 * lane; column < VALUE_DIM; column += 8 * LANES) {
            const Vector<Element, 8> x = load_global_vector<8>(out + column), y = load_global_vector<8>(dout + column);
#pragma unroll
            for (int i = 0; i < 8; ++i) sum += float(x.at[i]) * float(y.at[i]);
        }
    } else {
        for (int column = lane; column < VALUE_DIM; column += LANES) {
            sum += float(load_global(out + column * stride_out)) * float(load_global(dout + column * stride_dout));
        }
    }
    return sum;
}

extern "C" __global__ void __launch_bounds__(32 * WARPS)
flash_attention_delta(const Element* out_ptr,   // [B, Hq, Nq, Dv]
                      const Element* dout_ptr,  // [B, Hq, Nq, Dv]
                      const float* dlse_ptr,    // [B, Hq, Nq] or null
                      float* delta_ptr,         // [B, Hq, Nq], contiguous
                      Strides stride_out, Strides stride_dout, RowStrides stride_dlse, int heads, int rows, i64 total) {
    const int lane = lane_id() % LANES;
    const i64 index = (static_cast<i64>(blockIdx.x) * WARPS + warp_id()) * ROWS + lane_id() / LANES;
    const bool exists = index < total;
    const i64 batch = index / rows / heads;
    const int head = static_cast<int>(index / rows % heads), row = static_cast<int>(index % rows);
    const Element* out = out_ptr + (batch * stride_out.b + head * stride_out.h + row * stride_out.n);
    const Element* dout = dout_ptr + (batch * stride_dout.b + head * stride_dout.h + row * stride_dout.n);
    const float own = exists ? share(out, dout, stride_out.d, stride_dout.d, lane) : 0.0f;
    const float sum = warp_reduce<LANES>(own, Sum{});
    if (exists && lane == 0) {
        const i64 at = batch * stride_dlse.b + head * stride_dlse.h + row * stride_dlse.n;
        store_global(delta_ptr + index, dlse_ptr ? sum - load_global(dlse_ptr + at) : sum);
    }
}

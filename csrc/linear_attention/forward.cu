// Linear attention with scalar decay, forward: the walk of walk.cuh with x, y, z = q, k, v.
//
//     out_i = s sum_{j <= i} exp(b_i - b_j) (q_i . k_j) v_j        state = sum_j exp(b_N - b_j) k_j v_j^T
//
// Constants: those of the walk; Y_WIDTH is that of k, Z_WIDTH that of v.
#include "walk.cuh"

extern "C" __global__ void __launch_bounds__(THREADS, 1)
linear_attention_cuda_fwd_kernel(const Element* q_ptr,       // [B, Hk, N, K]
                                 const Element* k_ptr,       // [B, Hk, N, K]
                                 const Element* v_ptr,       // [B, H, N, V]
                                 Element* out_ptr,           // [B, H, N, V]
                                 const float* decay_ptr,     // [1, H, 1], [B, H, N] or null
                                 const float* state_ptr,     // [S, H, K, V] before every sequence, or null
                                 float* last_ptr,            // [S, H, K, V] after it
                                 const int* cu_seqlens_ptr,  // [S + 1] or null
                                 Strides stride_q, Strides stride_k, Strides stride_v, Strides stride_out,
                                 Strides stride_decay, Strides stride_state, Strides stride_last,
                                 int heads, int group,  // heads of v to one of q and k
                                 int seqlen,            // packed: all rows
                                 float scale) {
    const Walk<Element> given{
        q_ptr, k_ptr, v_ptr, out_ptr, stride_q, stride_k, stride_v, stride_out, group, group, 1, decay_ptr,
        stride_decay, state_ptr, last_ptr, stride_state, stride_last, cu_seqlens_ptr, heads, seqlen, scale,
    };
    walk<false, 0>(given, Crossing{});
}

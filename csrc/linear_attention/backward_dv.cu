// Linear attention with scalar decay, backward: the gradients of v and of the first state, the walk of walk.cuh with
// x, y, z = k, q, dO back in time.
//
//     dv_j = s sum_{i >= j} exp(b_i - b_j) (k_j . q_i) dO_i + exp(b_N - b_j) D k_j        D: the gradient behind N
//     dS_0 = s sum_i exp(b_i) q_i dO_i^T + exp(b_N) D
//
// Constants: those of the walk; Y_WIDTH is that of k, Z_WIDTH that of v.
#include "walk.cuh"

extern "C" __global__ void __launch_bounds__(THREADS, 1)
linear_attention_cuda_bwd_dv_kernel(const Element* q_ptr,       // [B, Hk, N, K]
                                    const Element* k_ptr,       // [B, Hk, N, K]
                                    const Element* dout_ptr,    // [B, H, N, V]
                                    Element* dv_ptr,            // [B, H, N, V]
                                    const float* decay_ptr,     // [1, H, 1], [B, H, N] or null
                                    const float* dstate_ptr,    // [S, H, K, V] after every sequence, or null
                                    float* dinitial_ptr,        // [S, H, K, V] before it, or null
                                    const int* cu_seqlens_ptr,  // [S + 1] or null
                                    Strides stride_q, Strides stride_k, Strides stride_dout, Strides stride_dv,
                                    Strides stride_decay, Strides stride_dstate, Strides stride_dinitial,
                                    int heads, int group,  // heads of v to one of q and k
                                    int seqlen,            // packed: all rows
                                    float scale) {
    const Walk<Element> given{
        k_ptr, q_ptr, dout_ptr, dv_ptr, stride_k, stride_q, stride_dout, stride_dv, group, group, 1, decay_ptr,
        stride_decay, dstate_ptr, dinitial_ptr, stride_dstate, stride_dinitial, cu_seqlens_ptr, heads, seqlen, scale,
    };
    walk<true, 0>(given, Crossing{});
}

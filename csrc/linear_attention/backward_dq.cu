// Linear attention with scalar decay, backward: the gradient of q, the walk of walk.cuh with x, y, z = dO, v, k.
//
//     dq_i = s sum_{j <= i} exp(b_i - b_j) (dO_i . v_j) k_j + s exp(b_i) S_0 dO_i        S_0: the first state
//
// Where decays want a gradient also r, and the states where segments end.
//
// Constants: those of the walk; Y_WIDTH is the width of v, Z_WIDTH that of k; Result (Element, or float where heads
// share q, and their shares are added up elsewhere), SEGMENT (rows of a segment; 0: no gradient of decays).
#include "walk.cuh"

extern "C" __global__ void __launch_bounds__(THREADS, 1)
linear_attention_cuda_bwd_dq_kernel(const Element* q_ptr,       // [B, Hk, N, K]
                                    const Element* k_ptr,       // [B, Hk, N, K]
                                    const Element* v_ptr,       // [B, H, N, V]
                                    const Element* dout_ptr,    // [B, H, N, V]
                                    Result* dq_ptr,             // [B, H, N, K]
                                    float* r_ptr,               // [SLICES, B, H, N] or null
                                    float* restarts_ptr,        // [B, slots, H, K, V] or null
                                    const float* decay_ptr,     // [1, H, 1], [B, H, N] or null
                                    const float* state_ptr,     // [S, H, K, V] before every sequence, or null
                                    const int* cu_seqlens_ptr,  // [S + 1] or null
                                    Strides stride_q, Strides stride_k, Strides stride_v, Strides stride_dout,
                                    Strides stride_dq, Strides stride_r, Strides stride_decay,
                                    Strides stride_restarts,  // n of V, d of K
                                    Strides stride_state,     // likewise
                                    int slots, int heads, int group,  // heads of v to one of q and k
                                    int seqlen,                       // packed: all rows
                                    float scale) {
    const Walk<Result> given{
        dout_ptr, v_ptr, k_ptr, dq_ptr, stride_dout, stride_v, stride_k, stride_dq, 1, 1, group, decay_ptr,
        stride_decay, state_ptr, nullptr, stride_state, stride_state, cu_seqlens_ptr, heads, seqlen, scale,
    };
    const Crossing crossing{q_ptr, stride_q, r_ptr, nullptr, stride_r, restarts_ptr, stride_restarts, slots, nullptr,
                            {}};
    walk<false, SEGMENT>(given, crossing);
}

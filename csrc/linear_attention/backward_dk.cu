// Linear attention with scalar decay, backward: the gradients of k and of the log decays, the walk of walk.cuh with
// x, y, z = v, dO, q back in time.
//
//     dk_j = s sum_{i >= j} exp(b_i - b_j) (v_j . dO_i) q_i + exp(b_N - b_j) D v_j        D: the gradient behind N
//     dg_t = sum_{i >= t} (r_i - c_i) + <D, S_N>        r, c: see the walk; N: the end of t's segment
//
// Constants: those of the walk; Y_WIDTH is the width of v, Z_WIDTH that of k; Result (Element, or float where heads
// share k, and their shares are added up elsewhere), SEGMENT (rows of a segment; 0: no gradient of decays).
#include "walk.cuh"

extern "C" __global__ void __launch_bounds__(THREADS, 1)
linear_attention_cuda_bwd_dk_kernel(const Element* q_ptr,       // [B, Hk, N, K]
                                    const Element* k_ptr,       // [B, Hk, N, K]
                                    const Element* v_ptr,       // [B, H, N, V]
                                    const Element* dout_ptr,    // [B, H, N, V]
                                    Result* dk_ptr,             // [B, H, N, K]
                                    const float* r_ptr,         // [B, H, N] or null
                                    float* dg_ptr,              // [SLICES, B, H, N] or null
                                    float* restarts_ptr,        // [B, slots, H, K, V] or null; only read
                                    const float* behind_ptr,    // [S, H, K, V]: states after every sequence, or null
                                    const float* decay_ptr,     // [1, H, 1], [B, H, N] or null
                                    const float* dstate_ptr,    // [S, H, K, V]: their gradient, or null
                                    const int* cu_seqlens_ptr,  // [S + 1] or null
                                    Strides stride_q, Strides stride_k, Strides stride_v, Strides stride_dout,
                                    Strides stride_dk, Strides stride_r, Strides stride_decay,
                                    Strides stride_restarts,  // n of V, d of K
                                    Strides stride_behind, Strides stride_dstate,  // likewise
                                    int slots, int heads, int group,  // heads of v to one of q and k
                                    int seqlen,                       // packed: all rows
                                    float scale) {
    const Walk<Result> given{
        v_ptr, dout_ptr, q_ptr, dk_ptr, stride_v, stride_dout, stride_q, stride_dk, 1, 1, group, decay_ptr,
        stride_decay, dstate_ptr, nullptr, stride_dstate, stride_dstate, cu_seqlens_ptr, heads, seqlen, scale,
    };
    const Crossing crossing{k_ptr, stride_k, dg_ptr, r_ptr, stride_r, restarts_ptr, stride_restarts, slots, behind_ptr,
                            stride_behind};
    walk<true, SEGMENT>(given, crossing);
}

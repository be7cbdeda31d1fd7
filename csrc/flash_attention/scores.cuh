// What both backward kernels do with a tile of scores, made anew from q, k and the LSE.
//
//     p_ij = 2^(s_ij - lse_i)      dp_ij = dout_i . v_j      ds_ij = p_ij (dp_ij - delta_i) ds_ij/d(scale q_i . k_j)
//
// with s and lse in base 2, and delta_i = dout_i . out_i - dlse_i. A row without a key, and a row that does not exist,
// has lse = inf here, so that its weights are 0.
#pragma once
#include "common/math.cuh"
#include "tiles.cuh"

// lse in base 2 and delta of a row.
struct Statistics {
    float lse = infinity(), delta = 0.0f;

    DEVICE static Statistics of(const float* lse_row, const float* delta_row) {
        Statistics found;
        const float lse = load_global(lse_row);
        found.lse = lse == -infinity() ? infinity() : lse * LOG2E;
        found.delta = load_global(delta_row);
        return found;
    }
};

// Turns q . k into p; slope becomes the derivative of the score with respect to scale q . k.
DEVICE float weight(float qk, float lse, float qk_scale, float softcap_log2, float& slope) {
    slope = 1.0f;
    float score = qk * qk_scale;
    if constexpr (SOFTCAP) {
        const float capped = tanh_exact(score);
        slope = 1.0f - capped * capped;
        score = capped * softcap_log2;
    }
    return exp2_fast(score - lse);
}

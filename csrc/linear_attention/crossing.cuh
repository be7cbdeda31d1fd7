// What a walk does for the gradient of decays: the sums of out . u over rows, and along them.
#pragma once
#include "decays.cuh"
#include "tiles.cuh"

// For 16 rows of a warp's columns, of which `acc` is out without the pairs of a token and itself: the shares of
// out . u, and then those pairs on top.
DEVICE void cross(float (&acc)[2][4], Shared<Element> u, Shared<Element> z, Shared<float> itself, Shared<float> shares,
                  float scale) {
    const int group = lane_id() / 4, pair = lane_id() % 4;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int row = group + 8 * half;
        const float weight = load_shared(itself + row) * scale;
        float sum = 0.0f;
#pragma unroll
        for (int n = 0; n < 2; ++n) {
            const int place = row * Z_ROW + 8 * n + 2 * pair;
            const u32 us = load_shared((u + place).template as<u32>());
            const u32 zs = load_shared((z + place).template as<u32>());
            float &left = acc[n][2 * half], &right = acc[n][2 * half + 1];
            sum += left * low_of<Element>(us) + right * high_of<Element>(us);
            left += weight * low_of<Element>(zs);
            right += weight * high_of<Element>(zs);
        }
        sum = warp_reduce<4>(sum, Sum{});
        if (pair == 0) store_shared(shares + row, sum);
    }
}

// One warp's account of the rows of a head: forward r, reversed the gradient of every log decay.
struct RowSums {
    Shared<float> shares;  // [WARPS, CHUNK]
    int length;
    float* made;
    const float* partner;  // r; null for zeros
    float carried;         // reversed: the gradient of the decay behind the rows so far
    float r[PARTS];

    // The r of a chunk from row `first` on.
    DEVICE void ask(int first) {
#pragma unroll
        for (int part = 0; part < PARTS; ++part) {
            const int row = part * WARP + lane_id();
            const bool exists = partner && row < CHUNK && first + row < length;
            r[part] = exists ? load_global(partner + first + row) : 0.0f;
        }
    }

    // Begins a segment, with the warps' shares of <D, S>.
    DEVICE void restart(Shared<float> products) {
        carried = 0.0f;
#pragma unroll
        for (int warp = 0; warp < WARPS; ++warp) carried += load_shared(products + warp);
    }

    // Writes what the chunk from row `first` on gives.
    template <bool REVERSE>
    DEVICE void put(int first) {
#pragma unroll
        for (int turn = 0; turn < PARTS; ++turn) {
            const int part = REVERSE ? PARTS - 1 - turn : turn;
            const int row = part * WARP + lane_id();
            float sum = 0.0f;
            if (row < CHUNK) {
#pragma unroll
                for (int warp = 0; warp < WARPS; ++warp) sum += load_shared(shares + (warp * CHUNK + row));
            }
            if constexpr (REVERSE) {
                sum = r[part] - sum;
#pragma unroll
                for (int distance = 1; distance < WARP; distance *= 2) {
                    const float higher = shuffle_down(sum, distance);
                    if (lane_id() + distance < WARP) sum += higher;
                }
                sum += carried;
                carried = shuffle(sum, 0);
            }
            if (row < CHUNK && first + row < length) store_global(made + first + row, sum);
        }
    }
};

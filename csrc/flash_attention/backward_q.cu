// dq of FlashAttention-2 (Dao, 2023, arXiv:2307.08691, algorithm 2) with mma.sync and cp.async, for sm_80 and newer.
//
//     dq_i = scale sum_j ds_ij k_j                        (ds: scores.cuh)
//
// A block owns BLOCK_M = 16 WARPS rows of one head, 16 to a warp, and walks over the keys that they see in tiles of
// BLOCK_N. q and dout stay in shared memory, dq in the accumulators of its warp; ds goes from accumulators into the
// left operand of the second product. No block writes what another writes, so there are no atomics.
//
// FLOPs: 2 Nq Nk (2 D + Dv) a head, of what the window shows. Bytes: q, dout, lse, delta and dq once; k and v once for
// each block of rows, of what the window shows; 16 of offsets a warp of packed sequences.
//
// Constants: Element, HEAD_DIM, VALUE_DIM, BLOCK_N, WARPS, SOFTCAP, ALIGNED (rows of 16-byte units).
constexpr int THREADS = 32 * WARPS, BLOCK_M = 16 * WARPS;
#include "scores.cuh"

constexpr int D_ROW = ROW<BLOCK_D>, V_ROW = ROW<BLOCK_V>;
constexpr int OWN = BLOCK_M * (D_ROW + V_ROW), STAGE = BLOCK_N * (D_ROW + V_ROW);  // elements

extern "C" __global__ void __launch_bounds__(THREADS)
flash_attention_backward_q(const Element* q_ptr,      // [B, Hq, Nq, D]
                           const Element* k_ptr,      // [B, Hkv, Nk, D]
                           const Element* v_ptr,      // [B, Hkv, Nk, Dv]
                           const Element* dout_ptr,   // [B, Hq, Nq, Dv]
                           const float* lse_ptr,      // [B, Hq, Nq], natural log
                           const float* delta_ptr,    // [B, Hq, Nq]
                           Element* dq_ptr,           // [B, Hq, Nq, D]
                           const int* offsets_q_ptr,  // [S + 1] or null
                           const int* offsets_k_ptr,  // [S + 1] or null
                           Strides stride_q, Strides stride_k, Strides stride_v, Strides stride_dout,
                           RowStrides stride_lse, RowStrides stride_delta, Strides stride_dq,
                           int heads, int group, int seqlen_q, int seqlen_k, int total_q, int total_k,
                           float qk_scale, float softcap_log2, int window_left, int window_right, float scale) {
    const int row_blocks = ceil_div(seqlen_q, BLOCK_M), number = static_cast<int>(blockIdx.x);
    const int block = window_right < 0 ? number % row_blocks : row_blocks - 1 - number % row_blocks;
    const int sequence = number / row_blocks / heads, head = number / row_blocks % heads;
    const Rows q_rows = rows_of(offsets_q_ptr, sequence, seqlen_q, total_q);
    const Rows k_rows = rows_of(offsets_k_ptr, sequence, seqlen_k, total_k);
    const int first_row = block * BLOCK_M, rows = least(q_rows.length - first_row, BLOCK_M);
    if (rows <= 0) return;
    const Window window{window_left, window_right, q_rows.length, k_rows.length};
    const i64 batch = offsets_q_ptr ? 0 : sequence;
    const int start_row = q_rows.start + first_row;
    const Element* q = q_ptr + batch * stride_q.b + head * stride_q.h + start_row * stride_q.n;
    const Element* dout = dout_ptr + batch * stride_dout.b + head * stride_dout.h + start_row * stride_dout.n;
    const Element* k = k_ptr + batch * stride_k.b + head / group * stride_k.h + k_rows.start * stride_k.n;
    const Element* v = v_ptr + batch * stride_v.b + head / group * stride_v.h + k_rows.start * stride_v.n;

    SharedMemory arena;
    const Shared<Element> q_tile = arena.take<Element>(OWN + 2 * STAGE), dout_tile = q_tile + BLOCK_M * D_ROW;
    auto k_tile = [&](int stage) { return q_tile + (OWN + stage * STAGE); };
    auto v_tile = [&](int stage) { return q_tile + (OWN + stage * STAGE + BLOCK_N * D_ROW); };

    const int start = window.low(first_row) / BLOCK_N * BLOCK_N, stop = window.high(first_row + rows - 1) + 1;
    auto fetch = [&](int first, int stage) {
        fetch_tile<BLOCK_N, HEAD_DIM>(k_tile(stage), k + first * stride_k.n, stride_k.n, stride_k.d, stop - first);
        fetch_tile<BLOCK_N, VALUE_DIM>(v_tile(stage), v + first * stride_v.n, stride_v.n, stride_v.d, stop - first);
    };
    fetch_tile<BLOCK_M, HEAD_DIM>(q_tile, q, stride_q.n, stride_q.d, rows);
    fetch_tile<BLOCK_M, VALUE_DIM>(dout_tile, dout, stride_dout.n, stride_dout.d, rows);
    if (start < stop) fetch(start, 0);
    commit_copies();

    const int own_row = 16 * warp_id();
    const Shared<Element> q_own = q_tile + own_row * D_ROW, dout_own = dout_tile + own_row * V_ROW;
    auto row_at = [&](int half) { return least(first_row + own_row + lane_id() / 4 + 8 * half, q_rows.length - 1); };
    const Sight sight([&](int half) { return window.low(row_at(half)); },
                      [&](int half) { return window.high(row_at(half)); });
    Statistics of_row[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const i64 row = q_rows.start + row_at(half);
        const float* lse = lse_ptr + batch * stride_lse.b + head * stride_lse.h + row * stride_lse.n;
        const float* delta = delta_ptr + batch * stride_delta.b + head * stride_delta.h + row * stride_delta.n;
        // The four lanes of a row share what one of them asks for.
        Statistics found;
        if (lane_id() % 4 == 0) found = Statistics::of(lse, delta);
        of_row[half].lse = shuffle(found.lse, lane_id() / 4 * 4);
        of_row[half].delta = shuffle(found.delta, lane_id() / 4 * 4);
    }

    float dq[BLOCK_D / 8][4] = {};
    int stage = 0;
    for (int first = start; first < stop; first += BLOCK_N) {
        wait_copies<0>();
        __syncthreads();  // this tile is here, and nobody reads the one before it any more
        if (first + BLOCK_N < stop) fetch(first + BLOCK_N, 1 - stage);
        commit_copies();

        float p[BLOCK_N / 16][2][4] = {}, ds[BLOCK_N / 16][2][4] = {};
        multiply_transposed<BLOCK_D>(p, q_own, k_tile(stage));
        multiply_transposed<BLOCK_V>(ds, dout_own, v_tile(stage));
#pragma unroll
        for (int jj = 0; jj < BLOCK_N / 16; ++jj) {
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                const Statistics& row = of_row[i % 4 / 2];
                float slope, &dp = ds[jj][i / 4][i % 4];
                const float share = weight(p[jj][i / 4][i % 4], row.lse, qk_scale, softcap_log2, slope);
                dp = share * (dp - row.delta) * slope;
            }
        }
        if (sight.hides(first, BLOCK_N)) sight.hide(ds, first, 0.0f);
#pragma unroll
        for (int jj = 0; jj < BLOCK_N / 16; ++jj) {
            multiply<BLOCK_D>(dq, as_left<Element>(ds[jj]), k_tile(stage) + 16 * jj * D_ROW);
        }
        stage = 1 - stage;
    }
    wait_copies<0>();
    __syncthreads();  // dq leaves through the place of q

    const float factor[2] = {scale, scale};
    put_rows<BLOCK_D>(q_own, dq, factor);
    __syncwarp();
    Element* to = dq_ptr + batch * stride_dq.b + head * stride_dq.h + (start_row + own_row) * stride_dq.n;
    store_rows<HEAD_DIM>(to, stride_dq.n, stride_dq.d, q_own, rows - own_row);
}

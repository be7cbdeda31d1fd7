// FlashAttention-2 forward (Dao, 2023, arXiv:2307.08691, algorithm 1) with mma.sync and cp.async, for sm_80 and newer.
//
// A block owns BLOCK_M = 16 WARPS query rows of one head, 16 to a warp, and walks over the keys in tiles of BLOCK_N.
// For each row a warp keeps the largest score m so far, the denominator l and the unnormalised output acc, float32:
//
//     m' = max(m, max_j s_j)    p_j = 2^(s_j - m')    l' = 2^(m - m') l + sum_j p_j    acc' = 2^(m - m') acc + p v
//
// and at the end out = acc / l, lse = ln 2 (m + log2 l). Fragments of q stay in registers up to 128 columns. Scores go
// from accumulators into the left operand of the second product without leaving the registers. While one tile is
// worked on, the next is on its way. Only tiles at an edge of what the rows see are masked.
//
// FLOPs: 2 Nq Nk (D + Dv) a head, of what the window shows. Bytes that blocks request: q, out and lse once; k and v
// once for each block of rows, of what the window shows; 16 of offsets a warp of packed sequences.
//
// Constants: Element, HEAD_DIM, VALUE_DIM, BLOCK_N, WARPS, SOFTCAP, ALIGNED (rows of 16-byte units).
constexpr int THREADS = 32 * WARPS, BLOCK_M = 16 * WARPS;
#include "common/math.cuh"
#include "tiles.cuh"

constexpr int Q_ROW = ROW<BLOCK_D>, K_ROW = ROW<BLOCK_D>, V_ROW = ROW<BLOCK_V>;
constexpr int STAGE = BLOCK_N * (K_ROW + V_ROW);  // elements
constexpr bool Q_HELD = BLOCK_D <= 128;
// Where q is held, it comes through the place of the second stage, which is filled once q has been read.
constexpr int BEHIND = BLOCK_M * Q_ROW > STAGE ? BLOCK_M * Q_ROW : STAGE;
constexpr int ARENA = Q_HELD ? STAGE + BEHIND : 2 * STAGE + BLOCK_M * Q_ROW;
static_assert(BLOCK_M * V_ROW <= ARENA, "the output leaves through shared memory");

using Sums = SoftmaxSums<BLOCK_V>;

// One tile of keys from `first` on: its scores, and what they add to the sums.
template <class Q>
DEVICE void fold(Sums& sums, const Q& q_of, Shared<Element> k_tile, Shared<Element> v_tile, const Sight& sight,
                 int first, float qk_scale, float softcap_log2) {
    float scores[BLOCK_N / 16][2][4] = {};
    multiply_transposed<BLOCK_D>(scores, q_of, k_tile);
#pragma unroll
    for (int jj = 0; jj < BLOCK_N / 16; ++jj) {
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            float& score = scores[jj][i / 4][i % 4];
            score *= qk_scale;
            if constexpr (SOFTCAP) score = tanh_exact(score) * softcap_log2;
        }
    }
    if (sight.hides(first, BLOCK_N)) sight.hide(scores, first, -infinity());
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const float alpha = sums.include(scores, half);
#pragma unroll
        for (int n = 0; n < BLOCK_V / 8; ++n) {
            sums.acc[n][2 * half] *= alpha;
            sums.acc[n][2 * half + 1] *= alpha;
        }
    }
#pragma unroll
    for (int jj = 0; jj < BLOCK_N / 16; ++jj) {
        multiply<BLOCK_V>(sums.acc, as_left<Element>(scores[jj]), v_tile + 16 * jj * V_ROW);
    }
}

// With wide heads shared memory is full before the registers are, so that a thread may have all 255.
extern "C" __global__ void __launch_bounds__(THREADS, BLOCK_D > 128 ? 1 : 0)
flash_attention_forward(const Element* q_ptr,       // [B, Hq, Nq, D]
                        const Element* k_ptr,       // [B, Hkv, Nk, D]
                        const Element* v_ptr,       // [B, Hkv, Nk, Dv]
                        Element* out_ptr,           // [B, Hq, Nq, Dv]
                        float* lse_ptr,             // [B, Hq, Nq], natural log
                        const int* offsets_q_ptr,   // [S + 1] or null
                        const int* offsets_k_ptr,   // [S + 1] or null
                        Strides stride_q, Strides stride_k, Strides stride_v, Strides stride_out, RowStrides stride_lse,
                        int heads, int group, int seqlen_q, int seqlen_k, int total_q, int total_k,
                        float qk_scale, float softcap_log2, int window_left, int window_right) {
    // Row blocks within heads within sequences. Where a right bound makes the last rows the longest, they start first.
    const int row_blocks = ceil_div(seqlen_q, BLOCK_M), number = static_cast<int>(blockIdx.x);
    const int block = window_right < 0 ? number % row_blocks : row_blocks - 1 - number % row_blocks;
    const int sequence = number / row_blocks / heads, head = number / row_blocks % heads;
    const Rows q_rows = rows_of(offsets_q_ptr, sequence, seqlen_q, total_q);
    const Rows k_rows = rows_of(offsets_k_ptr, sequence, seqlen_k, total_k);
    const int first_row = block * BLOCK_M, rows = least(q_rows.length - first_row, BLOCK_M);
    if (rows <= 0) return;
    const Window window{window_left, window_right, q_rows.length, k_rows.length};
    const i64 batch = offsets_q_ptr ? 0 : sequence;
    const Element* q = q_ptr + batch * stride_q.b + head * stride_q.h + (q_rows.start + first_row) * stride_q.n;
    const Element* k = k_ptr + batch * stride_k.b + head / group * stride_k.h + k_rows.start * stride_k.n;
    const Element* v = v_ptr + batch * stride_v.b + head / group * stride_v.h + k_rows.start * stride_v.n;

    SharedMemory arena;
    const Shared<Element> tiles = arena.take<Element>(ARENA);
    const Shared<Element> q_tile = tiles + (Q_HELD ? STAGE : 2 * STAGE);
    auto k_tile = [&](int stage) { return tiles + stage * STAGE; };
    auto v_tile = [&](int stage) { return tiles + (stage * STAGE + BLOCK_N * K_ROW); };

    // The keys that any row of the block sees, in whole tiles.
    const int start = window.low(first_row) / BLOCK_N * BLOCK_N, stop = window.high(first_row + rows - 1) + 1;
    auto fetch = [&](int first, int stage) {
        fetch_tile<BLOCK_N, HEAD_DIM>(k_tile(stage), k + first * stride_k.n, stride_k.n, stride_k.d, stop - first);
        fetch_tile<BLOCK_N, VALUE_DIM>(v_tile(stage), v + first * stride_v.n, stride_v.n, stride_v.d, stop - first);
    };
    fetch_tile<BLOCK_M, HEAD_DIM>(q_tile, q, stride_q.n, stride_q.d, rows);
    commit_copies();
    if (start < stop) fetch(start, 0);
    commit_copies();

    const int own_row = 16 * warp_id();
    const Shared<Element> q_own = q_tile + own_row * Q_ROW;
    Fragment q_held[Q_HELD ? BLOCK_D / 16 : 1];
    if constexpr (Q_HELD) {
        wait_copies<1>();
        __syncthreads();
#pragma unroll
        for (int kk = 0; kk < BLOCK_D / 16; ++kk) q_held[kk] = load_left<Q_ROW>(q_own, kk);
    }
    auto q_of = [&](int kk) {
        if constexpr (Q_HELD) return q_held[kk];
        return load_left<Q_ROW>(q_own, kk);
    };

    auto row_at = [&](int half) { return least(first_row + own_row + lane_id() / 4 + 8 * half, q_rows.length - 1); };
    const Sight sight([&](int half) { return window.low(row_at(half)); },
                      [&](int half) { return window.high(row_at(half)); });
    Sums sums;
    int stage = 0;
    for (int first = start; first < stop; first += BLOCK_N) {
        wait_copies<0>();
        __syncthreads();  // this tile is here, and nobody reads the one before it any more
        if (first + BLOCK_N < stop) fetch(first + BLOCK_N, 1 - stage);
        commit_copies();
        fold(sums, q_of, k_tile(stage), v_tile(stage), sight, first, qk_scale, softcap_log2);
        stage = 1 - stage;
    }
    wait_copies<0>();
    __syncthreads();  // the output goes where the tiles were

    float share[2];
    float* lse = lse_ptr + batch * stride_lse.b + head * stride_lse.h + (q_rows.start + first_row) * stride_lse.n;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const float l = warp_reduce<4>(sums.l[half], Sum{});
        share[half] = l == 0.0f ? 0.0f : 1.0f / l;
        const int row = own_row + lane_id() / 4 + 8 * half;
        if (lane_id() % 4 == 0 && row < rows) {
            store_global(lse + row * stride_lse.n, l == 0.0f ? -infinity() : LN2 * (sums.m[half] + log2_fast(l)));
        }
    }
    const Shared<Element> own = tiles + own_row * V_ROW;
    put_rows<BLOCK_V>(own, sums.acc, share);
    __syncwarp();
    Element* out = out_ptr + batch * stride_out.b + head * stride_out.h +
                   (q_rows.start + first_row + own_row) * stride_out.n;
    store_rows<VALUE_DIM>(out, stride_out.n, stride_out.d, own, rows - own_row);
}

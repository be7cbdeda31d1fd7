// dk and dv of FlashAttention-2 (Dao, 2023, arXiv:2307.08691, algorithm 2) with mma.sync and cp.async.
//
//     dv_j = sum_i p_ij dout_i          dk_j = scale sum_i ds_ij q_i          (p, ds: scores.cuh)
//
// A block owns BLOCK_N = 16 WARPS keys of one key head, 16 to a warp, and walks over the rows that see them in tiles of
// BLOCK_M, through all query heads of its group. Tiles of scores stand with a key to a row, so that p and ds go from
// accumulators into the left operand of the second products. Every sum is made in one block: no atomics.
//
// Both sums of heads wider than 128 are more than the registers hold: then a launch makes one of them, with GRAD_K or
// GRAD_V false.
//
// FLOPs: 2 Nq Nk (2 D + 2 Dv) a query head, of what the window shows. Bytes: k, v, dk and dv once; q, dout, lse and
// delta of each query head once for each block of keys, of what the window shows; 16 of offsets a warp of packed ones.
//
// Constants: Element, HEAD_DIM, VALUE_DIM, BLOCK_M, WARPS, SOFTCAP, GRAD_K, GRAD_V, ALIGNED (rows of 16-byte units).
constexpr int THREADS = 32 * WARPS, BLOCK_N = 16 * WARPS;
#include "scores.cuh"

constexpr int D_ROW = ROW<BLOCK_D>, V_ROW = ROW<BLOCK_V>;
constexpr int OWN = BLOCK_N * (D_ROW + V_ROW), STAGE = BLOCK_M * (D_ROW + V_ROW);  // elements
static_assert(BLOCK_M <= THREADS, "a thread asks for the statistics of one row");

extern "C" __global__ void __launch_bounds__(THREADS)
flash_attention_backward_kv(const Element* q_ptr,      // [B, Hq, Nq, D]
                            const Element* k_ptr,      // [B, Hkv, Nk, D]
                            const Element* v_ptr,      // [B, Hkv, Nk, Dv]
                            const Element* dout_ptr,   // [B, Hq, Nq, Dv]
                            const float* lse_ptr,      // [B, Hq, Nq], natural log
                            const float* delta_ptr,    // [B, Hq, Nq]
                            Element* dk_ptr,           // [B, Hkv, Nk, D]
                            Element* dv_ptr,           // [B, Hkv, Nk, Dv]
                            const int* offsets_q_ptr,  // [S + 1] or null
                            const int* offsets_k_ptr,  // [S + 1] or null
                            Strides stride_q, Strides stride_k, Strides stride_v, Strides stride_dout,
                            RowStrides stride_lse, RowStrides stride_delta, Strides stride_dk, Strides stride_dv,
                            int heads, int group, int seqlen_q, int seqlen_k, int total_q, int total_k,
                            float qk_scale, float softcap_log2, int window_left, int window_right, float scale) {
    const int key_blocks = ceil_div(seqlen_k, BLOCK_N), kv_heads = heads / group;
    const int number = static_cast<int>(blockIdx.x), block = number % key_blocks;
    const int sequence = number / key_blocks / kv_heads, kv_head = number / key_blocks % kv_heads;
    const Rows q_rows = rows_of(offsets_q_ptr, sequence, seqlen_q, total_q);
    const Rows k_rows = rows_of(offsets_k_ptr, sequence, seqlen_k, total_k);
    const int first_key = block * BLOCK_N, keys = least(k_rows.length - first_key, BLOCK_N);
    if (keys <= 0) return;
    const Window window{window_left, window_right, q_rows.length, k_rows.length};
    const int batch = offsets_q_ptr ? 0 : sequence;
    const int start_key = k_rows.start + first_key;
    const Element* k = k_ptr + batch * stride_k.b + kv_head * stride_k.h + start_key * stride_k.n;
    const Element* v = v_ptr + batch * stride_v.b + kv_head * stride_v.h + start_key * stride_v.n;

    SharedMemory arena;
    const Shared<Element> k_tile = arena.take<Element>(OWN + 2 * STAGE), v_tile = k_tile + BLOCK_N * D_ROW;
    const Shared<Vector<float, 2>> statistics = arena.take<Vector<float, 2>>(2 * BLOCK_M);
    auto q_tile = [&](int stage) { return k_tile + (OWN + stage * STAGE); };
    auto dout_tile = [&](int stage) { return k_tile + (OWN + stage * STAGE + BLOCK_M * D_ROW); };

    // Tiles of the rows that see any of these keys, head after head of the group.
    const int start = window.first_row(first_key) / BLOCK_M * BLOCK_M;
    const int stop = window.last_row(first_key + keys - 1) + 1;
    const int tiles = most(ceil_div(stop - start, BLOCK_M), 0), steps = tiles * group;
    auto head_of = [&](int step) { return kv_head * group + step / tiles; };
    auto first_of = [&](int step) { return start + step % tiles * BLOCK_M; };
    auto fetch = [&](int step, int stage) {
        const int head = head_of(step), first = first_of(step), row = q_rows.start + first;
        const int of = afresh(batch);  // where a batch begins in four tensors would stay in registers
        const Element* q = q_ptr + of * stride_q.b + head * stride_q.h + row * stride_q.n;
        const Element* dout = dout_ptr + of * stride_dout.b + head * stride_dout.h + row * stride_dout.n;
        fetch_tile<BLOCK_M, HEAD_DIM>(q_tile(stage), q, stride_q.n, stride_q.d, stop - first);
        fetch_tile<BLOCK_M, VALUE_DIM>(dout_tile(stage), dout, stride_dout.n, stride_dout.d, stop - first);
    };
    // Asked for before a tile is worked on, and put down after.
    auto ask = [&](int step) {
        Statistics found;
        const int row = first_of(step) + static_cast<int>(threadIdx.x);
        if (static_cast<int>(threadIdx.x) < BLOCK_M && row < stop) {
            const i64 at = q_rows.start + row;
            const int head = head_of(step), of = afresh(batch);
            found = Statistics::of(lse_ptr + of * stride_lse.b + head * stride_lse.h + at * stride_lse.n,
                                   delta_ptr + of * stride_delta.b + head * stride_delta.h + at * stride_delta.n);
        }
        return found;
    };
    auto put = [&](const Statistics& found, int stage) {
        const int row = static_cast<int>(threadIdx.x);
        if (row >= BLOCK_M) return;
        store_shared(statistics + (stage * BLOCK_M + row), Vector<float, 2>{{found.lse, found.delta}});
    };
    fetch_tile<BLOCK_N, HEAD_DIM>(k_tile, k, stride_k.n, stride_k.d, keys);
    fetch_tile<BLOCK_N, VALUE_DIM>(v_tile, v, stride_v.n, stride_v.d, keys);
    if (steps > 0) {
        fetch(0, 0);
        put(ask(0), 0);
    }
    commit_copies();

    const int own_key = 16 * warp_id(), pair = lane_id() % 4;
    const Shared<Element> k_own = k_tile + own_key * D_ROW, v_own = v_tile + own_key * V_ROW;
    auto key_at = [&](int half) { return least(first_key + own_key + lane_id() / 4 + 8 * half, k_rows.length - 1); };
    const Sight sight([&](int half) { return window.first_row(key_at(half)); },
                      [&](int half) { return window.last_row(key_at(half)); });

    float dk[BLOCK_D / 8][4] = {}, dv[BLOCK_V / 8][4] = {};
    int stage = 0;
    for (int step = 0; step < steps; ++step) {
        wait_copies<0>();
        __syncthreads();  // this tile is here, and nobody reads the one before it any more
        const bool more = step + 1 < steps;
        Statistics next;
        if (more) {
            fetch(step + 1, 1 - stage);
            next = ask(step + 1);
        }
        commit_copies();

        const int first = first_of(step);
        float p[BLOCK_M / 16][2][4] = {}, slope[SOFTCAP ? BLOCK_M / 16 : 1][2][4];
        multiply_transposed<BLOCK_D>(p, k_own, q_tile(stage));
        auto of_row = [&](int ii, int i) {
            return load_shared(statistics + (stage * BLOCK_M + 16 * ii + 8 * (i / 4) + 2 * pair + i % 2));
        };
#pragma unroll
        for (int ii = 0; ii < BLOCK_M / 16; ++ii) {
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                float own, &score = p[ii][i / 4][i % 4];
                score = weight(score, of_row(ii, i).at[0], qk_scale, softcap_log2, own);
                if constexpr (SOFTCAP) slope[ii][i / 4][i % 4] = own;
            }
        }
        if (sight.hides(first, BLOCK_M)) sight.hide(p, first, 0.0f);
        if constexpr (GRAD_V) {
#pragma unroll
            for (int ii = 0; ii < BLOCK_M / 16; ++ii) {
                multiply<BLOCK_V>(dv, as_left<Element>(p[ii]), dout_tile(stage) + 16 * ii * V_ROW);
            }
        }
        if constexpr (GRAD_K) {
            float ds[BLOCK_M / 16][2][4] = {};
            multiply_transposed<BLOCK_V>(ds, v_own, dout_tile(stage));
#pragma unroll
            for (int ii = 0; ii < BLOCK_M / 16; ++ii) {
#pragma unroll
                for (int i = 0; i < 8; ++i) {
                    float& dp = ds[ii][i / 4][i % 4];
                    dp = p[ii][i / 4][i % 4] * (dp - of_row(ii, i).at[1]);
                    if constexpr (SOFTCAP) dp *= slope[ii][i / 4][i % 4];
                }
                multiply<BLOCK_D>(dk, as_left<Element>(ds[ii]), q_tile(stage) + 16 * ii * D_ROW);
            }
        }
        if (more) put(next, 1 - stage);
        stage = 1 - stage;
    }
    wait_copies<0>();
    __syncthreads();  // the gradients leave through the places of k and v

    if constexpr (GRAD_K) {
        const float factor[2] = {scale, scale};
        put_rows<BLOCK_D>(k_own, dk, factor);
        __syncwarp();
        Element* to = dk_ptr + batch * stride_dk.b + kv_head * stride_dk.h + (start_key + own_key) * stride_dk.n;
        store_rows<HEAD_DIM>(to, stride_dk.n, stride_dk.d, k_own, keys - own_key);
    }
    if constexpr (GRAD_V) {
        const float factor[2] = {1.0f, 1.0f};
        put_rows<BLOCK_V>(v_own, dv, factor);
        __syncwarp();
        Element* to = dv_ptr + batch * stride_dv.b + kv_head * stride_dv.h + (start_key + own_key) * stride_dv.n;
        store_rows<VALUE_DIM>(to, stride_dv.n, stride_dv.d, v_own, keys - own_key);
    }
}

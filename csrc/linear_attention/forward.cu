// The forward walk of linear attention with scalar decay (Qin et al., 2024, arXiv:2401.04658, equations 9 to 13; Dao
// and Gu, 2024, arXiv:2405.21060, section 6) with mma.sync and cp.async.
//
//     out_i = s sum_{j <= i} exp(b_i - b_j) (q_i . k_j) v_j        state = sum_j exp(b_N - b_j) k_j v_j^T
//
// with b the running sum of the log decays. A block has BLOCK_V columns of v in one head of one sequence and walks
// chunks of CHUNK rows: pairs inside a chunk by the masked product of q and k, all others through the state S of the
// rows before the chunk,
//
//     out_i = s (exp(b_i) q_i S + sum_{j <= i in the chunk} exp(b_i - b_j) (q_i . k_j) v_j)
//     S'    = exp(b_last) S + sum_{j in the chunk} exp(b_last - b_j) k_j v_j^T
//
// with b counted from the chunk's beginning, in base 2. Every exponent is at most 0, and is masked before it is raised.
//
// Each warp has 16 of the columns and keeps their state transposed, S^T [16, K], float32, in registers: as accumulators
// of S^T += v^T k they are, once rounded to 16 bits, the right operand of q S, so that the state never leaves the warp.
// The 16 by 16 pieces of the scores are shared out among all warps and meet in shared memory. Chunks arrive in a ring
// of two stages, the next one while this one is worked on; two barriers a chunk.
//
// FLOPs: N ((C + 16) (K slices + V) + 4 K V) a head: pieces of scores up to the diagonal, made once for each slice of
// columns. Bytes: q, k and decays once for each slice, v and out once; the states at both ends, float32, once; 8 bytes
// of offsets a warp where sequences are packed.
//
// Constants: Element (fp16, bf16), KEY_WIDTH, VALUE_WIDTH, CHUNK, WARPS, ALIGNED (16-byte rows of q, k, v and out),
// DECAY (0: none, 1: one a head, 2: one a token).
#include "common/barriers.cuh"
#include "common/math.cuh"
#include "tiles.cuh"

constexpr int NO_DECAY = 0, PER_HEAD = 1;
constexpr int STAGES = 2;
constexpr float LEAST_LOG_DECAY = -110.0f;  // as options.py has it
constexpr int PARTS = (CHUNK + WARP - 1) / WARP;  // rows of a chunk for each lane
constexpr int SLICES = (VALUE_WIDTH + BLOCK_V - 1) / BLOCK_V;

// The log decays of one head, in base 2. One warp makes the running sums, a chunk ahead.
struct Decays {
    const float* at;
    i64 stride_n;
    int length;
    float each;  // the one of all tokens

    DEVICE static float in_base_2(float g) { return least(most(g, LEAST_LOG_DECAY), 0.0f) * LOG2E; }

    // The decays of a chunk from row `first` on; 0 past the end.
    DEVICE void ask(float (&g)[PARTS], int first) const {
#pragma unroll
        for (int part = 0; part < PARTS; ++part) {
            const int row = part * WARP + lane_id();
            g[part] = 0.0f;
            if constexpr (DECAY == PER_HEAD) {
                g[part] = each;
            } else {
                const bool exists = row < CHUNK && first + row < length;
                if (exists) g[part] = in_base_2(load_global(at + (first + row) * stride_n));
            }
        }
    }

    // Their running sums; rows past the end repeat the last.
    DEVICE void put(Shared<float> sums, const float (&g)[PARTS], int first) const {
        float before = 0.0f;
#pragma unroll
        for (int part = 0; part < PARTS; ++part) {
            const int row = part * WARP + lane_id();
            float sum = g[part];
            if constexpr (DECAY == PER_HEAD) {
                sum *= static_cast<float>(least(row + 1, length - first));
            } else {
#pragma unroll
                for (int distance = 1; distance < WARP; distance *= 2) {
                    const float lower = shuffle_up(sum, distance);
                    if (lane_id() >= distance) sum += lower;
                }
                sum += before;
                before = shuffle(sum, WARP - 1);
            }
            if (row < CHUNK) store_shared(sums + row, sum);
        }
    }
};

// The scores of a chunk below the diagonal, decayed: 16 by 16 pieces, one warp after the other.
DEVICE void score(Shared<Element> pairs, Shared<Element> q_tile, Shared<Element> k_tile,
                  [[maybe_unused]] Shared<float> sums) {
    const int group = lane_id() / 4, pair = lane_id() % 4;
    for (int piece = warp_id(); piece < STRIPS * (STRIPS + 1) / 2; piece += WARPS) {
        int strip = 0;
        while ((strip + 1) * (strip + 2) / 2 <= piece) ++strip;
        const int other = piece - strip * (strip + 1) / 2;
        float scores[2][4] = {};
#pragma unroll
        for (int kk = 0; kk < BLOCK_K / 16; ++kk) {
            u32 b[4];
            load_right_transposed<K_ROW>(b, k_tile + 16 * other * K_ROW, kk);
            multiply(scores[0], scores[1], load_left<K_ROW>(q_tile + 16 * strip * K_ROW, kk), b);
        }
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int row = 16 * strip + group + 8 * half;
            [[maybe_unused]] float own = 0.0f;
            if constexpr (DECAY != NO_DECAY) own = load_shared(sums + row);
#pragma unroll
            for (int n = 0; n < 2; ++n) {
                const int column = 16 * other + 8 * n + 2 * pair;
                float weight[2];
                [[maybe_unused]] Vector<float, 2> theirs;
                if constexpr (DECAY != NO_DECAY) theirs = load_shared_vector<2>(sums + column);
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    if constexpr (DECAY == NO_DECAY) {
                        weight[i] = column + i <= row ? 1.0f : 0.0f;
                    } else {
                        // Masked before the exponential: the other half would be positive.
                        weight[i] = exp2_fast(column + i <= row ? least(own - theirs.at[i], 0.0f) : -infinity());
                    }
                }
                const float left = scores[n][2 * half], right = scores[n][2 * half + 1];
                store_shared((pairs + (row * P_ROW + column)).template as<u32>(),
                             pack<Element>(left * weight[0], right * weight[1]));
            }
        }
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
linear_attention_cuda_kernel(const Element* q_ptr,        // [B, Hk, N, K]
                             const Element* k_ptr,        // [B, Hk, N, K]
                             const Element* v_ptr,        // [B, H, N, V]
                             Element* out_ptr,            // [B, H, N, V]
                             const float* decay_ptr,      // [1, H, 1], [B, H, N] or null
                             const float* state_ptr,      // [S, H, K, V] before every sequence, or null
                             float* last_ptr,             // [S, H, K, V] after it
                             const int* cu_seqlens_ptr,   // [S + 1] or null
                             Strides stride_q, Strides stride_k, Strides stride_v, Strides stride_out,
                             Strides stride_decay, Strides stride_state, Strides stride_last,
                             int heads, int group,  // heads of v to one of q and k
                             int seqlen,            // packed: all rows
                             float scale) {
    SharedMemory arena;
    const Shared<Element> q_tiles = arena.take<Element>(STAGES * CHUNK * K_ROW);
    const Shared<Element> k_tiles = arena.take<Element>(STAGES * CHUNK * K_ROW);
    const Shared<Element> v_tiles = arena.take<Element>(STAGES * CHUNK * V_ROW);
    const Shared<Element> pairs = arena.take<Element>(CHUNK * P_ROW);
    const Shared<float> all_sums = arena.take<float>(STAGES * CHUNK);

    const int block = static_cast<int>(blockIdx.x), slice = block % SLICES * BLOCK_V;
    const int head = block / SLICES % heads, sequence = block / SLICES / heads;
    int start = 0, length = seqlen, batch = sequence;
    if (cu_seqlens_ptr) {
        // Whatever the offsets say, the rows lie inside the tensors.
        start = least(most(load_global_uniform(cu_seqlens_ptr + sequence), 0), seqlen);
        length = most(least(load_global_uniform(cu_seqlens_ptr + sequence + 1), seqlen) - start, 0);
        batch = 0;
    }
    auto place = [&](const Strides& stride, int in_head, int row) {
        return batch * stride.b + in_head * stride.h + row * stride.n;
    };
    const Element* q_head = q_ptr + place(stride_q, head / group, start);
    const Element* k_head = k_ptr + place(stride_k, head / group, start);
    const Element* v_head = v_ptr + place(stride_v, head, start) + slice * stride_v.d;
    const int columns = least(VALUE_WIDTH - slice, BLOCK_V), own = columns - 16 * warp_id();
    Element* out_head = out_ptr + place(stride_out, head, start) + (slice + 16 * warp_id()) * stride_out.d;

    auto fetch = [&](int first, int stage) {
        const int there = length - first;
        fetch_tile<BLOCK_K>(q_tiles + stage * CHUNK * K_ROW, q_head + first * stride_q.n, stride_q, there, KEY_WIDTH);
        fetch_tile<BLOCK_K>(k_tiles + stage * CHUNK * K_ROW, k_head + first * stride_k.n, stride_k, there, KEY_WIDTH);
        fetch_tile<BLOCK_V>(v_tiles + stage * CHUNK * V_ROW, v_head + first * stride_v.n, stride_v, there, columns);
        commit_copies();
    };
    if (length > 0) fetch(0, 0);

    [[maybe_unused]] Decays decays{nullptr, 0, length, 0.0f};
    [[maybe_unused]] float g[PARTS];
    if constexpr (DECAY != NO_DECAY) {
        if (warp_id() == 0 && length > 0) {
            if constexpr (DECAY == PER_HEAD) {
                decays.each = Decays::in_base_2(load_global_uniform(decay_ptr + head * stride_decay.h));
            } else {
                decays.at = decay_ptr + place(stride_decay, head, start);
                decays.stride_n = stride_decay.n;
            }
            decays.ask(g, 0);
            decays.put(all_sums, g, 0);
            decays.ask(g, CHUNK);
        }
    }

    // S^T: rows are the warp's columns of v, columns are those of k.
    float state[BLOCK_K / 8][4];
    auto each_of_state = [&](const Strides& stride, const auto& visit) {
        const i64 outer = sequence * stride.b + head * stride.h;
#pragma unroll
        for (int n = 0; n < BLOCK_K / 8; ++n) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int key = 8 * n + 2 * (lane_id() % 4) + i % 2, value = lane_id() / 4 + i / 2 * 8;
                visit(state[n][i], outer + key * stride.n + (slice + 16 * warp_id() + value) * stride.d,
                      key < KEY_WIDTH && value < own);
            }
        }
    };
    each_of_state(stride_state, [&](float& x, i64 offset, bool exists) {
        x = state_ptr && exists ? load_global(state_ptr + offset) : 0.0f;
    });

    for (int first = 0, stage = 0; first < length; first += CHUNK, stage ^= 1) {
        wait_copies<0>();
        __syncthreads();  // this chunk is here, and nobody reads the one before
        const Shared<float> sums = all_sums + stage * CHUNK;
        if (first + CHUNK < length) {
            fetch(first + CHUNK, stage ^ 1);
            if constexpr (DECAY != NO_DECAY) {
                if (warp_id() == 0) {
                    decays.put(all_sums + (stage ^ 1) * CHUNK, g, first + CHUNK);
                    decays.ask(g, first + 2 * CHUNK);
                }
            }
        }
        const Shared<Element> q_tile = q_tiles + stage * CHUNK * K_ROW, k_tile = k_tiles + stage * CHUNK * K_ROW;
        const Shared<Element> v_tile = v_tiles + (stage * CHUNK * V_ROW + 16 * warp_id());
        score(pairs, q_tile, k_tile, sums);
        __syncthreads();

        Fragment held[BLOCK_K / 16];  // the state as the right operand
#pragma unroll
        for (int kk = 0; kk < BLOCK_K / 16; ++kk) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const float(&from)[4] = state[2 * kk + i % 2];
                held[kk].at[i] = pack<Element>(from[i / 2 * 2], from[i / 2 * 2 + 1]);
            }
        }
#pragma unroll 1
        for (int strip = 0; strip < STRIPS; ++strip) {
            float acc[2][4] = {};
#pragma unroll
            for (int kk = 0; kk < BLOCK_K / 16; ++kk) {
                multiply(acc[0], acc[1], load_left<K_ROW>(q_tile + 16 * strip * K_ROW, kk), held[kk].at);
            }
            if constexpr (DECAY != NO_DECAY) {
                const int row = 16 * strip + lane_id() / 4;
                const float seen[2] = {exp2_fast(load_shared(sums + row)), exp2_fast(load_shared(sums + row + 8))};
#pragma unroll
                for (int i = 0; i < 8; ++i) acc[i / 4][i % 4] *= seen[i % 4 / 2];
            }
#pragma unroll 1
            for (int other = 0; other <= strip; ++other) {
                u32 b[4];
                load_right<V_ROW>(b, v_tile + 16 * other * V_ROW);
                multiply(acc[0], acc[1], load_left<P_ROW>(pairs + 16 * strip * P_ROW, other), b);
            }
#pragma unroll
            for (int i = 0; i < 8; ++i) acc[i / 4][i % 4] *= scale;
            const int row = first + 16 * strip;
            store_strip(out_head + row * stride_out.n, stride_out, acc, length - row, own);
        }

        [[maybe_unused]] float total = 0.0f;
        if constexpr (DECAY != NO_DECAY) {
            total = load_shared(sums + (CHUNK - 1));
            const float kept = exp2_fast(total);
#pragma unroll
            for (int n = 0; n < BLOCK_K / 8; ++n) {
#pragma unroll
                for (int i = 0; i < 4; ++i) state[n][i] *= kept;
            }
        }
#pragma unroll 1
        for (int strip = 0; strip < STRIPS; ++strip) {
            Fragment a = load_left_transposed<V_ROW>(v_tile + 16 * strip * V_ROW);
            if constexpr (DECAY != NO_DECAY) {
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    Vector<float, 2> kept =
                        load_shared_vector<2>(sums + (16 * strip + 8 * half + 2 * (lane_id() % 4)));
#pragma unroll
                    for (int i = 0; i < 2; ++i) kept.at[i] = exp2_fast(least(total - kept.at[i], 0.0f));
                    a.at[2 * half] = weighed(a.at[2 * half], kept);
                    a.at[2 * half + 1] = weighed(a.at[2 * half + 1], kept);
                }
            }
#pragma unroll
            for (int kk = 0; kk < BLOCK_K / 16; ++kk) {
                u32 b[4];
                load_right<K_ROW>(b, k_tile + (16 * strip * K_ROW + 16 * kk));
                multiply(state[2 * kk], state[2 * kk + 1], a, b);
            }
        }
    }
    each_of_state(stride_last, [&](float x, i64 offset, bool exists) {
        if (exists) store_global(last_ptr + offset, x);
    });
}

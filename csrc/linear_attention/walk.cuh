// The walk that is the forward pass and all of the backward pass of linear attention with scalar decay (Qin et al.,
// 2024, arXiv:2401.04658, equations 9 to 13; Dao and Gu, 2024, arXiv:2405.21060, section 6), by mma.sync and cp.async.
//
// With any three sequences of rows x, y, z, and b the running sum of the log decays, it makes
//
//     out_i = s sum_{j <= i} exp(b_i - b_j) (x_i . y_j) z_j            forward in time
//     out_j = s sum_{i >= j} exp(b_i - b_j) (x_j . y_i) z_i            with REVERSE
//
// and four choices of them are the operator and its gradients:
//
//     out: x, y, z = q, k, v              dq: dO, v, k
//     dv:  x, y, z = k, q, dO reversed    dk: v, dO, q reversed
//
// A block has BLOCK_Z columns of z and out in one head of one sequence and walks chunks of CHUNK rows: pairs inside a
// chunk by the masked product of x and y, all others through the state S of the rows that it has passed. With b counted
// from the chunk's beginning, in base 2, and b_C its last,
//
//     out_i = s (exp(b_i) x_i S + sum_{j <= i in the chunk} exp(b_i - b_j) (x_i . y_j) z_j)
//     S'    = exp(b_C) S + sum_{j in the chunk} exp(b_C - b_j) y_j z_j^T
//
// Reversed the two weights change places, and S is the gradient of the state forward, so that the scale goes into it.
// Every exponent is at most 0, and is masked before it is raised.
//
// Each warp has 16 of the columns and keeps their state transposed, S^T [16, Y], float32, in registers: as accumulators
// of S^T += z^T y they are, once rounded to 16 bits, the right operand of x S, so that the state never leaves the warp.
// The 16 by 16 pieces of the scores are shared out among all warps and meet in shared memory. Chunks arrive in a ring
// of two stages, the next one while this one is worked on; two barriers a chunk.
//
// Gradient of decays (SEGMENT). With r_i = q_i . dq_i and c_j = k_j . dk_j, both without the pair of a token and
// itself, which no decay touches, dg_t = sum_{i >= t} (r_i - c_i) + <D, S> inside a segment, with S the state behind
// the segment and D its gradient. Both come from the same rounded pairs, so that their errors cancel in the sum, and a
// segment ends every SEGMENT rows, so that those of the states, which do not, pile up no further: there dq's walk
// leaves its state in memory, and dk's, which comes by with D in the same registers, multiplies the two. `u`, what out
// is a gradient of, arrives with z; rows of out . u go through shared memory to the last warp, which sums them up while
// the others make the scores of the next chunk.
//
// FLOPs: N ((C + 16) (Y slices + Z) + 4 Y Z) a head: pieces of scores up to the diagonal, made once for each slice of
// columns. Bytes: x, y and decays once for each slice, z and out once; the states at both ends, float32, once; 8 bytes
// of offsets a warp where sequences are packed. With SEGMENT: u once, an r or dg written for each slice and token, and
// r read once; every SEGMENT rows, and at the end where there is a gradient of it, a state.
//
// Constants: Element (fp16, bf16), Y_WIDTH, Z_WIDTH, CHUNK, WARPS, ALIGNED (16-byte rows of x, y, z, u and out), DECAY
// (0: none, 1: one a head, 2: one a token).
#pragma once
#include "common/barriers.cuh"
#include "common/math.cuh"
#include "crossing.cuh"
#include "decays.cuh"
#include "tiles.cuh"

constexpr int STAGES = 2;
constexpr int SLICES = (Z_WIDTH + BLOCK_Z - 1) / BLOCK_Z;

// What a walk reads and makes. Strides of states: n of what y is multiplied with, d of z's columns.
template <class Result>
struct Walk {
    const Element *x, *y, *z;  // [B, H / group, N, Y or Z]
    Result* out;               // [B, H, N, Z]
    Strides stride_x, stride_y, stride_z, stride_out;
    int x_group, y_group, z_group;  // heads of v to one of x, y and z
    const float* decay;             // [1, H, 1], [B, H, N] or null
    Strides stride_decay;
    const float* state;  // [S, H, Y, Z] where the walk begins, or null
    float* last;         // [S, H, Y, Z] where it ends, or null
    Strides stride_state, stride_last;
    const int* cu_seqlens;  // [S + 1] or null
    int heads, seqlen;      // packed: all rows
    float scale;
};

// What a walk with SEGMENT reads and makes beside.
struct Crossing {
    const Element* u;  // [B, H / z_group, N, Z]
    Strides stride_u;
    float* made;           // [SLICES, B, H, N]: r, or reversed this slice's share of the gradient of each log decay
    const float* partner;  // [B, H, N], reversed: the r of all slices
    Strides stride_rows;   // of both; d from one slice to the next
    float* restarts;       // [B, slots, H, Y, Z]: the states behind segments but for the last
    Strides stride_restarts;
    int slots;             // of a sequence; packed: of all
    const float* behind;   // [S, H, Y, Z], reversed: the states behind every sequence
    Strides stride_behind;
};

// The scores of a chunk up to the diagonal (reversed: from it on; STRICT: without it, which goes to `itself`), decayed:
// 16 by 16 pieces, one warp after the other.
template <bool REVERSE, bool STRICT>
DEVICE void score(Shared<Element> pairs, Shared<Element> x_tile, Shared<Element> y_tile,
                  [[maybe_unused]] Shared<float> sums, [[maybe_unused]] Shared<float> itself) {
    const int group = lane_id() / 4, pair = lane_id() % 4;
    for (int piece = warp_id(); piece < STRIPS * (STRIPS + 1) / 2; piece += WARPS) {
        int late = 0;
        while ((late + 1) * (late + 2) / 2 <= piece) ++late;
        const int early = piece - late * (late + 1) / 2;
        const int strip = REVERSE ? early : late, other = REVERSE ? late : early;
        float scores[2][4] = {};
#pragma unroll
        for (int kk = 0; kk < BLOCK_Y / 16; ++kk) {
            u32 b[4];
            load_right_transposed<Y_ROW>(b, y_tile + 16 * other * Y_ROW, kk);
            multiply(scores[0], scores[1], load_left<Y_ROW>(x_tile + 16 * strip * Y_ROW, kk), b);
        }
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int row = 16 * strip + group + 8 * half;
            [[maybe_unused]] Sum2 own{};
            if constexpr (DECAY != NO_DECAY) own = Sum2::at(sums, row);
#pragma unroll
            for (int n = 0; n < 2; ++n) {
                const int column = 16 * other + 8 * n + 2 * pair;
                float weighed[2];
                [[maybe_unused]] TwoSums theirs;
                if constexpr (DECAY != NO_DECAY) theirs = TwoSums::of(sums, column);
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    const int ahead = REVERSE ? column + i - row : row - column - i;
                    const bool seen = STRICT ? ahead > 0 : ahead >= 0;
                    const float score = scores[n][2 * half + i];
                    // Chosen and not multiplied by 0: what is not seen may have overflowed.
                    if constexpr (DECAY == NO_DECAY) {
                        weighed[i] = seen ? score : 0.0f;
                    } else {
                        // Masked before the exponential: the other half would be positive.
                        const float between = REVERSE ? theirs.at[i].minus(own) : own.minus(theirs.at[i]);
                        weighed[i] = seen ? score * exp2_fast(seen ? between : -infinity()) : 0.0f;
                    }
                    if constexpr (STRICT) {
                        if (ahead == 0) store_shared(itself + row, scores[n][2 * half + i]);
                    }
                }
                store_shared((pairs + (row * P_ROW + column)).template as<u32>(),
                             pack<Element>(weighed[0], weighed[1]));
            }
        }
    }
}

// With SEGMENT, the rows of a segment, it takes part in the gradient of decays.
template <bool REVERSE, int SEGMENT, class Result>
DEVICE void walk(const Walk<Result>& given, [[maybe_unused]] const Crossing& crossing) {
    constexpr bool CROSSING = SEGMENT > 0;
    static_assert(SEGMENT % CHUNK == 0, "a segment is whole chunks");
    SharedMemory arena;
    const Shared<Element> x_tiles = arena.take<Element>(STAGES * CHUNK * Y_ROW);
    const Shared<Element> y_tiles = arena.take<Element>(STAGES * CHUNK * Y_ROW);
    const Shared<Element> z_tiles = arena.take<Element>(STAGES * CHUNK * Z_ROW);
    const Shared<Element> pairs = arena.take<Element>(CHUNK * P_ROW);
    const Shared<float> all_sums = arena.take<float>(STAGES * 2 * CHUNK);  // of decays: Sum2
    const Shared<Element> u_tiles = arena.take<Element>(CROSSING ? STAGES * CHUNK * Z_ROW : 0);
    const Shared<float> itself = arena.take<float>(CROSSING ? CHUNK : 0);
    const Shared<float> shares = arena.take<float>(CROSSING ? WARPS * CHUNK : 0);  // of out . u, by warp
    const Shared<float> products = arena.take<float>(CROSSING ? WARPS : 0);        // of <D, S>, by warp

    const int block = static_cast<int>(blockIdx.x), slice = block % SLICES * BLOCK_Z;
    const int head = block / SLICES % given.heads, sequence = block / SLICES / given.heads;
    const Rows rows = rows_of(given.cu_seqlens, sequence, given.seqlen, given.seqlen);
    const int start = rows.start, length = rows.length, batch = given.cu_seqlens ? 0 : sequence;
    auto place = [&](const Strides& stride, int in_head, int row) {
        return batch * stride.b + in_head * stride.h + row * stride.n;
    };
    const Strides &stride_x = given.stride_x, &stride_y = given.stride_y, &stride_z = given.stride_z;
    const Element* x_head = given.x + place(stride_x, head / given.x_group, start);
    const Element* y_head = given.y + place(stride_y, head / given.y_group, start);
    const Element* z_head = given.z + place(stride_z, head / given.z_group, start) + slice * stride_z.d;
    [[maybe_unused]] const Element* u_head = nullptr;
    if constexpr (CROSSING) {
        u_head = crossing.u + place(crossing.stride_u, head / given.z_group, start) + slice * crossing.stride_u.d;
    }
    const int columns = least(Z_WIDTH - slice, BLOCK_Z), own = columns - 16 * warp_id();
    Result* out_head =
        given.out + place(given.stride_out, head, start) + (slice + 16 * warp_id()) * given.stride_out.d;

    const int chunks = ceil_div(length, CHUNK);
    auto row_of = [&](int step) { return (REVERSE ? chunks - 1 - step : step) * CHUNK; };
    auto fetch = [&](int first, int stage) {
        const int there = length - first;
        fetch_tile<BLOCK_Y>(x_tiles + stage * CHUNK * Y_ROW, x_head + first * stride_x.n, stride_x, there, Y_WIDTH);
        fetch_tile<BLOCK_Y>(y_tiles + stage * CHUNK * Y_ROW, y_head + first * stride_y.n, stride_y, there, Y_WIDTH);
        fetch_tile<BLOCK_Z>(z_tiles + stage * CHUNK * Z_ROW, z_head + first * stride_z.n, stride_z, there, columns);
        if constexpr (CROSSING) {
            const Strides& stride = crossing.stride_u;
            fetch_tile<BLOCK_Z>(u_tiles + stage * CHUNK * Z_ROW, u_head + first * stride.n, stride, there, columns);
        }
        commit_copies();
    };
    if (length > 0) fetch(row_of(0), 0);

    [[maybe_unused]] Decays decays{nullptr, 0, length, 0.0f};
    [[maybe_unused]] float g[PARTS];
    if constexpr (DECAY != NO_DECAY) {
        if (warp_id() == 0 && length > 0) {
            if constexpr (DECAY == PER_HEAD) {
                decays.each = Decays::in_base_2(load_global_uniform(given.decay + head * given.stride_decay.h));
            } else {
                decays.at = given.decay + place(given.stride_decay, head, start);
                decays.stride_n = given.stride_decay.n;
            }
            decays.ask(g, row_of(0));
            decays.put(all_sums, g, row_of(0));
            decays.ask(g, row_of(1));
        }
    }

    // S^T: rows are the warp's columns of z, columns are those of y.
    float state[BLOCK_Y / 8][4];
    auto each_of_state = [&](const Strides& stride, int which, const auto& visit) {
        const int lane = afresh(lane_id()), in_z = lane / 4, pair = 2 * (lane % 4);
        i64 offset = which * stride.b + head * stride.h + pair * stride.n + (slice + 16 * warp_id() + in_z) * stride.d;
#pragma unroll
        for (int n = 0; n < BLOCK_Y / 8; ++n) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                visit(state[n][i], offset + i % 2 * stride.n + i / 2 * 8 * stride.d,
                      8 * n + pair + i % 2 < Y_WIDTH && in_z + i / 2 * 8 < own);
            }
            offset += 8 * stride.n;
        }
    };
    each_of_state(given.stride_state, sequence, [&](float& value, i64 offset, bool exists) {
        value = given.state && exists ? load_global(given.state + offset) : 0.0f;
    });

    // The last warp's sums over the rows of out . u, a chunk behind.
    [[maybe_unused]] RowSums row_sums{shares, length, nullptr, nullptr, 0.0f, {}};
    if constexpr (CROSSING) {
        const i64 rows = place(crossing.stride_rows, head, start);
        row_sums.made = crossing.made + rows + slice / BLOCK_Z * crossing.stride_rows.d;
        row_sums.partner = REVERSE && slice == 0 ? crossing.partner + rows : nullptr;
    }

    for (int step = 0; step < chunks; ++step) {
        const int first = row_of(step), stage = step % STAGES;
        wait_copies<0>();
        __syncthreads();  // this chunk is here, and nobody reads the one before
        const Shared<float> sums = all_sums + stage * 2 * CHUNK;
        if (step + 1 < chunks) {
            fetch(row_of(step + 1), stage ^ 1);
            if constexpr (DECAY != NO_DECAY) {
                if (warp_id() == 0) {
                    decays.put(all_sums + (stage ^ 1) * 2 * CHUNK, g, row_of(step + 1));
                    decays.ask(g, row_of(step + 2));
                }
            }
        }
        if constexpr (CROSSING) {
            if (step > 0 && warp_id() == WARPS - 1) row_sums.put<REVERSE>(row_of(step - 1));
        }
        const Shared<Element> x_tile = x_tiles + stage * CHUNK * Y_ROW, y_tile = y_tiles + stage * CHUNK * Y_ROW;
        const Shared<Element> z_tile = z_tiles + (stage * CHUNK * Z_ROW + 16 * warp_id());
        score<REVERSE, CROSSING>(pairs, x_tile, y_tile, sums, itself);

        // A segment ends behind this chunk: forward its state is kept below, reversed it is met here.
        [[maybe_unused]] bool restarts = false;
        [[maybe_unused]] int slot = 0;
        if constexpr (CROSSING) {
            const int end = first + CHUNK;
            restarts = end < length && end % SEGMENT == 0;
            slot = batch * crossing.slots + (start + end - 1) / SEGMENT;
        }
        [[maybe_unused]] const bool meets = restarts || (step == 0 && given.state != nullptr);
        if constexpr (CROSSING && REVERSE) {
            if (meets) {
                float product = 0.0f;
                const float* behind = restarts ? crossing.restarts : crossing.behind;
                const Strides &in = crossing.stride_restarts, &last = crossing.stride_behind;
                const Strides stride{restarts ? in.b : last.b, restarts ? in.h : last.h, restarts ? in.n : last.n,
                                     restarts ? in.d : last.d};
                each_of_state(stride, restarts ? slot : sequence, [&](float value, i64 offset, bool exists) {
                    if (exists) product += value * load_global(behind + offset);
                });
                product = warp_reduce(product, Sum{});
                if (lane_id() == 0) store_shared(products + warp_id(), product);
            }
        }
        __syncthreads();
        if constexpr (CROSSING && REVERSE) {
            if (warp_id() == WARPS - 1) {
                if (meets) row_sums.restart(products);
                row_sums.ask(first);
            }
        }

        Fragment held[BLOCK_Y / 16];  // the state as the right operand
#pragma unroll
        for (int kk = 0; kk < BLOCK_Y / 16; ++kk) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const float(&from)[4] = state[2 * kk + i % 2];
                held[kk].at[i] = pack<Element>(from[i / 2 * 2], from[i / 2 * 2 + 1]);
            }
        }
        [[maybe_unused]] Sum2 total{};
        if constexpr (DECAY != NO_DECAY) total = Sum2::at(sums, CHUNK - 1);
#pragma unroll 1
        for (int strip = 0; strip < STRIPS; ++strip) {
            float acc[2][4] = {}, from_state[2][4] = {};
#pragma unroll
            for (int kk = 0; kk < BLOCK_Y / 16; ++kk) {
                multiply(from_state[0], from_state[1], load_left<Y_ROW>(x_tile + 16 * strip * Y_ROW, kk), held[kk].at);
            }
#pragma unroll 1
            for (int other = REVERSE ? strip : 0; other < (REVERSE ? STRIPS : strip + 1); ++other) {
                u32 b[4];
                load_right<Z_ROW>(b, z_tile + 16 * other * Z_ROW);
                multiply(acc[0], acc[1], load_left<P_ROW>(pairs + 16 * strip * P_ROW, other), b);
            }
            float seen[2] = {1.0f, 1.0f};
            if constexpr (DECAY != NO_DECAY) {
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    const Sum2 sum = Sum2::at(sums, 16 * strip + lane_id() / 4 + 8 * half);
                    seen[half] = exp2_fast(REVERSE ? total.minus(sum) : sum.value());
                }
            }
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                const float passed = from_state[i / 4][i % 4] * seen[i % 4 / 2];
                float& result = acc[i / 4][i % 4];
                result = REVERSE ? result * given.scale + passed : (result + passed) * given.scale;
            }
            if constexpr (CROSSING) {
                const Shared<Element> u_tile = u_tiles + (stage * CHUNK * Z_ROW + 16 * warp_id());
                cross(acc, u_tile + 16 * strip * Z_ROW, z_tile + 16 * strip * Z_ROW, itself + 16 * strip,
                      shares + (warp_id() * CHUNK + 16 * strip), given.scale);
            }
            const int row = first + 16 * strip;
            store_strip(out_head + row * given.stride_out.n, given.stride_out, acc, length - row, own);
        }

        if constexpr (DECAY != NO_DECAY) {
            const float kept = exp2_fast(total.value());
#pragma unroll
            for (int n = 0; n < BLOCK_Y / 8; ++n) {
#pragma unroll
                for (int i = 0; i < 4; ++i) state[n][i] *= kept;
            }
        }
#pragma unroll 1
        for (int strip = 0; strip < STRIPS; ++strip) {
            Fragment a = load_left_transposed<Z_ROW>(z_tile + 16 * strip * Z_ROW);
            if constexpr (DECAY != NO_DECAY || REVERSE) {
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    Vector<float, 2> kept{{1.0f, 1.0f}};
                    [[maybe_unused]] TwoSums own{};
                    if constexpr (DECAY != NO_DECAY) {
                        own = TwoSums::of(sums, 16 * strip + 8 * half + 2 * (lane_id() % 4));
                    }
#pragma unroll
                    for (int i = 0; i < 2; ++i) {
                        if constexpr (DECAY != NO_DECAY) {
                            kept.at[i] = exp2_fast(REVERSE ? own.at[i].value() : total.minus(own.at[i]));
                        }
                        if constexpr (REVERSE) kept.at[i] *= given.scale;
                    }
                    a.at[2 * half] = scaled<Element>(a.at[2 * half], kept);
                    a.at[2 * half + 1] = scaled<Element>(a.at[2 * half + 1], kept);
                }
            }
#pragma unroll
            for (int kk = 0; kk < BLOCK_Y / 16; ++kk) {
                u32 b[4];
                load_right<Y_ROW>(b, y_tile + (16 * strip * Y_ROW + 16 * kk));
                multiply(state[2 * kk], state[2 * kk + 1], a, b);
            }
        }
        if constexpr (CROSSING && !REVERSE) {
            if (restarts) {
                each_of_state(crossing.stride_restarts, slot, [&](float value, i64 offset, bool exists) {
                    if (exists) store_global(crossing.restarts + offset, value);
                });
            }
        }
    }
    if constexpr (CROSSING) {
        __syncthreads();
        if (chunks > 0 && warp_id() == WARPS - 1) row_sums.put<REVERSE>(row_of(chunks - 1));
    }
    if (given.last) {
        each_of_state(given.stride_last, sequence, [&](float value, i64 offset, bool exists) {
            if (exists) store_global(given.last + offset, value);
        });
    }
}

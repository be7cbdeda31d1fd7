// LeanAttention (Sanovar et al., 2024, arXiv:2405.10480, section 4) with mma.sync and cp.async: attention of a few new
// positions to long caches, every block with an equal share of all keys (schedule.cuh) or a fixed part of an item.
//
//     s_ij = scale k_scale q_i . k_j, capped and masked      out_i = sum_j exp(s_ij - lse_i) v_scale v_j
//
// An item is BLOCK_M rows that read the same keys, the Nq positions of the query heads of one key head: row g Nq + i is
// position i of the group's head g. So the 16 rows of a matrix instruction are filled by the group, and its keys are
// read once. Of the ROW_WARPS x KEY_WARPS warps of a block, those equal in the first have the same 16 rows, those equal
// in the second the same keys of every tile. Fragments of q stay in registers up to 128 columns; a warp's scores go
// from accumulators into the fragment of the second product without leaving the registers.
//
// A segment that is no whole item leaves (m, l, acc) in the workspace, and its block counts itself in at the item; the
// last one merges in the order of the slots. Nobody waits, and the counter is back at zero.
//
// FLOPs: 2 (D + Dv) for each of 16 ROW_WARPS rows and each key. Bytes: keys and values once for every BLOCK_M rows of a
// group, a page number for every key where there are pages; q once a segment; out and lse once; 4 (Dv + 2) a row for
// each partial result, written and read; the lengths twice a block.
//
// Constants: Element (fp16, bf16), Cache (Element, or u8 where CODE is INT8 or E4M3), HEAD_DIM, VALUE_DIM, BLOCK_N,
// ROW_WARPS, KEY_WARPS, STAGES, PAGED, K_BY_KEY, V_BY_KEY (a factor for every key), ALIGNED (16-byte rows), OF_PREFIX.
//
// OF_PREFIX: the pass over the keys that all sequences have in front of their own. An item is BLOCK_M rows of the whole
// batch, and its sum goes to prefix_ptr, where the pass over the sequences' own keys finds it.
#include "results.cuh"
#include "schedule.cuh"
#include "tiles.cuh"
#include "walk.cuh"

constexpr int Q_BYTES = BLOCK_M * Q_ROW * 2;
constexpr int TILE_BYTES = STAGES * KEY_WARPS * KEYS_BYTES;
constexpr int SUM_BYTES = KEY_WARPS * BLOCK_M * (MERGE_ROW + 2) * 4;
// The sums take the place of q and the tiles.
constexpr int POOL = Q_BYTES + TILE_BYTES > SUM_BYTES ? Q_BYTES + TILE_BYTES : SUM_BYTES;

// A row of q: of which sequence, which head, and which of its newest positions.
struct Reader {
    int sequence, head, row;

    template <class S>
    DEVICE i64 in(const S& stride) const {
        return sequence * stride.b + head * stride.h + row * stride.n;
    }
};

extern "C" __global__ void __launch_bounds__(THREADS, 1)
lean_attention_cuda_kernel(const Element* q_ptr,        // [B, Hq, Nq, D]
                           const Cache* k_ptr,          // [B, Hkv, N, D] or [pages, Hkv, page, D]
                           const Cache* v_ptr,          // [B, Hkv, N, Dv] or [pages, Hkv, page, Dv]
                           Element* out_ptr,            // [B, Hq, Nq, Dv]
                           float* lse_ptr,              // [B, Hq, Nq]
                           const int* seqlens_ptr,      // [B]
                           const int* table_ptr,        // [B, most pages] or null
                           const float* sinks_ptr,      // [Hq] or null
                           const float* k_scale_ptr,    // [Hkv], one for each key, or null
                           const float* v_scale_ptr,    // the same
                           float* prefix_ptr,           // [B * Hq * Nq, Dv], then [B * Hq * Nq, 2]; or null
                           float* partial_ptr,          // [slots, BLOCK_M * (2 + Dv)]
                           u32* arrivals_ptr,           // [items], all 0 before and after
                           Strides stride_q, Strides stride_k, Strides stride_v, Strides stride_out,
                           RowStrides stride_lse, RowStrides stride_k_scale, RowStrides stride_v_scale,
                           i64 stride_table,
                           int batch, int rows, int group, int kv_heads, int row_tiles, int capacity,
                           int page, int pages, float qk_scale, float softcap, int window_left, int window_right,
                           int fewest_tiles, int most_parts,  // of a share, and of an item
                           int part_tiles,                    // of a fixed part; 0: equal shares
                           int prefix) {                      // keys before those of every sequence
    SharedMemory arena;
    const Shared<u8> pool = arena.take<u8>(POOL);
    const Shared<Element> q_tile = pool.as<Element>();
    const Shared<int> line_tile = arena.take<int>(sizeof(Line) / sizeof(int));
    const Shared<u32> flag = arena.take<u32>(1);
    Rings rings{pool + Q_BYTES, pool.as<float>(), pool.as<float>()};
    if constexpr (K_BY_KEY) rings.k_factors = arena.take<float>(STAGES * BLOCK_N);
    if constexpr (V_BY_KEY) rings.v_factors = arena.take<float>(STAGES * BLOCK_N);
    const Gathered gathered{pool.as<Vector<float, 2>>(), pool.as<float>() + 2 * KEY_WARPS * BLOCK_M};

    const int readers = group * rows;  // of the keys of one head of one sequence
    const Sizes sizes{batch, rows, kv_heads, row_tiles, capacity, window_left};
    Line line{};
    if (part_tiles == 0) {
        if (warp_id() == 0) {
            line = equal_share(seqlens_ptr, sizes, fewest_tiles, most_parts);
            if (lane_id() == 0) {
                store_shared(line_tile, line.tile), store_shared(line_tile + 1, line.stop);
                store_shared(line_tile + 2, line.sequence), store_shared(line_tile + 3, line.before);
                store_shared(line_tile + 4, line.total), store_shared(line_tile + 5, line.parts);
            }
        }
        __syncthreads();
        line = {load_shared(line_tile), load_shared(line_tile + 1), load_shared(line_tile + 2),
                load_shared(line_tile + 3), load_shared(line_tile + 4), load_shared(line_tile + 5)};
    }
    Segment segment;
    bool more = part_tiles == 0 ? next_segment(line, segment, seqlens_ptr, sizes)
                                : fixed_part(segment, seqlens_ptr, sizes, part_tiles, most_parts, prefix);
    while (more) {
        const int head = segment.lane / row_tiles, first_row = segment.lane % row_tiles * BLOCK_M;
        const int used = least(OF_PREFIX ? readers * batch - first_row : readers - first_row, BLOCK_M);
        const i64 at = PAGED || OF_PREFIX ? 0 : segment.sequence;
        auto reader_of = [&](int row) {
            const int index = first_row + row, own = OF_PREFIX ? index % readers : index;
            return Reader{OF_PREFIX ? index / readers : segment.sequence, head * group + own / rows, own % rows};
        };

        constexpr int CHUNKS = BLOCK_D / 8;
        for (int chunk = static_cast<int>(threadIdx.x); chunk < BLOCK_M * CHUNKS; chunk += THREADS) {
            const int row = chunk / CHUNKS, column = chunk % CHUNKS * 8;
            copy_chunk<ALIGNED>(q_tile + (row * Q_ROW + column), q_ptr, reader_of(least(row, used - 1)).in(stride_q),
                                stride_q.d, column, HEAD_DIM, row < used);
        }
        commit_copies();
        const Shared<Element> q_rows = q_tile + 16 * row_warp() * Q_ROW;
        Fragment q_held[Q_HELD ? BLOCK_D / 16 : 1];
        auto get_q = [&] {
            wait_copies<STAGES - 1>();
            __syncthreads();
            if constexpr (Q_HELD) {
#pragma unroll
                for (int kk = 0; kk < BLOCK_D / 16; ++kk) q_held[kk] = load_q(q_rows, kk);
            }
        };
        auto q_of = [&](int kk) {
            if constexpr (Q_HELD) return q_held[kk];
            return load_q(q_rows, kk);
        };

        float score_scale = qk_scale * UNDECODED;
        if (k_scale_ptr && !K_BY_KEY) score_scale *= load_global_uniform(k_scale_ptr + head);
        const Keys keys{
            k_ptr + at * stride_k.b + head * stride_k.h,
            v_ptr + at * stride_v.b + head * stride_v.h,
            K_BY_KEY ? k_scale_ptr + at * stride_k_scale.b + head * stride_k_scale.h : nullptr,
            V_BY_KEY ? v_scale_ptr + at * stride_v_scale.b + head * stride_v_scale.h : nullptr,
            PAGED ? table_ptr + segment.sequence * stride_table : nullptr,
            stride_k, stride_v, stride_k_scale, stride_v_scale, page, pages,
        };
        int position[2];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const Reader reader = reader_of(least(16 * row_warp() + lane_id() / 4 + 8 * half, used - 1));
            position[half] = segment.length - rows + reader.row;
            if constexpr (OF_PREFIX) {
                // A position is counted from the prefix's first key, and each row's sequence has its own length.
                int own = 0;
                if (lane_id() % 4 == 0) own = sizes.length(load_global(seqlens_ptr + reader.sequence));
                position[half] += shuffle(own, lane_id() / 4 * 4);
            }
        }
        const int last = segment.length - 1;
        const Sight sight(
            [&](int half) { return window_left < 0 ? 0 : position[half] - window_left; },
            [&](int half) { return window_right < 0 ? last : least(position[half] + window_right, last); });
        int low = sizes.first_key(segment.length);
        if constexpr (OF_PREFIX) {
            // Of a prefix too only what some row of the block sees is read: all but what is behind the window of the
            // first one.
            low = 0;
            if (window_left >= 0) {
                int before = -0x7fffffff;  // 0 minus the least position
                for (int row = lane_id(); row < used; row += WARP) {
                    const Reader reader = reader_of(row);
                    const int own = sizes.length(load_global(seqlens_ptr + reader.sequence));
                    before = most(before, rows - own - segment.length - reader.row);
                }
                low = -warp_reduce(before, Max{}) - window_left;
            }
        }
        const Softmax softmax{score_scale, softcap, sight};
        Sums sums = walk(get_q, q_of, keys, rings, softmax,
                         (OF_PREFIX ? 0 : sizes.first_tile(segment.length)) + segment.begin,
                         segment.end - segment.begin, low, segment.length);
        if constexpr (!V_BY_KEY) {
            const float unit = v_scale_ptr ? UNDECODED * load_global_uniform(v_scale_ptr + head) : UNDECODED;
#pragma unroll
            for (int n = 0; n < BLOCK_V / 8; ++n) {
#pragma unroll
                for (int i = 0; i < 4; ++i) sums.acc[n][i] *= unit;
            }
        }
        __syncthreads();  // the sums go where q and tiles were
        gathered.put(sums);
        __syncthreads();

        auto finish_row = [&](Row& row, int number) {
            const Reader reader = reader_of(number);
            const i64 all = static_cast<i64>(batch) * kv_heads * readers;
            const i64 index = (static_cast<i64>(reader.sequence) * kv_heads * group + reader.head) * rows + reader.row;
            if constexpr (OF_PREFIX) {
                store_sum(prefix_ptr, all, index, row);
            } else {
                if (prefix_ptr) merge_stored(row, prefix_ptr, all, index);
                finish(row, out_ptr + reader.in(stride_out), stride_out.d, lse_ptr + reader.in(stride_lse),
                       sinks_ptr ? sinks_ptr + reader.head : nullptr);
            }
        };
        if (segment.whole()) {
            for (int number = warp_id(); number < used; number += WARPS) {
                Row row = gathered.row(number);
                finish_row(row, number);
            }
        } else {
            float* slot = partial_ptr + static_cast<i64>(segment.own) * SLOT;
            for (int number = warp_id(); number < used; number += WARPS) {
                store_sum(slot, BLOCK_M, number, gathered.row(number));
            }
            u32* counter = arrivals_ptr + static_cast<i64>(segment.sequence) * sizes.lanes() + segment.lane;
            if (last_arriver(counter, static_cast<u32>(segment.count), flag)) {
                for (int number = warp_id(); number < used; number += WARPS) {
                    Row row = merge_partials(partial_ptr, segment, number);
                    finish_row(row, number);
                }
            }
        }
        more = part_tiles == 0 && next_segment(line, segment, seqlens_ptr, sizes);
        __syncthreads();  // q and tiles go where sums were
    }
}

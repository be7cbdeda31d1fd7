// One stage of hierarchical selection (InfiniteHiP, Lee et al., 2025, arXiv:2502.08910, section 3) with mma.sync, search
// and choice in one launch.
//
// Each candidate, a chunk of 2^STEPS keys, keeps an interval [l, r), at first the part of it that may be selected from,
// and halves it STEPS times:
//
//     c = (l + r) // 2    a = (l + c) // 2    b = (c + r) // 2
//     s_a = max over rows of q . k_a          s_b likewise, a key counting only for rows whose limit it is within
//     s = max(s, s_a, s_b)                    [l, r) = [l, c) if s_a > s_b else [c, r)
//
// and s is its score. A warp has 16 candidates, the rows of a matrix instruction, and goes its own way: the two keys of
// a candidate are read by this warp alone, once, from global memory into the registers where the instruction wants them
// (rows.cuh); through shared memory they would take a detour and a barrier. The rows of queries lie in shared memory for
// all warps of the block; where BLOCK_R of them are not all, every step brings them tile by tile.
//
// Blocks count themselves in at their list. The last one takes the K best (choose.cuh), of the best score that any head
// gives where heads share the list. Nobody waits, and the counter is back at zero. Blocks past the last chunk that may
// be selected from, or past the end of the list that is divided, return at once and are not counted.
//
// FLOPs: 4 R D STEPS a candidate, for R rows (means of neighbouring queries of a group's heads). Bytes: 2 D STEPS
// elements of K for each candidate that is not empty; the rows of q once for every block (once in every step where they
// take several tiles); of the list that is divided 4 for each candidate and its count for every warp; 4 bytes of score,
// written and read again by the last block (seven times where candidates are too many for shared memory); the list; the
// counter.
//
// Constants: Element (fp16, bf16), HEAD_DIM, BLOCK_R, WARPS, ALIGNED (16-byte rows of q and k).
#include "choose.cuh"
#include "rows.cuh"

constexpr int BLOCK_C = 16 * WARPS;

extern "C" __global__ void __launch_bounds__(THREADS, 1)
hip_attention_select_cuda_kernel(const Element* q_ptr,           // [B, Hq, Nq, D]
                                 const Element* k_ptr,           // [B, Hkv, N, D]
                                 const int* parents_ptr,         // [B, lists, Mq, slots] of the stage before, or null
                                 const int* parent_counts_ptr,   // [B, lists, Mq]
                                 float* scores_ptr,              // [B, heads, Mq, candidates]
                                 int* ids_ptr,                   // [B, lists, Mq, most]
                                 int* counts_ptr,                // [B, lists, Mq]
                                 u32* arrivals_ptr,              // [B * lists * Mq], all 0 before and after
                                 Strides stride_q, Strides stride_k,
                                 int heads,     // searched heads
                                 int lists,     // 1 where they share a list, else heads
                                 int group,     // query heads to a searched head
                                 int kv_group,  // searched heads to a key head
                                 int blocks,    // Mq
                                 int block_q, int means, int rows_of_mean, int q_len, int kv_len,
                                 int candidates, int slots, int most_kept, int sink, int window, int causal,
                                 int steps,         // log2 of a chunk
                                 int ratio_log2) {  // of the chunks that one of the stage before is divided into
    SharedMemory arena;
    constexpr int POOL = BLOCK_R * BLOCK_D * 2 > 4 * HELD ? BLOCK_R * BLOCK_D * 2 : 4 * HELD;
    const Shared<u8> pool = arena.take<u8>(POOL);  // rows of q, then orders
    const Shared<int> limits = arena.take<int>(BLOCK_R);
    const Shared<u32> counts = arena.take<u32>(DIGITS);
    const Shared<u32> words = arena.take<u32>(4 + 2 * WARPS);
    const Shared<Element> tile = pool.as<Element>();

    const int tiles = ceil_div(candidates, BLOCK_C), one = static_cast<int>(blockIdx.x);
    const int searched = one / tiles, first_slot = one % tiles * BLOCK_C;  // of [B, heads, Mq]
    const int block = searched % blocks, head = searched / blocks % heads, batch = searched / blocks / heads;
    const int shared = heads / lists;  // heads that share a list
    const i64 list = static_cast<i64>(batch * lists + head / shared) * blocks + block;

    const int first_row = block * block_q, held = least(block_q, q_len - first_row);
    const int before = causal ? first_row - 1 + kv_len - q_len - window : kv_len - 1;
    const int end = causal ? least(most(before + held + 1, 0), kv_len) : kv_len;
    const int* parents = parents_ptr ? parents_ptr + list * slots : nullptr;
    int reach = least(ceil_div(end, 1 << steps), candidates);
    if (parents) reach = least(most(load_global_uniform(parent_counts_ptr + list), 0), slots) << ratio_log2;
    if (first_slot >= most(reach, 1)) return;
    auto number_of = [&](int slot) {
        if (!parents) return slot;
        const int part = slot & ((1 << ratio_log2) - 1);
        return (load_global(parents + (slot >> ratio_log2)) << ratio_log2) + part;
    };

    // A lane has two candidates, and so have the other three of its row of the instruction, the same.
    const int own = first_slot + 16 * warp_id() + lane_id() / 4, quarter = lane_id() / 4 * 4;
    int left[2], right[2];
    float best[2] = {-infinity(), -infinity()};
    bool alive[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int slot = own + 8 * half;
        const bool exists = slot < reach;
        int number = exists && lane_id() == quarter ? number_of(slot) : 0;
        number = shuffle(number, quarter);
        left[half] = most(number << steps, sink);
        right[half] = least((number + 1) << steps, end);
        alive[half] = exists && left[half] < right[half];
    }
    const bool busy = any_lane(alive[0] || alive[1]);
    if (block_reduce<WARPS>(static_cast<int>(busy), Max{}, words.as<int>())) {
        const Rows rows{q_ptr + batch * stride_q.b + static_cast<i64>(head) * group * stride_q.h + first_row * stride_q.n,
                        stride_q.h, stride_q.n, stride_q.d, group, means, rows_of_mean, held, before, causal};
        const Element* k_head = k_ptr + batch * stride_k.b + head / kv_group * stride_k.h;
        const bool whole = rows.count() <= BLOCK_R;
        if (whole) rows.fetch(tile, limits, 0);
#pragma unroll 1
        for (int step = 0; step < steps; ++step) {
            int centre[2], number[2][2];
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                centre[half] = (left[half] + right[half]) / 2;
                number[0][half] = (left[half] + centre[half]) / 2;
                number[1][half] = (centre[half] + right[half]) / 2;
            }
            Keys keys[2];
#pragma unroll
            for (int side = 0; side < 2; ++side) keys[side].load(k_head, stride_k.n, stride_k.d, number[side], alive);
            float found[2][2] = {{-infinity(), -infinity()}, {-infinity(), -infinity()}};
            for (int from = 0; from < rows.count(); from += BLOCK_R) {
                if (!whole) {
                    __syncthreads();  // nobody reads the tile before
                    rows.fetch(tile, limits, from);
                }
                if (!whole || step == 0) {
                    wait_copies<0>();
                    __syncthreads();
                }
                if (busy) multiply(found, keys, number, tile, limits, least(rows.count() - from, BLOCK_R));
            }
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const float first = warp_reduce<4>(found[0][half], Max{});
                const float second = warp_reduce<4>(found[1][half], Max{});
                best[half] = most(best[half], most(first, second));
                // Where one key is left, both halves are that key, and the second one is the interval again.
                if (first > second) {
                    right[half] = centre[half];
                } else {
                    left[half] = centre[half];
                }
            }
        }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int slot = own + 8 * half;
        if (slot < reach && lane_id() == quarter) {
            store_global(scores_ptr + static_cast<i64>(searched) * candidates + slot,
                         alive[half] ? best[half] : -infinity());
        }
    }

    const u32 arriving = static_cast<u32>(shared * most(ceil_div(reach, BLOCK_C), 1));
    if (last_arriver(arrivals_ptr + list, arriving, words)) {
        const i64 stride_heads = static_cast<i64>(blocks) * candidates;
        const i64 first_head = static_cast<i64>(batch) * heads + head / shared * shared;
        const Choice choice{scores_ptr + first_head * stride_heads + static_cast<i64>(block) * candidates, stride_heads,
                            shared, reach, most_kept};
        const Scratch scratch{pool.as<u32>(), counts, words, words + 4};
        choose(choice, scratch, ids_ptr + list * most_kept, counts_ptr + list, number_of);
    }
}

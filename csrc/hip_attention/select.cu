// One stage of hierarchical selection (InfiniteHiP, Lee et al., 2025, arXiv:2502.08910, section 3) with mma.sync, the
// search and the choice in one launch.
//
// Each candidate, a chunk of 2^STEPS keys, keeps an interval [l, r), at first the part of it that may be selected from,
// and halves it STEPS times:
//
//     c = (l + r) // 2    a = (l + c) // 2    b = (c + r) // 2
//     s_a = max over rows of q . k_a          s_b likewise, a key counting only for rows whose limit it is within
//     s = max(s, s_a, s_b)                    [l, r) = [l, c) if s_a > s_b else [c, r)
//
// and s is its score. A warp has 16 candidates, the columns of two matrix instructions, and goes its own way: the two
// keys of a candidate are read by this warp alone, once, from global memory into the registers where the instructions
// want them (rows.cuh); through shared memory they would take a detour. The rows of queries lie in shared memory for
// all warps of the block; where BLOCK_R of them are not all, every step brings them tile by tile.
//
// Blocks count themselves in at their list. The last one takes the K best (choose.cuh), of the best score that any head
// gives where heads share the list. Nobody waits, and the counter is back at zero. Blocks past the last chunk that may
// be selected from, or past the end of the list that is divided, return at once and are not counted.
//
// FLOPs: 4 R D STEPS a candidate, for R rows (means of neighbouring queries of a group's heads). Bytes: 2 D STEPS
// elements of K for each candidate that is not empty; the rows of q once for every block (once in every step where they
// take several tiles); of the list that is divided 4 for each candidate and its count for every warp; 4 of score,
// written and read by the last block (written once more and read five times where candidates are too many for shared
// memory); the list, and its counter from every block.
//
// Constants: Element (fp16, bf16), HEAD_DIM, BLOCK_R, WHOLE (no list has more rows), WARPS, ALIGNED (16-byte rows of q
// and k).
#include "choose.cuh"
#include "rows.cuh"

constexpr int BLOCK_C = 16 * WARPS;
// Twelve warps an SM leave each thread 168 registers, of which keys of 128 columns take 64.
constexpr int RESIDENT = most((BLOCK_D <= 64 ? 16 : BLOCK_D <= 128 ? 12 : 8) / WARPS, 1);

struct Sizes {
    int heads, lists, blocks, tiles;
};

// Of what a thread block is a part.
struct Spot {
    int searched, first_slot;  // of [B, heads, Mq]; the first of its candidates
    int block, head, batch;
    i64 list;

    DEVICE Spot(int number, const Sizes& sizes) {
        searched = number / sizes.tiles, first_slot = number % sizes.tiles * BLOCK_C;
        block = searched % sizes.blocks, head = searched / sizes.blocks % sizes.heads;
        batch = searched / sizes.blocks / sizes.heads;
        list = static_cast<i64>(batch * sizes.lists + head / (sizes.heads / sizes.lists)) * sizes.blocks + block;
    }
};

extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT)
hip_attention_select_cuda_kernel(const Element* q_ptr,          // [B, Hq, Nq, D]
                                 const Element* k_ptr,          // [B, Hkv, N, D]
                                 const int* parents_ptr,        // [B, lists, Mq, slots] of the stage before, or null
                                 const int* parent_counts_ptr,  // [B, lists, Mq]
                                 float* scores_ptr,             // [B, heads, Mq, candidates]
                                 int* ids_ptr,                  // [B, lists, Mq, most]
                                 int* counts_ptr,               // [B, lists, Mq]
                                 u32* arrivals_ptr,             // [B * lists * Mq], all 0 before and after
                                 Strides stride_q, Strides stride_k,
                                 int heads,     // searched heads
                                 int lists,     // 1 where they share a list, else heads
                                 int group,     // query heads to a searched head
                                 int kv_group,  // searched heads to a key head
                                 int blocks,    // Mq
                                 int block_q, int means, int rows_of_mean, int q_len, int kv_len, int candidates,
                                 int slots, int most_kept, int sink, int window, int causal,
                                 int steps,         // log2 of a chunk
                                 int ratio_log2) {  // of the chunks that one of the stage before is divided into
    SharedMemory arena;
    constexpr int POOL = BLOCK_R * BLOCK_D * 2 > 4 * HELD ? BLOCK_R * BLOCK_D * 2 : 4 * HELD;
    const Shared<u8> pool = arena.take<u8>(POOL);  // rows of q, then orders
    const Shared<int> limits = arena.take<int>(BLOCK_R);
    const Shared<u32> counts = arena.take<u32>(DIGITS);
    const Shared<u32> words = arena.take<u32>(4 + 2 * WARPS);
    const Shared<Element> tile = pool.as<Element>();

    const Sizes sizes{heads, lists, blocks, ceil_div(candidates, BLOCK_C)};
    const Spot spot(static_cast<int>(blockIdx.x), sizes);
    const int first_row = spot.block * block_q, held = least(block_q, q_len - first_row);
    const int before = causal ? first_row - 1 + kv_len - q_len - window : kv_len - 1;
    const int end = causal ? least(most(before + held + 1, 0), kv_len) : kv_len;
    int reach = least(ceil_div(end, 1 << steps), candidates);
    if (parents_ptr) {
        const int listed = load_global_uniform(parent_counts_ptr + spot.list);
        reach = least(most(listed, 0), slots) << ratio_log2;
    }
    if (spot.first_slot >= most(reach, 1)) return;
    auto number_of = [&](i64 list, int slot) {
        if (!parents_ptr) return slot;
        const int part = slot & ((1 << ratio_log2) - 1);
        return (load_global(parents_ptr + list * slots + (slot >> ratio_log2)) << ratio_log2) + part;
    };

    // A lane has two candidates, and the other three of its column of the instruction have the same.
    const int own = spot.first_slot + 16 * warp_id() + lane_id() / 4, quarter = lane_id() / 4 * 4;
    int left[2], right[2];
    float best[2] = {-infinity(), -infinity()};
    bool alive[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int slot = own + 8 * half;
        const bool exists = slot < reach;
        int number = exists && lane_id() == quarter ? number_of(spot.list, slot) : 0;
        number = shuffle(number, quarter);
        left[half] = most(number << steps, sink);
        right[half] = least((number + 1) << steps, end);
        alive[half] = exists && left[half] < right[half];
    }
    const bool busy = any_lane(alive[0] || alive[1]);
    if (block_reduce<WARPS>(static_cast<int>(busy), Max{}, words.as<int>())) {
        const i64 first_head = static_cast<i64>(spot.head) * group;
        const Element* q = q_ptr + spot.batch * stride_q.b + first_head * stride_q.h + first_row * stride_q.n;
        const QueryRows rows{q, stride_q.h, stride_q.n, stride_q.d, group, means, rows_of_mean, held, before, causal};
        const Element* k_head = k_ptr + spot.batch * stride_k.b + spot.head / kv_group * stride_k.h;
        const int least_limit = rows.least_limit();
        if (WHOLE) {
            rows.fetch(tile, limits, 0);
            __syncthreads();
        }
#pragma unroll 1
        for (int step = WHOLE && !busy ? steps : 0; step < steps; ++step) {
            int centre[2], number[2][2];
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                centre[half] = (left[half] + right[half]) >> 1;
                number[0][half] = (left[half] + centre[half]) >> 1;
                number[1][half] = (centre[half] + right[half]) >> 1;
            }
            // No key of the warp is past the limit of any row.
            const bool clear =
                every_lane((!alive[0] || number[1][0] <= least_limit) && (!alive[1] || number[1][1] <= least_limit));
            Keys keys[2];
#pragma unroll
            for (int side = 0; side < 2; ++side) keys[side].load(k_head, stride_k.n, stride_k.d, number[side], alive);
            Found found;
#pragma unroll
            for (int i = 0; i < 8; ++i) found.at[i / 4][i / 2 % 2][i % 2] = -infinity();
            for (int from = 0; from < rows.count(); from += BLOCK_R) {
                if (!WHOLE) {
                    __syncthreads();  // nobody reads the tile before
                    rows.fetch(tile, limits, from);
                    __syncthreads();
                }
                if (busy) multiply(found, keys, number, clear, tile, limits, least(rows.count() - from, BLOCK_R));
            }
            float reached[2][2];
            reduce(reached, found);
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const float first = reached[0][half], second = reached[1][half];
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
    // Where this block stands is found again, and does not wait in registers for the search to end.
    const Spot here(afresh(static_cast<int>(blockIdx.x)), sizes);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int slot = here.first_slot + 16 * warp_id() + lane_id() / 4 + 8 * half;
        if (slot < reach && lane_id() % 4 == 0) {
            store_global(scores_ptr + static_cast<i64>(here.searched) * candidates + slot,
                         alive[half] ? best[half] : -infinity());
        }
    }

    const int shared = heads / lists;  // heads that share the list
    const u32 arriving = static_cast<u32>(shared * most(ceil_div(reach, BLOCK_C), 1));
    if (last_arriver(arrivals_ptr + here.list, arriving, words)) {
        const i64 stride_heads = static_cast<i64>(blocks) * candidates;
        const i64 first_head = static_cast<i64>(here.batch) * heads + here.head / shared * shared;
        const Choice choice{scores_ptr + first_head * stride_heads + static_cast<i64>(here.block) * candidates,
                            stride_heads, shared, reach, most_kept};
        const Scratch scratch{pool.as<u32>(), counts, words, words + 4};
        choose(choice, scratch, ids_ptr + here.list * most_kept, counts_ptr + here.list,
               [&](int slot) { return number_of(here.list, slot); });
    }
}

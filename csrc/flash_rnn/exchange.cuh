// How the blocks and warps of a head hand one another the operand of the next product: COUNT tiles [TILE, PADDED].
//
// One block: two buffers in shared memory, of which one is read while the other is written, and one __syncthreads a
// turn. Several blocks, of a cooperative launch: each writes its units to global memory, they wait for one another at a
// counter that only the blocks of this head and these sequences share, and each reads all of it. There, too, are two
// buffers: whoever writes one again has passed the barrier after the other, so all have read it.
#pragma once
#include "common/barriers.cuh"
#include "product.cuh"

template <int COUNT>
struct Exchange {
    static constexpr int SIZE = COUNT * OPERAND_TILE;
    static constexpr int CHUNK = 16 / sizeof(Element);

    Shared<Element> tiles;
    Element* global;
    u32* arrived;
    u32 passed = 0;

    // `exchange_ptr` [groups, 2, COUNT, TILE, PADDED] and `arrived_ptr` [groups], zero, are null where BLOCKS is 1.
    DEVICE Exchange(SharedMemory& arena, Element* exchange_ptr, u32* arrived_ptr)
        : tiles(arena.take<Element>(BLOCKS == 1 ? 2 * SIZE : SIZE)), global(exchange_ptr), arrived(arrived_ptr) {
        if constexpr (BLOCKS > 1) {
            global += static_cast<i64>(blockIdx.x / BLOCKS) * 2 * COUNT * TILE * PADDED;
            arrived += blockIdx.x / BLOCKS;
        }
    }

    DEVICE Shared<Element> operand(int turn) const { return BLOCKS == 1 ? tiles + turn % 2 * SIZE : tiles; }

    // This lane's part of tile c of a turn.
    DEVICE void put(int turn, int c, const Quad (&x)[SEQ_TILES], const Place& at) const {
#pragma unroll
        for (int t = 0; t < SEQ_TILES; ++t)
#pragma unroll
            for (int s = 0; s < 2; ++s) {
                auto pair = paired<Element>(x[t][s]);
                using Pair = decltype(pair);
                if constexpr (BLOCKS == 1) {
                    const int row = c * TILE + at.sequence(t, s);
                    store_shared((operand(turn) + (row * OPERAND_ROW + at.unit)).template as<Pair>(), pair);
                } else {
                    const int row = (turn % 2 * COUNT + c) * TILE + at.sequence(t, s);
                    store_global(reinterpret_cast<Pair*>(global + row * PADDED + at.unit), pair);
                }
            }
    }

    // All parts of the turn's operand are there when this returns, and all threads of the block have come by.
    DEVICE void pass(int turn) {
        if constexpr (BLOCKS == 1) {
            __syncthreads();
        } else {
            blocks_wait(arrived, BLOCKS, passed);
            for (int chunk = threadIdx.x; chunk < COUNT * TILE * PADDED / CHUNK; chunk += THREADS) {
                const int row = chunk / (PADDED / CHUNK), column = chunk % (PADDED / CHUNK) * CHUNK;
                store_shared_vector<CHUNK>(
                    tiles + (row * OPERAND_ROW + column),
                    load_global_coherent<CHUNK>(global + (turn % 2 * COUNT * TILE + row) * PADDED + column));
            }
            __syncthreads();
        }
    }
};

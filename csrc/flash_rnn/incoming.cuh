// What the recurrent kernels read at every step, fetched while the steps before it run.
#pragma once
#include "common/async_copy.cuh"
#include "places.cuh"

constexpr int AHEAD = VECTORS ? STAGES - 1 : 1;

// COUNT tiles [TILE, UNITS] a step of a tensor, from step `origin` on, `direction` (1 or -1) at a time. Rows of 16
// bytes come by cp.async into STAGES slots of shared memory, STAGES - 1 steps ahead; others into registers, one step
// ahead. Steps before 0, steps at the end of a sequence and beyond, and units of padding are zeros.
template <class T, int COUNT>
struct Incoming {
    static constexpr int CHUNK = 16 / sizeof(T);
    static constexpr int ROW = UNITS + CHUNK;  // rows lie in different banks
    static constexpr int CHUNKS = COUNT * TILE * UNITS / CHUNK;
    static constexpr int EACH = VECTORS ? most(ceil_div(CHUNKS, THREADS), 1) : 1;
    static constexpr int SIZE = most(COUNT, 1) * TILE * ROW;

    const T* base;
    Shared<T> slots;
    i64 stride;
    int origin, direction;
    // cp.async: the chunks of this thread.
    const T* from[EACH];
    int until[EACH];
    // Registers: the lane's own elements.
    T ahead[most(COUNT, 1)][SEQ_TILES][2][2];
    const T* own;
    Steps strides;
    int ends[SEQ_TILES][2];

    DEVICE Incoming(SharedMemory& arena, const T* ptr, const Steps& steps, const Place& at, const Lengths& lengths,
                    int origin, int direction)
        : base(ptr), stride(steps.n), origin(origin), direction(direction) {
        if constexpr (COUNT > 0 && VECTORS) {
            slots = arena.take<T>(STAGES * SIZE);
#pragma unroll
            for (int e = 0; e < EACH; ++e) {
                const int chunk = threadIdx.x + e * THREADS;
                const int unit = at.part * UNITS + chunk % (UNITS / CHUNK) * CHUNK;
                const int row = chunk / (UNITS / CHUNK), x = row / TILE;
                until[e] = inside(unit) && chunk < CHUNKS ? lengths.of(row % TILE) : 0;
                from[e] = ptr + (at.first + row % TILE) * steps.b + x * steps.x + at.head * steps.h + unit;
            }
        } else if constexpr (COUNT > 0) {
            strides = steps;
            own = ptr + (at.first + at.column) * steps.b + at.head * steps.h + at.unit * steps.d;
            load_ends(ends, lengths, at);
        }
    }

    // x = the tiles of this turn, as far as they are the lane's. Registers then take those of the next turn.
    DEVICE void read(Quad (*x)[SEQ_TILES], int turn, const Place& at) {
        if constexpr (COUNT > 0) {
#pragma unroll
            for (int c = 0; c < COUNT; ++c)
#pragma unroll
                for (int t = 0; t < SEQ_TILES; ++t)
#pragma unroll
                    for (int s = 0; s < 2; ++s) {
                        if constexpr (VECTORS) {
                            const Vector<T, 2> pair = load_shared_vector<2>(
                                slots + (turn % STAGES * SIZE + (c * TILE + at.sequence(t, s)) * ROW + at.row()));
                            x[c][t][s][0] = float(pair.at[0]), x[c][t][s][1] = float(pair.at[1]);
                        } else {
                            x[c][t][s][0] = float(ahead[c][t][s][0]), x[c][t][s][1] = float(ahead[c][t][s][1]);
                        }
                    }
            if constexpr (!VECTORS) request(turn + 1, at);
        }
    }

    // Asks for the tiles of a turn: of the first AHEAD before the loop, and where they come by cp.async, in the loop
    // for those of the turn that is AHEAD of it. The caller commits.
    DEVICE void request(int turn, const Place& at) {
        const int step = origin + direction * turn;
        if constexpr (COUNT > 0 && VECTORS) {
#pragma unroll
            for (int e = 0; e < EACH; ++e) {
                const int chunk = threadIdx.x + e * THREADS;
                if (CHUNKS % THREADS != 0 && chunk >= CHUNKS) break;
                const bool exists = step >= 0 && step < until[e];
                copy_async(
                    slots + (turn % STAGES * SIZE + chunk / (UNITS / CHUNK) * ROW + chunk % (UNITS / CHUNK) * CHUNK),
                    exists ? from[e] + step * stride : base, exists);
            }
        } else if constexpr (COUNT > 0) {
#pragma unroll
            for (int c = 0; c < COUNT; ++c)
#pragma unroll
                for (int t = 0; t < SEQ_TILES; ++t)
#pragma unroll
                    for (int s = 0; s < 2; ++s)
#pragma unroll
                        for (int u = 0; u < 2; ++u) {
                            const bool exists = step >= 0 && step < ends[t][s] && inside(at.unit + u) && at.leads();
                            ahead[c][t][s][u] = exists ? load_global(own + step * stride + c * strides.x +
                                                                     (8 * t + s) * strides.b + u * strides.d)
                                                       : T(0.0f);
                        }
        }
    }
};

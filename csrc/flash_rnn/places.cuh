// Who does what in the recurrent kernels, and how the tensors of a step come and go.
//
// A head belongs to a group of BLOCKS thread blocks, each with UNITS of its units and TILE sequences. A matrix
// instruction makes 16 rows by 8 sequences; rows are units, in the order that gives a lane two neighbours:
//
//     row group -> unit 2 group,   row group + 8 -> unit 2 group + 1       (group = lane / 4, pair = lane % 4)
//
// so a lane holds units 2 group and 2 group + 1 of sequences 2 pair and 2 pair + 1, for all gates: what a cell needs of
// a unit is in the registers of one lane, and lies in memory as pairs. A quad is those four numbers, by sequence, then
// unit. SPLIT warps share the 16 units and divide the columns of the product between them; the first does the rest.
//
// Constants: Element (fp16, bf16, float), Cell, WIDTH (D), UNITS (a multiple of 16), BLOCKS, TILE (a multiple of 8),
// SPLIT, HELD (product.cuh), STAGES (2 or more), VECTORS (all rows of memory are whole, aligned 16 bytes), PRECISE.
#pragma once
#include "common/barriers.cuh"
#include "common/numbers.cuh"

constexpr int GATES = Cell::GATES, APART = Cell::APART, STATES = Cell::STATES;
constexpr int VALUES = GATES + APART, JOINED = GATES - APART, OTHERS = STATES - 1;
template <bool EXACT>
struct KeptAs {
    using Type = Element;
};
template <>
struct KeptAs<true> {
    using Type = float;
};
using Kept = KeptAs<Cell::EXACT>::Type;  // a value, from the forward pass to the backward

constexpr int PADDED = UNITS * BLOCKS;  // the width of a head in whole instructions
constexpr int UNIT_TILES = UNITS / 16;
constexpr int THREADS = WARP * UNIT_TILES * SPLIT;
constexpr int SEQ_TILES = TILE / 8;

struct Steps {  // of a [B, N, X, H, D] tensor; x is 0 where there is no such dimension
    i64 b, n, x, h, d;
};
struct Matrices {  // of the recurrent matrices [G, H, D, D]
    i64 g, h, o, i;
};

// Whether a unit of the padded width is one of the head's.
DEVICE bool inside(int unit) { return WIDTH == PADDED || unit < WIDTH; }

using Quad = float[2][2];  // [sequence][unit]

struct Place {
    int head, part;  // which head, and which part of it
    int first;       // sequence of the batch
    int unit;        // of the head: this lane's first
    int split;       // which share of the columns this warp has
    int column;      // this lane's first sequence within the tile, of the first 8

    DEVICE Place(int heads) {
        const int block = blockIdx.x / BLOCKS;
        part = blockIdx.x % BLOCKS;
        head = block % heads;
        first = block / heads * TILE;
        unit = part * UNITS + warp_id() / SPLIT * 16 + lane_id() / 4 * 2;
        split = warp_id() % SPLIT;
        column = lane_id() % 4 * 2;
    }

    // The first of the lane's units within the block.
    DEVICE int row() const { return unit - part * UNITS; }
    // Sequence s of the lane's two in tile t of 8, within the block's tile.
    DEVICE int sequence(int t, int s) const { return 8 * t + column + s; }
    // Whether this warp does pointwise work.
    DEVICE bool leads() const { return SPLIT == 1 || split == 0; }
};

// The steps of the tile's sequences, in shared memory: between 0 and N whatever the tensor says; N without a tensor, 0
// beyond the batch.
struct Lengths {
    Shared<int> steps;

    DEVICE Lengths(SharedMemory& arena, const int* lengths_ptr, const Place& at, int batch, int length)
        : steps(arena.take<int>(TILE)) {
        for (int s = threadIdx.x; s < TILE; s += THREADS) {
            const int sequence = at.first + s;
            int found = sequence < batch ? length : 0;
            if (sequence < batch && lengths_ptr != nullptr)
                found = least(most(load_global(lengths_ptr + sequence), 0), length);
            store_shared(steps + s, found);
        }
        __syncthreads();
    }

    DEVICE int of(int sequence) const { return load_shared(steps + sequence); }

    // What the block walks.
    DEVICE int longest() const {
        int found = 0;
        for (int s = 0; s < TILE; ++s) found = most(found, of(s));
        return found;
    }
};

// The steps of the lane's sequences.
DEVICE void load_ends(int (&ends)[SEQ_TILES][2], const Lengths& lengths, const Place& at) {
#pragma unroll
    for (int t = 0; t < SEQ_TILES; ++t)
#pragma unroll
        for (int s = 0; s < 2; ++s) ends[t][s] = lengths.of(at.sequence(t, s));
}

// ---- pairs: two neighbouring units --------------------

// As one access: of one register where they are 16-bit numbers.
template <class T>
DEVICE auto paired(const float (&x)[2]) {
    if constexpr (sizeof(T) == 2) {
        return pack<T>(x[0], x[1]);
    } else {
        return Vector<T, 2>{{x[0], x[1]}};
    }
}

template <class T>
DEVICE void store_pair(T* p, const float (&x)[2], i64 stride, int unit) {
    if constexpr (VECTORS) {
        auto pair = paired<T>(x);
        if (inside(unit)) store_global(reinterpret_cast<decltype(pair)*>(p), pair);
    } else {
        if (inside(unit)) store_global(p, T(x[0]));
        if (inside(unit + 1)) store_global(p + stride, T(x[1]));
    }
}

template <bool WHOLE, class T>
DEVICE void load_pair(float (&x)[2], const T* p, i64 stride, int unit, bool exists) {
    x[0] = x[1] = 0.0f;
    if constexpr (WHOLE) {
        if (exists && inside(unit)) {
            const Vector<T, 2> pair = load_global_vector<2>(p);
            x[0] = float(pair.at[0]), x[1] = float(pair.at[1]);
        }
    } else {
        if (exists && inside(unit)) x[0] = float(load_global(p));
        if (exists && inside(unit + 1)) x[1] = float(load_global(p + stride));
    }
}

// The bias of the block's units, of a contiguous [G, H, D], in shared memory; zeros without a pointer. A barrier comes
// before it is read.
struct Bias {
    Shared<float> pairs;

    DEVICE Bias(SharedMemory& arena, const Element* ptr, const Place& at, int heads)
        : pairs(arena.take<float>(GATES * UNITS)) {
        for (int e = threadIdx.x; e < GATES * UNITS; e += THREADS) {
            const int g = e / UNITS, unit = at.part * UNITS + e % UNITS;
            const bool exists = ptr != nullptr && inside(unit);
            store_shared(pairs + e, exists ? float(load_global(ptr + (g * heads + at.head) * WIDTH + unit)) : 0.0f);
        }
    }

    // Of gate g, for the lane's units.
    DEVICE Vector<float, 2> of(int g, const Place& at) const {
        return load_shared_vector<2>(pairs + (g * UNITS + at.row()));
    }
};

// ---- states: contiguous float32 [S, B, H, D] --------------------

DEVICE i64 state_offset(const Place& at, int state, int sequence, int batch, int heads) {
    return ((static_cast<i64>(state) * batch + sequence) * heads + at.head) * WIDTH + at.unit;
}

// States FROM and later; zeros without a pointer.
template <int FROM>
DEVICE void load_states(Quad (&states)[STATES][SEQ_TILES], const float* ptr, const Place& at, int batch, int heads) {
#pragma unroll
    for (int t = 0; t < SEQ_TILES; ++t) {
#pragma unroll
        for (int s = 0; s < 2; ++s) {
            const int sequence = at.first + at.sequence(t, s);
#pragma unroll
            for (int x = 0; x < STATES; ++x) {
                const bool exists = x >= FROM && ptr != nullptr && sequence < batch;
                load_pair<false>(states[x][t][s], exists ? ptr + state_offset(at, x, sequence, batch, heads) : ptr, 1,
                                 at.unit, exists);
            }
        }
    }
}

DEVICE void store_states(float* ptr, const Quad (&states)[STATES][SEQ_TILES], const Place& at, int batch, int heads) {
#pragma unroll
    for (int t = 0; t < SEQ_TILES; ++t) {
#pragma unroll
        for (int s = 0; s < 2; ++s) {
            const int sequence = at.first + at.sequence(t, s);
            if (sequence >= batch) continue;
#pragma unroll
            for (int x = 0; x < STATES; ++x)
                store_pair(ptr + state_offset(at, x, sequence, batch, heads), states[x][t][s], 1, at.unit);
        }
    }
}

// ---- the tiles of one step --------------------

template <class T>
DEVICE i64 step_offset(const T*, const Steps& stride, const Place& at, int t, int s, int step) {
    return (at.first + at.sequence(t, s)) * stride.b + step * stride.n + at.head * stride.h + at.unit * stride.d;
}

// The first COUNT tiles of a step, in the sequences that have it.
template <int COUNT, class T>
DEVICE void store_step(T* ptr, const Steps& stride, Quad (*tiles)[SEQ_TILES], const int (&ends)[SEQ_TILES][2], int step,
                       const Place& at) {
#pragma unroll
    for (int t = 0; t < SEQ_TILES; ++t)
#pragma unroll
        for (int s = 0; s < 2; ++s) {
            if (step >= ends[t][s]) continue;
            T* p = ptr + step_offset(ptr, stride, at, t, s, step);
#pragma unroll
            for (int x = 0; x < COUNT; ++x) store_pair(p + x * stride.x, tiles[x][t][s], stride.d, at.unit);
        }
}

// Their reverse; zeros in the others.
template <int COUNT, class T>
DEVICE void load_step(Quad (*tiles)[SEQ_TILES], const T* ptr, const Steps& stride, const int (&ends)[SEQ_TILES][2],
                      int step, const Place& at) {
#pragma unroll
    for (int t = 0; t < SEQ_TILES; ++t)
#pragma unroll
        for (int s = 0; s < 2; ++s) {
            const bool exists = step >= 0 && step < ends[t][s] && at.leads();
            const T* p = exists ? ptr + step_offset(ptr, stride, at, t, s, step) : ptr;
#pragma unroll
            for (int x = 0; x < COUNT; ++x)
                load_pair<VECTORS>(tiles[x][t][s], exists ? p + x * stride.x : p, stride.d, at.unit, exists);
        }
}

// The convolution of one block of a pair of sequences, which both kernels are made of:
//
//     w = inverse(K * forward((2^-e0 v0) + i (2^-e1 v1))),     v0 * k = 2^e0 Re w,   v1 * k = 2^e1 Im w
//
// or with conj(K), the convolution with the filter reversed in time, which is the adjoint.
#pragma once
#include "signal.cuh"

// The power of two nearest 1 / sqrt(M) from above, half of 1 / M, applied between the two transforms. Scaled numbers
// are below 2, those of the filter's spectrum below 1, so nothing in fp16 overflows: stages 1 and 2 forward give at
// most 2 sqrt(2) N1 R; by Parseval's equation the input of the transform back has the energy 2^5 M at most, with which
// stages 3 and 2 back give sqrt(2^5 M) R, 2^15 for the longest.
constexpr float middle() {
    float power = 1.0f;
    while (power * power * (POINTS / 4) >= 1.0f) power *= 0.5f;
    return power;
}
constexpr float MIDDLE = middle();

// What a thread block has at hand.
struct Chip {
    Planes planes;           // [N1][R R]
    RootTable<N1> first;     // F of stage 1
    RootTable<R> second;     // F of stages 2 and 3
    Shared<u32> inner;       // the factors between them
    Shared<int> scratch;     // [4 WARPS]

    DEVICE Chip(SharedMemory& arena) {
        planes = {arena.take<fp16>(POINTS), arena.take<fp16>(POINTS)};
        first.table = arena.take<u32>(RootTable<N1>::ENTRIES);
        second.table = arena.take<u32>(RootTable<R>::ENTRIES);
        inner = arena.take<u32>(4 * QUADS);
        scratch = arena.take<int>(4 * WARPS);
        first.make();
        second.make();
        make_inner_twiddles(inner);
    }
};

// Where a block of positions lies in its sequences.
struct Place {
    int start;  // the time of position 0
    int seqlen;
    int stop[2];  // where each member ends: 0 for one that does not exist
};

// What a thread block does at one time: a block of positions of a pair of sequences of one head, or of a single one.
// Found anew for each, rather than kept in registers from one to the next.
struct Unit {
    int head, first, now;  // first sequence of the batch; the time of the first result
    bool exists, two;

    // The `turn`-th of the thread block's `units`.
    DEVICE Unit(int turn, int units, int batch, int heads, int members, int chunks, int step) {
        const int block = afresh(static_cast<int>(blockIdx.x)), pairs = ceil_div(batch, members);
        const int number = block / heads * units + turn;
        head = block % heads;
        first = number % pairs * members;
        now = number / pairs * step;
        exists = turn < units && number < pairs * chunks;
        two = members == 2 && first + 1 < batch;
    }

    // The member's sequence; the first for one that does not exist.
    DEVICE int sequence(int member) const { return afresh(two ? first + member : first); }

    DEVICE Place place(int start, int seqlen) const { return {start, seqlen, {seqlen, two ? seqlen : 0}}; }
};

// The filters: fp16 pairs of their frequencies, in the order of the lanes, and what they were divided by.
struct Filters {
    const u32* spectrum;  // [H, M]
    const float* scale;   // [H]
};

// u pre of a sequence, with the state before it or its own end.
struct Inputs {
    const Element *u, *pre;
    const float* state;
    RowStrides stride_u, stride_pre;
    int heads, past;
    bool periodic;

    DEVICE Source of(int b, int head) const {
        const i64 row = static_cast<i64>(b) * heads + head;
        return {row_of(u, stride_u, b, head), row_of(pre, stride_pre, b, head), 0,
                state == nullptr ? state : state + row * past, past, periodic, false};
    }
};

// The product with the filter, of the frequencies of one k1, in place. `sign` is -1 for its conjugate.
DEVICE void filter(Square& z, const u32* spectrum, float sign, const Roots& f, Here at = HERE) {
#pragma unroll
    for (int m = 0; m < BLOCKS; ++m) {
        Square p;
#pragma unroll
        for (int tile = 0; tile < TILES; ++tile) {
            const Vector<u32, 4> k = load_global_vector<4>(spectrum + 4 * ((m * TILES + tile) * WARP + lane_id()), at);
            const Sums x = stage3(z, m, tile, f, at);
            Complex y[4];
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                const Complex factor = {low_of<fp16>(k.at[e]) * MIDDLE, high_of<fp16>(k.at[e]) * (MIDDLE * sign)};
                y[e] = Complex{x.r[e], x.i[e]} * factor;
            }
            const u32 re[2] = {pack<fp16>(y[0].r, y[1].r), pack<fp16>(y[2].r, y[3].r)};
            const u32 im[2] = {pack<fp16>(y[0].i, y[1].i), pack<fp16>(y[2].i, y[3].i)};
            p.set(m, tile, re, im);
        }
#pragma unroll
        for (int k = 0; k < BLOCKS; ++k) {
#pragma unroll
            for (int q = 0; q < 4; ++q) {
                z.r[m][k][q] = p.r[m][k][q];
                z.i[m][k][q] = p.i[m][k][q];
            }
        }
    }
}

// By what the two members of what `convolve` left in the planes are to be multiplied.
struct Undo {
    float r, i;
};

// One block, up to stage 1 back, which the caller has to do (back_to_signal). `sign` is -1 for the filter's conjugate.
// Three barriers, the last at the end.
template <class Sources>
DEVICE Undo convolve(const Chip& chip, const Sources& source_of, const Place& place, const Filters& filters, int head,
                     float sign, Here at = HERE) {
    Exponents e = {-127, -127};
    {
        Signal<SLABS> z;
        load_pair(z, source_of, place.start, place.seqlen, place.stop, 0, at);
        include(e, z);
        e = largest(e, chip.scratch, at);
        rescale(z, e);
        stage1<0, N1>(chip.planes, z, 0, chip.first, at);
    }
    block_sync(at);
    const Roots f(chip.second, at);
    const u32* spectrum = filters.spectrum + static_cast<i64>(head) * POINTS;
#pragma unroll 1
    for (int k1 = warp_id(); k1 < N1; k1 += WARPS) {
        Square z;
        stage2(z, chip.planes, k1, f, chip.inner, at);
        __syncwarp();
        filter(z, spectrum + k1 * COLUMNS, sign, f, at);
        back_to_stage1(chip.planes, k1, z, f, chip.inner, at);
    }
    const float undo = load_global_uniform(filters.scale + head, at) * (1.0f / (MIDDLE * POINTS));
    block_sync(at);
    return {undo * scale_back(e.r), undo * scale_back(e.i)};
}

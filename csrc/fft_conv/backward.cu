// The backward kernel of fft_conv: every gradient in one launch, block by block of forward.cu.
//
// With v = pre u, g = post dy of the positions that a block makes (`now`), and of those after them (`rest`),
//
//     G = forward(g_now),  V = forward(v)
//     dK += G conj(V)                                  float32, summed in the order of the blocks
//     dv = inverse(conj(K) forward(g_now + g_rest))    du = pre dv,  dpre = u dv
//     w  = inverse(K V)                                dpost = dy w
//
// dv is the same convolution run backwards in time, on blocks that begin where the results of forward.cu's begin: those
// make the first `step` positions and look at the ones behind. A block with HALF reaches nothing behind it and is its
// own.
//
// Three passes over a block, then, of which the second and the third are the forward kernel's; what a later one reads
// again the caches have. dK needs two transforms at once, so it is made in two rounds, of the lower and of the upper
// half of k1, after the largest elements were found: each has room for both, and shared memory is that of the forward
// kernel.
//
// Scaling: a member of a pair is scaled by itself, as in the forward pass. But in dK the members are added up, so there
// v is scaled to the same product with g for both, that of the larger one; the smaller has less to add.
//
// Every thread block keeps its own sum of dK in global memory: a lane reads and writes what it alone has written, 8 M
// bytes, which stay in the second-level cache. PyTorch adds those of a head and brings them back to taps. No atomics:
// the bits are the same on every run. The first unit of a thread block writes without reading.
//
// Bytes that a unit asks for: u, pre, dy and post three times for dK; dy and post, then u and pre where gates need
// them, for dv; u and pre, then dy, for dpost; du, dpre, dpost; the spectrum once for dv and once for dpost; the sum.
// FLOPs of a pair: 16 M (N1 + 2 R) each for dv and dpost, 16 M (N1 + 2 R) for the two transforms of dK.
//
// Constants: Element (fp16, bf16), N1, R, WARPS, HALF, ALIGNED.
#include "convolve.cuh"

constexpr int ROUND = N1 / 2;

// What scales dK.
struct Scales {
    Exponents g;
    int product;
};

// What scales dK of one block. `source(which, member)` is g (0) or v (1).
template <class Sources>
DEVICE Scales scales_of(const Chip& chip, const Sources& source, const Place& place, Here at = HERE) {
    Scales scales = {};
#pragma unroll 1
    for (int which = 0; which < 2; ++which) {
        Exponents e = {-127, -127};
#pragma unroll 1
        for (int slab = 0; slab < SLABS; ++slab) {
            Signal<1> z;
            load_pair(z, [&](int member) { return source(which, member); }, place.start, place.seqlen, place.stop, slab,
                      at);
            include(e, z);
        }
        e = largest(e, chip.scratch + which * 2 * WARPS, at);
        if (which == 0) {
            scales.g = e;
        } else {
            scales.product = most(scales.g.r + e.r, scales.g.i + e.i);
        }
    }
    return scales;
}

// dK of ROUND rows k1 from `first` on, 0 or ROUND.
template <class Sources>
DEVICE void add_rows(int first, const Chip& chip, const Sources& source, const Place& place, const Scales& scales,
                     float* sums, bool fresh, Here at = HERE) {
    const Planes of_g = {chip.planes.r, chip.planes.r + ROUND * COLUMNS};
    const Planes of_v = {chip.planes.i, chip.planes.i + ROUND * COLUMNS};
#pragma unroll 1
    for (int which = 0; which < 2; ++which) {
        const bool is_g = which == 0;
        const Exponents e = {is_g ? scales.g.r : scales.product - scales.g.r,
                             is_g ? scales.g.i : scales.product - scales.g.i};
        const Planes planes = {is_g ? of_g.r : of_v.r, is_g ? of_g.i : of_v.i};
#pragma unroll 1
        for (int slab = 0; slab < SLABS; ++slab) {
            Signal<1> z;
            load_pair(z, [&](int member) { return source(which, member); }, place.start, place.seqlen, place.stop, slab,
                      at);
            rescale(z, e);
            if (first == 0) {
                stage1<0, ROUND>(planes, z, slab, chip.first, at);
            } else {
                stage1<ROUND, ROUND>(planes, z, slab, chip.first, at);
            }
        }
    }
    block_sync(at);
    const Roots f(chip.second, at);
#pragma unroll 1
    for (int row = warp_id(); row < ROUND; row += WARPS) {
        Square g, v;
        stage2(g, of_g, row, f, chip.inner, at);
        const float factor = power_of_two(afresh(scales.product));
        __syncwarp();  // one transform after the other: both under way are too many registers, as are sums below
        stage2(v, of_v, row, f, chip.inner, at);
        float* of_row = sums + 2 * (first + row) * COLUMNS + 8 * afresh(lane_id());
#pragma unroll
        for (int m = 0; m < BLOCKS; ++m) {
            __syncwarp();  // the sums of one block after those of another
#pragma unroll
            for (int tile = 0; tile < TILES; ++tile) {
                const Sums a = stage3(g, m, tile, f, at);
                const Sums b = stage3(v, m, tile, f, at);
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    float* to = of_row + 8 * WARP * (m * TILES + tile) + 4 * half;
                    Vector<float, 4> sum = {};
                    if (!fresh) sum = load_global_vector<4>(to, at);
#pragma unroll
                    for (int e = 0; e < 2; ++e) {
                        const Complex x = {a.r[2 * half + e], a.i[2 * half + e]};
                        const Complex y = {b.r[2 * half + e], b.i[2 * half + e]}, product = x * conj(y);
                        sum.at[2 * e] += product.r * factor;
                        sum.at[2 * e + 1] += product.i * factor;
                    }
                    store_global_vector(to, sum, at);
                }
            }
        }
    }
    block_sync(at);
}

// Of the shortest transforms a compiler would rather have three blocks on a multiprocessor, and spill for it.
extern "C" __global__ void __launch_bounds__(THREADS, POINTS == 4096 ? 2 : 0)
fft_conv_bwd_kernel(const Element* dy_ptr,    // [B, H, N]
                    const Element* u_ptr,     // [B, H, N]
                    const Element* pre_ptr,   // [B, H, N] or null
                    const Element* post_ptr,  // [B, H, N] or null
                    const float* state_ptr,   // [B, H, past] or null
                    const u32* spectrum_ptr,  // [H, M] pairs of fp16, in the order of the lanes
                    const float* scale_ptr,   // [H], what the spectrum was divided by
                    Element* du_ptr,          // [B, H, N] contiguous, or null; so are dpre and dpost
                    Element* dpre_ptr, Element* dpost_ptr,
                    float* dk_ptr,  // [parts, H, M, 2], the sums of each thread block, or null
                    RowStrides stride_dy, RowStrides stride_u, RowStrides stride_pre, RowStrides stride_post,
                    int batch, int heads, int seqlen,
                    int past,      // steps of the state
                    int lead,      // positions before a block's first result
                    int step,      // results of a block
                    int chunks,    // blocks of a sequence
                    int units,     // blocks of pairs to a thread block
                    int members,   // sequences to a transform, 1 or 2
                    int periodic) {  // before time 0 lies the end
    SharedMemory arena;
    const Chip chip(arena);
    const Inputs inputs{u_ptr, pre_ptr, state_ptr, stride_u, stride_pre, heads, past, periodic != 0};

#pragma unroll 1
    for (int turn = 0;; ++turn) {
        const Unit unit(turn, units, batch, heads, members, chunks, step);
        if (!unit.exists) break;
        const int head = unit.head, now = unit.now;
        const auto input = [&](int member) { return inputs.of(unit.sequence(member), head); };
        const auto gradient = [&](int member, int first, bool after) -> Source {
            const int b = unit.sequence(member);
            return {row_of(dy_ptr, stride_dy, b, head), row_of(post_ptr, stride_post, b, head), first, nullptr, 0,
                    false, after};
        };
        if (dk_ptr != nullptr) {
            const auto either = [&](int which, int member) {
                return which == 0 ? gradient(member, now, false) : input(member);
            };
            const Place place = unit.place(now - lead, seqlen);
            float* sums = dk_ptr + static_cast<i64>(blockIdx.x) * (2 * POINTS);
            const Scales scales = scales_of(chip, either, place);
#pragma unroll 1
            for (int first = 0; first < N1; first += ROUND) {
                add_rows(first, chip, either, place, scales, sums, turn == 0);
            }
        }
#pragma unroll 1
        for (int pass = 0; pass < 2; ++pass) {
            const bool of_v = pass == 0;
            if (of_v ? du_ptr == nullptr && dpre_ptr == nullptr : dpost_ptr == nullptr) continue;
            const int start = of_v && !HALF ? now : now - lead;
            const auto source_of = [&](int member) {
                return of_v ? gradient(member, 0, periodic != 0) : input(member);
            };
            const float sign = of_v ? -1.0f : 1.0f;
            const Undo undo = convolve(chip, source_of, unit.place(start, seqlen), {spectrum_ptr, scale_ptr}, head,
                                       sign);

            const int b = afresh(unit.first), stop = least(seqlen, now + step);
            const auto store = [&](int member, int time, const Values& w, Element* y, const Element* gate,
                                   RowStrides strides) {
                if (y == nullptr) return;
                Values product = w;
                if (gate != nullptr) {
                    const Values factor = load_times(row_of(gate, strides, b + member, head), time, now, stop);
#pragma unroll
                    for (int j = 0; j < 4; ++j) product.at[j] *= factor.at[j];
                }
                const i64 row = static_cast<i64>(b + member) * heads + head;
                store_times(y + row * seqlen, product, time, now, stop);
            };
            const auto finish = [&](int member, int time, Values& w, float factor) {
#pragma unroll
                for (int j = 0; j < 4; ++j) w.at[j] *= factor;
                if (of_v) {
                    store(member, time, w, du_ptr, pre_ptr, stride_pre);
                    store(member, time, w, dpre_ptr, u_ptr, stride_u);
                } else {
                    store(member, time, w, dpost_ptr, dy_ptr, stride_dy);
                }
            };
            back_to_signal(chip.planes, chip.first, [&](int position, Values re, Values im) {
                finish(0, start + position, re, undo.r);
                if (unit.two) finish(1, start + position, im, undo.i);
            });
        }
    }
}

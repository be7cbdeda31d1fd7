// Sequences, and stage 1 of their transforms, which reads them.
//
// A block of POINTS positions covers a piece of a sequence: position i is at the time `start + i`. Two sequences are
// the real and the imaginary part of one complex one. With HALF the first half of the positions is zeros: it is neither
// loaded nor multiplied (N1 = 32) nor stored.
//
// A warp owns SLABS times 32 columns. Its right operands come from memory as they are needed: column `group` of a tile
// is any column one likes, so lane (group, pair) loads the 4 neighbours at 4 (group / 2 + 4 (group % 2)) of each of its
// rows, one for each of 4 tiles, and finds its results, columns 2 pair + b, at 4 (pair + 4 b): 4 neighbours again. So
// 8 bytes are moved at a time, 64 in a line loaded, 32 in a line stored.
//
// Before numbers become fp16 they are scaled by powers of two: first each group of 16 that a thread holds, then, when
// the largest of the whole sequence is known, all to the same exponent. Both are exact.
//
// Constants: Element, HALF, ALIGNED (4 times from a multiple of 4 on are inside a sequence or outside it, and 8 aligned
// bytes of each tensor; there is no state); with those of transform.cuh.
#pragma once
#include "common/tensors.cuh"
#include "transform.cuh"

// Row (batch, head) of a tensor [B, H, N]; one of no tensor has no x.
struct Row {
    const Element* x;
    i64 stride;
};

DEVICE Row row_of(const Element* x, RowStrides strides, int batch, int head) {
    return {x == nullptr ? x : x + batch * strides.b + head * strides.h, strides.n};
}

struct Values {
    float at[4];
};

// x at 4 times from `time` on, of which those in [first, stop) count; 0 for the others.
DEVICE Values load_times(Row row, int time, int first, int stop, Here at = HERE) {
    Values v = {};
    if constexpr (ALIGNED) {
        if (time >= first && time < stop) {
            const Vector<Element, 4> x = load_global_vector<4>(row.x + time, at);
#pragma unroll
            for (int j = 0; j < 4; ++j) v.at[j] = float(x.at[j]);
        }
    } else {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            if (time + j >= first && time + j < stop) v.at[j] = float(load_global(row.x + (time + j) * row.stride, at));
        }
    }
    return v;
}

// y at the times in [first, stop) of 4 from `time` on. The row is contiguous, as the launcher allocated it.
DEVICE void store_times(Element* y, const Values& v, int time, int first, int stop, Here at = HERE) {
    if constexpr (ALIGNED) {
        if (time < first || time >= stop) return;
        Vector<Element, 4> x;
#pragma unroll
        for (int j = 0; j < 4; ++j) x.at[j] = Element(v.at[j]);
        store_global_vector(y + time, x, at);
    } else {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            if (time + j >= first && time + j < stop) store_global(y + time + j, Element(v.at[j]), at);
        }
    }
}

// x gate of one sequence from the time `first` on, with what lies before time 0 and after its end.
struct Source {
    Row x, gate;
    int first;
    const float* past;  // the last steps before time 0, or none
    int past_steps;
    bool before, after;  // time runs on at the other end: before 0, after the end

    DEVICE Values load(int time, int seqlen, int stop, Here at = HERE) const {
        Values v = {};
        if constexpr (ALIGNED) {
            if (before && time < 0) time += seqlen;
            if (after && time >= seqlen) time -= seqlen;
            v = load_times(x, time, first, stop, at);
            if (gate.x == nullptr) return v;
            const Values g = load_times(gate, time, first, stop, at);
#pragma unroll
            for (int j = 0; j < 4; ++j) v.at[j] *= g.at[j];
        } else {
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                int t = time + j;
                const bool in_past = past != nullptr && t < 0 && t >= -past_steps && stop > 0;
                if (in_past) v.at[j] = load_global(past + t + past_steps, at);
                if (before && t < 0) t += seqlen;
                if (after && t >= seqlen) t -= seqlen;
                if (t < first || t >= stop) continue;
                v.at[j] = float(load_global(x.x + t * x.stride, at));
                if (gate.x != nullptr) v.at[j] *= float(load_global(gate.x + t * gate.stride, at));
            }
        }
        return v;
    }
};

// ---- powers of two -------------------------------------------------------------------------------------------------

// 2^e, exact; e is clamped to the exponents of normal numbers.
DEVICE float power_of_two(int e) { return bits_as<float>(static_cast<u32>(least(most(e, -126), 127) + 127) << 23); }

// e such that |x| is in [2^e, 2^(e + 1)); -127 of zero.
DEVICE int exponent(float x) { return static_cast<int>(bits_as<u32>(x) >> 23 & 255) - 127; }

// 2^e, but 0 for what was scaled as zeros: of those nothing may be left but zeros.
DEVICE float scale_back(int e) { return e < -126 ? 0.0f : power_of_two(e); }

DEVICE u32 scaled(u32 pair, float factor) {
    return pack<fp16>(low_of<fp16>(pair) * factor, high_of<fp16>(pair) * factor);
}

// ---- stage 1 -------------------------------------------------------------------------------------------------------

constexpr int ROW_BLOCKS = N1 / 16;
constexpr int FIRST_BLOCK = HALF && N1 == 32 ? 1 : 0;  // of 16 rows n1, of which the first are zeros
constexpr int HELD = ROW_BLOCKS - FIRST_BLOCK;
constexpr int ZERO_ROWS = HALF ? N1 / 2 : 0;

DEVICE int first_column(int slab) { return 32 * (warp_id() + slab * WARPS); }

// What a lane holds of a pair of sequences, COUNT slabs: the right operands of stage 1, tile j of a slab in [..][j];
// and by what power of two each group is too small.
template <int COUNT>
struct Signal {
    u32 r[COUNT][HELD][4][2], i[COUNT][HELD][4][2];
    int er[COUNT][HELD], ei[COUNT][HELD];
};

// One member's group of a slab: rows 16 (FIRST_BLOCK + block) + ...; returns its exponent.
DEVICE int load_group(u32 (&to)[4][2], const Source& source, int start, int seqlen, int stop, int slab, int block,
                      Here at = HERE) {
    const int lane = afresh(lane_id()), group = lane / 4, pair = lane % 4;
    const int column = first_column(slab) + 4 * (group / 2 + 4 * (group % 2));
    Values v[2][2];
    float largest = 0.0f;
#pragma unroll
    for (int q = 0; q < 2; ++q) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
            const int row = 16 * (FIRST_BLOCK + block) + 8 * q + 2 * pair + e;
            v[q][e] = {};
            if (16 * (FIRST_BLOCK + block) + 8 * q < ZERO_ROWS) continue;
            v[q][e] = source.load(start + row * COLUMNS + column, seqlen, stop, at);
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                const float size = v[q][e].at[j] < 0.0f ? -v[q][e].at[j] : v[q][e].at[j];
                largest = most(largest, size);
            }
        }
    }
    const int own = exponent(largest);
    const float factor = power_of_two(-own);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
#pragma unroll
        for (int q = 0; q < 2; ++q) to[j][q] = pack<fp16>(v[q][0].at[j] * factor, v[q][1].at[j] * factor);
    }
    return own;
}

// Both members, from slab `first` on. `stop`: where each ends; the second is absent if that is 0. source_of(member) is
// made where it is read, so that the registers hold one at a time.
template <int COUNT, class Sources>
DEVICE void load_pair(Signal<COUNT>& z, const Sources& source_of, int start, int seqlen, const int (&stop)[2],
                      int first, Here at = HERE) {
#pragma unroll
    for (int member = 0; member < 2; ++member) {
        const Source source = source_of(member);
#pragma unroll
        for (int slab = 0; slab < COUNT; ++slab) {
#pragma unroll
            for (int block = 0; block < HELD; ++block) {
                auto& to = member == 0 ? z.r[slab][block] : z.i[slab][block];
                int& exponent = member == 0 ? z.er[slab][block] : z.ei[slab][block];
                exponent = load_group(to, source, start, seqlen, stop[member], first + slab, block, at);
            }
        }
    }
}

struct Exponents {
    int r, i;
};

// Those of one lane, and of the one that was found before.
template <int COUNT>
DEVICE void include(Exponents& e, const Signal<COUNT>& z) {
#pragma unroll
    for (int slab = 0; slab < COUNT; ++slab) {
#pragma unroll
        for (int block = 0; block < HELD; ++block) {
            e.r = most(e.r, z.er[slab][block]);
            e.i = most(e.i, z.ei[slab][block]);
        }
    }
}

// The largest exponent of each member, over the whole block. Holds a barrier. `scratch` has 2 WARPS entries, to be
// written again after two more barriers.
DEVICE Exponents largest(Exponents e, Shared<int> scratch, Here at = HERE) {
    e.r = warp_reduce(e.r, Max{}, at);
    e.i = warp_reduce(e.i, Max{}, at);
    if (lane_id() == 0) {
        store_shared(scratch + 2 * warp_id(), e.r, at);
        store_shared(scratch + 2 * warp_id() + 1, e.i, at);
    }
    block_sync(at);
#pragma unroll
    for (int warp = 0; warp < WARPS; ++warp) {
        e.r = most(e.r, load_shared(scratch + 2 * warp, at));
        e.i = most(e.i, load_shared(scratch + 2 * warp + 1, at));
    }
    return e;
}

// The held numbers times 2^-e.
template <int COUNT>
DEVICE void rescale(Signal<COUNT>& z, Exponents e) {
#pragma unroll
    for (int slab = 0; slab < COUNT; ++slab) {
#pragma unroll
        for (int block = 0; block < HELD; ++block) {
            const float fr = power_of_two(z.er[slab][block] - e.r), fi = power_of_two(z.ei[slab][block] - e.i);
#pragma unroll
            for (int j = 0; j < 4; ++j) {
#pragma unroll
                for (int q = 0; q < 2; ++q) {
                    z.r[slab][block][j][q] = scaled(z.r[slab][block][j][q], fr);
                    z.i[slab][block][j][q] = scaled(z.i[slab][block][j][q], fi);
                }
            }
        }
    }
}

// Stage 1: rows FIRST to FIRST + ROWS of k1, with their factors, as rows 0 to ROWS of the planes.
template <int FIRST, int ROWS, int COUNT>
DEVICE void stage1(const Planes& planes, const Signal<COUNT>& z, int first, const RootTable<N1>& table,
                   Here at = HERE) {
    const int lane = afresh(lane_id()), group = lane / 4, pair = lane % 4;
#pragma unroll
    for (int m = FIRST / 16; m < (FIRST + ROWS + 15) / 16; ++m) {
        RootBlock f[HELD];
#pragma unroll
        for (int k = 0; k < HELD; ++k) f[k] = table.block(m, FIRST_BLOCK + k, at);
#pragma unroll
        for (int slab = 0; slab < COUNT; ++slab) {
            Sums d[4];
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                d[j] = {};
#pragma unroll
                for (int k = 0; k < HELD; ++k) {
                    add_product<false>(d[j], f[k], z.r[slab][k][j], z.i[slab][k][j], at);
                }
            }
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                if (16 * m + 8 * half < FIRST || 16 * m + 8 * half >= FIRST + ROWS) continue;
                const int k1 = afresh(16 * m + 8 * half + group), column = first_column(first + slab) + 4 * pair;
                const Complex next = root_of_unity<POINTS>(k1), far = root_of_unity<POINTS>(16 * k1);
                Complex w = root_of_unity<POINTS>(k1 * column);
#pragma unroll
                for (int b = 0; b < 2; ++b) {
                    Complex turn = w;
                    Complex x[4];
#pragma unroll
                    for (int j = 0; j < 4; ++j) {
                        x[j] = Complex{d[j].r[2 * half + b], d[j].i[2 * half + b]} * turn;
                        if (j < 3) turn = turn * next;
                    }
                    const int to = place(k1 - FIRST, column + 16 * b);
                    const Vector<u32, 2> re = {pack<fp16>(x[0].r, x[1].r), pack<fp16>(x[2].r, x[3].r)};
                    const Vector<u32, 2> im = {pack<fp16>(x[0].i, x[1].i), pack<fp16>(x[2].i, x[3].i)};
                    store_shared_vector((planes.r + to).as<u32>(), re, at);
                    store_shared_vector((planes.i + to).as<u32>(), im, at);
                    if (b == 0) w = w * far;
                }
            }
        }
    }
}

// The right operands of a slab, 16 rows k1 from 16 k on, out of a plane.
DEVICE void columns_of(u32 (&x)[4][2], Shared<fp16> plane, int slab, int k, Here at = HERE) {
    const int lane = afresh(lane_id()), group = lane / 4, pair = lane % 4;
    const int column = first_column(slab) + 4 * (group / 2 + 4 * (group % 2));
#pragma unroll
    for (int q = 0; q < 2; ++q) {
        const int row = 16 * k + 8 * q + 2 * pair;
        const Vector<u32, 2> even = load_shared_vector<2>((plane + place(row, column)).as<u32>(), at);
        const Vector<u32, 2> odd = load_shared_vector<2>((plane + place(row + 1, column)).as<u32>(), at);
#pragma unroll
        for (int j = 0; j < 2; ++j) {
            x[2 * j][q] = (even.at[j] & 0xffffu) | odd.at[j] << 16;
            x[2 * j + 1][q] = even.at[j] >> 16 | (odd.at[j] & 0xffff0000u);
        }
    }
}

// Stage 1 back: hands `store(position, re, im)` the numbers at 4 positions from `position` on, of all but those that
// HALF leaves out.
template <class Store>
DEVICE void back_to_signal(const Planes& planes, const RootTable<N1>& table, const Store& store, Here at = HERE) {
    const int lane = afresh(lane_id()), group = lane / 4, pair = lane % 4;
#pragma unroll 1
    for (int slab = 0; slab < SLABS; ++slab) {
        u32 xr[ROW_BLOCKS][4][2], xi[ROW_BLOCKS][4][2];
#pragma unroll
        for (int k = 0; k < ROW_BLOCKS; ++k) {
            columns_of(xr[k], planes.r, slab, k, at);
            columns_of(xi[k], planes.i, slab, k, at);
        }
#pragma unroll
        for (int m = FIRST_BLOCK; m < ROW_BLOCKS; ++m) {
            RootBlock f[ROW_BLOCKS];
#pragma unroll
            for (int k = 0; k < ROW_BLOCKS; ++k) f[k] = table.block(m, k, at);
            Sums d[4];
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                d[j] = {};
#pragma unroll
                for (int k = 0; k < ROW_BLOCKS; ++k) add_product<true>(d[j], f[k], xr[k][j], xi[k][j], at);
            }
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                if (16 * m + 8 * half < ZERO_ROWS) continue;
#pragma unroll
                for (int b = 0; b < 2; ++b) {
                    Values re, im;
#pragma unroll
                    for (int j = 0; j < 4; ++j) {
                        re.at[j] = d[j].r[2 * half + b];
                        im.at[j] = d[j].i[2 * half + b];
                    }
                    store((16 * m + 8 * half + group) * COLUMNS + first_column(slab) + 4 * (pair + 4 * b), re, im);
                }
            }
        }
    }
}

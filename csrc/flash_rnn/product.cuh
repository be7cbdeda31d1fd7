// The product of a step: rows of R, or of R^T, which stay on chip, with what all warps made of the step before.
//
// A warp has 16 rows of each of the GATES matrices and K_TILES fragments of their columns: HELD of them in registers,
// the others in shared memory in the order in which lanes take them, 16 bytes each. The operand, h or the gradients of
// the gates, is a tile [sequence, column] in shared memory, rows 16 bytes longer than the head is wide, so that the
// eight rows of an ldmatrix lie in different banks; a fragment takes 32 bytes of a row whatever the element.
//
// 16-bit elements are multiplied as they are. float32 goes through TF32: each factor is the sum of two TF32 numbers,
// and of their four products the three larger ones are added (PRECISE), or it is rounded to one.
#pragma once
#include "common/matrix.cuh"
#include "places.cuh"

constexpr int COLUMNS = 32 / sizeof(Element);  // of a fragment
constexpr int PER_REGISTER = 4 / sizeof(Element);
constexpr int OPERAND_ROW = PADDED + 16 / sizeof(Element);
constexpr int OPERAND_TILE = TILE * OPERAND_ROW;
constexpr int K_TILES = PADDED / COLUMNS / SPLIT;
constexpr int RESTING = K_TILES - HELD;
static_assert(PADDED % (COLUMNS * SPLIT) == 0 && RESTING >= 0, "the columns of a head do not split so");

template <class T>
DEVICE void multiply(float (&sum)[4], const u32 (&a)[4], const u32 (&b)[2]) {
    if constexpr (sizeof(T) == 2) {
        mma_16x8x16<T>(sum, a, b);
    } else {
        u32 high_a[4], high_b[2];
#pragma unroll
        for (int r = 0; r < 4; ++r) high_a[r] = tf32_bits(bits_as<float>(a[r]));
#pragma unroll
        for (int r = 0; r < 2; ++r) high_b[r] = tf32_bits(bits_as<float>(b[r]));
        if constexpr (PRECISE) {
            u32 low_a[4], low_b[2];
#pragma unroll
            for (int r = 0; r < 4; ++r) low_a[r] = tf32_bits(bits_as<float>(a[r]) - bits_as<float>(high_a[r]));
#pragma unroll
            for (int r = 0; r < 2; ++r) low_b[r] = tf32_bits(bits_as<float>(b[r]) - bits_as<float>(high_b[r]));
            mma_16x8x8_tf32(sum, low_a, high_b);
            mma_16x8x8_tf32(sum, high_a, low_b);
        }
        mma_16x8x8_tf32(sum, high_a, high_b);
    }
}

template <class T>
DEVICE u32 both(T low, T high) {
    return low.bits | static_cast<u32>(high.bits) << 16;
}

using Sums = float[SEQ_TILES][4];

// `TURNED`: the rows are those of R^T.
template <bool TURNED>
struct Weights {
    u32 held[GATES][most(HELD, 1)][4];
    Shared<u32> resting;

    // Rows are taken unless they are not `wanted`: then there is to be no product.
    DEVICE Weights(SharedMemory& arena, const Element* ptr, const Matrices& stride, const Place& at,
                   bool wanted = true) {
        resting = arena.take<u32>(UNIT_TILES * SPLIT * GATES * RESTING * WARP * 4) +
                  (warp_id() * GATES * RESTING * WARP + lane_id()) * 4;
        if (!wanted) return;
        const i64 row = TURNED ? stride.i : stride.o, column = TURNED ? stride.o : stride.i;
        const int start = at.split * K_TILES * COLUMNS + lane_id() % 4 * PER_REGISTER;
        const Element* first = ptr + at.head * stride.h + at.unit * row + start * column;
#pragma unroll
        for (int g = 0; g < GATES; ++g) {
            const Element* next = first;
#pragma unroll
            for (int k = 0; k < HELD; ++k) {
                load(held[g][k], next, row, column, start + k * COLUMNS, at.unit);
                next += COLUMNS * column;
                // A compiler that has more loads under way runs out of registers.
                if (GATES * HELD > 24 || k % 4 == 3) __syncwarp();
            }
            for (int k = HELD; k < K_TILES; ++k) {
                u32 a[4];
                load(a, next, row, column, start + k * COLUMNS, at.unit);
                next += COLUMNS * column;
                store_shared_vector<4>(resting + (g * RESTING + k - HELD) * WARP * 4,
                                       Vector<u32, 4>{{a[0], a[1], a[2], a[3]}});
            }
            first += stride.g;
        }
    }

    // A fragment whose first element for this lane, at `unit` and column `at_k`, is *p.
    DEVICE static void load(u32 (&a)[4], const Element* p, i64 row, i64 column, int at_k, int unit) {
#pragma unroll
        for (int r = 0; r < 4; ++r) {
            const int more = r / 2 * COLUMNS / 2, u = unit + r % 2, k = at_k + more;
            const Element* q = p + r % 2 * row + more * column;
            if constexpr (PER_REGISTER == 2) {
                a[r] = both(element(q, u, k), element(q + column, u, k + 1));
            } else {
                a[r] = bits_as<u32>(element(q, u, k));
            }
        }
    }

    DEVICE static Element element(const Element* p, int unit, int k) {
        return inside(unit) && inside(k) ? load_global(p) : Element(0.0f);
    }

    DEVICE void fragment(u32 (&a)[4], int g, int k) const {
        if (k < HELD) {
#pragma unroll
            for (int r = 0; r < 4; ++r) a[r] = held[g][k < HELD ? k : 0][r];
        } else {
            const Vector<u32, 4> four = load_shared_vector<4>(resting + (g * RESTING + k - HELD) * WARP * 4);
#pragma unroll
            for (int r = 0; r < 4; ++r) a[r] = four.at[r];
        }
    }
};

// The operand's fragments k and k + 1 of this warp's share, for all sequences; only the first where K_TILES ends.
DEVICE void load_operand(u32 (&b)[SEQ_TILES][2][2], Shared<Element> operand, int k, const Place& at) {
    const int lane = lane_id();
#pragma unroll
    for (int t = 0; t < SEQ_TILES; ++t) {
        const Shared<Element> row = operand + ((8 * t + lane % 8) * OPERAND_ROW + (at.split * K_TILES + k) * COLUMNS);
        if (k + 1 < K_TILES) {
            u32 four[4];
            ldmatrix_x4(four, (row + lane / 8 * COLUMNS / 2).as<u16>());
            b[t][0][0] = four[0], b[t][0][1] = four[1], b[t][1][0] = four[2], b[t][1][1] = four[3];
        } else {
            u32 two[2];
            ldmatrix_x2(two, (row + lane / 8 % 2 * COLUMNS / 2).as<u16>());
            b[t][0][0] = two[0], b[t][0][1] = two[1];
        }
    }
}

// sums[g] += R_g h, of an operand that all gates share.
template <bool TURNED>
DEVICE void product_of_one(Sums (&sums)[GATES], const Weights<TURNED>& weights, Shared<Element> operand,
                           const Place& at) {
#pragma unroll
    for (int k = 0; k < K_TILES; k += 2) {
        u32 b[SEQ_TILES][2][2];
        load_operand(b, operand, k, at);
#pragma unroll
        for (int half = 0; half < 2 && k + half < K_TILES; ++half) {
#pragma unroll
            for (int g = 0; g < GATES; ++g) {
                u32 a[4];
                weights.fragment(a, g, k + half);
#pragma unroll
                for (int t = 0; t < SEQ_TILES; ++t) multiply<Element>(sums[g][t], a, b[t][half]);
            }
        }
    }
}

// sums[g] += R_g^T ds_g, of GATES operands behind one another; the caller adds the gates.
template <bool TURNED>
DEVICE void product_of_each(Sums (&sums)[GATES], const Weights<TURNED>& weights, Shared<Element> operands,
                            const Place& at) {
#pragma unroll
    for (int k = 0; k < K_TILES; k += 2) {
#pragma unroll
        for (int g = 0; g < GATES; ++g) {
            u32 b[SEQ_TILES][2][2];
            load_operand(b, operands + g * OPERAND_TILE, k, at);
#pragma unroll
            for (int half = 0; half < 2 && k + half < K_TILES; ++half) {
                u32 a[4];
                weights.fragment(a, g, k + half);
#pragma unroll
                for (int t = 0; t < SEQ_TILES; ++t) multiply<Element>(sums[g][t], a, b[t][half]);
            }
        }
    }
}

// Adds up the sums of the SPLIT warps that share rows, in the registers of the first. All warps of the block come here.
template <int COUNT>
struct Gathering {
    Shared<float> scratch;

    DEVICE Gathering(SharedMemory& arena) {
        scratch = arena.take<float>(UNIT_TILES * (SPLIT - 1) * COUNT * SEQ_TILES * WARP * 4);
    }

    DEVICE void add(Sums (&sums)[COUNT], const Place& at) const {
        if constexpr (SPLIT > 1) {
            constexpr int SIZE = COUNT * SEQ_TILES * WARP * 4;  // of one warp
            const Shared<float> own = scratch + (warp_id() / SPLIT * (SPLIT - 1) * SIZE + lane_id() * 4);
            if (!at.leads()) {
#pragma unroll
                for (int c = 0; c < COUNT; ++c)
#pragma unroll
                    for (int t = 0; t < SEQ_TILES; ++t)
                        store_shared_vector<4>(
                            own + ((at.split - 1) * SIZE + (c * SEQ_TILES + t) * WARP * 4),
                            Vector<float, 4>{{sums[c][t][0], sums[c][t][1], sums[c][t][2], sums[c][t][3]}});
            }
            __syncthreads();
            if (at.leads()) {
                for (int other = 0; other < SPLIT - 1; ++other)
#pragma unroll
                    for (int c = 0; c < COUNT; ++c)
#pragma unroll
                        for (int t = 0; t < SEQ_TILES; ++t) {
                            const Vector<float, 4> four =
                                load_shared_vector<4>(own + (other * SIZE + (c * SEQ_TILES + t) * WARP * 4));
#pragma unroll
                            for (int r = 0; r < 4; ++r) sums[c][t][r] += four.at[r];
                        }
            }
        }
    }
};

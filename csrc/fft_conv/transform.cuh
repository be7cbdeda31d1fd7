// Transforms of M = N1 R R complex numbers by products of matrices, three digits deep (FlashFFTConv, arXiv:2311.05908).
//
// With w_N = exp(-2 pi i / N), a position n = R R n1 + R n2 + n3 and a frequency k = k1 + N1 k2 + N1 R k3,
//
//     forward  Z1[k1; n2 n3] = sum_n1 w_N1^(n1 k1) z[n1; n2 n3]      * w_M^(k1 (R n2 + n3))          stage 1
//              Z2[k1; k2 n3] = sum_n2 w_R^(n2 k2) Z1[k1; n2 n3]      * w_RR^(k2 n3)                  stage 2
//              Z3[k1; k2 k3] = sum_n3 w_R^(n3 k3) Z2[k1; k2 n3]                                      stage 3
//
// and back by the conjugates, in the reverse order: 3, 2, 1. Nothing is transposed or permuted: the filter's spectrum
// is stored in the order that stage 3 leaves.
//
// Where it happens. Between stage 1 and the others the numbers lie in shared memory, as two planes of fp16, [N1][R R].
// Stage 1 belongs to columns: a warp owns 32 of them. The rest belongs to rows: a warp takes [R, R] matrices of one k1
// through stages 2 and 3, the product with the filter, and back, all in registers. For that the orientation of each
// product is chosen so that an accumulator is the next operand as it is. An accumulator [m, n] can be a left operand,
// or transposed a right one, and either way n is summed over next:
//
//     Z2 [k2, n3] = F z [n2, n3]         right operand by ldmatrix      n3 next
//     Z3 [k2, k3] = Z2 F                 Z2 as left operand             k3 next
//     V2 [n3, k2] = conj(F) P^T          P = K Z3 as right operand      k2 next
//     V1 [n2, n3] = conj(F) V2^T         V2 as right operand
//
// F is symmetric, so the same registers hold it as a left and as a right operand. A complex product is 4 real ones.
//
// Rounding: matrices, and numbers between two stages, are fp16; sums, factors w_M and the spectrum's product float32.
//
// Constants: N1 and R are 16 or 32, WARPS divides R R / 32.
#pragma once
#include "common/barriers.cuh"
#include "common/matrix.cuh"
#include "common/warp.cuh"

constexpr int COLUMNS = R * R;
constexpr int POINTS = N1 * COLUMNS;
constexpr int THREADS = WARP * WARPS;
constexpr int BLOCKS = R / 16;                 // of a side of an [R, R] matrix
constexpr int TILES = R / 8;                   // accumulators across it
constexpr int SLABS = COLUMNS / 32 / WARPS;    // of 32 columns, to a warp
constexpr int QUADS = BLOCKS * TILES * WARP;   // groups of 4 frequencies that a lane holds, of one k1

static_assert((N1 == 16 || N1 == 32) && (R == 16 || R == 32), "transform: N1 and R are 16 or 32");
static_assert(SLABS * WARPS * 32 == COLUMNS, "transform: WARPS divides R R / 32");

struct Complex {
    float r, i;
};

DEVICE Complex operator*(Complex a, Complex b) { return {a.r * b.r - a.i * b.i, a.r * b.i + a.i * b.r}; }
DEVICE Complex conj(Complex a) { return {a.r, -a.i}; }

// exp(-2 pi i power / ORDER) to float32 accuracy: the angle is brought to within pi / 4 of a multiple of pi / 2 as a
// whole number, exactly, and there a few terms of the series do.
template <int ORDER>
DEVICE Complex root_of_unity(int power) {
    constexpr int QUARTER = ORDER / 4;
    power &= ORDER - 1;
    const int turns = (power + QUARTER / 2) / QUARTER;
    const float x = static_cast<float>(power - turns * QUARTER) * (6.283185307179586f / ORDER), y = x * x;
    const float sine = x * (1.0f + y * (-1.0f / 6 + y * (1.0f / 120 + y * (-1.0f / 5040 + y * (1.0f / 362880)))));
    const float cosine =
        1.0f + y * (-1.0f / 2 + y * (1.0f / 24 + y * (-1.0f / 720 + y * (1.0f / 40320 - y * (1.0f / 3628800)))));
    const bool swap = turns & 1;
    const float r = swap ? sine : cosine, i = swap ? cosine : sine;
    // cos(x + j pi / 2) is cos, -sin, -cos, sin; sin(x + j pi / 2) is sin, cos, -sin, -cos.
    return {(turns + 1) & 2 ? -r : r, turns & 2 ? i : -i};
}

// ---- matrices of roots ---------------------------------------------------------------------------------------------

// 16 by 16 of them as a left operand, by symmetry also as two right ones.
struct RootBlock {
    u32 r[4], i[4];
};

template <int COUNT>
DEVICE void negated(u32 (&to)[COUNT], const u32 (&from)[COUNT]) {
#pragma unroll
    for (int i = 0; i < COUNT; ++i) to[i] = from[i] ^ 0x80008000u;
}

// F[j, k] = w_N^(j k) in shared memory, as the lanes hold its blocks. A phase that needs F in registers loads it there,
// so that the others have the room.
template <int N>
struct RootTable {
    static constexpr int BLOCKS_ACROSS = N / 16, ENTRIES = BLOCKS_ACROSS * BLOCKS_ACROSS * 2 * WARP * 4;
    Shared<u32> table;

    DEVICE void make() const {
        for (int entry = threadIdx.x; entry < ENTRIES / 8; entry += THREADS) {
            const int lane = entry % WARP, block = entry / WARP;
            Vector<u32, 4> r, i;
#pragma unroll
            for (int q = 0; q < 4; ++q) {
                const int row = block / BLOCKS_ACROSS * 16 + lane / 4 + 8 * (q & 1);
                const int column = block % BLOCKS_ACROSS * 16 + lane % 4 * 2 + 8 * (q >> 1);
                const Complex a = root_of_unity<N>(row * column), b = root_of_unity<N>(row * (column + 1));
                r.at[q] = pack<fp16>(a.r, b.r);
                i.at[q] = pack<fp16>(a.i, b.i);
            }
            store_shared_vector(table + (2 * block * WARP + lane) * 4, r);
            store_shared_vector(table + ((2 * block + 1) * WARP + lane) * 4, i);
        }
    }

    DEVICE RootBlock block(int m, int k, Here at = HERE) const {
        const int first = 2 * (m * BLOCKS_ACROSS + k);
        const Vector<u32, 4> r = load_shared_vector<4>(table + (first * WARP + lane_id()) * 4, at);
        const Vector<u32, 4> i = load_shared_vector<4>(table + ((first + 1) * WARP + lane_id()) * 4, at);
        RootBlock loaded;
#pragma unroll
        for (int q = 0; q < 4; ++q) {
            loaded.r[q] = r.at[q];
            loaded.i[q] = i.at[q];
        }
        return loaded;
    }
};

// The F of stages 2 and 3, in registers.
struct Roots {
    u32 r[BLOCKS][BLOCKS][4], i[BLOCKS][BLOCKS][4];

    DEVICE Roots(const RootTable<R>& table, Here at = HERE) {
#pragma unroll
        for (int m = 0; m < BLOCKS; ++m) {
#pragma unroll
            for (int k = 0; k < BLOCKS; ++k) {
                const RootBlock loaded = table.block(m, k, at);
#pragma unroll
                for (int q = 0; q < 4; ++q) {
                    r[m][k][q] = loaded.r[q];
                    i[m][k][q] = loaded.i[q];
                }
            }
        }
    }
};

struct Sums {
    float r[4], i[4];
};

// d += F x, or with CONJ conj(F) x, where F is a left operand. Here x is negated, and may be dead after it.
template <bool CONJ>
DEVICE void add_product(Sums& d, const u32 (&fr)[4], const u32 (&fi)[4], const u32 (&xr)[2], const u32 (&xi)[2],
                        Here at = HERE) {
    u32 minus[2];
    mma_16x8x16<fp16>(d.r, fr, xr, at);
    mma_16x8x16<fp16>(d.i, fr, xi, at);
    if constexpr (CONJ) {
        negated(minus, xr);
        mma_16x8x16<fp16>(d.r, fi, xi, at);
        mma_16x8x16<fp16>(d.i, fi, minus, at);
    } else {
        negated(minus, xi);
        mma_16x8x16<fp16>(d.r, fi, minus, at);
        mma_16x8x16<fp16>(d.i, fi, xr, at);
    }
}

// The same of a block that was loaded for many x, which stay: here F is negated.
template <bool CONJ>
DEVICE void add_product(Sums& d, const RootBlock& f, const u32 (&xr)[2], const u32 (&xi)[2], Here at = HERE) {
    u32 minus[4];
    negated(minus, f.i);
    mma_16x8x16<fp16>(d.r, f.r, xr, at);
    mma_16x8x16<fp16>(d.i, f.r, xi, at);
    if constexpr (CONJ) {
        mma_16x8x16<fp16>(d.r, f.i, xi, at);
        mma_16x8x16<fp16>(d.i, minus, xr, at);
    } else {
        mma_16x8x16<fp16>(d.r, minus, xi, at);
        mma_16x8x16<fp16>(d.i, f.i, xr, at);
    }
}

// ---- shared memory -------------------------------------------------------------------------------------------------

// Real and imaginary parts, [rows][R R] each.
struct Planes {
    Shared<fp16> r, i;
};

// Where a column of a row lies. Groups of 8 columns are exchanged so that no access meets a bank twice: neither those
// of stage 1, 4 or 8 rows at a time, nor ldmatrix, 8 times R columns apart.
DEVICE int place(int row, int column) {
    const int chunk = column / 8;
    const int moved = chunk ^ ((row & 3) << 1 | (row >> 2 & 1)) ^ (chunk >> 3 & (R == 32 ? 3 : 1));
    return row * COLUMNS + moved * 8 + column % 8;
}

// w_RR^(j k), rounded to fp16, as the lanes hold an accumulator: element e of a quad is row 8 (e / 2), column e % 2 of
// its place. One table serves both directions, being symmetric.
DEVICE void make_inner_twiddles(Shared<u32> table) {
    for (int quad = threadIdx.x; quad < QUADS; quad += THREADS) {
        const int tile = quad / WARP, lane = quad % WARP;
        const int row = tile / TILES * 16 + lane / 4, column = tile % TILES * 8 + lane % 4 * 2;
        Vector<u32, 4> entry;
#pragma unroll
        for (int e = 0; e < 4; ++e) {
            const Complex w = root_of_unity<COLUMNS>((row + e / 2 * 8) * (column + e % 2));
            entry.at[e] = pack<fp16>(w.r, w.i);
        }
        store_shared_vector(table + 4 * quad, entry);
    }
}

// d *= w, or conj(w), of the table's tile; then as 16-bit registers: rows `group` in [0], rows group + 8 in [1].
template <bool CONJ>
DEVICE void twiddled(u32 (&r)[2], u32 (&i)[2], const Sums& d, Shared<u32> table, int tile, Here at = HERE) {
    const Vector<u32, 4> w = load_shared_vector<4>(table + 4 * (tile * WARP + lane_id()), at);
    Complex z[4];
#pragma unroll
    for (int e = 0; e < 4; ++e) {
        const Complex root = {low_of<fp16>(w.at[e]), high_of<fp16>(w.at[e])};
        z[e] = Complex{d.r[e], d.i[e]} * (CONJ ? conj(root) : root);
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        r[half] = pack<fp16>(z[2 * half].r, z[2 * half + 1].r);
        i[half] = pack<fp16>(z[2 * half].i, z[2 * half + 1].i);
    }
}

// ---- stages 2 and 3, of the [R, R] matrix of one k1 ----------------------------------------------------------------

// A complex [R, R] matrix as left operands.
struct Square {
    u32 r[BLOCKS][BLOCKS][4], i[BLOCKS][BLOCKS][4];

    // What becomes of an accumulator at rows 16 m, columns 8 tile.
    DEVICE void set(int m, int tile, const u32 (&re)[2], const u32 (&im)[2]) {
        r[m][tile / 2][tile % 2 * 2] = re[0];
        r[m][tile / 2][tile % 2 * 2 + 1] = re[1];
        i[m][tile / 2][tile % 2 * 2] = im[0];
        i[m][tile / 2][tile % 2 * 2 + 1] = im[1];
    }
};

// Stage 2 of row `row` of the planes.
DEVICE void stage2(Square& z, const Planes& planes, int row, const Roots& f, Shared<u32> table, Here at = HERE) {
    constexpr int LOADED = R == 32 ? 1 : 2;  // tiles that one ldmatrix loads
    const int lane = afresh(lane_id());
#pragma unroll
    for (int tile = 0; tile < TILES; tile += LOADED) {
        u32 xr[4], xi[4];
        const int from = place(row, (LOADED == 1 ? lane : lane % 16) * R + 8 * (tile + (LOADED == 1 ? 0 : lane / 16)));
        ldmatrix_x4_transposed(xr, planes.r + from, at);
        ldmatrix_x4_transposed(xi, planes.i + from, at);
#pragma unroll
        for (int more = 0; more < LOADED; ++more) {
#pragma unroll
            for (int m = 0; m < BLOCKS; ++m) {
                Sums d = {};
#pragma unroll
                for (int k = 0; k < BLOCKS; ++k) {
                    const u32 br[2] = {xr[2 * (k + more)], xr[2 * (k + more) + 1]};
                    const u32 bi[2] = {xi[2 * (k + more)], xi[2 * (k + more) + 1]};
                    add_product<false>(d, f.r[m][k], f.i[m][k], br, bi, at);
                }
                u32 re[2], im[2];
                twiddled<false>(re, im, d, table, m * TILES + tile + more, at);
                z.set(m, tile + more, re, im);
            }
        }
    }
}

// Stage 3: frequencies (k2, k3) at rows 16 m, columns 8 tile.
DEVICE Sums stage3(const Square& z, int m, int tile, const Roots& f, Here at = HERE) {
    Sums d = {};
#pragma unroll
    for (int k = 0; k < BLOCKS; ++k) {
        const auto &left = z.r[m][k], &im = z.i[m][k];
        const int half = tile % 2;
        const u32 fr[2] = {f.r[tile / 2][k][half], f.r[tile / 2][k][2 + half]};
        const u32 fi[2] = {f.i[tile / 2][k][half], f.i[tile / 2][k][2 + half]};
        u32 minus[4];  // rather than of the matrix, which would stay in registers
        negated(minus, im);
        mma_16x8x16<fp16>(d.r, left, fr, at);
        mma_16x8x16<fp16>(d.i, left, fi, at);
        mma_16x8x16<fp16>(d.r, minus, fi, at);
        mma_16x8x16<fp16>(d.i, im, fr, at);
    }
    return d;
}

// One accumulator of conj(F) x^T: rows 16 m, columns 8 tile.
DEVICE Sums back_product(const Square& x, int m, int tile, const Roots& f, Here at = HERE) {
    Sums d = {};
#pragma unroll
    for (int k = 0; k < BLOCKS; ++k) {
        const int half = tile % 2;
        const u32 xr[2] = {x.r[tile / 2][k][half], x.r[tile / 2][k][2 + half]};
        const u32 xi[2] = {x.i[tile / 2][k][half], x.i[tile / 2][k][2 + half]};
        add_product<true>(d, f.r[m][k], f.i[m][k], xr, xi, at);
    }
    return d;
}

// Stages 3 and 2 back, of k1 = row, with the factors of stage 1, into that row of the planes.
DEVICE void back_to_stage1(const Planes& planes, int row, const Square& p, const Roots& f, Shared<u32> table,
                           Here at = HERE) {
    Square v;
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile) {
#pragma unroll
        for (int m = 0; m < BLOCKS; ++m) {
            u32 re[2], im[2];
            twiddled<true>(re, im, back_product(p, m, tile, f, at), table, m * TILES + tile, at);
            v.set(m, tile, re, im);
        }
    }
    const int lane = afresh(lane_id()), group = lane / 4, pair = lane % 4;
    Complex of_row[BLOCKS][2];  // w_M^(k1 R n2)
#pragma unroll
    for (int m = 0; m < BLOCKS; ++m) {
        of_row[m][0] = root_of_unity<POINTS / R>(row * (16 * m + group));
        of_row[m][1] = root_of_unity<POINTS / R>(row * (16 * m + group + 8));
    }
    Complex of_column = root_of_unity<POINTS>(row * 2 * pair);  // w_M^(k1 n3), from one tile to the next
    const Complex next = root_of_unity<POINTS>(row), next_tile = root_of_unity<POINTS>(row * 8);
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile) {
        const Complex columns[2] = {of_column, of_column * next};
        of_column = of_column * next_tile;
#pragma unroll
        for (int m = 0; m < BLOCKS; ++m) {
            const Sums d = back_product(v, m, tile, f, at);
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                Complex z[2];
#pragma unroll
                for (int e = 0; e < 2; ++e) {
                    z[e] = Complex{d.r[2 * half + e], d.i[2 * half + e]} * conj(of_row[m][half] * columns[e]);
                }
                const int to = place(row, (16 * m + group + 8 * half) * R + 8 * tile + 2 * pair);
                store_shared((planes.r + to).as<u32>(), pack<fp16>(z[0].r, z[1].r), at);
                store_shared((planes.i + to).as<u32>(), pack<fp16>(z[0].i, z[1].i), at);
            }
        }
    }
}

// What becomes of the sums of a segment: those of the warps merged, put down as a partial result, merged with those of
// other blocks, and written as out and lse.
//
// Sums over different keys merge into that of all, in whatever order they were made:
//
//     m = max_s m_s        l = sum_s exp(m_s - m) l_s        acc = sum_s exp(m_s - m) acc_s
//
// A warp takes one row after the other: lane s weighs sum s, 32 at a time, then every lane adds up four columns in the
// order of the sums. So the bits depend on what is merged alone.
#pragma once
#include "common/barriers.cuh"
#include "schedule.cuh"
#include "walk.cuh"

constexpr int MERGE_ROW = BLOCK_V + 8;               // floats; so that the stores of a warp meet no bank twice
constexpr int PARTIAL_ROW = (VALUE_DIM + 3) / 4 * 4;  // floats of acc in the workspace
constexpr int SLOT = BLOCK_M * (2 + PARTIAL_ROW);     // floats: acc of all rows, then m and l
constexpr int VECTORS = (PARTIAL_ROW + 4 * WARP - 1) / (4 * WARP);

// The sums of one row: a lane has the columns 4 lane to 4 lane + 3, and those 128, 256, ... further.
struct Row {
    float m = -infinity(), l = 0.0f;
    float acc[VECTORS][4] = {};

    DEVICE static int column(int vector) { return 4 * (vector * WARP + lane_id()); }

    // Merges `count` sums, at most 32, into this one. Lane s has (m, l) of sum s; acc_of(s, column) is four columns.
    template <class Acc>
    DEVICE void merge(float m_own, float l_own, int count, const Acc& acc_of) {
        const float highest = most(m, warp_reduce(m_own, Max{}));
        const float finite = finite_or_0(highest);
        const float weight = exp2_fast(LOG2E * (m_own - finite)), kept = exp2_fast(LOG2E * (m - finite));
        l = l * kept + warp_reduce(l_own * weight, Sum{});
        m = highest;
#pragma unroll
        for (int vector = 0; vector < VECTORS; ++vector) {
#pragma unroll
            for (int i = 0; i < 4; ++i) acc[vector][i] *= kept;
        }
#pragma unroll 4
        for (int s = 0; s < count; ++s) {
            const float of_sum = shuffle(weight, s);
#pragma unroll
            for (int vector = 0; vector < VECTORS; ++vector) {
                if (column(vector) >= PARTIAL_ROW) continue;
                const Vector<float, 4> some = acc_of(s, column(vector));
#pragma unroll
                for (int i = 0; i < 4; ++i) acc[vector][i] += some.at[i] * of_sum;
            }
        }
    }
};

// The sums of all warps in shared memory, in place of q and the tiles: m and l [KEY_WARPS, BLOCK_M], acc with rows of
// MERGE_ROW.
struct Gathered {
    Shared<Vector<float, 2>> statistics;
    Shared<float> acc;

    DEVICE void put(const Sums& sums) const {
        const int group = lane_id() / 4, pair = lane_id() % 4;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int row = key_warp() * BLOCK_M + 16 * row_warp() + group + 8 * half;
            if (pair == 0) store_shared(statistics + row, Vector<float, 2>{{sums.m[half], sums.l[half]}});
            const Shared<float> to = acc + row * MERGE_ROW;
            if constexpr (CODE == NO_CODE) {
#pragma unroll
                for (int n = 0; n < BLOCK_V / 8; ++n) {
                    store_shared_vector(to + (8 * n + 2 * pair),
                                        Vector<float, 2>{{sums.acc[n][2 * half], sums.acc[n][2 * half + 1]}});
                }
            } else {
                // Columns of even and of odd number came from different fragments.
#pragma unroll
                for (int n = 0; n < BLOCK_V / 8; n += 2) {
                    const float *even = sums.acc[n] + 2 * half, *odd = sums.acc[n + 1] + 2 * half;
                    store_shared_vector(to + (8 * n + 4 * pair), Vector<float, 4>{{even[0], odd[0], even[1], odd[1]}});
                }
            }
        }
    }

    DEVICE Row row(int index) const {
        Row row;
        Vector<float, 2> own{{-infinity(), 0.0f}};
        if (lane_id() < KEY_WARPS) own = load_shared(statistics + (lane_id() * BLOCK_M + index));
        row.merge(own.at[0], own.at[1], KEY_WARPS, [&](int s, int column) {
            return load_shared_vector<4>(acc + ((s * BLOCK_M + index) * MERGE_ROW + column));
        });
        return row;
    }
};

// Puts a sum down in a slot of `rows` rows: acc of all, whose rows are vectors of four, then m and l.
DEVICE void store_sum(float* slot, i64 rows, i64 index, const Row& row) {
    if (lane_id() == 0) store_global_vector(slot + rows * PARTIAL_ROW + 2 * index, Vector<float, 2>{{row.m, row.l}});
    float* to = slot + index * PARTIAL_ROW;
#pragma unroll
    for (int vector = 0; vector < VECTORS; ++vector) {
        if (Row::column(vector) >= PARTIAL_ROW) continue;
        store_global_vector(to + Row::column(vector), Vector<float, 4>{{row.acc[vector][0], row.acc[vector][1],
                                                                        row.acc[vector][2], row.acc[vector][3]}});
    }
}

// Merges in the sum that an earlier launch put down.
DEVICE void merge_stored(Row& row, const float* slot, i64 rows, i64 index) {
    Vector<float, 2> own{{-infinity(), 0.0f}};
    if (lane_id() == 0) own = load_global_vector<2>(slot + rows * PARTIAL_ROW + 2 * index);
    row.merge(own.at[0], own.at[1], 1, [&](int, int column) {
        return load_global_vector<4>(slot + index * PARTIAL_ROW + column);
    });
}

// The sum of an item's partial results, always in the order of their slots.
DEVICE Row merge_partials(const float* partial_ptr, const Segment& segment, int index) {
    auto slot_of = [&](int s) {
        const i64 slot = s == 0 ? segment.first : segment.next + static_cast<i64>(s - 1) * segment.step;
        return partial_ptr + slot * SLOT;
    };
    Row row;
    for (int first = 0; first < segment.count; first += WARP) {
        const int count = least(segment.count - first, WARP);
        Vector<float, 2> own{{-infinity(), 0.0f}};
        if (lane_id() < count) {
            own = load_global_coherent<2>(slot_of(first + lane_id()) + (BLOCK_M * PARTIAL_ROW + 2 * index));
        }
        row.merge(own.at[0], own.at[1], count, [&](int s, int column) {
            return load_global_coherent<4>(slot_of(first + s) + (index * PARTIAL_ROW + column));
        });
    }
    return row;
}

// Writes out and lse of one row: [VALUE_DIM] and a number, with the sink of its head, if any.
DEVICE void finish(Row& row, Element* out, i64 stride_d, float* lse, const float* sink) {
    if (sink) {
        // A sum of one logit that has no value.
        const float logit = load_global_uniform(sink), highest = most(row.m, logit);
        const float finite = finite_or_0(highest), kept = exp2_fast(LOG2E * (row.m - finite));
        row.l = row.l * kept + exp2_fast(LOG2E * (logit - finite));
        row.m = highest;
#pragma unroll
        for (int vector = 0; vector < VECTORS; ++vector) {
#pragma unroll
            for (int i = 0; i < 4; ++i) row.acc[vector][i] *= kept;
        }
    }
    const bool empty = row.l == 0.0f;
    const float share = empty ? 0.0f : 1.0f / row.l;
    if (lane_id() == 0) store_global(lse, empty ? -infinity() : row.m + LN2 * log2_fast(row.l));
#pragma unroll
    for (int vector = 0; vector < VECTORS; ++vector) {
        const int column = Row::column(vector);
        if constexpr (VALUE_DIM % 4 == 0) {
            if (column >= VALUE_DIM) continue;
            Vector<Element, 4> four;
#pragma unroll
            for (int i = 0; i < 4; ++i) four.at[i] = Element(row.acc[vector][i] * share);
            store_global_vector(out + column, four);
        } else {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                if (column + i >= VALUE_DIM) continue;
                store_global(out + (column + i) * stride_d, Element(row.acc[vector][i] * share));
            }
        }
    }
}

// Where the elements of a tensor lie in global memory: the strides that a launcher passes, as a tuple of ints, and the
// rows of packed sequences.
#pragma once
#include "memory.cuh"

// Of [B, H, N, D].
struct Strides {
    i64 b, h, n, d;
};

// Of [B, H, N]: a number for each row, or rows whose elements are neighbours.
struct RowStrides {
    i64 b, h, n;
};

// The rows of one sequence within a tensor.
struct Rows {
    int start, length;
};

// Packed sequences: rows offsets[sequence] to offsets[sequence + 1] of `total`, at most `seqlen`; whatever the offsets
// say, the result lies inside the tensor. Dense ones (no offsets): all of `seqlen`.
DEVICE Rows rows_of(const int* offsets, int sequence, int seqlen, int total) {
    if (!offsets) return {0, seqlen};
    const int start = least(most(load_global_uniform(offsets + sequence), 0), total);
    const int stop = least(load_global_uniform(offsets + sequence + 1), total);
    return {start, least(most(stop - start, 0), seqlen)};
}

// Which keys a row sees.
//
// Rows are aligned at the end of the keys: row i of Nq stands at position i + Nk - Nq, and sees the keys from
// position - window_left to position + window_right; -1 is an unbounded side. Causal is window_right = 0.
#pragma once
#include "common/platform.cuh"

struct Window {
    int left, right, rows, keys;

    DEVICE int position(int row) const { return row + keys - rows; }

    // The first and the last key that a row sees.
    DEVICE int low(int row) const { return left < 0 ? 0 : most(position(row) - left, 0); }
    DEVICE int high(int row) const { return right < 0 ? keys - 1 : least(position(row) + right, keys - 1); }

    // The first and the last row that sees a key.
    DEVICE int first_row(int key) const { return right < 0 ? 0 : most(key - right - (keys - rows), 0); }
    DEVICE int last_row(int key) const { return left < 0 ? rows - 1 : least(key + left - (keys - rows), rows - 1); }
};

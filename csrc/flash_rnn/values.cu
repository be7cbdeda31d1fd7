// The values of all steps at once, for a backward pass that did not keep them: x + R h + b, h being known.
//
// Unlike the forward pass, this is parallel over time. A block has a head, or UNITS of its units, and takes every
// so-many-th tile of TILE rows, a row being one step of one sequence; R stays on chip meanwhile (product.cuh).
//
// FLOPs: 2 G D^2 a step, head and sequence. Bytes: R and b once for every block; gates and values once, h BLOCKS times.
#include "cells.cuh"
#include "product.cuh"

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    flash_rnn_values_cuda(const Element* gates_ptr,      // [B, N, G, H, D]
                          const Element* recurrent_ptr,  // [G, H, D, D], out by in
                          const Element* bias_ptr,       // [G, H, D], contiguous, or null
                          const float* initial_ptr,      // [S, B, H, D], contiguous, or null
                          const Element* out_ptr,        // [B, N, H, D]
                          Kept* values_ptr,              // [B, N, A, H, D]
                          Steps stride_gates, Matrices stride_recurrent, Steps stride_out, Steps stride_values,
                          int batch, int heads, i64 rows,
                          int walkers) {  // blocks that share the rows of a head's part
    const Place at(heads);
    SharedMemory arena;
    Shared<Element> operand = arena.take<Element>(OPERAND_TILE);
    Weights<false> weights(arena, recurrent_ptr, stride_recurrent, at);
    Gathering<GATES> gathering(arena);
    const Bias bias(arena, bias_ptr, at, heads);

    for (i64 start = at.first; start < rows; start += static_cast<i64>(walkers) * TILE) {
        for (int e = threadIdx.x; e < TILE * PADDED / 2; e += THREADS) {
            const int row = e / (PADDED / 2), unit = e % (PADDED / 2) * 2;
            const i64 step = (start + row) / batch, sequence = (start + row) % batch;
            const bool exists = start + row < rows;
            float h[2] = {0.0f, 0.0f};
            if (step > 0) {
                load_pair<VECTORS>(h,
                                   out_ptr + sequence * stride_out.b + (step - 1) * stride_out.n +
                                       at.head * stride_out.h + unit * stride_out.d,
                                   stride_out.d, unit, exists);
            } else if (initial_ptr != nullptr) {
                load_pair<false>(h, initial_ptr + (sequence * heads + at.head) * WIDTH + unit, 1, unit, exists);
            }
            store_shared_vector<2>(operand + (row * OPERAND_ROW + unit),
                                   Vector<Element, 2>{{Element(h[0]), Element(h[1])}});
        }
        __syncthreads();
        Sums sums[GATES] = {};
        product_of_one(sums, weights, operand, at);
        gathering.add(sums, at);
        if (at.leads()) {
#pragma unroll
            for (int e = 0; e < SEQ_TILES * 2; ++e) {
                const int t = e / 2, s = e % 2;
                const i64 row = start + at.sequence(t, s), step = row / batch, sequence = row % batch;
                if (row >= rows) continue;
                const Element* x_at = gates_ptr + sequence * stride_gates.b + step * stride_gates.n +
                                      at.head * stride_gates.h + at.unit * stride_gates.d;
                Kept* v_at = values_ptr + sequence * stride_values.b + step * stride_values.n +
                                at.head * stride_values.h + at.unit * stride_values.d;
#pragma unroll
                for (int g = 0; g < GATES; ++g) {
                    const Vector<float, 2> b = bias.of(g, at);
                    float x[2], v[2] = {sums[g][t][s] + b.at[0], sums[g][t][2 + s] + b.at[1]};
                    load_pair<VECTORS>(x, x_at + g * stride_gates.x, stride_gates.d, at.unit, true);
                    if (g < JOINED)
                        v[0] += x[0], v[1] += x[1];
                    else
                        store_pair(v_at + (g + APART) * stride_values.x, x, stride_values.d, at.unit);
                    store_pair(v_at + g * stride_values.x, v, stride_values.d, at.unit);
                }
            }
        }
        __syncthreads();
    }
}

// The forward pass of recurrent networks, all steps in one launch (FlashRNN, Poeppel et al., 2024, arXiv:2412.07752,
// section 3).
//
//     s_g = R_g h + b_g        states = cell(x, s, states)        for every step
//
// A group of BLOCKS blocks takes TILE sequences of one head through time (places.cuh). R stays in registers and shared
// memory all the while (product.cuh), the states in registers; gates come STAGES - 1 steps ahead (incoming.cuh), and h
// goes from warp to warp, or from block to block, once a step (exchange.cuh). Transposed, gates^T = R h^T, so that the
// matrix that stays is the operand of the matrix instructions that takes 16 rows, and a tile needs 8 sequences only.
//
// FLOPs: 2 G D^2 a step, head and sequence. Bytes: R and b once for every group; gates and h once; where a gradient
// will be taken, the values and S - 1 states of every step; with BLOCKS > 1, h BLOCKS times over. A step waits for the
// one before: the time is N times a product, a few exponentials and an exchange of h.
#include "cells.cuh"
#include "exchange.cuh"
#include "incoming.cuh"

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    flash_rnn_fwd_cuda(const Element* gates_ptr,      // [B, N, G, H, D]
                       const Element* recurrent_ptr,  // [G, H, D, D], out by in
                       const Element* bias_ptr,       // [G, H, D], contiguous, or null
                       const float* initial_ptr,      // [S, B, H, D], contiguous, or null
                       const int* lengths_ptr,        // [B], contiguous, or null
                       Element* out_ptr,              // [B, N, H, D]; zeros where there are lengths
                       float* state_ptr,              // [S, B, H, D], contiguous
                       Kept* values_ptr,              // [B, N, A, H, D], or null
                       float* history_ptr,            // [B, N, S - 1, H, D], or null
                       Element* exchange_ptr,         // [groups, 2, TILE, PADDED], or null for one block a head
                       u32* arrived_ptr,              // [groups], zeros, or null
                       Steps stride_gates, Matrices stride_recurrent, Steps stride_out, Steps stride_values,
                       Steps stride_history, int batch, int heads, int length) {
    const Place at(heads);
    SharedMemory arena;
    Weights<false> weights(arena, recurrent_ptr, stride_recurrent, at);
    const Lengths lengths(arena, lengths_ptr, at, batch, length);
    Exchange<1> exchange(arena, exchange_ptr, arrived_ptr);
    Gathering<GATES> gathering(arena);
    Incoming<Element, GATES> gates(arena, gates_ptr, stride_gates, at, lengths, 0, 1);

    const Bias bias(arena, bias_ptr, at, heads);
    int ends[SEQ_TILES][2];
    load_ends(ends, lengths, at);
    const int steps = lengths.longest();

#pragma unroll
    for (int turn = 0; turn < AHEAD; ++turn) {
        gates.request(turn, at);
        commit_copies();
    }
    Quad states[STATES][SEQ_TILES];
    load_states<0>(states, initial_ptr, at, at.leads() ? batch : 0, heads);
    if (at.leads()) exchange.put(0, 0, states[0], at);
    wait_copies<AHEAD - 1>();
    exchange.pass(0);

    for (int step = 0; step < steps; ++step) {
        Quad x[GATES][SEQ_TILES], values[VALUES][SEQ_TILES];
        Vector<float, 2> b[GATES];
        if (at.leads()) {
            gates.read(x, step, at);
#pragma unroll
            for (int g = 0; g < GATES; ++g) b[g] = bias.of(g, at);
        }
        Sums sums[GATES] = {};
        product_of_one(sums, weights, exchange.operand(step), at);
        // Behind the product, whose instructions take their time, and before what waits for it.
        if constexpr (VECTORS) gates.request(step + AHEAD, at);
        commit_copies();
        gathering.add(sums, at);
        if (at.leads()) {
#pragma unroll
            for (int e = 0; e < SEQ_TILES * 4; ++e) {
                const int t = e / 4, s = e / 2 % 2, u = e % 2;
                float v[VALUES], state[STATES];
#pragma unroll
                for (int g = 0; g < GATES; ++g) v[g] = sums[g][t][2 * u + s] + b[g].at[u];
#pragma unroll
                for (int g = 0; g < GATES; ++g) {
                    if (g < JOINED)
                        v[g] += x[g][t][s][u];
                    else
                        v[g + APART] = x[g][t][s][u];
                }
#pragma unroll
                for (int i = 0; i < STATES; ++i) state[i] = states[i][t][s][u];
                Cell::forward(v, state);
#pragma unroll
                for (int i = 0; i < STATES; ++i)
                    if (step < ends[t][s]) states[i][t][s][u] = state[i];
#pragma unroll
                for (int a = 0; a < VALUES; ++a) values[a][t][s][u] = v[a];
            }
            exchange.put(step + 1, 0, states[0], at);
        }
        wait_copies<AHEAD - 1>();
        exchange.pass(step + 1);
        if (at.leads()) {
            store_step<1>(out_ptr, stride_out, &states[0], ends, step, at);
            if (values_ptr != nullptr) store_step<VALUES>(values_ptr, stride_values, values, ends, step, at);
            if (OTHERS > 0 && history_ptr != nullptr)
                store_step<OTHERS>(history_ptr, stride_history, &states[STATES > 1], ends, step, at);
        }
    }
    if (at.leads()) store_states(state_ptr, states, at, batch, heads);
}

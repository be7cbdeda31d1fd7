// The backward pass of recurrent networks, all steps in one launch, from the last to the first.
//
//     dvalues, dstates = cell'(values, states before and after, dstates)        dh = dh' + sum_g R_g^T ds_g
//
// where dh' is what the cell itself passes on. Groups of blocks, tiles and lanes are those of the forward pass
// (places.cuh): a warp has 16 units, whose dh it makes and whose pointwise work it does, so it holds 16 rows of every
// R_g^T. What goes from warp to warp once a step are the ds of all gates. Values, dout and the states before a step
// come STAGES - 1 steps ahead. Nothing but dstates runs through time, so the gradients of R and b wait until the loop
// is over: dR_g = sum_t ds_g h^T is one product of length B N, in PyTorch.
//
// FLOPs: 2 G D^2 a step, head and sequence. Bytes: R once for every group; values, the S - 1 states after h (and h
// where the cell reads it), dout and the gradients of the gates once, and once more those of recurrent parts that are
// apart; with BLOCKS > 1, ds BLOCKS times over.
#include "cells.cuh"
#include "exchange.cuh"
#include "incoming.cuh"

constexpr int READS_H = Cell::READS_H ? 1 : 0;

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    flash_rnn_bwd_cuda(const Element* recurrent_ptr,  // [G, H, D, D], out by in
                       const float* initial_ptr,      // [S, B, H, D], contiguous, or null
                       const int* lengths_ptr,        // [B], contiguous, or null
                       const Element* out_ptr,        // [B, N, H, D]
                       const Kept* values_ptr,        // [B, N, A, H, D]
                       const float* history_ptr,      // [B, N, S - 1, H, D], or null
                       const Element* dout_ptr,       // [B, N, H, D]
                       const float* dstate_ptr,       // [S, B, H, D], contiguous, or null
                       Element* dgates_ptr,           // [B, N, G, H, D]
                       Element* dapart_ptr,           // [B, N, APART, H, D], or null
                       float* dinitial_ptr,           // [S, B, H, D], contiguous, or null
                       Element* exchange_ptr,         // [groups, 2, G, TILE, PADDED], or null for one block a head
                       u32* arrived_ptr,              // [groups], zeros, or null
                       Matrices stride_recurrent, Steps stride_out, Steps stride_values, Steps stride_history,
                       Steps stride_dout, Steps stride_dgates, Steps stride_dapart, int batch, int heads, int length,
                       float clip,  // infinite: none
                       int cuts) {
    const Place at(heads);
    SharedMemory arena;
    Weights<true> weights(arena, recurrent_ptr, stride_recurrent, at, !cuts);
    const Lengths lengths(arena, lengths_ptr, at, batch, length);
    Exchange<GATES> exchange(arena, exchange_ptr, arrived_ptr);
    Gathering<1> gathering(arena);
    int ends[SEQ_TILES][2];
    load_ends(ends, lengths, at);
    const int steps = lengths.longest();

    const int last = steps - 1;
    Incoming<Kept, VALUES> values(arena, values_ptr, stride_values, at, lengths, last, -1);
    Incoming<Element, 1> dout(arena, dout_ptr, stride_dout, at, lengths, last, -1);
    Incoming<Element, READS_H> h(arena, out_ptr, stride_out, at, lengths, last - 1, -1);
    Incoming<float, OTHERS> others(arena, history_ptr, stride_history, at, lengths, last - 1, -1);
    auto request = [&](int turn) {
        values.request(turn, at);
        dout.request(turn, at);
        h.request(turn, at);
        others.request(turn, at);
    };

#pragma unroll
    for (int turn = 0; turn < AHEAD; ++turn) {
        request(turn);
        commit_copies();
    }
    // The states after a step, but h.
    Quad states[STATES][SEQ_TILES] = {}, dstates[STATES][SEQ_TILES];
    load_step<OTHERS>(&states[STATES > 1], history_ptr, stride_history, ends, last, at);
    load_states<0>(dstates, dstate_ptr, at, at.leads() ? batch : 0, heads);
    wait_copies<AHEAD - 1>();
    __syncthreads();

    for (int turn = 0; turn < steps; ++turn) {
        const int step = last - turn;
        if constexpr (VECTORS) request(turn + AHEAD);
        commit_copies();
        Quad dvalues[VALUES][SEQ_TILES];
        if (at.leads()) {
            Quad v[VALUES][SEQ_TILES], dh[1][SEQ_TILES], before[STATES][SEQ_TILES] = {};
            values.read(v, turn, at);
            dout.read(dh, turn, at);
            h.read(before, turn, at);
            others.read(&before[STATES > 1], turn, at);
            if (step == 0) load_states<1 - READS_H>(before, initial_ptr, at, batch, heads);
#pragma unroll
            for (int e = 0; e < SEQ_TILES * 4; ++e) {
                const int t = e / 4, s = e / 2 % 2, u = e % 2;
                float value[VALUES], dvalue[VALUES], old[STATES], now[STATES], grad[STATES];
#pragma unroll
                for (int a = 0; a < VALUES; ++a) value[a] = v[a][t][s][u];
#pragma unroll
                for (int i = 0; i < STATES; ++i) {
                    old[i] = before[i][t][s][u];
                    now[i] = states[i][t][s][u];
                    grad[i] = dstates[i][t][s][u];
                }
                grad[0] += dh[0][t][s][u];
                Cell::backward(value, old, now, grad, dvalue);
                const bool valid = step < ends[t][s];
#pragma unroll
                for (int a = 0; a < VALUES; ++a) dvalues[a][t][s][u] = valid ? dvalue[a] : 0.0f;
#pragma unroll
                for (int i = 0; i < STATES; ++i) {
                    if (valid) dstates[i][t][s][u] = grad[i];
                    states[i][t][s][u] = old[i];
                }
            }
            if (!cuts) {
#pragma unroll
                for (int g = 0; g < GATES; ++g) exchange.put(turn, g, dvalues[g], at);
            }
        }
        wait_copies<AHEAD - 1>();
        if (cuts) {
            __syncthreads();
        } else {
            exchange.pass(turn);
            Sums sums[GATES] = {};
            product_of_each(sums, weights, exchange.operand(turn), at);
            Sums total[1];
#pragma unroll
            for (int e = 0; e < SEQ_TILES * 4; ++e) {
                total[0][e / 4][e % 4] = sums[0][e / 4][e % 4];
#pragma unroll
                for (int g = 1; g < GATES; ++g) total[0][e / 4][e % 4] += sums[g][e / 4][e % 4];
            }
            gathering.add(total, at);
            if (at.leads()) {
#pragma unroll
                for (int e = 0; e < SEQ_TILES * 4; ++e) {
                    const int t = e / 4, s = e / 2 % 2, u = e % 2;
                    const float through = least(most(total[0][t][2 * u + s], -clip), clip);
                    if (step < ends[t][s]) dstates[0][t][s][u] += through;
                }
            }
        }
        if (at.leads()) {
            store_step<JOINED>(dgates_ptr, stride_dgates, dvalues, ends, step, at);
            if constexpr (APART > 0) {
                store_step<APART>(dgates_ptr + JOINED * stride_dgates.x, stride_dgates, &dvalues[GATES], ends, step,
                                  at);
                store_step<APART>(dapart_ptr, stride_dapart, &dvalues[JOINED], ends, step, at);
            }
        }
    }
    if (at.leads() && dinitial_ptr != nullptr) store_states(dinitial_ptr, dstates, at, batch, heads);
}

// The forward kernel of fft_conv: y = post (k * v + skip v), v = pre u, in one pass over memory (FlashFFTConv,
// arXiv:2311.05908).
//
// Overlap-save: a block of M positions makes the last M - overlap of them, or fewer. Block c of a sequence begins at
// the time c step - lead; before time 0 lies the initial state, the sequence's own end (periodic), or zeros. Where all
// of a sequence is one block and its first half would be zeros (HALF), only the other half is loaded, transformed and
// stored.
//
// A thread block owns a head and runs through `units` blocks of pairs of sequences. Three barriers to a unit: when the
// largest element is known, after stage 1, and before stage 1 back.
//
// Bytes that a unit asks for: u and pre (and the past) once for every position inside the sequence, post and y once;
// the spectrum, 4 M, which units of a head share in the caches. FLOPs of a pair: 16 M (N1 + 2 R), of which half a block
// saves those of N1 / 2 if N1 = 32. Shared memory: 4 M bytes for the numbers, 4 N1 N1 + 8 R R for roots and factors.
//
// Constants: Element (fp16, bf16), N1, R, WARPS, HALF, ALIGNED.
#include "convolve.cuh"

extern "C" __global__ void __launch_bounds__(THREADS)
fft_conv_fwd_kernel(const Element* u_ptr,     // [B, H, N]
                    const Element* pre_ptr,   // [B, H, N] or null
                    const Element* post_ptr,  // [B, H, N] or null
                    const float* state_ptr,   // [B, H, past] or null
                    const u32* spectrum_ptr,  // [H, M] pairs of fp16, in the order of the lanes
                    const float* scale_ptr,   // [H], what the spectrum was divided by
                    Element* y_ptr,           // [B, H, N] contiguous
                    RowStrides stride_u, RowStrides stride_pre, RowStrides stride_post,
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
        const int head = unit.head, first = unit.now, start = first - lead;
        const auto input = [&](int member) { return inputs.of(unit.sequence(member), head); };
        const Undo undo = convolve(chip, input, unit.place(start, seqlen), {spectrum_ptr, scale_ptr}, head, 1.0f);

        const int b = afresh(unit.first), stop = least(seqlen, first + step);
        const auto finish = [&](int member, int time, Values& w, float factor) {
#pragma unroll
            for (int j = 0; j < 4; ++j) w.at[j] *= factor;
            if (post_ptr != nullptr) {
                const Row post = row_of(post_ptr, stride_post, b + member, head);
                const Values gate = load_times(post, time, first, stop);
#pragma unroll
                for (int j = 0; j < 4; ++j) w.at[j] *= gate.at[j];
            }
            const i64 row = static_cast<i64>(b + member) * heads + head;
            store_times(y_ptr + row * seqlen, w, time, first, stop);
        };
        back_to_signal(chip.planes, chip.first, [&](int position, Values re, Values im) {
            finish(0, start + position, re, undo.r);
            if (unit.two) finish(1, start + position, im, undo.i);
        });
    }
}

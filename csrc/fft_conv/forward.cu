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
// Constants: Element (fp16, bf16), N1, R, WARPS, HALF.
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
                    int periodic,  // before time 0 lies the end
                    int aligned) {
    SharedMemory arena;
    const Chip chip(arena);
    const int head = blockIdx.x % heads, part = blockIdx.x / heads;
    const int pairs = ceil_div(batch, members), last = least((part + 1) * units, pairs * chunks);
    const u32* spectrum = spectrum_ptr + static_cast<i64>(head) * POINTS;
    const float scale = load_global_uniform(scale_ptr + head);

#pragma unroll 1
    for (int unit = part * units; unit < last; ++unit) {
        const int start = unit / pairs * step - lead, b0 = unit % pairs * members;
        const bool two = members == 2 && b0 + 1 < batch;
        const Place place = {start, seqlen, {seqlen, two ? seqlen : 0}};
        Source source[2];
#pragma unroll
        for (int member = 0; member < 2; ++member) {
            const int b = two ? b0 + member : b0;
            const i64 row = static_cast<i64>(b) * heads + head;
            source[member] = {row_of(u_ptr, stride_u, b, head), row_of(pre_ptr, stride_pre, b, head), 0,
                              state_ptr == nullptr ? state_ptr : state_ptr + row * past, past,
                              periodic != 0, false, aligned != 0};
        }
        const Undo undo = convolve(chip, source, place, spectrum, scale, 1.0f);

        const int b = afresh(b0), first = start + lead, stop = least(seqlen, first + step);
        const auto finish = [&](int member, int time, Values& w, float factor) {
#pragma unroll
            for (int j = 0; j < 4; ++j) w.at[j] *= factor;
            if (post_ptr != nullptr) {
                const Row post = row_of(post_ptr, stride_post, b + member, head);
                const Values gate = load_times(post, time, first, stop, aligned != 0);
#pragma unroll
                for (int j = 0; j < 4; ++j) w.at[j] *= gate.at[j];
            }
            const i64 row = static_cast<i64>(b + member) * heads + head;
            store_times(y_ptr + row * seqlen, w, time, first, stop, aligned != 0);
        };
        back_to_signal(chip.planes, chip.first, [&](int position, Values re, Values im) {
            finish(0, start + position, re, undo.r);
            if (two) finish(1, start + position, im, undo.i);
        });
    }
}

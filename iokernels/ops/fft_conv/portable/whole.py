"""The backend ``torch`` where one transform covers a row: all filters but those much shorter than the sequence.

What a tile needs is laid out in one buffer with its zeros, inputs, gradients and the filter one behind the other, so
that a tile costs one call of the library forward and one back: each call prepares its transforms anew, which for few
short rows takes as long as the transforms.
"""

from __future__ import annotations

import torch
from torch import Tensor

from iokernels.ops.fft_conv.options import TWO_SIDED, Gradients, Options, effective_taps, kept_bins, unplaced
from iokernels.ops.fft_conv.real_fft import irfft, rfft
from iokernels.ops.shared.layout import state_dtype

from .lengths import Cut
from .rows import Part, tiles


def forward(u: Tensor, k: Tensor, spectrum: Tensor | None, options: Options, plan: Cut) -> Tensor:
    """y of a call that is not empty. ``spectrum`` is the filter's, if it is known."""
    n, y = u.shape[2], u.new_empty(u.shape)
    for rows in tiles(u, plan):
        part = Part(u, options, rows)
        count, heads = rows.shape
        x = _buffer(u, count + (spectrum is None), heads, plan)
        v = part.fill_inputs(x[:count], plan.overlap)
        if spectrum is None:
            _place(rows.of_heads(k), x[count], n, options)
        frequencies = _kept(rfft(x), options, plan)
        if options.skip is None:
            x = v = None  # their memory serves the way back
        mine = frequencies[count] if spectrum is None else rows.of_heads(spectrum)
        w = irfft(frequencies[:count].mul_(mine), n=plan.length)[..., plan.overlap : plan.width]
        part.finish(w, v, 0, n, options.post_gate, y)
    return y


def backward(
    dy: Tensor, u: Tensor, k: Tensor, spectrum: Tensor | None, options: Options, plan: Cut, grads: Gradients
) -> None:
    """Fill those of ``grads`` that are not None."""
    n, sums = u.shape[2], state_dtype(u.dtype)
    known = spectrum if grads.k is None else None
    skips = torch.zeros(k.shape[0], dtype=sums, device=u.device)
    dk = grads.k if grads.k is None or k.dtype == sums else k.new_empty(k.shape, dtype=sums)
    for rows in tiles(u, plan):
        part = Part(u, options, rows, dy)
        count, heads = rows.shape
        # The rows of the buffer: v, g, and the filter where it is not known.
        x = _buffer(u, 2 * count + (known is None), heads, plan)
        v, g = x[:count], part.fill_gradients(x[count : 2 * count], plan.overlap)
        reads_v = grads.k is not None or grads.post_gate is not None
        if reads_v or grads.skip is not None:
            v = part.fill_inputs(v, plan.overlap)
        if grads.skip is not None:
            skips[rows.heads] += torch.linalg.vecdot(g, v).sum(0)
        if known is None:
            _place(rows.of_heads(k), x[2 * count], n, options)
        first = 0 if reads_v else count  # of the rows that are transformed
        frequencies = _kept(rfft(x[first:]), options, plan)
        of_v, of_g = frequencies[: count - first], frequencies[count - first : 2 * count - first]
        mine = frequencies[-1] if known is None else rows.of_heads(known)
        products = None
        if grads.k is not None:
            products = of_v.conj_physical() if grads.post_gate is not None else of_v.conj_physical_()
            products.mul_(of_g)
        # What goes back stands where its factors did: w for v, dv for g, dk for the filter.
        if grads.post_gate is not None:
            of_v.mul_(mine)
        of_g.mul_(mine.conj_physical())
        if products is not None:
            torch.sum(products, 0, out=frequencies[-1])
        unused = 0 if grads.post_gate is not None else count - first
        results = irfft(frequencies[unused:], n=plan.length)
        first += unused
        if grads.post_gate is not None:
            part.finish(results[:count, :, plan.overlap : plan.width], v, 0, n, dy, grads.post_gate)
        dv = results[count - first : 2 * count - first, :, : plan.width]
        if grads.initial_state is not None:
            rows.of(grads.initial_state).copy_(dv[..., : plan.overlap])
        part.store_inputs(dv[..., plan.overlap :], g, 0, n, grads)
        if dk is not None:
            taps, sum_of_tiles = unplaced(results[-1], k.shape[1], n, options), rows.of_heads(dk)
            sum_of_tiles.copy_(taps) if rows.batch.start == 0 else sum_of_tiles.add_(taps)
    if grads.skip is not None:
        grads.skip.copy_(skips)
    if grads.k is not None and dk is not None and dk is not grads.k:
        grads.k.copy_(dk)


def _buffer(u: Tensor, rows: int, heads: int, plan: Cut) -> Tensor:
    """Room for so many rows of every head, ``[rows, heads, L]``: inputs of the transform, uninitialised."""
    return u.new_empty((rows, heads, plan.length), dtype=state_dtype(u.dtype))


def _place(k: Tensor, period: Tensor, n: int, options: Options) -> None:
    """Fill one period of the filter, ``[heads, L]``: the tap of lag l at index ``l mod L``."""
    ahead = n - 1 if options.mode == TWO_SIDED else 0
    there = effective_taps(n, k.shape[1], options) - ahead
    period[:, :there] = k[:, ahead : ahead + there]
    period[:, there : period.shape[1] - ahead].zero_()
    if ahead:
        period[:, period.shape[1] - ahead :] = k[:, :ahead]


def _kept(frequencies: Tensor, options: Options, plan: Cut) -> Tensor:
    return frequencies[..., : kept_bins(options.keep, plan.length)] if options.keep < 1.0 else frequencies

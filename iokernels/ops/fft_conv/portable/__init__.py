"""``fft_conv`` by ``torch.fft``: the backend ``torch``, for any device and any dtype.

Maths. With capitals for transforms of length L that is long enough for no output to be reached around the end,

    forward     v = pre u             w = iFFT(K V)             y = post (w + skip v)
    backward    g = post dy           dv = iFFT(conj(K) G) + skip g     dk = iFFT(sum_b G conj(V))
                du = pre dv           dpre = u dv               dpost = dy (w + skip v)     dskip = sum_bt g v

Real transforms only. L is the least number that is long enough and has no prime factor but 2, 3 and 5, and a row is one
transform (:mod:`.whole`). Where the filter is at least :data:`.lengths.SHORT` times shorter than the
sequence, a row is cut into blocks instead (overlap-save): with P = Nk - 1 and S = L - P, block c makes the outputs from
``c S`` on,

    w_c = iFFT(K FFT(v[c S - P :]))[P:]     dk = iFFT(sum_c FFT(0, g_c) conj FFT(v[c S - P :]))[:Nk]
    dv_c = iFFT(conj(K) FFT(g[c S :]))[:S]    from the first step of the past on, whose part is the state's gradient

Memory: rows, or blocks of a row, are taken a few at a time, so that a step works on a bounded number of bytes that
stay in a CPU's caches: about :func:`.rows.workspace`, or 32 transforms if that is more. FLOPs:
``2.5 L log2 L`` a transform; 2 a row forward, 5 backward, 1 more for the gradient of a post gate, and 1 for each
filter, 2 backward. Sums are float32, float64 for float64.

Conjugates are written out: a lazy one is not seen inside an operator that a compiled graph calls.
"""

from __future__ import annotations

import torch
from torch import Tensor

from iokernels.ops.fft_conv.options import (
    Gradients,
    Needs,
    Options,
    effective_taps,
    empty_gradients,
    kept_bins,
    placed,
    unplaced,
)
from iokernels.ops.fft_conv.real_fft import irfft, rfft
from iokernels.ops.shared.layout import state_dtype

from . import whole
from .lengths import Cut, cut
from .rows import Part, Rows, pieces, tiles


def transform(k: Tensor, n: int, dtype: torch.dtype, options: Options) -> list[Tensor]:
    """The spectrum of a filter ``[H, Nk]`` for inputs of length n: complex ``[H, L/2 + 1]``, or the kept ones."""
    k = k.to(state_dtype(dtype))
    length = cut(n, effective_taps(n, k.shape[1], options), options).length
    spectrum = rfft(placed(k, length, n, options))
    return [spectrum[:, : kept_bins(options.keep, length)].contiguous() if options.keep < 1.0 else spectrum]


def forward(u: Tensor, k: Tensor, transformed: list[Tensor], options: Options) -> Tensor:
    """y as :class:`Options` defines it. ``transformed`` is what :func:`transform` made of k, or empty."""
    if u.numel() == 0:
        return u.new_empty(u.shape)
    n, plan = u.shape[2], _plan(u, k, options)
    if not plan.blocks:
        return whole.forward(u, k, transformed[0] if transformed else None, options, plan)
    y, spectrum = u.new_empty(u.shape), _spectrum(u, k, transformed, options)
    for rows in tiles(u, plan):
        part = Part(u, options, rows)
        for start, count in pieces(u, rows, plan, n, plan.step):
            stop = min(start + count * plan.step, n)
            x = part.inputs(start - plan.overlap, plan.overlap + count * plan.step)
            w = _inverse(_blocks(x, plan).mul_(spectrum[rows.heads, None]), plan, plan.overlap)
            w = w[..., : stop - start]
            v = x[..., plan.overlap : plan.overlap + stop - start]
            part.finish(w, v, start, stop, options.post_gate, y)
    return y


def backward(dy: Tensor, u: Tensor, k: Tensor, transformed: list[Tensor], options: Options, needs: Needs) -> Gradients:
    """The gradients that ``needs`` names."""
    plan = _plan(u, k, options)
    grads = empty_gradients(u, k, options, needs, zeros=bool(plan.blocks))
    if u.numel() == 0:
        return grads
    if not plan.blocks:
        whole.backward(dy, u, k, transformed[0] if transformed else None, options, plan, grads)
        return grads
    spectrum = _spectrum(u, k, transformed, options)
    sums = state_dtype(u.dtype)
    filters = torch.zeros_like(spectrum)
    skips = torch.zeros(k.shape[0], dtype=sums, device=u.device)
    for rows in tiles(u, plan):
        part = Part(u, options, rows, dy)
        _inputs_gradients(part, rows, spectrum, plan, grads)
        if grads.k is not None or grads.post_gate is not None or grads.skip is not None:
            _other_gradients(part, rows, spectrum, plan, grads, filters, skips)
    if grads.k is not None:
        grads.k.copy_(_taps(filters, k.shape[1], u.shape[2], plan, options))
    if grads.skip is not None:
        grads.skip.copy_(skips)
    return grads


def _inputs_gradients(part: Part, rows: Rows, spectrum: Tensor, plan: Cut, grads: Gradients) -> None:
    """du, dpre and that of the initial state, all from dv."""
    if grads.u is None and grads.pre_gate is None and grads.initial_state is None:
        return
    n, past = part.u.shape[2], 0 if part.options.initial_state is None else part.options.initial_state.shape[2]
    conjugate = spectrum[rows.heads, None].conj_physical()
    for first, count in pieces(part.u, rows, plan, past + n, plan.step):
        start, stop = first - past, min(first + count * plan.step, past + n) - past
        g = part.gradients(start, (count - 1) * plan.step + plan.length)
        dv = _blocks(g, plan).mul_(conjugate)
        dv = _inverse(dv, plan, 0)[..., : stop - start]
        ahead = min(max(-start, 0), stop - start)
        if grads.initial_state is not None and ahead:
            grads.initial_state[rows.index][..., start + past : start + past + ahead] = dv[..., :ahead]
        if ahead < stop - start:
            part.store_inputs(dv[..., ahead:], g[..., ahead : stop - start], start + ahead, stop, grads)


def _other_gradients(
    part: Part, rows: Rows, spectrum: Tensor, plan: Cut, grads: Gradients, filters: Tensor, skips: Tensor
) -> None:
    """dk (added to ``filters``, as frequencies), dpost and dskip (added to ``skips``)."""
    n = part.u.shape[2]
    for start, count in pieces(part.u, rows, plan, n, plan.step):
        stop = min(start + count * plan.step, n)
        x = part.inputs(start - plan.overlap, plan.overlap + count * plan.step)
        v = x[..., plan.overlap : plan.overlap + stop - start]
        g = part.gradients(start, count * plan.step)
        if grads.skip is not None:
            skips[rows.heads] += torch.linalg.vecdot(g[..., : stop - start], v).sum(0)
        if grads.k is None and grads.post_gate is None:
            continue
        inputs = _blocks(x, plan)
        if grads.k is not None:
            dw = g.unflatten(2, (count, plan.step))
            dw = rfft(torch.nn.functional.pad(dw, (plan.overlap, 0)))
            filters[rows.heads] += dw.mul_(inputs.conj_physical()).sum((0, 2))
        if grads.post_gate is not None:
            w = _inverse(inputs.mul_(spectrum[rows.heads, None]), plan, plan.overlap)[..., : stop - start]
            part.finish(w, v, start, stop, part.dy, grads.post_gate)


def _plan(u: Tensor, k: Tensor, options: Options) -> Cut:
    return cut(u.shape[2], effective_taps(u.shape[2], k.shape[1], options), options)


def _spectrum(u: Tensor, k: Tensor, transformed: list[Tensor], options: Options) -> Tensor:
    return (transformed or transform(k, u.shape[2], u.dtype, options))[0]


def _blocks(x: Tensor, plan: Cut) -> Tensor:
    """Transforms ``[b, h, blocks, frequencies]`` of x ``[b, h, time]``."""
    return rfft(x.unfold(2, plan.length, plan.step))


def _inverse(product: Tensor, plan: Cut, first: int) -> Tensor:
    """``[b, h, time]``: of every block the results from ``first`` on that are its own."""
    return irfft(product, n=plan.length)[..., first : first + plan.step].flatten(2)


def _taps(filters: Tensor, taps: int, n: int, plan: Cut, options: Options) -> Tensor:
    """The gradient of the taps ``[H, Nk]`` from its frequencies."""
    period = irfft(filters, n=plan.length)
    return unplaced(period, taps, n, options)

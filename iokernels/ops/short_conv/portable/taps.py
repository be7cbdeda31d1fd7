"""Short convolution of a few taps in PyTorch, one tap after the other: the dense part of the backend ``torch``.

A tap is a shifted multiply-add of whole tensors, and what a shift leaves out is what padding with zeros would have
added, so nothing is padded. A tile that stays in a core's cache is taken through all taps, the bias and the activation
before the next one. Half precision is converted once a tile and computed in float32. Nothing of this is slower with the
channels inside, where PyTorch's grouped convolution reorders its inputs.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from iokernels.ops.short_conv.options import ShortOptions, compute_dtype, empty_rows, out_length

MOST_TAPS = 8
"""Wider filters are faster as convolutions of PyTorch."""

_TILE = 2**17
"""Elements of a tile, for each thread."""
_LEAST_CHANNELS = 64
"""Shorter runs of channels, where they are inside, cost more than a tile that does not fit the cache."""


def forward(x: Tensor, weight: Tensor, options: ShortOptions) -> Tensor:
    """Dense, without a state: out in the dtype and memory order of x."""
    width, dtype = weight.shape[1], compute_dtype(x, weight)
    out = empty_rows(x, out_length(x.shape[2], width, options))
    taps, bias = _columns(weight, dtype), None if options.bias is None else options.bias.to(dtype)[:, None]
    for batch, heads, first, last in _tiles(out):
        start, stop = max(first - options.left, 0), min(last - options.left + width - 1, x.shape[2])
        rows, target = x[batch, heads, start:stop], out[batch, heads, first:last]
        sums = target if out.dtype == dtype else _room(target, dtype)
        _correlate(sums, _as(rows, dtype), [tap[heads] for tap in taps], first - options.left - start)
        if bias is not None:
            sums.add_(bias[heads])
        if options.silu:
            F.silu(sums, inplace=True)
        if sums is not target:
            target.copy_(sums)
    return out


def backward(
    dout: Tensor, x: Tensor, weight: Tensor, options: ShortOptions, needs: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor]:
    """The gradients of x and weight, where needed, and that of a bias (both float32, float64 for float64)."""
    channels, width = weight.shape
    dtype, left, length = compute_dtype(x, weight), options.left, x.shape[2]
    taps, bias = _columns(weight, dtype), None if options.bias is None else options.bias.to(dtype)[:, None]
    turned = taps[::-1]
    dx = empty_rows(x, length) if needs[0] else None
    dweight = x.new_zeros((channels, width), dtype=dtype) if needs[1] else None
    dbias = x.new_zeros(channels, dtype=dtype)
    for batch, heads in _whole_rows(x):
        rows, dsum = _as(x[batch, heads], dtype), _as(dout[batch, heads], dtype)
        if options.silu:
            sums = _room(dsum, dtype)
            _correlate(sums, rows, [tap[heads] for tap in taps], -left)
            if bias is not None:
                sums.add_(bias[heads])
            dsum = torch.ops.aten.silu_backward.grad_input(dsum, sums, grad_input=sums)
        dbias[heads] += dsum.sum((0, 2))
        room = _room(rows, dtype)  # for one product after the other
        if dweight is not None:
            for tap in range(width):
                here, there = _overlap(dsum.shape[2], length, tap - left)
                product = torch.mul(dsum[..., here], rows[..., there], out=room[..., there])
                dweight[heads, tap] += product.sum((0, 2))
        if dx is not None:
            target = dx[batch, heads]
            sums = target if dx.dtype == dtype else room
            _correlate(sums, dsum, [tap[heads] for tap in turned], left - width + 1)
            if sums is not target:
                target.copy_(sums)
    return dx, dweight, dbias


def _correlate(out: Tensor, rows: Tensor, taps: list[Tensor], shift: int) -> None:
    """``out[m] = sum_w taps[w] rows[m + w + shift]``, rows being 0 outside."""
    first = None
    for tap in range(len(taps)):
        here, _ = _overlap(out.shape[2], rows.shape[2], tap + shift)
        if here.stop - here.start == out.shape[2]:
            first = tap
            break
    if first is None:
        out.zero_()
    else:
        there = _overlap(out.shape[2], rows.shape[2], first + shift)[1]
        torch.mul(rows[..., there], taps[first], out=out)
    for tap, factor in enumerate(taps):
        here, there = _overlap(out.shape[2], rows.shape[2], tap + shift)
        if tap != first and here.start < here.stop:
            out[..., here].addcmul_(rows[..., there], factor)


def _overlap(outputs: int, inputs: int, shift: int) -> tuple[slice, slice]:
    """Where m is an output and ``m + shift`` an input, and the latter."""
    start = max(0, -shift)
    stop = max(start, min(outputs, inputs - shift))
    return slice(start, stop), slice(start + shift, stop + shift)


def _columns(weight: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """Every tap as ``[H, 1]``."""
    return [tap[:, None] for tap in weight.to(dtype).t().contiguous()]


def _as(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x, or a copy in another dtype and the same order."""
    return x if x.dtype == dtype else _room(x, dtype).copy_(x)


def _room(x: Tensor, dtype: torch.dtype) -> Tensor:
    """An uninitialised tensor of the shape of x, dense in the order that x has."""
    batch, heads, length = x.shape
    if x.stride(1) < x.stride(2):
        return x.new_empty((batch, length, heads), dtype=dtype).transpose(1, 2)
    return x.new_empty((batch, heads, length), dtype=dtype)


def _elements(x: Tensor) -> int:
    return _TILE * torch.get_num_threads() if x.device.type == "cpu" else x.numel()


def _tiles(out: Tensor) -> Iterator[tuple[slice, slice, int, int]]:
    """Sequences, channels, and outputs from first to last."""
    batch, heads, length = out.shape
    most = max(_elements(out), 1)
    if out.stride(1) < out.stride(2):
        channels = heads
        steps = max(1, min(length, most // max(heads, 1)))
    else:
        steps = max(1, min(length, most))
        channels = max(1, min(heads, most // steps))
    sequences = max(1, most // (steps * channels)) if channels == heads and steps == length else 1
    for b in range(0, batch, sequences):
        for h in range(0, heads, max(channels, 1)):
            for first in range(0, length, steps):
                yield slice(b, b + sequences), slice(h, h + channels), first, min(first + steps, length)


def _whole_rows(x: Tensor) -> Iterator[tuple[slice, slice]]:
    """Sequences and channels, channels outside."""
    batch, heads, length = x.shape
    most = max(_elements(x) // max(length, 1), 1)
    channels = max(most, _LEAST_CHANNELS if x.stride(1) < x.stride(2) else 1)
    sequences = max(1, most // max(heads, 1))
    for h in range(0, heads, channels):
        for b in range(0, batch, sequences):
            yield slice(b, b + sequences), slice(h, h + channels)

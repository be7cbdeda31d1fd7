"""What the backend ``torch`` works on at a time: some rows of a call, and of them a stretch of time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from iokernels.ops.fft_conv.options import Gradients, Options
from iokernels.ops.shared.layout import state_dtype

from .lengths import Cut


class Rows(NamedTuple):
    """The sequences and heads that are worked on together."""

    batch: slice
    heads: slice
    count: int
    all: bool = False  # whether these are all there are

    @property
    def shape(self) -> tuple[int, int]:
        """How many sequences and heads."""
        return self.batch.stop - self.batch.start, self.heads.stop - self.heads.start

    @property
    def index(self) -> tuple[slice, slice]:
        """Of a ``[B, H, N]`` tensor."""
        return self.batch, self.heads

    def of(self, x: Tensor) -> Tensor:
        """Their part of x ``[B, H, ...]``."""
        return x if self.all else x[self.batch, self.heads]

    def of_heads(self, x: Tensor) -> Tensor:
        """Their part of x ``[H, ...]``."""
        return x if self.all else x[self.heads]


_LEAST_TRANSFORMS = 32
"""Fewer at once, and the library's preparation of a transform, which it repeats in every call, takes too much."""


_NOT_CUT = 4
"""A call of up to so many workspaces is one tile: fewer calls of the library are worth more than the cache."""


def workspace(u: Tensor) -> int:
    """Bytes that a step works on, if that is enough transforms: what stays in a CPU's caches, or is little on a GPU.

    Several threads take larger steps, because each step wakes them up a few times.
    """
    threads = torch.get_num_threads()
    if u.device.type != "cpu":
        return 2**28
    return 2**22 if threads == 1 else 2**24 * threads


def _bytes(u: Tensor, plan: Cut) -> int:
    """What a transform works on, with what comes in and goes out."""
    return 3 * state_dtype(u.dtype).itemsize * plan.length


def _together(u: Tensor, plan: Cut) -> int:
    """How many transforms make up :func:`workspace`."""
    return max(_LEAST_TRANSFORMS, workspace(u) // _bytes(u, plan))


def tiles(u: Tensor, plan: Cut) -> Iterator[Rows]:
    """Heads a few at a time with the whole batch, or, where that is too much, one head with a few sequences."""
    batch, heads, _ = u.shape
    many = _together(u, plan)
    if not plan.blocks and batch * heads * _bytes(u, plan) <= _NOT_CUT * workspace(u):
        yield Rows(slice(0, batch), slice(0, heads), batch * heads, True)
        return
    if plan.blocks:
        many = max(1, many // max(1, u.shape[2] // plan.step))
    sequences, together = min(batch, many), max(1, many // batch)
    for head in range(0, heads, together):
        for first in range(0, batch, sequences):
            last, stop = min(first + sequences, batch), min(head + together, heads)
            yield Rows(slice(first, last), slice(head, stop), (last - first) * (stop - head))


def pieces(u: Tensor, rows: Rows, plan: Cut, outputs: int, step: int) -> Iterator[tuple[int, int]]:
    """Stretches of ``outputs``: (where one starts, how many blocks of ``step`` it has)."""
    blocks = -(-outputs // step)
    many = max(1, _together(u, plan) // rows.count)
    for first in range(0, blocks, many):
        yield first * step, min(many, blocks - first)


class Part:
    """Some rows of a call's tensors, in the dtype of the sums."""

    def __init__(self, u: Tensor, options: Options, rows: Rows, dy: Tensor | None = None) -> None:
        self.u, self.options, self.rows, self.dy = u, options, rows, dy
        self.dtype = state_dtype(u.dtype)

    def inputs(self, start: int, length: int) -> Tensor:
        """v from ``start`` on, past and zeros included. Not to be changed: it may be u itself."""
        return self._stretch(self.u, self.options.pre_gate, self.options.initial_state, start, length)

    def gradients(self, start: int, length: int) -> Tensor:
        """g from ``start`` on, with zeros around it. Not to be changed."""
        assert self.dy is not None
        return self._stretch(self.dy, self.options.post_gate, None, start, length)

    def fill_inputs(self, x: Tensor, past: int) -> Tensor:
        """Store ``past`` steps of the state, v and zeros in ``x [b, h, L]``. Returns the view of v."""
        if past:
            assert self.options.initial_state is not None
            x[..., :past] = self.rows.of(self.options.initial_state)
        return self._fill(x, self.u, self.options.pre_gate, past)

    def fill_gradients(self, x: Tensor, past: int) -> Tensor:
        """Store ``past`` zeros, g and zeros in ``x [b, h, L]``. Returns the view of g."""
        assert self.dy is not None
        if past:
            x[..., :past].zero_()
        return self._fill(x, self.dy, self.options.post_gate, past)

    def _fill(self, x: Tensor, source: Tensor, gate: Tensor | None, past: int) -> Tensor:
        stop = past + source.shape[2]
        inside = x[..., past:stop].copy_(self.rows.of(source))
        if gate is not None:
            inside.mul_(self.rows.of(gate))
        x[..., stop:].zero_()
        return inside

    def finish(self, w: Tensor, v: Tensor | None, start: int, stop: int, factor: Tensor | None, out: Tensor) -> None:
        """``out = factor * (w + skip * v)`` of the outputs from start to stop; w is changed. Only skip reads v."""
        if self.options.skip is not None and v is not None:
            w.addcmul_(self._skip(), v)
        if factor is not None:
            w.mul_(self._stretch_of(factor, start, stop))
        self._stretch_of(out, start, stop).copy_(w)

    def store_inputs(self, dv: Tensor, g: Tensor, start: int, stop: int, grads: Gradients) -> None:
        """du and dpre from dv without its skip term, which is changed."""
        if self.options.skip is not None:
            dv.addcmul_(self._skip(), g)
        if grads.pre_gate is not None:
            self._stretch_of(grads.pre_gate, start, stop).copy_(dv * self._stretch_of(self.u, start, stop))
        if grads.u is not None:
            if self.options.pre_gate is not None:
                dv.mul_(self._stretch_of(self.options.pre_gate, start, stop))
            self._stretch_of(grads.u, start, stop).copy_(dv)

    def _stretch_of(self, x: Tensor, start: int, stop: int) -> Tensor:
        x = self.rows.of(x)
        return x if stop - start == x.shape[2] else x[..., start:stop]

    def _skip(self) -> Tensor:
        assert self.options.skip is not None
        return self.options.skip[self.rows.heads, None].to(self.dtype)

    def _stretch(self, x: Tensor, gate: Tensor | None, past: Tensor | None, start: int, length: int) -> Tensor:
        n = x.shape[2]
        first, last = min(max(start, 0), n), min(max(start + length, 0), n)
        inside = x[self.rows.index][..., first:last].to(self.dtype)
        if gate is not None:
            inside = inside * gate[self.rows.index][..., first:last]
        before = min(max(-start, 0), length)
        if past is not None and before:
            width = min(before, past.shape[2])
            inside = torch.cat([past[self.rows.index][..., past.shape[2] - width :], inside], dim=2)
            before -= width
        after = length - before - inside.shape[2]
        return torch.nn.functional.pad(inside, (before, after)) if before or after else inside

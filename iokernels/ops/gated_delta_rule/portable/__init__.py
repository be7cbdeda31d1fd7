"""``gated_delta_rule`` in chunked PyTorch: the backend ``torch``, for any device and any dtype.

Rows are taken in chunks of C, a few chunks at a time (a segment); :mod:`.chunks` has the maths. FLOPs a
row and head: ``C (5 K + 3 V) + 6 K V`` forward. Bytes: q, k, v and out once, and a segment's intermediate results,
which stay in a cache if its size allows (:data:`SEGMENT_ELEMENTS`). The backward pass keeps the state at the start of
every segment, and makes the segment again.

Sums and states are float32 (float64 for float64 inputs). Packed sequences are run one after the other; their offsets
are read on the host.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from iokernels.ops.gated_delta_rule.options import (
    DeltaOptions,
    Gradients,
    empty_inverses,
    empty_state,
    log_decay_gradient,
)
from iokernels.ops.shared.decays import LEAST_LOG_DECAY
from iokernels.ops.shared.layout import empty_in_order_of, state_dtype

from . import chunks as maths

CHUNK = 64
"""Rows to a chunk: the triangular system costs C a row, and the walk over the state 1/C."""

SEGMENT_ELEMENTS = 1 << 18
"""Elements of q, k and v in a segment."""


class Inputs(NamedTuple):
    """One call, or one packed sequence of it: views."""

    q: Tensor  # [B, Hk, N, K]
    k: Tensor
    v: Tensor  # [B, H, N, V]
    beta: Tensor  # [B, H, N]
    log_decay: Tensor | None

    def part(self, rows: slice) -> Inputs:
        """These rows of all of it."""
        return Inputs(*(x if x is None else x[:, :, rows] for x in self))  # pyright: ignore[reportArgumentType]

    def rows(self, chunk: int, scale: float) -> maths.Rows:
        """Cut into chunks; query and key heads are repeated for the value heads that share them."""
        heads, dtype = self.v.shape[1], state_dtype(self.v.dtype)
        decay = self.log_decay
        if decay is None:
            decay = self.beta.new_zeros(()).expand(self.beta.shape)
        return maths.Rows(
            q=_cut(self.q.to(dtype) * scale, heads, chunk),
            k=_cut(self.k.to(dtype), heads, chunk),
            v=_cut(self.v.to(dtype), heads, chunk),
            beta=_cut(self.beta.to(dtype)[..., None], heads, chunk),
            log_decay=_cut(decay.to(dtype).clamp(LEAST_LOG_DECAY, 0.0)[..., None], heads, chunk)[..., 0],
        )

    def segments(self, chunk: int) -> list[slice]:
        """Rows in parts of whole chunks."""
        batch, heads, length, width = self.v.shape
        most = max(1, SEGMENT_ELEMENTS // max(1, batch * heads * chunk * (2 * self.k.shape[3] + width))) * chunk
        return [slice(start, min(start + most, length)) for start in range(0, length, most)]


def _cut(x: Tensor, heads: int, chunk: int) -> Tensor:
    """[B, Hk, n, D] as [B * H, M, C, D], with zeros at the end."""
    batch, shared, length, width = x.shape
    x = F.pad(x, (0, 0, 0, -length % chunk))
    x = x.unsqueeze(2).expand(-1, -1, heads // shared, -1, -1)
    return x.reshape(batch * heads, x.shape[3] // chunk, chunk, width)


def _joined(x: Tensor, like: Tensor) -> Tensor:
    """The reverse: [B * H, M, C, D] as [B, Hk, n, D], summed over the heads that share one."""
    batch, shared, length, width = like.shape
    group = x.shape[0] // (batch * shared) if batch else 1
    x = x.reshape(batch, shared, group, x.shape[1] * x.shape[2], width)[:, :, :, :length]
    return x.sum(2) if x.shape[2] > 1 else x.squeeze(2)


def forward(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, options: DeltaOptions) -> tuple[Tensor, Tensor, Tensor]:
    """Returns (out [B, H, N, V], final state [S, H, K, V], and for the backward pass nothing)."""
    out, final = empty_in_order_of(v, v.shape[3]), empty_state(q, v, options)
    if options.cu_seqlens is not None:
        out.zero_()
    for index, rows in _sequences(q, options):
        given = Inputs(q, k, v, beta, options.log_decay).part(rows)
        state = _initial(options, final, index)
        chunk = _chunk(given)
        for part in given.segments(chunk):
            made, state = maths.forward(given.part(part).rows(chunk, options.scale), state)
            rows_out = out[:, :, rows][:, :, part]
            rows_out.copy_(_joined(made, rows_out))
        final[index].copy_(state.view_as(final[index]))
    return out, final, empty_inverses(q, v, "torch")


def backward(
    dout: Tensor, dfinal: Tensor | None, q: Tensor, k: Tensor, v: Tensor, beta: Tensor, inverses: Tensor,
    options: DeltaOptions,
) -> Gradients:  # fmt: skip
    """The gradients of all arguments. ``dfinal`` is None where nobody used the final state."""
    decay = options.log_decay
    dq, dk, dv = (empty_in_order_of(x, x.shape[3]) for x in (q, k, v))
    dbeta = torch.empty_like(beta)
    ddecay = None if decay is None else torch.empty_like(decay)
    dinitial = empty_state(q, v, options)
    if options.cu_seqlens is not None:
        for gradient in (dq, dk, dv, dbeta, ddecay):
            if gradient is not None:
                gradient.zero_()
    accurate = state_dtype(q.dtype)
    for index, rows in _sequences(q, options):
        given = Inputs(q, k, v, beta, decay).part(rows)
        chunk = _chunk(given)
        parts = given.segments(chunk)
        states = [_initial(options, dinitial, index)]
        for part in parts[:-1]:
            states.append(maths.forward(given.part(part).rows(chunk, options.scale), states[-1])[1])
        gradient = torch.zeros_like(states[0]) if dfinal is None else dfinal[index].to(accurate).reshape_as(states[0])
        grads = Inputs(dq, dk, dv, dbeta, ddecay).part(rows)
        rows_dout = dout[:, :, rows]
        for part in reversed(parts):
            state = states.pop()
            cut = _cut(rows_dout[:, :, part].to(accurate), v.shape[1], chunk)
            made, gradient = maths.backward(given.part(part).rows(chunk, options.scale), state, cut, gradient)
            made = made._replace(q=made.q.mul_(options.scale), log_decay=made.log_decay[..., None])
            for target, x in zip(grads.part(part), made, strict=True):
                if target is not None:
                    target = target if target.dim() == 4 else target[..., None]
                    target.copy_(_joined(x, target))
        dinitial[index].copy_(gradient.view_as(dinitial[index]))
    if decay is not None and ddecay is not None:
        log_decay_gradient(ddecay, decay)
    return Gradients(dq, dk, dv, dbeta, ddecay, None if options.initial_state is None else dinitial)


def step(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, state: Tensor, log_decay: Tensor | None, scale: float
) -> Tensor:
    """The recurrence itself, over the few tokens of q ``[B, Hk, N, K]``; ``state [B, H, K, V]`` is updated in place."""
    heads, length, width = v.shape[1:]
    out = empty_in_order_of(v, width)
    group = heads // q.shape[1]
    q, k = (x.to(state.dtype).repeat_interleave(group, dim=1) if group > 1 else x.to(state.dtype) for x in (q, k))
    v, beta = v.to(state.dtype), beta.to(state.dtype)
    for t in range(length):
        if log_decay is not None:
            state.mul_(log_decay[:, :, t].to(state.dtype).clamp(LEAST_LOG_DECAY, 0.0).exp()[..., None, None])
        key = k[:, :, t, None]
        written = beta[:, :, t, None, None] * (v[:, :, t, None] - key @ state)
        state.addcmul_(key.transpose(2, 3), written)
        out[:, :, t].copy_(((q[:, :, t, None] * scale) @ state).squeeze(2))
    return out


def _chunk(given: Inputs) -> int:
    """A short sequence is one chunk of its own length."""
    return max(1, min(CHUNK, given.v.shape[2]))


def _sequences(q: Tensor, options: DeltaOptions) -> Iterator[tuple[slice, slice]]:
    """The states and the rows that belong together. Offsets outside the tensors are clamped, and a negative length is
    none."""
    if options.cu_seqlens is None:
        yield slice(None), slice(None)
        return
    offsets = [min(max(offset, 0), q.shape[2]) for offset in options.cu_seqlens.tolist()]
    for index, (start, stop) in enumerate(pairwise(offsets)):
        yield slice(index, index + 1), slice(start, max(start, stop))


def _initial(options: DeltaOptions, like: Tensor, index: slice) -> Tensor:
    """The state at the start of these sequences, [B * H, K, V]."""
    if options.initial_state is None:
        return like.new_zeros((like[index].shape[0] * like.shape[1], *like.shape[2:]))
    return options.initial_state[index].to(like.dtype).flatten(0, 1)

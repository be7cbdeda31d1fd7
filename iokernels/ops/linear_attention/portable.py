"""``linear_attention`` in chunked PyTorch: the backend ``torch``, for any device and any dtype.

Maths. Tokens are taken in chunks of C; S is the state before a chunk ``[features, columns]``, b the running sum of log
decays inside it, b_C the last, and G_ij = exp(b_i - b_j) for i >= j, else 0 (Qin et al., 2024, arXiv:2401.04658,
section 3; Yang et al., 2024, arXiv:2312.06635, section 4). With x = s Q K^T, f the features of ``options.Options`` and
w a row of v (followed by a 1 with ``normalize``):

    num = (phi(x) * G) W + exp(b) f(Q) S        S' = exp(b_C) S + (exp(b_C - b) f(K))^T W

Backward, with dN the gradient of num, first a walk forward for dQ, then one back for dK and dW, where D is the gradient
of the state behind the chunk:

    P = (dN W^T) * G                            dX = P phi'(x)
    dQ = s dX K + df(Q)[exp(b) dN S^T]          dK = s dX^T Q + df(K)[exp(b_C - b) W D^T]
    dW = (phi(x) * G)^T dN + exp(b_C - b) f(K) D        D' = exp(b_C) D + (exp(b) f(Q))^T dN

and where decays want gradients, r_i sums P phi(x) over a row and c_j over a column, both without the diagonal, which no
decay touches, and with what the state brings and takes: ``dg_t = sum_{i >= t} (r_i - c_i) + <dS_N, S_N>``.

FLOPs: ``2 B H N (C (K + V) + 2 F V)`` forward, and two and a half times that backward. Bytes: q, k, v and out once
forward; the backward pass reads q, k, v and dout twice and writes dq, dk and dv once. Extra memory: a few tiles of
``B H C (C + F)`` and two states. Tiles and states are float32 (float64 for float64 inputs).
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from iokernels.ops.shared.decays import LEAST_LOG_DECAY, sums_dtype
from iokernels.ops.shared.layout import empty_in_order_of, state_dtype

from .options import Gradients, Needs, Options, empty_denominator, empty_state, log_decay_gradient

CHUNK = 128
"""Tokens to a chunk: enough for matrix products at speed, few enough that a tile stays in cache."""


def forward(q: Tensor, k: Tensor, v: Tensor, options: Options) -> tuple[Tensor, Tensor, Tensor]:
    """Returns (out, final state, denominator) of :class:`Options`.

    The offsets of packed sequences are read on the host, and the sequences run one after the other.
    """
    out, state = empty_in_order_of(v, v.shape[3]), empty_state(q, v, options)
    denominator = empty_denominator(v, options)
    if options.cu_seqlens is not None:
        out.zero_()
        denominator.zero_()
    for part in _parts(q, options):
        rows = part.rows
        made = _walk_forward(
            Chunks(q[:, :, rows], k[:, :, rows], v[:, :, rows], part.options),
            out[:, :, rows],
            denominator[:, :, rows] if options.normalize else None,
        )
        state[part.states].copy_(made)
    return out, state, denominator


def step(q: Tensor, k: Tensor, v: Tensor, state: Tensor, options: Options) -> Tensor:
    """Returns out, and moves ``state`` on by the tokens."""
    out, denominator = empty_in_order_of(v, v.shape[3]), empty_denominator(v, options)
    chunks = Chunks(q, k, v, options._replace(initial_state=state))
    state.copy_(_walk_forward(chunks, out, denominator if options.normalize else None))
    return out


def backward(
    dout: Tensor, dstate: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor | None, state: Tensor | None,
    denominator: Tensor, options: Options, needs: Needs,
) -> Gradients:  # fmt: skip
    """The gradients that ``needs`` names, given those of out and, where the loss uses it, of the final state. ``out``
    is there with ``normalize``, ``state`` where decays want a gradient."""
    dq, dk, dv = (
        empty_in_order_of(x, x.shape[3]) if need else None for x, need in zip((q, k, v), needs[:3], strict=True)
    )
    dinitial = torch.empty_like(options.initial_state) if needs.initial_state else None  # pyright: ignore
    dg = v.new_empty(v.shape[:3], dtype=state_dtype(v.dtype)) if needs.log_decay else None
    if options.cu_seqlens is not None:
        for grad in (dq, dk, dv, dg):
            if grad is not None:
                grad.zero_()
    dnum = _numerator_gradient(dout, out, denominator, options)
    for part in _parts(q, options):
        rows = part.rows
        chunks = Chunks(q[:, :, rows], k[:, :, rows], v[:, :, rows], part.options)
        own_dnum = dnum[:, :, rows]
        own_dstate = None if dstate is None else dstate[part.states]
        crossing = None if dg is None else dg[:, :, rows]  # r - c
        if dq is not None or dg is not None:
            _walk_queries(chunks, own_dnum, None if dq is None else dq[:, :, rows], crossing)
        first = _walk_back(
            chunks, own_dnum, own_dstate, None if dk is None else dk[:, :, rows],
            None if dv is None else dv[:, :, rows], crossing,
        )  # fmt: skip
        if dinitial is not None:
            dinitial[part.states].copy_(first)
        if crossing is not None:
            crossing.copy_(crossing.flip(-1).cumsum(-1).flip(-1))
            if own_dstate is not None:
                assert state is not None
                crossing.add_((own_dstate * state[part.states]).sum((-2, -1))[..., None])
    return Gradients(dq, dk, dv, None if dg is None else log_decay_gradient(dg, options), dinitial)


def _numerator_gradient(dout: Tensor, out: Tensor | None, denominator: Tensor, options: Options) -> Tensor:
    """The gradient of num, and with ``normalize`` that of den as a last column."""
    if not options.normalize:
        return dout
    assert out is not None
    dout = dout.to(denominator.dtype)
    inverse = torch.where(denominator == 0.0, 0.0, 1.0 / denominator)[..., None]
    return torch.cat([dout * inverse, -(dout * out).sum(-1, keepdim=True) * inverse], -1)


class _Part(NamedTuple):
    """What is run as a dense batch: all of it, or one packed sequence."""

    rows: slice
    states: slice
    options: Options


def _parts(q: Tensor, options: Options) -> Iterator[_Part]:
    """Offsets outside the tensors are clamped; a sequence of negative length is empty."""
    total = q.shape[2]
    if options.cu_seqlens is None:
        yield _Part(slice(0, total), slice(None), options)
        return
    decay, initial = options.log_decay, options.initial_state
    for index, (start, stop) in enumerate(pairwise(options.cu_seqlens.tolist())):
        start = min(max(start, 0), total)
        rows, states = slice(start, max(start, min(stop, total))), slice(index, index + 1)
        yield _Part(
            rows,
            states,
            options._replace(
                cu_seqlens=None,
                log_decay=decay[:, :, rows] if decay is not None and options.per_token() else decay,
                initial_state=None if initial is None else initial[states],
            ),
        )


class _Weights(NamedTuple):
    """The decays of one chunk, ``[B|1, H|1, C]`` and with all pairs."""

    since_start: Tensor  # exp(b), [..., C, 1]
    until_end: Tensor  # exp(b_C - b), [..., C, 1]
    total: Tensor  # exp(b_C), [..., 1, 1]
    between: Tensor  # G, [..., C, C]


class Chunks:
    """The inputs of a dense batch, chunk by chunk, in the dtype of the states, with a head of q and k for each of v."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, options: Options) -> None:
        self.q, self.k, self.v, self.options = q, k, v, options
        self.dtype = state_dtype(q.dtype)
        self.group = v.shape[1] // k.shape[1]
        self.length = v.shape[2]
        self.slices = [slice(at, min(at + CHUNK, self.length)) for at in range(0, self.length, CHUNK)]
        self._weights: dict[int, _Weights] = {}

    def initial_state(self) -> Tensor:
        """A fresh copy of the state before the first token."""
        if self.options.initial_state is not None:
            return self.options.initial_state.to(self.dtype, copy=True)
        return empty_state(self.q, self.v, self.options).zero_()

    def keys(self, x: Tensor, rows: slice) -> Tensor:
        """Rows of q or k, with as many heads as v."""
        x = x[:, :, rows].to(self.dtype)
        return x if self.group == 1 else x.repeat_interleave(self.group, 1)

    def values(self, rows: slice) -> Tensor:
        """Rows of W."""
        v = self.v[:, :, rows].to(self.dtype)
        return torch.cat([v, torch.ones_like(v[..., :1])], -1) if self.options.normalize else v

    def summed(self, x: Tensor) -> Tensor:
        """The sum over the heads that share one of q and k."""
        return x if self.group == 1 else x.unflatten(1, (-1, self.group)).sum(2)

    def weights(self, rows: slice) -> _Weights:
        """The decays of a chunk. Where they are the same for every token, chunks of one length share them."""
        length = rows.stop - rows.start
        if not self.options.per_token() and length in self._weights:
            return self._weights[length]
        decay = self.options.log_decay
        if decay is None:
            g = self.q.new_zeros((1, 1, length), dtype=self.dtype)
        elif self.options.per_token():
            g = decay[:, :, rows]
        else:
            g = decay.view(1, -1, 1).expand(1, -1, length)
        b = g.to(self.dtype).clamp(LEAST_LOG_DECAY, 0.0).cumsum(-1, dtype=sums_dtype(g.device))
        end = b[..., -1:]
        later = torch.ones(length, length, dtype=torch.bool, device=b.device).triu_(1)
        between = (b[..., :, None] - b[..., None, :]).to(self.dtype).masked_fill_(later, float("-inf")).exp_()
        since_start, until_end, total = ((x.to(self.dtype).exp()[..., None]) for x in (b, end - b, end))
        made = _Weights(since_start, until_end, total, between)
        if not self.options.per_token():
            self._weights[length] = made
        return made

    def scores(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor | float]:
        """phi(x) and its derivative, ``[B, H, C, C]``, where a row sees a token: elsewhere those of 0, as x, which has
        no weight there, may overflow."""
        x = (self.options.scale * (q @ k.transpose(-1, -2))).tril_()
        if not self.options.taylor:
            return x, 1.0
        slope = 1.0 + x
        return slope + x * (x / 2.0), slope  # in this order the last number that fits is not lost

    def features(self, x: Tensor, half: float = 1.0) -> Tensor:
        """f(x), ``[B, H, C, features]``; ``half`` is the factor of its squares."""
        if not self.options.taylor:
            return x
        square = (half * x[..., :, None] * x[..., None, :]).flatten(-2)
        return torch.cat([torch.ones_like(x[..., :1]), x, square], -1)

    def features_gradient(self, x: Tensor, grad: Tensor, half: float = 1.0) -> Tensor:
        """The gradient of x from that of ``features(x, half)``."""
        if not self.options.taylor:
            return grad
        width = x.shape[-1]
        square = grad[..., 1 + width :].unflatten(-1, (width, width))
        both = (square + square.transpose(-1, -2)) @ x[..., None]
        return grad[..., 1 : 1 + width] + half * both.squeeze(-1)


def _walk_forward(chunks: Chunks, out: Tensor, denominator: Tensor | None) -> Tensor:
    """Fill out and den, and return the final state."""
    state, scale = chunks.initial_state(), chunks.options.scale
    for rows in chunks.slices:
        weights = chunks.weights(rows)
        q, k, values = chunks.keys(chunks.q, rows), chunks.keys(chunks.k, rows), chunks.values(rows)
        phi, _ = chunks.scores(q, k)
        numerator = (phi * weights.between) @ values
        numerator += (chunks.features(scale * q, 0.5) * weights.since_start) @ state
        state = weights.total * state + (chunks.features(k) * weights.until_end).transpose(-1, -2) @ values
        if denominator is not None:
            below = numerator[..., -1]
            denominator[:, :, rows].copy_(below)
            numerator = numerator[..., :-1] * torch.where(below == 0.0, 0.0, 1.0 / below)[..., None]
        out[:, :, rows].copy_(numerator)
    return state


def _walk_queries(chunks: Chunks, dnum: Tensor, dq: Tensor | None, crossing: Tensor | None) -> None:
    """Fill dq, and ``crossing`` with r."""
    state, scale = chunks.initial_state(), chunks.options.scale
    for rows in chunks.slices:
        weights = chunks.weights(rows)
        q, k, values = chunks.keys(chunks.q, rows), chunks.keys(chunks.k, rows), chunks.values(rows)
        dn = dnum[:, :, rows].to(chunks.dtype)
        phi, slope = chunks.scores(q, k)
        p = (dn @ values.transpose(-1, -2)) * weights.between
        from_state = (dn @ state.transpose(-1, -2)) * weights.since_start
        if dq is not None:
            grad = (p * slope) @ k + chunks.features_gradient(scale * q, from_state, 0.5)
            dq[:, :, rows].copy_(chunks.summed(scale * grad))
        if crossing is not None:
            inside = (p * phi).tril(-1).sum(-1)
            crossing[:, :, rows].copy_(inside + (from_state * chunks.features(scale * q, 0.5)).sum(-1))
        state = weights.total * state + (chunks.features(k) * weights.until_end).transpose(-1, -2) @ values


def _walk_back(
    chunks: Chunks, dnum: Tensor, dstate: Tensor | None, dk: Tensor | None, dv: Tensor | None, crossing: Tensor | None
) -> Tensor:
    """Fill dk and dv, take c off ``crossing``, and return the gradient of the state before the first token."""
    scale = chunks.options.scale
    if dstate is None:
        d = empty_state(chunks.q, chunks.v, chunks.options).zero_()
    else:
        d = dstate.to(chunks.dtype, copy=True)
    for rows in reversed(chunks.slices):
        weights = chunks.weights(rows)
        q, k, values = chunks.keys(chunks.q, rows), chunks.keys(chunks.k, rows), chunks.values(rows)
        dn = dnum[:, :, rows].to(chunks.dtype)
        phi, slope = chunks.scores(q, k)
        p = (dn @ values.transpose(-1, -2)) * weights.between
        to_state = (values @ d.transpose(-1, -2)) * weights.until_end
        if dk is not None:
            grad = scale * ((p * slope).transpose(-1, -2) @ q) + chunks.features_gradient(k, to_state)
            dk[:, :, rows].copy_(chunks.summed(grad))
        if crossing is not None:
            inside = (p * phi).tril(-1).sum(-2)
            crossing[:, :, rows].sub_(inside + (to_state * chunks.features(k)).sum(-1))
        if dv is not None:
            grad = (phi * weights.between).transpose(-1, -2) @ dn
            grad += (chunks.features(k) * weights.until_end) @ d
            dv[:, :, rows].copy_(grad[..., : dv.shape[3]])
        d = weights.total * d + (chunks.features(scale * q, 0.5) * weights.since_start).transpose(-1, -2) @ dn
    return d

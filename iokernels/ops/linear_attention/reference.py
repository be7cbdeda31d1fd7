"""The oracle: linear attention as its formula reads, with the whole N x N matrix of weights in memory.

Computes in the dtype of states, which is float32 or, for float64 inputs (use that to judge others), float64, on any
device, and is differentiable to any order.
"""

from __future__ import annotations

import torch
from einops import einsum, repeat
from torch import Tensor

from iokernels.ops.shared.decays import LEAST_LOG_DECAY, sums_dtype
from iokernels.ops.shared.layout import state_dtype
from iokernels.runtime.contracts.offsets import read_offsets
from iokernels.runtime.registration.precision import lifted

from .options import Options


def attend(q: Tensor, k: Tensor, v: Tensor, options: Options) -> tuple[Tensor, Tensor]:
    """Linear attention as :class:`Options` defines it. Returns (out, final state)."""
    out, state = _attend(*lifted((q, k, v, options)))
    return out.to(v.dtype), state


def _attend(q: Tensor, k: Tensor, v: Tensor, options: Options) -> tuple[Tensor, Tensor]:
    if options.cu_seqlens is None:
        return _attend_dense(q, k, v, options)
    starts = read_offsets(options.cu_seqlens, q.shape[2])
    outs, states = [], []
    for sequence in range(len(starts) - 1):
        out, state = _attend_part(q, k, v, slice(starts[sequence], starts[sequence + 1]), sequence, options)
        outs.append(out)
        states.append(state)
    beside = v[:, :, starts[-1] :]  # rows of no sequence
    outs.append(beside.masked_fill(torch.ones_like(beside, dtype=torch.bool), 0.0))
    if not states:
        states = [_attend_part(q, k, v, slice(0, 0), None, options)[1][:0]]
    return torch.cat(outs, dim=2), torch.cat(states)


def _attend_part(
    q: Tensor, k: Tensor, v: Tensor, rows: slice, sequence: int | None, options: Options
) -> tuple[Tensor, Tensor]:
    """These rows of packed tensors, from the state of a sequence or from zeros."""
    decay, initial = options.log_decay, options.initial_state
    if decay is not None and options.per_token():
        decay = decay[:, :, rows]
    if initial is not None:
        initial = None if sequence is None else initial[sequence : sequence + 1]
    own = options._replace(log_decay=decay, initial_state=initial, cu_seqlens=None)
    return _attend_dense(q[:, :, rows], k[:, :, rows], v[:, :, rows], own)


def feature_rows(k: Tensor, taylor: bool) -> Tensor:
    """f(k) of :class:`Options`: ``[..., K]`` to ``[..., features]``."""
    if not taylor:
        return k
    square = einsum(k, k, "... a, ... c -> ... a c").flatten(-2)
    return torch.cat([torch.ones_like(k[..., :1]), k, square], -1)


def _attend_dense(q: Tensor, k: Tensor, v: Tensor, options: Options) -> tuple[Tensor, Tensor]:
    dtype, out_dtype = state_dtype(q.dtype), v.dtype
    group = v.shape[1] // k.shape[1]
    q, k = (repeat(x.to(dtype), "b h n d -> b (h group) n d", group=group) for x in (q, k))
    v = v.to(dtype)
    if options.normalize:
        v = torch.cat([v, torch.ones_like(v[..., :1])], -1)
    length = v.shape[2]

    decay = torch.zeros((), dtype=dtype, device=q.device) if options.log_decay is None else options.log_decay.to(dtype)
    decay = decay.clamp(LEAST_LOG_DECAY, 0.0)
    decay = (decay if decay.dim() == 3 else decay.view(1, -1, 1)).expand(*v.shape[:3])
    b = decay.cumsum(-1, dtype=sums_dtype(q.device))
    order = torch.arange(length, device=q.device)
    between = (b[..., :, None] - b[..., None, :]).to(dtype)
    between = between.masked_fill(order[:, None] < order[None, :], float("-inf"))

    # Half of a decay goes to each factor of a square, which then overflows only where the weight itself does. Where
    # nothing is left of a token, such as one that is yet to come, its product counts as 0: it may have overflowed.
    half = torch.exp(between / 2.0)
    x = half * (options.scale * einsum(q, k, "b h i d, b h j d -> b h i j")).masked_fill(half == 0.0, 0.0)
    weights = half * half + half * x + x * (x / 2.0) if options.taylor else half * x
    numerator = einsum(weights, v, "b h i j, b h j d -> b h i d")
    total = b[..., -1:] if length else b.new_zeros((*b.shape[:2], 1))
    kept = feature_rows(k, options.taylor) * torch.exp((total - b).to(dtype))[..., None]
    state = einsum(kept, v, "b h n f, b h n d -> b h f d")
    if options.initial_state is not None:
        initial = options.initial_state.to(dtype)
        seen = _query_rows(options.scale * q, torch.exp(b.to(dtype) / 2.0)[..., None], options.taylor)
        numerator = numerator + einsum(seen, initial, "b h n f, b h f d -> b h n d")
        state = state + torch.exp(total.to(dtype))[..., None] * initial
    if options.normalize:
        denominator = numerator[..., -1:]
        zero = denominator == 0.0
        out = (numerator[..., :-1] / denominator.masked_fill(zero, 1.0)).masked_fill(zero, 0.0)
    else:
        out = numerator
    return out.to(out_dtype), state


def _query_rows(x: Tensor, half: Tensor, taylor: bool) -> Tensor:
    """``half^2`` times the features of x = scale * q, whose dot product with f(k) is phi."""
    x = half * x
    if not taylor:
        return half * x
    square = einsum(x, x / 2.0, "... a, ... c -> ... a c").flatten(-2)
    return torch.cat([half * half, half * x, square], -1)

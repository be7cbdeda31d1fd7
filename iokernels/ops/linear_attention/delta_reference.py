"""The oracle of the gated delta rule: its recurrence, one token after the other.

Works in the dtype of its inputs (use float64 to judge others; half precision is lifted to float32, which states have
everywhere), on any device, and is differentiable to any order.
"""

from __future__ import annotations

import torch
from einops import einsum, repeat
from torch import Tensor

from .delta_options import DeltaOptions, state_dtype
from .options import LEAST_LOG_DECAY


def gated_delta_rule(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, options: DeltaOptions) -> tuple[Tensor, Tensor]:
    """Returns (out [B, H, N, V], final state [S, H, K, V]). See :class:`DeltaOptions`."""
    if options.cu_seqlens is None:
        return _one_length(q, k, v, beta, options.log_decay, options.initial_state, options.scale)
    starts = options.cu_seqlens.tolist()
    outs, states = [], []
    for sequence in range(len(starts) - 1):
        rows = slice(starts[sequence], starts[sequence + 1])
        out, state = _one_length(
            q[:, :, rows],
            k[:, :, rows],
            v[:, :, rows],
            beta[:, :, rows],
            None if options.log_decay is None else options.log_decay[:, :, rows],
            None if options.initial_state is None else options.initial_state[sequence : sequence + 1],
            options.scale,
        )
        outs.append(out)
        states.append(state)
    outs.append(torch.zeros_like(v[:, :, starts[-1] :]))
    if not states:
        return outs[0], q.new_zeros((0, v.shape[1], q.shape[3], v.shape[3]), dtype=state_dtype(q.dtype))
    return torch.cat(outs, dim=2), torch.cat(states, dim=0)


def _one_length(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor | None, state: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    batch, heads, length, width = v.shape
    dtype, accurate = v.dtype, state_dtype(v.dtype)
    q, k = (repeat(x.to(accurate), "b h n d -> b (h group) n d", group=heads // x.shape[1]) for x in (q, k))
    v, beta = v.to(accurate), beta.to(accurate)
    state = v.new_zeros((batch, heads, q.shape[3], width)) if state is None else state.to(accurate)
    outs = []
    for t in range(length):
        if log_decay is not None:
            kept = torch.exp(log_decay[:, :, t].to(accurate).clamp(LEAST_LOG_DECAY, 0.0))
            state = state * kept[..., None, None]
        remembered = einsum(state, k[:, :, t], "b h k v, b h k -> b h v")
        written = beta[:, :, t, None] * (v[:, :, t] - remembered)
        state = state + einsum(k[:, :, t], written, "b h k, b h v -> b h k v")
        outs.append(scale * einsum(state, q[:, :, t], "b h k v, b h k -> b h v"))
    out = torch.stack(outs, dim=2) if outs else v.clone()
    # A copy, because the graph needs what it was made from, and a step may change the state in place.
    return out.to(dtype), state.clone()

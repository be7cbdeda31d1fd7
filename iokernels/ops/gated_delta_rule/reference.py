"""The oracle of the gated delta rule: its recurrence, one token after the other.

Computes in the dtype of states, which is float32 or, for float64 inputs (use that to judge others), float64, on any
device, and is differentiable to any order.
"""

from __future__ import annotations

import torch
from einops import einsum, repeat
from torch import Tensor

from iokernels.ops.shared.decays import LEAST_LOG_DECAY
from iokernels.ops.shared.layout import state_dtype
from iokernels.runtime.contracts.offsets import read_offsets
from iokernels.runtime.registration.precision import lifted

from .options import DeltaOptions


def gated_delta_rule(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, options: DeltaOptions) -> tuple[Tensor, Tensor]:
    """Returns (out [B, H, N, V], final state [S, H, K, V]). See :class:`DeltaOptions`."""
    out, state = _gated_delta_rule(*lifted((q, k, v, beta, options)))
    return out.to(v.dtype), state


def _gated_delta_rule(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, options: DeltaOptions) -> tuple[Tensor, Tensor]:
    if options.cu_seqlens is None:
        return _one_length(q, k, v, beta, options.log_decay, options.initial_state, options.scale)
    starts = read_offsets(options.cu_seqlens, q.shape[2])
    outs, states = [], []
    for sequence in range(len(starts) - 1):
        rows = slice(starts[sequence], starts[sequence + 1])
        initial = None if options.initial_state is None else options.initial_state[sequence : sequence + 1]
        out, state = _one_length(*_rows(rows, q, k, v, beta, options.log_decay), initial, options.scale)
        outs.append(out)
        states.append(state)
    beside = v[:, :, starts[-1] :]  # rows of no sequence
    outs.append(beside.masked_fill(torch.ones_like(beside, dtype=torch.bool), 0.0))
    if not states:
        nothing = _rows(slice(0, 0), q, k, v, beta, options.log_decay)
        states = [_one_length(*nothing, None, options.scale)[1][:0]]
    return torch.cat(outs, dim=2), torch.cat(states)


def _rows(
    rows: slice, q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    decay = None if log_decay is None else log_decay[:, :, rows]
    return q[:, :, rows], k[:, :, rows], v[:, :, rows], beta[:, :, rows], decay


def _one_length(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor | None, state: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    heads, length = v.shape[1:3]
    dtype, accurate = v.dtype, state_dtype(v.dtype)
    q, k = (repeat(x.to(accurate), "b h n d -> b (h group) n d", group=heads // x.shape[1]) for x in (q, k))
    v, beta = v.to(accurate), beta.to(accurate)
    if state is None:
        # Zeros that are a function of k and v, also where there are no tokens.
        state = einsum(k[:, :, :0], v[:, :, :0], "b h n k, b h n v -> b h k v")
    state = state.to(accurate)
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

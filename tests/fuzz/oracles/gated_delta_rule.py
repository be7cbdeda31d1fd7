"""gated_delta_rule and its step from docs/ops/gated_delta_rule.md: the recurrence, token by token."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor


def walk(a: dict[str, Any], q: Tensor, k: Tensor, v: Tensor, beta: Tensor, decay: Tensor | None, state: Tensor) -> Any:
    """out and the last state of one sequence, ``[H, N, ...]``: ``S = a (I - beta k k^T) S + beta k v^T``."""
    scale = q.shape[-1] ** -0.5 if a.get("scale") is None else a["scale"]
    group = v.shape[0] // max(q.shape[0], 1)
    q, k = (x.repeat_interleave(group, dim=0) for x in (q, k))
    outs = []
    for t in range(v.shape[1]):
        key, weight = k[:, t], beta[:, t]
        if decay is not None:
            kept = torch.exp(decay[:, t])[:, None, None]
            state = torch.where(kept > 0.0, kept * state, 0.0 * kept)
        held = torch.einsum("hk,hkv->hv", key, a["jitter"](state))
        state = state + key[:, :, None] * a["jitter"](weight[:, None] * (v[:, t] - held))[:, None, :]
        outs.append(scale * torch.einsum("hk,hkv->hv", q[:, t], a["jitter"](state)))
    empty = v.new_zeros(v.shape[0], 0, v.shape[2])
    return (torch.stack(outs, dim=1) if outs else empty), state


def delta(a: dict[str, Any]) -> dict[str, Tensor]:
    """out and state of a dense call, or of packed sequences, or of a step."""
    q, k, v, beta, decay = a["q"], a["k"], a["v"], a["beta"], a.get("log_decay")
    packed = a.get("cu_seqlens") is not None
    initial = a.get("initial_state") if a.get("state") is None else a["state"]
    beta = beta.to(q.dtype)
    ends = a["cu_seqlens"].tolist() if packed else list(range(q.shape[0] + 1))
    outs, states = [], []
    for s, (i, j) in enumerate(itertools.pairwise(ends)):
        own = [x[i:j].transpose(0, 1) if packed else x[s] for x in (q, k, v, beta)]
        kept = None
        if decay is not None:
            if decay.dim() == 1:
                kept = decay[:, None].expand_as(own[3])
            else:
                kept = decay[i:j].transpose(0, 1) if packed else decay[s]
        state = q.new_zeros(v.shape[1], q.shape[-1], v.shape[-1]) if initial is None else initial[s]
        out, state = walk(a, own[0], own[1], own[2], own[3], kept, state)
        outs.append(out.transpose(0, 1) if packed else out)
        states.append(state)
    state = torch.stack(states) if states else q.new_zeros(0, v.shape[1], q.shape[-1], v.shape[-1])
    if packed:
        outs.append(torch.zeros_like(v[ends[-1] :]))
        return {"out": torch.cat(outs), "state": state}
    return {"out": torch.stack(outs) if outs else torch.zeros_like(v), "state": state}

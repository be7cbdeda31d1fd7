"""linear_attention and its step from docs/ops/linear_attention.md: as a recurrence, token by token, over states."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor


def features(x: Tensor, taylor: bool, of_query: bool) -> Tensor:
    """``[..., K]`` as the features whose product is phi: x itself, or 1, x and x (x) x (halved in one of the two)."""
    if not taylor:
        return x
    pairs = (x[..., :, None] * x[..., None, :]).flatten(-2)
    return torch.cat([torch.ones_like(x[..., :1]), x, pairs / 2 if of_query else pairs], dim=-1)


def walk(a: dict[str, Any], q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, state: Tensor) -> Any:
    """out and the last state of one sequence, ``[H, N, ...]``, from ``state [H, F, W]``."""
    taylor, normalize = a.get("feature_map") == "taylor", bool(a.get("normalize"))
    scale = q.shape[-1] ** -0.5 if a.get("scale") is None else a["scale"]
    group = v.shape[0] // max(q.shape[0], 1)
    q, k = (x.repeat_interleave(group, dim=0) for x in (q, k))
    outs, terms = [], state.detach().abs()
    for t in range(v.shape[1]):
        f = features(k[:, t], taylor, False)
        w = torch.cat([v[:, t], torch.ones_like(v[:, t, :1])], dim=-1) if normalize else v[:, t]
        if decay is not None:
            kept = torch.exp(decay[:, t])[:, None, None]
            state = torch.where(kept > 0.0, kept * state, 0.0 * kept)
            terms = kept.detach() * terms
        state = state + f[:, :, None] * w[:, None, :]
        asked = features(q[:, t] * scale, taylor, True)
        found = torch.einsum("hf,hfw->hw", asked, a["jitter"](state))
        if normalize:
            terms = terms + (f[:, :, None] * w[:, None, :]).detach().abs()
            found = found + a["jitter"].summed(asked, terms)
            total = found[:, -1:]
            divisor = torch.where(total == 0.0, 1.0, total)
            found = torch.where(total == 0.0, 0.0, found[:, :-1] / divisor)
            found = a["jitter"].cancelled(total, 1.0 / divisor, found)
        outs.append(found)
    empty = v.new_zeros(v.shape[0], 0, v.shape[2])
    return (torch.stack(outs, dim=1) if outs else empty), state


def linear(a: dict[str, Any]) -> dict[str, Tensor]:
    """out and state of a dense call, or of packed sequences, or of a step."""
    q, k, v = a["q"], a["k"], a["v"]
    packed = a.get("cu_seqlens") is not None
    initial = a.get("initial_state") if a.get("state") is None else a["state"]
    decay = a.get("log_decay")
    if packed:
        ends = a["cu_seqlens"].tolist()
        sequences = [tuple(x[i:j].transpose(0, 1) for x in (q, k, v)) for i, j in itertools.pairwise(ends)]
    else:
        sequences = [(q[b], k[b], v[b]) for b in range(q.shape[0])]
    width = q.shape[-1]
    rows = 1 + width + width * width if a.get("feature_map") == "taylor" else width
    heads = v.shape[1]
    nothing = q.new_zeros(heads, rows, v.shape[-1] + bool(a.get("normalize")))
    outs, states = [], []
    for s, (qs, ks, vs) in enumerate(sequences):
        own = None
        if decay is not None:
            if decay.dim() == 1:
                own = decay[:, None].expand(-1, vs.shape[1])
            else:
                own = decay[ends[s] : ends[s + 1]].transpose(0, 1) if packed else decay[s]
        out, state = walk(a, qs, ks, vs, own, nothing if initial is None else initial[s])
        outs.append(out.transpose(0, 1) if packed else out)
        states.append(state)
    state = torch.stack(states) if states else q.new_zeros(0, *nothing.shape)
    if packed:
        outs.append(torch.zeros_like(v[ends[-1] :]))
        return {"out": torch.cat(outs), "state": state}
    return {"out": torch.stack(outs) if outs else torch.zeros_like(v), "state": state}

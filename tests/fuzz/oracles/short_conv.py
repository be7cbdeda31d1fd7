"""short_conv and its step from docs/ops/short_conv.md: a sum over taps."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor


def convolved(a: dict[str, Any]) -> dict[str, Tensor]:
    """out and final_state of ``[B, H, N]`` inputs, or of packed ``[total, H]`` ones."""
    if a.get("cu_seqlens") is None:
        return _dense(a, a["x"], a.get("initial_state"))
    x, ends = a["x"], a["cu_seqlens"].tolist()
    outs, states = [], []
    for s, (first, last) in enumerate(itertools.pairwise(ends)):
        state = a.get("initial_state")
        found = _dense(a, x[first:last].t()[None], None if state is None else state[s : s + 1])
        outs.append(found["out"][0].t())
        states += [found["final_state"]] if a.get("padding", "causal") == "causal" else []
    outs.append(torch.zeros_like(x[ends[-1] :]))
    state = torch.cat(states) if states else x.new_zeros(0, x.shape[1], a["weight"].shape[1] - 1)
    return {"out": torch.cat(outs), "final_state": state}


def _dense(a: dict[str, Any], x: Tensor, state: Tensor | None) -> dict[str, Tensor]:
    weight = a["weight"].to(x.dtype)
    width = weight.shape[1]
    left, right = _sides(a.get("padding", "causal"), width)
    before = x.new_zeros(*x.shape[:2], left) if state is None else state
    whole = torch.cat([before, x, x.new_zeros(*x.shape[:2], right)], dim=2)
    rows = whole.shape[2] - (width - 1)
    out = x.new_zeros(*x.shape[:2], rows)
    for w in range(width):
        out = out + weight[:, w, None] * whole[:, :, w : w + rows]
    if a.get("bias") is not None:
        out = out + a["bias"].to(x.dtype)[:, None]
    if a.get("activation") is not None:
        out = out / (1.0 + torch.exp(-out))
    seen = whole[:, :, : whole.shape[2] - right]
    return {"out": out, "final_state": seen[:, :, max(seen.shape[2] - (width - 1), 0) :]}


def _sides(padding: Any, width: int) -> tuple[int, int]:
    if padding == "causal":
        return width - 1, 0
    if padding == "same":
        return (width - 1) // 2, width - 1 - (width - 1) // 2
    if padding == "valid":
        return 0, 0
    return (padding, padding) if isinstance(padding, int) else padding


def stepped(a: dict[str, Any]) -> dict[str, Tensor]:
    """out ``[B, H]`` of one more row, and the state moved on by it."""
    x, state, weight = a["x"], a["state"].clone(), a["weight"].to(a["x"].dtype)
    rows = range(x.shape[0]) if a.get("state_indices") is None else a["state_indices"].tolist()
    out = torch.zeros_like(x)
    for b, row in enumerate(rows):
        if row < 0:
            continue
        window = torch.cat([state[row], x[b, :, None]], dim=1)
        found = (window * weight).sum(1)
        if a.get("bias") is not None:
            found = found + a["bias"].to(x.dtype)
        if a.get("activation") is not None:
            found = found / (1.0 + torch.exp(-found))
        out[b] = found
        state[row] = window[:, 1:]
    return {"out": out, "state": state}

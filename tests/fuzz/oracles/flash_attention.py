"""flash_attention and flash_attention_varlen from the formulas of docs/ops/flash_attention.md."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

from .softmax import attend, by_groups, window_of


def dense(a: dict[str, Any]) -> dict[str, Tensor]:
    """out and lse of ``[B, H, N, D]`` tensors."""
    q, k, v = a["q"], a["k"], a["v"]
    batch, heads, rows, width = q.shape
    keys = k.shape[2]
    scale = width**-0.5 if a.get("scale") is None else a["scale"]
    scores = torch.einsum("bhid,bhjd->bhij", q, by_groups(k, heads)) * scale
    scores = a["jitter"].sums(scores)
    softcap = a.get("softcap") or 0.0
    if softcap > 0.0:
        capped = scores / softcap
        scores = softcap * a["jitter"].active(capped, torch.tanh(capped))
    place = torch.arange(rows)[:, None] + (keys - rows)
    key = torch.arange(keys)[None, :]
    if a.get("bias") is not None:
        scores = scores + a["bias"].to(scores.dtype)
    if a.get("alibi_slopes") is not None:
        slopes = a["alibi_slopes"].to(scores.dtype)
        slopes = slopes[None] if slopes.dim() == 1 else slopes
        scores = scores - slopes[:, :, None, None] * (place - key).abs()
    left, right = a.get("window") or (-1, -1)
    seen = window_of(place, key, left, 0 if a.get("causal") else right).expand(batch, heads, rows, keys)
    if a.get("mask") is not None:
        seen = seen & a["mask"]
    tail = a.get("bias") is not None or a.get("alibi_slopes") is not None
    out, lse = attend(scores, seen, by_groups(v, heads), a["jitter"], a.get("sinks"), a.get("kept"), tail)
    return {"out": out, "lse": lse}


def packed(a: dict[str, Any]) -> dict[str, Tensor]:
    """out ``[total, H, Dv]`` and lse ``[H, total]``: every sequence alone, and zeros in rows of none."""
    q, k, v = a["q"], a["k"], a["v"]
    starts, key_starts = a["cu_seqlens_q"].tolist(), a["cu_seqlens_k"].tolist()
    outs, lses = [], []
    for s, (first, last) in enumerate(itertools.pairwise(starts)):
        one = {**a, "q": q[first:last].transpose(0, 1)[None]}
        for name, x in (("k", k), ("v", v)):
            one[name] = x[key_starts[s] : key_starts[s + 1]].transpose(0, 1)[None]
        for name in ("mask", "bias"):
            one[name] = _of_sequence(a.get(name), s, one["q"].shape[2], one["k"].shape[2])
        slopes = a.get("alibi_slopes")
        if slopes is not None and slopes.dim() == 2 and slopes.shape[0] > 1:
            one["alibi_slopes"] = slopes[s]
        found = dense(one)
        outs.append(found["out"][0].transpose(0, 1))
        lses.append(found["lse"][0])
    rest = q.shape[0] - starts[-1]
    outs.append(q.new_zeros(rest, q.shape[1], v.shape[2]))
    lses.append(q.new_full((q.shape[1], rest), float("-inf")))
    return {"out": torch.cat(outs), "lse": torch.cat(lses, dim=1)}


def _of_sequence(x: Tensor | None, s: int, rows: int, keys: int) -> Tensor | None:
    """What of a mask or bias ``[B|1, H|1, Nq|1, Nk|1]``, with leading dimensions left out, sequence s meets."""
    if x is None:
        return None
    x = x[(None,) * (4 - x.dim())]
    x = x[s : s + 1] if x.shape[0] > 1 else x
    x = x[:, :, :rows] if x.shape[2] > 1 else x
    return x[..., :keys] if x.shape[3] > 1 else x

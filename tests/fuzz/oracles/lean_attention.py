"""lean_attention from the formula of docs/ops/lean_attention.md, sequence by sequence."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .softmax import attend, by_groups, window_of


def keys_of(cache: Tensor, table: Tensor | None, sequence: int, length: int) -> Tensor:
    """The first ``length`` entries of a sequence, ``[Hkv, length, ...]``, of a cache or of its pages."""
    if table is None:
        return cache[sequence, :, :length]
    page = cache.shape[2]
    found = [cache[int(table[sequence, i // page]), :, i % page] for i in range(length)]
    return torch.stack(found, dim=1) if found else cache.new_zeros(cache.shape[1], 0, *cache.shape[3:])


def lean(a: dict[str, Any]) -> dict[str, Tensor]:
    """out and lse of ``[B, Hq, Nq, D]`` queries."""
    q = a["q"]
    heads, rows, width = q.shape[1:]
    scale = width**-0.5 if a.get("scale") is None else a["scale"]
    softcap = a.get("softcap") or 0.0
    left, right = a.get("window") or (-1, -1)
    right = 0 if a.get("causal", True) else right
    outs, lses = [], []
    for b, length in enumerate(a["cache_seqlens"].tolist()):
        keys, values = (keys_of(a[n], a.get("block_table"), b, length).to(q.dtype) for n in ("k_cache", "v_cache"))
        if a.get("k_prefix") is not None:
            keys = torch.cat([a["k_prefix"].to(q.dtype), keys], dim=1)
            values = torch.cat([a["v_prefix"].to(q.dtype), values], dim=1)
        keys = keys * _factors(a.get("k_scale"), a.get("block_table"), b, length, q.dtype)
        values = values * _factors(a.get("v_scale"), a.get("block_table"), b, length, q.dtype)
        scores = torch.einsum("hid,hjd->hij", q[b], by_groups(keys[None], heads)[0]) * scale
        scores = a["jitter"].sums(scores)
        if softcap > 0.0:
            scores = softcap * torch.tanh(scores / softcap)
        place = keys.shape[1] - rows + torch.arange(rows)[:, None]
        seen = window_of(place, torch.arange(keys.shape[1])[None], left, right)
        out, lse = attend(
            scores[None], seen.expand(1, heads, -1, -1), by_groups(values[None], heads), a["jitter"], a.get("sinks")
        )
        outs.append(out)
        lses.append(lse)
    if not outs:
        return {"out": q.new_zeros(*q.shape[:3], a["v_cache"].shape[3]), "lse": q.new_zeros(q.shape[:3])}
    return {"out": torch.cat(outs), "lse": torch.cat(lses)}


def _factors(scale: Tensor | None, table: Tensor | None, b: int, length: int, dtype: torch.dtype) -> Any:
    if scale is None:
        return 1.0
    if scale.dim() == 1:
        return scale.to(dtype)[:, None, None]
    return keys_of(scale, table, b, length).to(dtype)[..., None]

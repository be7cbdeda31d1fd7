"""The selectors with a definition (select_exact, select_window), and hip_attention where nothing is left out."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import flash_attention
from .block_sparse_attention import seen_by, sparse


def whole(a: dict[str, Any]) -> dict[str, Tensor]:
    """hip_attention with room for everything is dense attention."""
    return flash_attention.dense({**a, "window": None, "causal": a.get("causal", True)})


def listed(a: dict[str, Any]) -> dict[str, Tensor]:
    """hip_attention to the lists that it is given: those of the arguments, or none at all."""
    if "indices" not in a:
        a = {**a, **_no_lists(a)}
    return sparse(a)


def _no_lists(a: dict[str, Any]) -> dict[str, Any]:
    rows, keys = a["q"].shape[2], a["k"].shape[2]
    blocks = max(-(-rows // a["block_q"]), 1)
    counts = torch.zeros(a["q"].shape[0], 1, blocks, dtype=torch.int32)
    return {"counts": counts, "indices": counts[..., None], "block_k": 8, "q_len": rows, "kv_len": keys}


def exact_scores(a: dict[str, Any]) -> dict[str, Tensor]:
    """``_best [B, Hm, Mq, blocks]``: the largest logit that a block of keys has for any row of a block of queries that
    may select it, -inf where it may not be selected; and ``_seen``, which keys a row sees of the sink and window."""
    q, k = a["q"], a["k"]
    batch, heads, rows, _ = q.shape
    kv_heads, keys = k.shape[1:3]
    k_of = k.repeat_interleave(heads // kv_heads, dim=1)
    logits = torch.einsum("bhid,bhjd->bhij", q, k_of)
    place, key = torch.arange(rows)[:, None] + keys - rows, torch.arange(keys)[None]
    may = key >= a["sink"]
    may = may & (key <= (place - a["window"] if a["causal"] else place * 0 + keys - 1))
    logits = torch.where(may, logits, float("-inf"))
    if a["heads"] != "query":
        logits = logits.view(batch, kv_heads, heads // kv_heads, rows, keys).amax(2)
    if a["heads"] == "all":
        logits = logits.amax(1, keepdim=True)
    blocks, size = -(-keys // a["block_k"]), a["block_k"]
    padded = torch.full((*logits.shape[:3], blocks * size), float("-inf"), dtype=logits.dtype)
    padded[..., :keys] = logits
    by_block = padded.view(*logits.shape[:3], blocks, size).amax(-1)
    groups = max(-(-rows // a["block_q"]), 1)
    best = torch.full((*by_block.shape[:2], groups, blocks), float("-inf"), dtype=logits.dtype)
    for m in range(groups):
        own = by_block[:, :, m * a["block_q"] : (m + 1) * a["block_q"]]
        if own.shape[2]:
            best[:, :, m] = own.amax(2)
    return {"_best": best}


__all__ = ["exact_scores", "listed", "seen_by", "whole"]

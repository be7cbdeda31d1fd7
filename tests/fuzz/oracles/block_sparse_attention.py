"""block_sparse_attention from docs/ops/block_sparse_attention.md: which row sees which key, in loops."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .lean_attention import keys_of
from .softmax import attend, by_groups


def seen_by(a: dict[str, Any], lengths: list[int], causal: bool) -> Tensor:
    """bool ``[B, Hm, q_len, kv_len]``: the keys that rows of sequences of these lengths see."""
    counts, indices = a["counts"].tolist(), a["indices"].tolist()
    rows, keys = a["q_len"], a["kv_len"]
    of_head = {
        name: a[name].tolist() if isinstance(a[name], Tensor) else [min(a[name], 2**40)] * a["counts"].shape[1]
        for name in ("sink", "window")
    }
    seen = torch.zeros(len(lengths), a["counts"].shape[1], rows, keys, dtype=torch.bool)
    key = torch.arange(keys)
    for b, length in enumerate(lengths):
        for h in range(seen.shape[1]):
            for i in range(rows):
                place = i + length - rows
                block = i // max(a["block_q"], 1)
                count = counts[b][h][block]
                row = key < of_head["sink"][h]
                row = row | ((key > place - of_head["window"][h]) & (key <= place))
                if count < 0:
                    row = torch.ones_like(row)
                for listed in indices[b][h][block][: max(count, 0)]:
                    row = row | (key // a["block_k"] == listed)
                if causal:
                    row = row & (key <= place)
                seen[b, h, i] = row & (key < length)
    return seen


def sparse(a: dict[str, Any]) -> dict[str, Tensor]:
    """out and lse of ``[B, Hq, Nq, D]`` queries."""
    q, k, v = a["q"], a["k"], a["v"]
    batch, heads, rows, width = q.shape
    keys, table = a["kv_len"], a.get("block_table")
    lengths = [keys] * batch if a.get("cache_seqlens") is None else a["cache_seqlens"].tolist()
    if table is not None or a.get("cache_seqlens") is not None:
        k, v = (_padded(x, table, lengths, keys) for x in (k, v))
    scale = width**-0.5 if a.get("scale") is None else a["scale"]
    seen = seen_by(a, lengths, a.get("causal", True)).repeat_interleave(heads // max(a["counts"].shape[1], 1), dim=1)
    scores = a["jitter"].sums(torch.einsum("bhid,bhjd->bhij", q, by_groups(k, heads)) * scale)
    out, lse = attend(scores, seen.expand(batch, heads, rows, keys), by_groups(v, heads), a["jitter"])
    return {"out": out, "lse": lse}


def _padded(x: Tensor, table: Tensor | None, lengths: list[int], keys: int) -> Tensor:
    """The keys of every sequence up to its length, with zeros behind them."""
    found = []
    for b, length in enumerate(lengths):
        own = keys_of(x, table, b, length)
        found.append(torch.cat([own, own.new_zeros(own.shape[0], keys - length, own.shape[2])], dim=1))
    return torch.stack(found) if found else x.new_zeros(0, x.shape[1], keys, x.shape[3])

"""Attention by its formula, over a matrix that says which row sees which key. For the oracles of all that attend."""

from __future__ import annotations

import torch
from torch import Tensor

from ..jitter import Jitter


def by_groups(x: Tensor, heads: int) -> Tensor:
    """``[B, Hkv, ...]`` as ``[B, heads, ...]``: query head h reads key head ``h // (heads / Hkv)``."""
    return x.repeat_interleave(heads // max(x.shape[1], 1), dim=1) if x.shape[1] else x


def window_of(rows: Tensor, keys: Tensor, left: int, right: int) -> Tensor:
    """True where key j is within ``[p - left, p + right]`` of a row's position p; -1 is no bound."""
    seen = torch.ones(torch.broadcast_shapes(rows.shape, keys.shape), dtype=torch.bool)
    if left >= 0:
        seen = seen & (keys - rows >= -left)
    if right >= 0:
        seen = seen & (keys - rows <= right)
    return seen


def attend(
    scores: Tensor, seen: Tensor, v: Tensor, jitter: Jitter, sinks: Tensor | None = None,
    kept: Tensor | None = None, tail: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """out ``[B, H, Nq, Dv]`` and lse ``[B, H, Nq]`` of scores ``[B, H, Nq, Nk]`` where ``seen``.

    ``sinks [H]`` takes part in the denominator; ``kept`` are factors of the weights (dropout). A row that sees nothing
    has out 0 and lse -inf, or the sink. ``tail`` says that a backward pass is given the rounded part of lse beside it:
    then its error is not that of lse, but of the logarithm of the denominator alone.
    """
    batch, heads, rows, keys = scores.shape
    columns = [torch.where(seen, scores, float("-inf"))]
    if sinks is not None:
        columns.append(sinks.to(scores.dtype)[None, :, None, None].expand(batch, heads, rows, 1))
    every = torch.cat(columns, dim=-1)
    if every.shape[-1] == 0:
        return scores.new_zeros(batch, heads, rows, v.shape[-1]) + v.sum() * 0, scores.new_full(
            (batch, heads, rows), float("-inf")
        )
    shift = every.detach().amax(-1, keepdim=True)
    shift = torch.where(shift == float("-inf"), 0.0, shift)
    some = every.detach() != float("-inf")
    weights = torch.where(some, torch.where(some, every - shift, 0.0).exp(), 0.0)
    total = weights.sum(-1, keepdim=True)
    empty = total == 0.0
    total = torch.where(empty, 1.0, total)
    lse = torch.where(empty, float("-inf"), total.log() + shift).squeeze(-1)
    exact = weights[..., :keys] / total
    digits = total.log().squeeze(-1) if tail else lse
    weights = jitter.weighed(exact, digits)
    if kept is not None:
        weights = weights * kept
    out = torch.einsum("bhij,bhjd->bhid", weights, v)
    return jitter.cancelled(scores, exact, out, digits), lse

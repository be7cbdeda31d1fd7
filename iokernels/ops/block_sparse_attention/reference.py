"""The oracle of block-sparse attention: dense attention with the lists expanded to a mask.

Computes in float32, in float64 for float64 inputs (use that to judge others), on any device, and is differentiable to
any order.
"""

from __future__ import annotations

import torch
from einops import einsum, repeat
from torch import Tensor

from iokernels.ops.shared.layout import state_dtype
from iokernels.runtime.registration.precision import lifted, recomputes_weights

from .index import key_mask
from .options import Options


def attend(q: Tensor, k: Tensor, v: Tensor, options: Options) -> tuple[Tensor, Tensor]:
    """Attention as :class:`Options` defines it. Returns (out, lse) like the operator."""
    dtype = q.dtype
    q, k, v = lifted((q, k, v))
    if options.block_table is not None:
        k, v = (_gathered(x, options.block_table, options.kv_len) for x in (k, v))
    heads = q.shape[1]
    k, v = (repeat(x, "b h n d -> b (h group) n d", group=heads // x.shape[1]) for x in (k, v))
    mask = key_mask(
        options.indices, options.counts, options.block_q, options.block_k,
        options.sink if options.sink_heads is None else options.sink_heads,
        options.window if options.window_heads is None else options.window_heads,
        q.shape[2], k.shape[2], options.causal, options.cache_seqlens,
    )  # fmt: skip
    mask = repeat(mask, "b h i j -> b (h group) i j", group=heads // mask.shape[1])
    # Keys past a sequence's length may hold anything, and 0 * NaN is not 0.
    shown = mask.any(2)[..., None]
    k, v = (x.masked_fill(~shown, 0.0) for x in (k, v))

    scores = options.scale * einsum(q, k, "b h i d, b h j d -> b h i j")
    scores = scores.masked_fill(~mask, float("-inf"))
    highest = scores.detach().amax(-1) if k.shape[2] else scores.new_full(scores.shape[:3], float("-inf"))
    highest = highest.masked_fill(highest == float("-inf"), 0.0)  # so that exp() below sees no inf - inf
    weights = torch.exp(scores - highest[..., None])
    denominator = weights.sum(-1)
    empty = denominator == 0.0
    denominator = denominator.masked_fill(empty, 1.0)
    lse = (highest + torch.log(denominator)).masked_fill(empty, float("-inf"))
    if recomputes_weights(q.dtype):
        weights = torch.exp(scores - lse.masked_fill(empty, 0.0)[..., None])
    else:
        weights = weights / denominator[..., None]
    return einsum(weights, v, "b h i j, b h j d -> b h i d").to(dtype), lse.to(state_dtype(dtype))


def _gathered(pages: Tensor, block_table: Tensor, kv_len: int) -> Tensor:
    """The keys of every sequence, ``[B, Hkv, kv_len, D]``, out of ``[pages, Hkv, page, D]``. Entries of the table that
    name no page are taken to be past a sequence's end."""
    if pages.shape[0] == 0:  # no entry is read
        pages = pages.new_zeros((1, *pages.shape[1:]))
    needed = -(-kv_len // max(pages.shape[2], 1))
    table = block_table[:, :needed].long().clamp(0, max(pages.shape[0] - 1, 0))
    rows = pages[table].transpose(1, 2).flatten(2, 3)
    return rows[:, :, :kv_len]

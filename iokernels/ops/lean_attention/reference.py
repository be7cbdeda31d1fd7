"""The oracle: decode attention as its formula reads, one sequence after the other.

Computes in float32, in float64 for float64 queries (use that to judge others), on any device, and is differentiable to
any order. Lengths and page tables are read on the host.
"""

from __future__ import annotations

import torch
from einops import einsum, rearrange, repeat
from torch import Tensor

from iokernels.runtime.contracts.offsets import on_host
from iokernels.runtime.registration.precision import at_least_single, lifted

from .options import Options, empty_lse, per_key


def attend(q: Tensor, k_cache: Tensor, v_cache: Tensor, options: Options) -> tuple[Tensor, Tensor]:
    """Attention as :class:`Options` defines it. Returns (out, lse) like the operator."""
    dtype = q.dtype
    q, k_cache, v_cache, options = lifted((q, k_cache, v_cache, options))
    if q.shape[0] == 0:
        numbers = (options.sinks, options.k_scale, options.v_scale, options.k_prefix, options.v_prefix)
        nothing = _nothing((q, k_cache, v_cache, *numbers)).to(q.dtype)
        return (q.new_empty((*q.shape[:3], v_cache.shape[3])) + nothing).to(dtype), empty_lse(q) + nothing
    outs, lses = [], []
    for sequence, length in enumerate(on_host("lean_attention", "cache_seqlens", options.cache_seqlens)):
        # Keys behind the window of the first row take no part, whatever they are.
        first = max(length - q.shape[2] - options.window_left, 0) if options.window_left >= 0 else 0
        k = keys_of(k_cache, options.k_scale, sequence, first, length, options, q.dtype)
        v = keys_of(v_cache, options.v_scale, sequence, first, length, options, q.dtype)
        if options.k_prefix is not None and options.v_prefix is not None and first == 0:
            k = torch.cat([_scaled(options.k_prefix, options.k_scale, q.dtype), k], dim=1)
            v = torch.cat([_scaled(options.v_prefix, options.v_scale, q.dtype), v], dim=1)
        out, lse = _attend_one(q[sequence], k, v, options)
        outs.append(out)
        lses.append(lse)
    return torch.stack(outs).to(dtype), torch.stack(lses)


def _nothing(tensors: tuple[Tensor | None, ...]) -> Tensor:
    """0, as a function of all that wants a gradient."""
    wanted = [x[:0].sum() for x in tensors if x is not None and x.requires_grad]
    return sum(wanted, torch.zeros((), device=tensors[0].device if tensors[0] is not None else None))


def keys_of(
    cache: Tensor, scale: Tensor | None, sequence: int, first: int, length: int, options: Options, dtype: torch.dtype
) -> Tensor:
    """The keys (or values) of one sequence from ``first`` to ``length``, scaled: [Hkv, length - first, D]."""
    if options.block_table is None:
        rows, factors = cache[sequence], scale[sequence] if scale is not None and per_key(scale) else scale
    else:
        page = cache.shape[2]
        pages = options.block_table[sequence, first // page : -(-length // page)].long()
        first, length = first % page, length - first // page * page
        rows = rearrange(cache[pages], "pages h page d -> h (pages page) d")
        factors = scale
        if scale is not None and per_key(scale):
            factors = rearrange(scale[pages], "pages h page -> h (pages page)")
    if factors is not None and factors.dim() == 2:
        factors = factors[:, first:length]
    return _scaled(rows[:, first:length], factors, dtype)


def _scaled(rows: Tensor, factors: Tensor | None, dtype: torch.dtype) -> Tensor:
    """``rows [Hkv, n, D]`` in ``dtype``, times a factor for each head or for each row."""
    rows = rows.to(dtype)
    if factors is None:
        return rows
    return rows * (factors[:, None, None] if factors.dim() == 1 else factors[:, :, None]).to(dtype)


def _attend_one(q: Tensor, k: Tensor, v: Tensor, options: Options) -> tuple[Tensor, Tensor]:
    """``q [Hq, Nq, D]`` at the end of ``k [Hkv, n, D]`` and ``v [Hkv, n, Dv]``."""
    heads, rows, keys = q.shape[0], q.shape[1], k.shape[1]
    k, v = (repeat(x, "h n d -> (h group) n d", group=heads // x.shape[0]) for x in (k, v))
    scores = options.scale * einsum(q, k, "h i d, h j d -> h i j")
    if options.softcap > 0.0:
        scores = options.softcap * torch.tanh(scores / options.softcap)

    position = torch.arange(rows, device=q.device) + keys - rows
    ahead = torch.arange(keys, device=q.device)[None, :] - position[:, None]
    hidden = torch.zeros_like(ahead, dtype=torch.bool)
    if options.window_left >= 0:
        hidden = hidden | (ahead < -options.window_left)
    if options.window_right >= 0:
        hidden = hidden | (ahead > options.window_right)
    scores = scores.masked_fill(hidden, float("-inf"))

    # A row's largest logit, and 0 where it has none, so that exp() below sees no inf - inf.
    highest = scores.detach().amax(-1) if keys else scores.new_full((heads, rows), float("-inf"))
    sinks = None
    if options.sinks is not None:
        sinks = options.sinks.to(scores.dtype)[:, None]
        highest = torch.maximum(highest, sinks.detach())
    highest = highest.masked_fill(highest == float("-inf"), 0.0)
    weights = torch.exp(scores - highest[..., None])
    denominator = weights.sum(-1)
    if sinks is not None:
        denominator = denominator + torch.exp(sinks - highest)
    empty = denominator == 0.0
    denominator = denominator.masked_fill(empty, 1.0)
    lse = (highest + torch.log(denominator)).masked_fill(empty, float("-inf"))
    weights = weights / denominator[..., None]
    if torch.isfinite(v.detach()).all():
        out = einsum(weights, v, "h i j, h j d -> h i d")
    else:
        # A weight of 0 does not undo a NaN, and a row knows nothing of a key that it does not see.
        out = einsum(weights, v[:, None].masked_fill(hidden[None, :, :, None], 0.0), "h i j, h i j d -> h i d")
    return out, lse.to(at_least_single(q.dtype))

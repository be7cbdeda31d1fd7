"""The oracle: attention as its formula reads, with the whole N x N matrix in memory.

Computes in float32, in float64 for float64 inputs (use that to judge others), on any device, and is differentiable to
any order.
"""

from __future__ import annotations

import torch
from einops import einsum, repeat
from torch import Tensor

from iokernels.ops.shared.layout import state_dtype
from iokernels.runtime.contracts.offsets import on_host
from iokernels.runtime.registration.precision import lifted, recomputes_weights

from .dropout import keep_mask
from .options import Options, narrowed, of_sequence


def attend(q: Tensor, k: Tensor, v: Tensor, options: Options) -> tuple[Tensor, Tensor]:
    """Attention as :class:`Options` defines it. Returns (out, lse) like the operator."""
    attend_in = _attend_dense if options.cu_seqlens_q is None else _attend_packed
    out, lse = attend_in(*lifted((q, k, v, options)))
    return out.to(q.dtype), lse.to(state_dtype(q.dtype))


def _attend_dense(q: Tensor, k: Tensor, v: Tensor, options: Options, first_sequence: int = 0) -> tuple[Tensor, Tensor]:
    heads, seqlen_q, seqlen_k = q.shape[1], q.shape[2], k.shape[2]
    k, v = (repeat(x, "b h n d -> b (h group) n d", group=heads // x.shape[1]) for x in (k, v))

    scores = options.scale * einsum(q, k, "b h i d, b h j d -> b h i j")
    if options.softcap > 0.0:
        scores = options.softcap * torch.tanh(scores / options.softcap)
    if options.bias is not None:
        scores = scores + narrowed(options.bias, scores.dtype).to(scores.dtype)
    distance = _row_minus_key(seqlen_q, seqlen_k, q.device)
    if options.alibi_slopes is not None:
        slopes = options.alibi_slopes.to(scores.dtype)
        scores = scores - slopes[:, :, None, None] * distance.abs()
    scores = scores.masked_fill(~_visible(distance, options), float("-inf"))

    # A row's largest logit, and 0 where it has none, so that exp() below sees no inf - inf.
    highest = scores.detach().amax(-1) if seqlen_k else scores.new_full(scores.shape[:3], float("-inf"))
    sinks = None
    if options.sinks is not None:
        sinks = options.sinks.to(scores.dtype)[None, :, None]
        highest = torch.maximum(highest, sinks.detach())
    highest = highest.masked_fill(highest == float("-inf"), 0.0)
    weights = torch.exp(scores - highest[..., None])
    denominator = weights.sum(-1)
    if sinks is not None:
        denominator = denominator + torch.exp(sinks - highest)
    empty = denominator == 0.0
    denominator = denominator.masked_fill(empty, 1.0)
    lse = (highest + torch.log(denominator)).masked_fill(empty, float("-inf"))
    if recomputes_weights(q.dtype):
        weights = torch.exp(scores - lse.masked_fill(empty, 0.0)[..., None])
    else:
        weights = weights / denominator[..., None]
    if options.dropout_p > 0.0:
        weights = weights * _kept(q, k, options, first_sequence) / (1.0 - options.dropout_p)
    return einsum(weights, v, "b h i j, b h j d -> b h i d"), lse


def _row_minus_key(seqlen_q: int, seqlen_k: int, device: torch.device) -> Tensor:
    """Position of row i among the keys, minus j: [Nq, Nk]."""
    rows = torch.arange(seqlen_q, device=device) + seqlen_k - seqlen_q
    return rows[:, None] - torch.arange(seqlen_k, device=device)[None, :]


def _visible(distance: Tensor, options: Options) -> Tensor:
    visible = torch.ones_like(distance, dtype=torch.bool)
    if options.window_left >= 0:
        visible = visible & (distance <= options.window_left)
    if options.window_right >= 0:
        visible = visible & (distance >= -options.window_right)
    if options.mask is not None:
        visible = visible & options.mask
    return visible


def _kept(q: Tensor, k: Tensor, options: Options, first_sequence: int) -> Tensor:
    assert options.dropout_seed is not None
    batch, heads, seqlen_q, _ = q.shape
    return keep_mask(
        options.dropout_seed,
        options.dropout_p,
        first_sequence * heads + torch.arange(batch * heads, device=q.device).view(batch, heads, 1, 1),
        torch.arange(seqlen_q, device=q.device)[:, None],
        torch.arange(k.shape[2], device=q.device)[None, :],
    )


def _attend_packed(q: Tensor, k: Tensor, v: Tensor, options: Options) -> tuple[Tensor, Tensor]:
    """Sequence by sequence. Reads the offsets on the host."""
    assert options.cu_seqlens_q is not None
    assert options.cu_seqlens_k is not None
    starts_q = on_host("flash_attention_varlen", "cu_seqlens_q", options.cu_seqlens_q)
    starts_k = on_host("flash_attention_varlen", "cu_seqlens_k", options.cu_seqlens_k)
    outs, lses = [], []
    for sequence in range(len(starts_q) - 1):
        rows = slice(starts_q[sequence], starts_q[sequence + 1])
        keys = slice(starts_k[sequence], starts_k[sequence + 1])
        out, lse = _attend_dense(
            q[:, :, rows],
            k[:, :, keys],
            v[:, :, keys],
            of_sequence(options, sequence, rows.stop - rows.start, keys.stop - keys.start),
            first_sequence=sequence,
        )
        outs.append(out)
        lses.append(lse)
    rest = q.shape[2] - starts_q[-1]
    outs.append(q.new_zeros((1, q.shape[1], rest, v.shape[3])))
    lses.append(q.new_full((1, q.shape[1], rest), float("-inf")))
    return torch.cat(outs, dim=2), torch.cat(lses, dim=2)

"""PyTorch's ``scaled_dot_product_attention``, signature and semantics, on :func:`flash_attention`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .api import flash_attention

_NAME = "scaled_dot_product_attention"


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Replaces :func:`torch.nn.functional.scaled_dot_product_attention`, argument by argument.

    Args:
        query: ``[..., Hq, L, E]``, at least two dimensions: float16, bfloat16, float32 or float64.
        key: ``[..., H, S, E]``, dtype and device of query. The dimensions before ``S`` broadcast.
        value: ``[..., H, S, Ev]``, likewise.
        attn_mask: at least two dimensions, broadcastable to ``[..., Hq, L, S]``. Bool: True takes part. Floating:
            added to the scores, differentiable, any floating dtype. With more than one batch dimension, a mask that
            differs along only some of them is expanded to all.
        dropout_p: probability in [0, 1] of dropping a weight. Always applied: pass 0 in evaluation. The generator is
            torch's, the dropped weights are not those that torch's function drops.
        is_causal: row i sees the keys 0 to i. This is aligned top-left, as in torch, and unlike
            :func:`flash_attention`, also where L and S differ. Not together with ``attn_mask``.
        scale: factor of the scores; ``E ** -0.5`` if None.
        enable_gqa: H may be a divisor of Hq; query head h reads key head ``h // (Hq / H)``.

    Returns:
        ``[..., Hq, L, Ev]``, dtype of query. A row that sees no key is 0 and has zero gradients.

    Raises:
        TypeError: an argument of a wrong type or dtype.
        ValueError: shapes or numbers that do not fit (torch's function raises ``RuntimeError``).

    The backend is chosen as in :func:`flash_attention`; set it with :func:`iokernels.use_backend`. Differences from
    torch: gradients can be taken once, nested tensors are not taken, and gradients do not flow through
    ``torch.func.grad``.
    """
    _check(query, key, value, attn_mask, is_causal)
    q, k, v, mask, batch = _dense(query, key, value, attn_mask, enable_gqa)
    options: dict[str, Any] = {}
    if is_causal:
        k, v, options = top_left_causal(k, v, q.shape[2])
    if mask is not None:
        options["mask" if mask.dtype == torch.bool else "bias"] = mask
    if dropout_p == 1.0:
        out = 0.0 * flash_attention(q, k, v, scale=scale, **options)
    else:
        out = flash_attention(q, k, v, scale=scale, dropout_p=dropout_p, **options)
    rank = max(query.dim(), key.dim(), value.dim())
    if rank == 4:
        return out
    if rank > 4:
        return out.unflatten(0, batch)
    return out[0] if rank == 3 else out[0, 0]


def top_left_causal(key: Tensor, value: Tensor, seqlen_q: int) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Express "row i sees the keys 0 to i" in the bottom-right terms of :func:`flash_attention`, without a mask.

    Takes ``key`` and ``value`` ``[B, H, S, E]``; returns views of them and the options to pass with them.
    """
    seqlen_k = key.shape[2]
    if seqlen_q < seqlen_k:
        # No row sees a key past the last row. Without those keys both corners are the same.
        key, value = key[:, :, :seqlen_q], value[:, :, :seqlen_q]
    if seqlen_q <= seqlen_k:
        return key, value, {"causal": True}
    # Row i sees up to key i + S - L + right, so the right side of the window moves the diagonal back to the corner.
    return key, value, {"window": (-1, seqlen_q - seqlen_k)}


def _check(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, is_causal: bool) -> None:
    for name, x in (("query", query), ("key", key), ("value", value), ("attn_mask", attn_mask)):
        if x is None and name == "attn_mask":
            continue
        if not isinstance(x, Tensor):
            raise TypeError(f"{_NAME}: {name} is {type(x).__name__}; it must be a torch.Tensor")
        if x.is_nested:
            raise TypeError(
                f"{_NAME}: {name} is a nested tensor; it must be a dense one: torch.nested.to_padded_tensor"
            )
        if x.dim() < 2:
            raise ValueError(f"{_NAME}: {name} has {x.dim()} dimensions; it must have at least 2")
    if attn_mask is None:
        return
    if is_causal:
        raise ValueError(f"{_NAME}: is_causal and attn_mask are both given; pass one of them")
    if attn_mask.dtype != torch.bool and not attn_mask.is_floating_point():
        raise TypeError(f"{_NAME}: attn_mask is {attn_mask.dtype}; it must be bool or floating")
    rank = max(query.dim(), key.dim(), value.dim())
    if attn_mask.dim() > rank:
        raise ValueError(f"{_NAME}: attn_mask has {attn_mask.dim()} dimensions; it must have at most {rank}")


def _dense(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, enable_gqa: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, tuple[int, ...]]:
    """Bring everything to the four dimensions of :func:`flash_attention`, broadcasting as torch does.

    Views, except where several batch dimensions cannot be merged into one. Also returns the batch dimensions.
    """
    if query.dim() == key.dim() == value.dim() == 4:
        kv_shape = key.shape[:2]
        same = kv_shape == value.shape[:2] and query.shape[0] == kv_shape[0]
        if same and (enable_gqa or query.shape[1] == kv_shape[1]):
            return query, key, value, mask, (query.shape[0],)
    rank = max(4, query.dim(), key.dim(), value.dim())
    q, k, v = (_of_rank(x, rank) for x in (query, key, value))
    try:
        batch = tuple(torch.broadcast_shapes(*(x.shape[:-3] for x in (q, k, v))))
        heads = q.shape[-3] if enable_gqa else torch.broadcast_shapes(*(x.shape[-3:-2] for x in (q, k, v)))[0]
    except RuntimeError:
        raise ValueError(
            f"{_NAME}: query, key and value have shapes {list(query.shape)}, {list(key.shape)} and "
            f"{list(value.shape)}; the dimensions before the last two must broadcast"
            + ("" if enable_gqa else " (fewer heads in key and value: enable_gqa=True)")
        ) from None
    # One head of keys for all stays one: it is never repeated in memory.
    kv_heads = k.shape[-3] if enable_gqa or k.shape[-3] == v.shape[-3] == 1 else heads
    if enable_gqa and k.shape[-3] != v.shape[-3]:
        raise ValueError(f"{_NAME}: key has {k.shape[-3]} heads and value {v.shape[-3]}; they must have as many")
    q, k, v = (x.expand(*batch, n, *x.shape[-2:]).flatten(0, -4) for x, n in ((q, heads), (k, kv_heads), (v, kv_heads)))
    if mask is not None:
        mask = _of_rank(mask, rank)
        if any(size != 1 for size in mask.shape[:-3]):
            try:
                mask = mask.expand(*batch, *mask.shape[-3:])
            except RuntimeError:
                raise ValueError(
                    f"{_NAME}: attn_mask has batch dimensions {list(mask.shape[:-3])}; "
                    f"they must broadcast to {list(batch)}"
                ) from None
        mask = mask.flatten(0, -4)
    return q, k, v, mask, batch


def _of_rank(x: Tensor, rank: int) -> Tensor:
    return x[(None,) * (rank - x.dim())]

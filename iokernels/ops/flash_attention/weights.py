"""The attention weights of a finished call, from its log-sum-exp."""

from __future__ import annotations

import torch
from torch import Tensor

_FAR = 2.0**14
"""An LSE from which on float32 rounds it by more than a thousandth."""


def attention_weights(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    *,
    causal: bool = False,
    window: tuple[int, int] | None = None,
    scale: float | None = None,
    softcap: float = 0.0,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """The matrix that :func:`flash_attention` does not write: ``p = exp(s - lse)``, before dropout.

    Pass q, k and the options of the call, and the ``lse [B, Hq, Nq]`` that it returned. Needs memory for
    ``B * Hq * Nq * Nk`` weights: meant for looking at attention, not for training with it. Differentiable in q, k, bias
    and lse. The arguments are taken as :func:`flash_attention` accepted them and are not checked again.

    Returns:
        ``[B, Hq, Nq, Nk]`` in the dtype of q. With sinks a row sums to less than 1; a row without keys is 0.
    """
    seqlen_q, seqlen_k = q.shape[2], k.shape[2]
    grouped = q.to(lse.dtype).unflatten(1, (k.shape[1], -1))
    scores = (grouped @ k.to(lse.dtype).unsqueeze(2).mT).flatten(1, 2)
    scores = scores * (q.shape[3] ** -0.5 if scale is None else scale)
    if softcap > 0.0:
        scores = softcap * torch.tanh(scores / softcap)
    if bias is not None:
        scores = scores + bias.to(scores.dtype)

    left, right = window or (-1, -1)
    right = 0 if causal else right
    rows = torch.arange(seqlen_q, device=q.device)[:, None] + seqlen_k - seqlen_q
    keys = torch.arange(seqlen_k, device=q.device)
    hidden = (keys < rows - left if left >= 0 else None, keys > rows + right if right >= 0 else None)
    for where in (*hidden, None if mask is None else ~mask):
        if where is not None:
            scores = scores.masked_fill(where, float("-inf"))
    # exp(-inf - -inf) would be NaN in a row without keys.
    lse = lse.masked_fill(lse == float("-inf"), 0.0)
    weights = torch.exp(scores - lse[..., None])
    # Beside a bias of -1e9 rounding takes from the LSE how many keys share the row. Their weights sum to 1: a sink
    # would have to be as far from 0 to take part.
    total = weights.sum(-1, keepdim=True)
    far = (lse.abs() > _FAR)[..., None] & (total > 0.0)
    return (weights / total.masked_fill(~far, 1.0)).to(q.dtype)

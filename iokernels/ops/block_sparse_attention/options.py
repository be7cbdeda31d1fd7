"""What the backends of block-sparse attention agree on: the arguments after q, k, v.

``q [B, Hq, Nq, D]``, ``k [B, Hkv, Nk, D]``, ``v [B, Hkv, Nk, Dv]``; or paged ``k [pages, Hkv, page, D]`` where
``block_table[b, i]`` is the page that holds the keys ``i * page`` to ``(i + 1) * page`` of sequence b.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from iokernels.ops.shared.layout import state_dtype
from iokernels.runtime.registration.schema import Size


class Options(NamedTuple):
    """Everything that shapes the attention matrix, after validation: a :class:`BlockIndex` as an operator takes it.

    Row i of sequence b stands at position ``p = i + len - Nq`` of its ``len`` keys (kv_len, or its cache_seqlens).
    With h' the list of query head h, and key j in ``[0, len)``, ``j <= p`` where causal, the row sees j where

        j // block_k is one of indices[b, h', i // block_q, :counts[b, h', i // block_q]],  or counts is -1,
        or j < sink,  or p - window < j <= p

    and then ``p_ij = exp(scale q_i . k_j - lse_i)``, ``out_i = sum_j p_ij v_j``. A row without a key has out 0 and lse
    -inf.
    """

    # Tensors, in the order of the operators' schemas.
    indices: Tensor  # int32 [B, Hm, Mq, S]
    counts: Tensor  # int32 [B, Hm, Mq]
    sink_heads: Tensor | None = None  # int32 [Hm]; replaces sink
    window_heads: Tensor | None = None  # int32 [Hm]; replaces window
    block_table: Tensor | None = None  # int32 [B, most pages]
    cache_seqlens: Tensor | None = None  # int32 [B]
    # Numbers.
    block_q: Size = 64
    block_k: int = 64
    sink: Size = 0
    window: Size = 0
    kv_len: Size = 0
    scale: float = 1.0
    causal: bool = True


class Needs(NamedTuple):
    """Which gradients a backward pass has to compute."""

    q: bool
    k: bool
    v: bool


class Gradients(NamedTuple):
    """What a backward pass returns; None where not needed. Shapes and dtypes of q, k, v."""

    q: Tensor | None
    k: Tensor | None
    v: Tensor | None


def packed_heads(heads: int, kv_heads: int, lists: int) -> int:
    """How many query heads of a key head share one list, and so one tile of rows."""
    return heads // kv_heads if lists <= kv_heads else 1


def empty_lse(q: Tensor) -> Tensor:
    """An uninitialised log-sum-exp [B, Hq, Nq]."""
    return q.new_empty(q.shape[:3], dtype=state_dtype(q.dtype))

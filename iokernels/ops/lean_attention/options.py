"""What the backends of this room agree on: the arguments after q and the caches.

``q [B, Hq, Nq, D]`` holds the newest Nq positions of every sequence. Keys and values lie in caches of a fixed capacity:
dense ``[B, Hkv, N, D]``, or paged ``[pages, Hkv, page, D]``, where ``block_table[b, i]`` is the page that holds the
keys ``i * page`` to ``(i + 1) * page`` of sequence b.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor


class Options(NamedTuple):
    """Everything that shapes the attention matrix, after validation.

    With ``len = cache_seqlens[b]`` keys of its own after P keys of a common prefix, row i of sequence b stands at the
    position ``p = P + len - Nq + i``. The score of the key at position j is

        s = scale * k_scale * q_i . k_j                  (k_scale: of the key's head, or of the key)
        s = softcap * tanh(s / softcap)                  if softcap > 0
        s = -inf   unless  p - window_left <= j <= p + window_right

    where a window of -1 is unbounded on that side; causal is ``window_right = 0``. Then
    ``lse = log(exp(sink) + sum_j exp(s))`` and ``out_i = sum_j exp(s - lse) v_scale v_j``. A row without a key has out
    0 and lse -inf (the sink, where there is one).
    """

    # Tensors, in the order of the operator's schema.
    cache_seqlens: Tensor  # int32 [B]
    block_table: Tensor | None = None  # int32 [B, most pages]
    sinks: Tensor | None = None  # any floating dtype, [Hq], in natural-log units
    k_scale: Tensor | None = None  # float32 [Hkv], or one for each key: [B, Hkv, N], paged [pages, Hkv, page]
    v_scale: Tensor | None = None
    k_prefix: Tensor | None = None  # dtype of the cache, [Hkv, P, D]
    v_prefix: Tensor | None = None  # [Hkv, P, Dv]
    # Numbers.
    scale: float = 1.0
    window_left: int = -1
    window_right: int = -1
    softcap: float = 0.0  # 0: none
    schedule: str = "auto"  # one of SCHEDULES


SCHEDULES = ("auto", "lean", "split", "invariant")
"""How a GPU divides the keys: what tuning chose, equal shares for all thread blocks, equal parts of the longest cache,
or parts of a length that depends on nothing but the widths and dtypes."""


def capacity(k_cache: Tensor, options: Options) -> Any:
    """How many keys a sequence can have at most."""
    if options.block_table is None:
        return k_cache.shape[2]
    return options.block_table.shape[1] * k_cache.shape[2]


def per_key(scale: Tensor | None) -> bool:
    """Whether a scale belongs to each key, not to a head."""
    return scale is not None and scale.dim() == 3


def empty_out(q: Tensor, v_cache: Tensor) -> Tensor:
    """An uninitialised output [B, Hq, Nq, Dv] in the memory order of q."""
    batch, heads, rows, _ = q.shape
    if q.stride(1) < q.stride(2):
        return q.new_empty((batch, rows, heads, v_cache.shape[3])).transpose(1, 2)
    return q.new_empty((batch, heads, rows, v_cache.shape[3]))


def empty_lse(q: Tensor) -> Tensor:
    """An uninitialised log-sum-exp [B, Hq, Nq]: float32, but for float64 queries."""
    return q.new_empty(q.shape[:3], dtype=torch.float64 if q.dtype == torch.float64 else torch.float32)

"""Causal self-attention of a decoder: parallel over a prompt, then from a cache, a few positions at a time."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from iokernels.ops.append_kv.rotary import apply_rotary, rotary_table
from iokernels.ops.flash_attention.api import flash_attention
from iokernels.ops.lean_attention.api import MAX_QUERIES
from iokernels.ops.shared.integers import integer
from iokernels.runtime.contracts import FLOATS, Contract, Spec
from iokernels.runtime.contracts.plain import LARGEST
from iokernels.runtime.registration.autocast import autocast_dtype

from .kv_cache import KVCache

_CONTRACT = Contract("DecodeAttention", x=Spec("B N embed_dim", FLOATS))

__all__ = ["DecodeAttention", "KVCache"]


class DecodeAttention(nn.Module):
    """Causal self-attention that can go on from a :class:`KVCache`.

    Without a cache ``forward`` is :func:`iokernels.flash_attention` of all positions, for training. With one, it writes
    the new keys and values into it and attends to all that it holds, by :func:`iokernels.lean_attention`.

    The parameters have the names, shapes and initial values of :class:`iokernels.nn.FlashAttention` (and so, without
    grouped heads and sinks, of :class:`torch.nn.MultiheadAttention`): a state_dict loads in both directions.

    Args:
        embed_dim: width E of input and output.
        num_heads: query heads; divides embed_dim.
        bias: whether the projections have a bias.
        num_kv_heads: heads of keys and values, a divisor of num_heads; num_heads if None.
        rotary: how many elements of each head turn with the position (:func:`iokernels.apply_rotary`); 0 is none.
        max_positions: how many positions the rotary table has; with rotary, the longest sequence.
        rotary_base: the angle of position p and pair j is ``p * rotary_base ** (-2 j / rotary)``.
        interleaved: pairs are (2 j, 2 j + 1) instead of (j, j + rotary / 2).
        window: ``(left, right)`` as in :func:`iokernels.flash_attention`; None sees all earlier positions.
        softcap: as there; 0 turns it off.
        sinks: adds a parameter ``sinks [num_heads]``, initially 0.
        scale: factor of the scores; ``head_dim ** -0.5`` if None.
        backend: as there, for all operators.
        device: where the parameters live.
        dtype: their dtype.

    Raises:
        TypeError: an argument of a wrong type.
        ValueError: sizes that do not fit.
    """

    in_proj_bias: Tensor | None
    sinks: Tensor | None
    cos: Tensor
    sin: Tensor

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        bias: bool = True,
        *,
        num_kv_heads: int | None = None,
        rotary: int = 0,
        max_positions: int = 0,
        rotary_base: float = 10000.0,
        interleaved: bool = False,
        window: tuple[int, int] | None = None,
        softcap: float = 0.0,
        sinks: bool = False,
        scale: float | None = None,
        backend: str | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        embed_dim = integer(_CONTRACT, "embed_dim", embed_dim, most=LARGEST)
        num_heads = integer(_CONTRACT, "num_heads", num_heads)
        kv_heads = num_heads if num_kv_heads is None else integer(_CONTRACT, "num_kv_heads", num_kv_heads)
        rotary = integer(_CONTRACT, "rotary", rotary)
        max_positions = integer(_CONTRACT, "max_positions", max_positions, most=LARGEST)
        rotary_base = _CONTRACT.number("rotary_base", rotary_base, above=0.0)
        interleaved = _CONTRACT.flag("interleaved", interleaved)
        window = None if window is None else _CONTRACT.window(window)
        softcap = _CONTRACT.number("softcap", softcap, least=0.0)
        scale = None if scale is None else _CONTRACT.number("scale", scale)
        _CONTRACT.require(
            embed_dim > 0 and num_heads > 0 and embed_dim % num_heads == 0,
            f"embed_dim is {embed_dim} and num_heads {num_heads}; both must be positive, and num_heads a divisor",
        )
        _CONTRACT.require(
            kv_heads > 0 and num_heads % kv_heads == 0,
            f"num_kv_heads is {kv_heads}; it must be a divisor of num_heads, {num_heads}",
        )
        head_dim = embed_dim // num_heads
        _CONTRACT.require(
            0 <= rotary <= head_dim and rotary % 2 == 0,
            f"rotary is {rotary}; it must be even, and at most the width of a head, {head_dim}",
        )
        _CONTRACT.require(
            (rotary > 0) == (max_positions > 0),
            f"rotary is {rotary} and max_positions {max_positions}; both must be positive, or both 0",
        )
        self.embed_dim, self.num_heads, self.num_kv_heads, self.head_dim = embed_dim, num_heads, kv_heads, head_dim
        self.rotary, self.max_positions, self.rotary_base = rotary, max_positions, rotary_base
        self.interleaved = interleaved
        self.window = window
        self.softcap = softcap
        self.scale = scale
        self.backend = backend

        made: dict[str, Any] = {"device": device, "dtype": dtype}
        rows = embed_dim + 2 * kv_heads * head_dim
        self.in_proj_weight = nn.Parameter(torch.empty((rows, embed_dim), **made))
        for name, shape in (("in_proj_bias", rows if bias else 0), ("sinks", num_heads if sinks else 0)):
            self.register_parameter(name, nn.Parameter(torch.zeros(shape, **made)) if shape else None)
        self.out_proj = nn.Linear(embed_dim, embed_dim, bias=bias, **made)
        nn.init.xavier_uniform_(self.in_proj_weight)
        if bias:
            nn.init.zeros_(self.out_proj.bias)
        if rotary:
            self._make_table(device)

    def _make_table(self, device: Any) -> None:
        tables = rotary_table(self.max_positions, self.rotary, base=self.rotary_base, device=device)
        for name, table in zip(("cos", "sin"), tables, strict=True):
            self.register_buffer(name, table, persistent=False)

    def _apply(self, fn: Any, recurse: bool = True) -> DecodeAttention:
        super()._apply(fn, recurse)
        if self.rotary:
            # Angles stay float32 in a module of half precision, and exist after to_empty().
            self._make_table(self.cos.device)
        return self

    def extra_repr(self) -> str:
        """The options that shape the result."""
        said = {"rotary": 0, "interleaved": False, "window": None, "softcap": 0.0, "scale": None, "backend": None}
        text = f"{self.embed_dim}, num_heads={self.num_heads}, num_kv_heads={self.num_kv_heads}"
        return text + "".join(f", {n}={getattr(self, n)!r}" for n, usual in said.items() if getattr(self, n) != usual)

    def new_cache(self, batch: int, capacity: int, *, layers: int = 1, **options: Any) -> KVCache:
        """A :class:`KVCache` that fits this module; ``options`` are its others (``page``, ``dtype``, ...).

        Its dtype is that of the parameters, or under autocast the one that projections have there.
        """
        weight = self.in_proj_weight
        dtype = autocast_dtype(weight.device.type) or weight.dtype
        options = {"dtype": dtype, "device": weight.device, **options}
        return KVCache(batch, capacity, self.num_kv_heads, self.head_dim, layers=layers, **options)

    def forward(self, x: Tensor, cache: KVCache | None = None, *, layer: int = 0) -> Tensor:
        """Attend from each position to itself and those before it.

        Args:
            x: ``[B, N, E]``. With a cache, the N positions of its last :meth:`KVCache.extend`, which the caller has
                called; rows past a sequence's own count are padding, and their results are of no use.
            cache: what was seen before. It is written, so gradients are refused: call it under ``torch.no_grad()``.
            layer: which of the cache's layers this is.

        Returns:
            ``[B, N, E]``.

        A prompt, that is all positions of empty sequences, is attended to as it is, before a quantised cache rounds
        its keys. More than 16 positions of sequences that are not empty are taken 16 at a time.
        """
        _CONTRACT.check({"embed_dim": self.embed_dim}, x=x)
        if self.rotary and self.cos.device != x.device:
            self._make_table(x.device)  # still on meta: a state_dict was assigned to a module that was built there
        widths = [self.embed_dim, *[self.num_kv_heads * self.head_dim] * 2]
        projected = F.linear(x, self.in_proj_weight, self.in_proj_bias).split(widths, dim=-1)
        q, k, v = (part.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for part in projected)
        out = self._parallel(q, k, v) if cache is None else self._cached(q, k, v, cache, layer)
        return self.out_proj(out.transpose(1, 2).flatten(2))

    def _options(self) -> dict[str, Any]:
        return {"causal": True, "window": self.window, "softcap": self.softcap, "scale": self.scale,
                "sinks": self.sinks, "backend": self.backend}  # fmt: skip

    def _parallel(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        first = torch.zeros(q.shape[0], dtype=torch.int32, device=q.device)
        return flash_attention(self._turned(q, first), self._turned(k, first), v, **self._options())

    def _cached(self, q: Tensor, k: Tensor, v: Tensor, cache: KVCache, layer: int) -> Tensor:
        if not isinstance(cache, KVCache):
            raise TypeError(f"DecodeAttention: cache is {type(cache).__name__}; it must be None or a KVCache")
        angles = (self.cos, self.sin) if self.rotary else None
        cache.append(k, v, layer=layer, rotary=angles, interleaved=self.interleaved, backend=self.backend)
        if cache.in_prompt:
            return self._parallel(q, k, v)
        q = self._turned(q, cache.starts)
        if q.shape[2] <= MAX_QUERIES:
            return cache.attend(q, layer=layer, **self._options())
        pieces, reached = [], cache.starts
        for piece in q.split(MAX_QUERIES, dim=2):
            reached = reached + piece.shape[2]
            pieces.append(cache.attend(piece, layer=layer, cache_seqlens=reached, **self._options()))
        return torch.cat(pieces, dim=2)

    def _turned(self, x: Tensor, first: Tensor) -> Tensor:
        if not self.rotary:
            return x
        return apply_rotary(x, self.cos, self.sin, first, interleaved=self.interleaved)

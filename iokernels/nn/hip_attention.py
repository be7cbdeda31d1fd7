"""Causal self-attention that is trained dense and runs sparse: :func:`iokernels.hip_attention` as a module."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from iokernels.ops.block_sparse_attention.arguments import keys
from iokernels.ops.hip_attention.api import hip_attention
from iokernels.ops.hip_attention.cache import SelectionCache
from iokernels.ops.hip_attention.select.call import options_of
from iokernels.runtime.contracts import Contract
from iokernels.runtime.contracts.plain import flag
from iokernels.runtime.errors import UnsupportedError
from iokernels.runtime.registration.autocast import autocast_dtype

from .kv_cache import KVCache
from .lean_attention import DecodeAttention

_CONTRACT = Contract("HiPAttention")


class HiPCache(KVCache):
    """A dense :class:`KVCache` of sequences of one length, with a :class:`iokernels.SelectionCache` for every layer.

    Args:
        refresh: steps between two runs of each stage of the search; None searches anew in every step.
        batch, capacity, num_kv_heads, head_dim, options: as in :class:`KVCache`.

    Raises:
        UnsupportedError: pages, or a dtype that has to be scaled: the search reads the keys as they lie.
    """

    def __init__(
        self,
        batch: int,
        capacity: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        refresh: Sequence[int] | None = (16, 8, 4),
        **options: Any,
    ) -> None:
        super().__init__(batch, capacity, num_kv_heads, head_dim, **options)
        if self.pages is not None or self.k_scale is not None or self.v_scale is not None:
            raise UnsupportedError(
                "HiPCache: page, k_scale and quantised dtypes are not supported: the search reads the keys as they lie."
            )
        layers = self.k.shape[0]
        self.selections = [None if refresh is None else SelectionCache(refresh) for _ in range(layers)]

    def _set_lengths(self, lengths: list[int]) -> None:
        super()._set_lengths(lengths)
        # Lists belong to the sequences that were there.
        for selection in self.selections:
            if selection is not None:
                selection.reset()

    def held(self, layer: int) -> tuple[Tensor, Tensor]:
        """Views of the keys and values of a layer up to the length of the sequences.

        Raises:
            UnsupportedError: the sequences have different lengths.
        """
        lengths = set(self.lengths)
        if len(lengths) > 1:
            raise UnsupportedError(
                f"HiPCache: the sequences have lengths {self.lengths}; the search takes sequences of one length. "
                "Decode them apart, or use DecodeAttention."
            )
        length = lengths.pop()
        return self.k[layer][:, :, :length], self.v[layer][:, :, :length]


torch.serialization.add_safe_globals([HiPCache])


class HiPAttention(DecodeAttention):
    """:class:`DecodeAttention` whose rows attend to ``budget + sink + window`` keys where there are more.

    In training mode it is dense, :func:`iokernels.flash_attention`: lists are found for a model that was trained
    without them. In evaluation it selects. Parameters, and so state_dicts, are those of :class:`DecodeAttention` and
    :class:`torch.nn.MultiheadAttention`: load trained weights, call ``eval()``.

    Args:
        embed_dim: width E of input and output.
        num_heads: query heads; divides embed_dim.
        bias: whether the projections have a bias.
        budget: keys that are selected for each block of queries, as in :func:`iokernels.hip_attention`.
        sink: first keys that every row attends to.
        window: latest keys that every row attends to.
        heads: who shares a list, as in :func:`iokernels.select_hip`.
        block_q: query rows that share a list.
        sparse_training: select in training too. Gradients then flow through what was attended to.
        num_kv_heads, rotary, max_positions, rotary_base, interleaved, scale, backend, device, dtype: as in
            :class:`DecodeAttention`. Positions are not extended: a sequence longer than those of training needs a
            model that can do with it.

    Raises:
        ValueError: sizes that do not fit.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        bias: bool = True,
        *,
        budget: int = 2048,
        sink: int = 256,
        window: int = 1024,
        heads: str = "kv",
        block_q: int = 64,
        sparse_training: bool = False,
        num_kv_heads: int | None = None,
        rotary: int = 0,
        max_positions: int = 0,
        rotary_base: float = 10000.0,
        interleaved: bool = False,
        scale: float | None = None,
        backend: str | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            embed_dim, num_heads, bias, num_kv_heads=num_kv_heads, rotary=rotary, max_positions=max_positions,
            rotary_base=rotary_base, interleaved=interleaved, scale=scale, backend=backend, device=device, dtype=dtype,
        )  # fmt: skip
        self.heads, self.block_q, self.sink, self.recent, _ = options_of(
            "HiPAttention", heads, block_q, sink, window, True
        )
        self.budget = keys("HiPAttention", "budget", budget, least=1)
        if scale is not None:  # of training too: the search wants the highest scores, not the lowest
            self.scale = _CONTRACT.number("scale", scale, above=0.0)
        self.sparse_training = flag("HiPAttention", "sparse_training", sparse_training)

    def extra_repr(self) -> str:
        """The options that shape the result."""
        return f"{super().extra_repr()}, budget={self.budget}, sink={self.sink}, window={self.recent}"

    def new_cache(self, batch: int, capacity: int, *, layers: int = 1, **options: Any) -> HiPCache:
        """A :class:`HiPCache` that fits this module; ``options`` are its others (``refresh``, ``dtype``, ...)."""
        weight = self.in_proj_weight
        dtype = autocast_dtype(weight.device.type) or weight.dtype
        options = {"dtype": dtype, "device": weight.device, **options}
        return HiPCache(batch, capacity, self.num_kv_heads, self.head_dim, layers=layers, **options)

    def _sparse(self, q: Tensor, k: Tensor, v: Tensor, selection: SelectionCache | None = None) -> Tensor:
        return hip_attention(
            q, k, v, budget=self.budget, sink=self.sink, window=self.recent, scale=self.scale, heads=self.heads,
            block_q=self.block_q, selection=selection, backend=self.backend,
        )  # fmt: skip

    def _parallel(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.training and not self.sparse_training:
            return super()._parallel(q, k, v)
        first = torch.zeros(q.shape[0], dtype=torch.int32, device=q.device)
        return self._sparse(self._turned(q, first), self._turned(k, first), v)

    def _cached(self, q: Tensor, k: Tensor, v: Tensor, cache: KVCache, layer: int) -> Tensor:
        if not isinstance(cache, HiPCache):
            raise TypeError(f"HiPAttention: cache is {type(cache).__name__}; it must be a HiPCache, from new_cache()")
        if self.training and not self.sparse_training:
            return super()._cached(q, k, v, cache, layer)
        angles = (self.cos, self.sin) if self.rotary else None
        cache.append(k, v, layer=layer, rotary=angles, interleaved=self.interleaved, backend=self.backend)
        keys, values = cache.held(layer)
        # Steps of a few positions reuse lists; a prompt, or a long piece of one, makes its own.
        selection = cache.selections[layer] if q.shape[2] <= self.block_q and not cache.in_prompt else None
        return self._sparse(self._turned(q, cache.starts), keys, values, selection)

"""Calls of lean_attention for its tests: caches of every kind, with poison wherever nothing may be read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from iokernels import lean_attention
from iokernels.runtime.registration.precision import eagerly
from iokernels.testing import budget, inputs
from iokernels.testing.poison import poison_

_LARGEST = {torch.float8_e4m3fn: 448.0, torch.int8: 127.0}
_NOWHERE = 2**31 - 1
"""A page that does not exist."""


class Call(NamedTuple):
    """The tensors of one call, and everything else."""

    tensors: dict[str, Any]
    options: dict[str, Any]

    def __call__(self, backend: str, **options: Any) -> tuple[Tensor, Tensor]:
        """(out, lse)."""
        return lean_attention(**self.tensors, **self.options | options, return_lse=True, backend=backend)

    def double(self) -> Call:
        """The same values in float64, but for quantised caches and float32 scales, which go with any q."""
        return self._replace(
            tensors={
                name: x if x.dtype in (*_LARGEST, torch.int32) or name.endswith("scale") else x.double()
                for name, x in self.tensors.items()
            }
        )

    def with_tensors(self, **tensors: Tensor) -> Call:
        """This call with some tensors changed."""
        return self._replace(tensors=self.tensors | tensors)


class _Store:
    """Where the keys of every sequence lie: in rows of their own, or in pages that are in no order."""

    def __init__(self, generator: torch.Generator, lengths: Sequence[int], spare: int, page: int) -> None:
        self.lengths, self.page = lengths, page
        self.most = max(lengths, default=0) + spare
        if page:
            counts = [-(-n // page) for n in lengths]
            free = torch.randperm(sum(counts) + 1, generator=generator).tolist()
            self.pages = [[free.pop() for _ in range(count)] for count in counts]
            self.table = torch.full((len(lengths), -(-self.most // page)), _NOWHERE, dtype=torch.int32)
            for row, pages in zip(self.table, self.pages, strict=True):
                row[: len(pages)] = torch.tensor(pages, dtype=torch.int32)

    def hold(self, sequences: list[Tensor], heads: int, width: int, dtype: torch.dtype) -> Tensor:
        """A cache of ``sequences``, each [heads, its length, width], with poison around them."""
        if not self.page:
            cache = poison_(torch.zeros(len(sequences), heads, self.most, width, dtype=dtype))
            for row, x in zip(cache, sequences, strict=True):
                row[:, : x.shape[1]] = x
            return cache
        cache = poison_(torch.zeros(sum(map(len, self.pages)) + 1, heads, self.page, width, dtype=dtype))
        for pages, x in zip(self.pages, sequences, strict=True):
            for page, keys in zip(pages, x.split(self.page, dim=1), strict=False):
                cache[page, :, : keys.shape[1]] = keys
        return cache


def make(
    seed: int,
    lengths: Sequence[int],
    *,
    heads: int = 2,
    kv_heads: int = 1,
    rows: int = 1,
    head_dim: int = 16,
    value_dim: int | None = None,
    spare: int = 3,
    page: int = 0,
    prefix: int = 0,
    dtype: torch.dtype = torch.float32,
    cache_dtype: torch.dtype | None = None,
    scales: str = "",
    sinks: bool = False,
    kind: Any = "peaked",
    layout: Any = "contiguous",
    device: str = "cpu",
    **options: Any,
) -> Call:
    """Draw sequences of ``lengths`` keys and put them into caches with room for ``spare`` keys more.

    ``page`` 0 is a dense cache; else pages lie in random order, one belongs to nobody, and entries of the block table
    that no length reaches name pages that do not exist. ``prefix`` keys are common to all. ``scales`` is ``"head"`` or
    ``"key"``, and a cache is then what is left of the keys over their scale. Whatever lies past a length is NaN, or the
    largest integer. ``layout`` is one of :func:`iokernels.testing.inputs.poisoned_view`, for q and both caches.
    """
    generator = torch.Generator().manual_seed(seed)
    widths = {"k": head_dim, "v": head_dim if value_dim is None else value_dim}
    drawn = [
        inputs.attention(generator, 1, heads, kv_heads, rows, prefix + n, *widths.values(), kind=kind) for n in lengths
    ]
    store = _Store(generator, lengths, spare, page)
    of_cache = cache_dtype or dtype

    def place(x: Tensor, how: Any) -> Tensor:
        return inputs.poisoned_view(x.to(device), how)

    q = torch.cat([torch.zeros(0, heads, rows, head_dim), *(x[0] for x in drawn)])
    tensors = {"q": place(q.to(dtype), "contiguous" if layout == "expanded" else layout)}
    for index, (name, width) in enumerate(widths.items(), start=1):
        sequences = [x[index][0, :, prefix:] for x in drawn]
        common = drawn[0][index][0, :, :prefix] if prefix else torch.zeros(kv_heads, 0, width)
        # A factor for every head, or for every key of a sequence; the caches are divided by it.
        head_factors, key_factors = torch.ones(kv_heads), [torch.ones(x.shape[:2]) for x in sequences]
        if scales == "head":
            drawn_keys = torch.cat([common, *sequences, torch.ones(kv_heads, 1, width)], dim=1)
            head_factors = drawn_keys.abs().amax((1, 2)) / _LARGEST.get(of_cache, 2.0)
            tensors[f"{name}_scale"] = place(head_factors, "strided")
        elif scales == "key":
            key_factors = [x.abs().amax(-1) / _LARGEST.get(of_cache, 2.0) for x in sequences]
            factors = store.hold([x[..., None] for x in key_factors], kv_heads, 1, torch.float32)
            tensors[f"{name}_scale"] = place(factors[..., 0], "padded")
        kept = [
            _rounded(x / (head_factors[:, None] * y)[..., None], of_cache)
            for x, y in zip(sequences, key_factors, strict=True)
        ]
        tensors[f"{name}_cache"] = place(store.hold(kept, kv_heads, width, of_cache), layout)
        if prefix:
            tensors[f"{name}_prefix"] = place(_rounded(common / head_factors[:, None, None], of_cache), "padded")
    tensors["cache_seqlens"] = place(torch.tensor(lengths, dtype=torch.int32), "contiguous")
    if page:
        tensors["block_table"] = place(store.table, "padded")
    if sinks:
        tensors["sinks"] = place(torch.randn(heads, generator=generator).to(dtype), "strided")
    return Call(tensors, options)


def _rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    return (x.round() if dtype == torch.int8 else x).to(dtype)


def prove(backend: str, call: Call, **options: Any) -> tuple[Tensor, Tensor]:
    """Hold the results of ``backend`` to the error budget, and return them."""
    found = call(backend, **options)
    truth = call.double()("reference", **options)
    with eagerly():
        low = call("reference", **options)
    for what, x, y, z in zip(("out", "lse"), found, truth, low, strict=True):
        assert x.dtype == z.dtype, what
        budget.check(x, y, z, factor=budget.FORWARD, what=what, may_vanish=True)
    assert not call.tensors["cache_seqlens"].any() or truth[0].abs().max() > 0.01, "the inputs prove nothing"
    return found

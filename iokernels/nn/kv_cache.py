"""The keys and values of a decoder's layers, dense or in pages, for :func:`iokernels.lean_attention`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from iokernels.ops.lean_attention.api import QUANTISED, lean_attention
from iokernels.ops.lean_attention.append_api import append_kv
from iokernels.runtime.contracts import FLOATS, Contract, short

from .pages import Pages

_CONTRACT = Contract("KVCache")


class KVCache:
    """Memory for the keys and values of all layers of a decoder.

    A step is::

        cache.extend(n)                                  # host: room for n more positions of every sequence
        for layer in range(layers):
            cache.append(k, v, layer=layer)              # k [B, Hkv, n, D], v [B, Hkv, n, Dv]
            out = cache.attend(q, layer=layer)           # q [B, Hq, n, D], n up to 16

    ``extend`` is the only call that changes lengths; it belongs outside a compiled or captured region. ``append`` and
    ``attend`` read lengths and page tables on the device, from tensors that stay where they are: a CUDA graph of them
    may be replayed after each ``extend``.

    Args:
        batch: sequences.
        capacity: most keys of a sequence.
        num_kv_heads: heads of keys and values.
        head_dim: width of a key.
        value_dim: width of a value; head_dim if None.
        layers: how many layers' keys are held; all have the same lengths.
        dtype: of the queries, or float8_e4m3fn or int8: every key and value then has a scale of its own, unless scales
            of heads are given.
        device: where it lives.
        page: keys of a page; None is dense: ``capacity`` keys are reserved for every sequence from the start. With
            pages, memory follows the lengths, and sequences that begin alike share it (:meth:`reorder`).
        pages: pages in all; enough for ``capacity`` keys of every sequence if None.
        k_scale: float32 ``[num_kv_heads]``, or ``[layers, num_kv_heads]``: what keys are divided by when they are
            written, and multiplied by when they are read.
        v_scale: likewise, of values.

    Attributes:
        k: ``[layers, B, Hkv, N, D]``, or ``[layers, pages, Hkv, page, D]``; past a length it holds anything.
        v: likewise, Dv.
        k_scale: float32, ``[layers, Hkv]``, or ``[layers, B, Hkv, N]`` or ``[layers, pages, Hkv, page]``, or None.
        v_scale: likewise.
        seqlens: int32 ``[B]``, how many keys each sequence has, those of the last ``extend`` included.
        starts: int32 ``[B]``, seqlens before the last ``extend``: the position of the first new key.
        block_table: int32 ``[B, most pages]``, or None. Entries that no key needs are -1.
        in_prompt: whether the last ``extend`` began every sequence: the new keys are all that there are.

    Raises:
        TypeError: a dtype that no cache has.
        ValueError: sizes that are not positive, or scales of a wrong shape.
    """

    def __init__(
        self,
        batch: int,
        capacity: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        value_dim: int | None = None,
        layers: int = 1,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        page: int | None = None,
        pages: int | None = None,
        k_scale: Tensor | None = None,
        v_scale: Tensor | None = None,
    ) -> None:
        sizes = {"batch": batch, "capacity": capacity, "num_kv_heads": num_kv_heads, "head_dim": head_dim,
                 "value_dim": value_dim, "layers": layers, "page": page, "pages": pages}  # fmt: skip
        for name, size in sizes.items():
            _CONTRACT.require(size is None or size > 0, f"{name} is {size}; it must be positive")
        _CONTRACT.require(page is not None or pages is None, "pages is given without page, the keys of one")
        if dtype not in (*FLOATS, *QUANTISED):
            allowed = " or ".join(short(x) for x in (*FLOATS, *QUANTISED))
            raise TypeError(f"KVCache: dtype is {short(dtype)}; it must be {allowed}")
        self.capacity = capacity
        self.pages: Pages | None = None
        self.block_table: Tensor | None = None
        shape: tuple[int, ...] = (layers, batch, num_kv_heads, capacity)
        if page is not None:
            each = -(-capacity // page)
            pages = batch * each if pages is None else pages
            self.pages = Pages(batch, page, pages)
            self.block_table = torch.full((batch, each), -1, dtype=torch.int32, device=device)
            shape = (layers, pages, num_kv_heads, page)
        self.k = torch.empty(*shape, head_dim, dtype=dtype, device=device)
        self.v = torch.empty(*shape, head_dim if value_dim is None else value_dim, dtype=dtype, device=device)
        self.k_scale = self._scale("k_scale", k_scale, shape)
        self.v_scale = self._scale("v_scale", v_scale, shape)
        self.seqlens = torch.zeros(batch, dtype=torch.int32, device=device)
        self.starts = torch.zeros_like(self.seqlens)
        self._counts = torch.zeros_like(self.seqlens)
        self._lengths = [0] * batch
        self._begin()

    def _begin(self) -> None:
        """No step has begun."""
        self._rows = 0
        self._ragged = False
        self.in_prompt = False

    def _scale(self, name: str, scale: Tensor | None, shape: tuple[int, ...]) -> Tensor | None:
        if scale is None:
            quantised = self.k.dtype in QUANTISED
            return torch.empty(shape, dtype=torch.float32, device=self.k.device) if quantised else None
        layers, heads = shape[0], shape[2]
        _CONTRACT.require(
            tuple(scale.shape) in ((heads,), (layers, heads)),
            f"{name} has shape {list(scale.shape)}; it must be [{heads}] or [{layers}, {heads}]",
        )
        return scale.to(self.k.device, torch.float32).expand(layers, heads)

    @property
    def lengths(self) -> list[int]:
        """``seqlens`` as the host knows them, without asking the device."""
        return list(self._lengths)

    def __repr__(self) -> str:
        layers, _, heads, rows, width = self.k.shape
        paged = "" if self.pages is None else f", pages={self.k.shape[1]} of {rows} keys, {self.pages.free} free"
        return (
            f"KVCache(layers={layers}, batch={len(self._lengths)}, capacity={self.capacity}, num_kv_heads={heads}, "
            f"head_dim={width}, dtype={short(self.k.dtype)}{paged}, lengths={self._lengths})"
        )

    # -- a step

    def extend(self, count: int | Sequence[int]) -> None:
        """Begin a step of ``count`` new positions of every sequence, or of ``count[b]`` of sequence b.

        Their keys and values are undefined until every layer has appended them.

        Raises:
            ValueError: a count is negative, a sequence would pass the capacity, or there are not enough free pages.
                Nothing has changed then.
        """
        counts = list(count) if not isinstance(count, int) else [count] * len(self._lengths)
        _CONTRACT.require(
            len(counts) == len(self._lengths) and min(counts) >= 0,
            f"count is {count}; it must be at least 0, one number or one for each of {len(self._lengths)} sequences",
        )
        after = [length + more for length, more in zip(self._lengths, counts, strict=True)]
        for sequence, length in enumerate(after):
            _CONTRACT.require(
                length <= self.capacity,
                f"sequence {sequence} would have {length} keys; the capacity is {self.capacity}",
            )
        if self.pages is not None:
            needed = self.pages.needed(self._lengths, after)
            _CONTRACT.require(
                needed <= self.pages.free, f"{needed} more pages are needed and {self.pages.free} are free"
            )
            if needed:
                self._copy_pages(self.pages.grow(self._lengths, after))
                self._write_table()
        self.in_prompt = not any(self._lengths)
        self._rows, self._ragged, self._lengths = max(counts), len(set(counts)) > 1, after
        self.starts.copy_(self.seqlens)
        if self._ragged:
            self._counts.copy_(torch.tensor(counts, dtype=torch.int32))
            self.seqlens.add_(self._counts)
        else:
            self.seqlens.add_(counts[0])

    def append(
        self,
        k: Tensor,
        v: Tensor,
        *,
        layer: int = 0,
        rotary: tuple[Tensor, Tensor] | None = None,
        interleaved: bool = False,
        backend: str | None = None,
    ) -> None:
        """Write the new keys ``[B, Hkv, n, D]`` and values ``[B, Hkv, n, Dv]`` of a layer.

        n is the count of the last :meth:`extend`, the largest if there were several: rows past a sequence's own count
        are padding. The rest is as in :func:`iokernels.append_kv`.
        """
        _CONTRACT.require(
            k.dim() == 4 and k.shape[2] == self._rows,
            f"k has shape {list(k.shape)}; the last extend was by {self._rows} positions",
        )
        append_kv(
            k, v, self.k[layer], self.v[layer], cache_seqlens=self.starts, block_table=self.block_table,
            new_seqlens=self._counts if self._ragged else None, rotary=rotary, interleaved=interleaved,
            backend=backend, **self._scales(layer),
        )  # fmt: skip

    def attend(self, q: Tensor, *, layer: int = 0, **options: Any) -> Any:
        """:func:`iokernels.lean_attention` of the newest positions ``q [B, Hq, n, D]`` to a layer; its options.

        Raises:
            ValueError: several rows after an :meth:`extend` by different counts, whose padding does not stand at the
                end of the keys.
        """
        _CONTRACT.require(
            not self._ragged or q.shape[2] == 1,
            "q has several rows and the last extend was by different counts, so they do not end where the keys do",
        )
        return lean_attention(
            q, self.k[layer], self.v[layer], block_table=self.block_table,
            **{"cache_seqlens": self.seqlens, **self._scales(layer), **options},
        )  # fmt: skip

    def _scales(self, layer: int) -> dict[str, Tensor | None]:
        return {
            "k_scale": None if self.k_scale is None else self.k_scale[layer],
            "v_scale": None if self.v_scale is None else self.v_scale[layer],
        }

    # -- between steps

    def truncate(self, lengths: Sequence[int]) -> None:
        """Forget the newest keys (of rejected speculation, say): sequence b keeps its first ``lengths[b]``.

        Raises:
            ValueError: a length is negative, or longer than the sequence is. Nothing has changed then.
        """
        lengths = list(lengths)
        ok = len(lengths) == len(self._lengths)
        _CONTRACT.require(
            ok and all(0 <= new <= old for new, old in zip(lengths, self._lengths, strict=True)),
            f"lengths is {lengths}; the sequences have {self._lengths} keys and can only get shorter",
        )
        if self.pages is not None:
            for sequence, length in enumerate(lengths):
                self.pages.shrink(sequence, length)
            self._write_table()
        self._set_lengths(lengths)

    def reset(self, sequences: Sequence[int] | None = None) -> None:
        """Forget all keys of the named sequences, or of all; their pages become free."""
        emptied = range(len(self._lengths)) if sequences is None else sequences
        self.truncate([0 if b in emptied else length for b, length in enumerate(self._lengths)])

    def reorder(self, index: Sequence[int]) -> None:
        """Let sequence b go on from the keys of sequence ``index[b]``, as a beam search does.

        Dense caches copy the keys. With pages none are copied now: sequences share pages, and one that is not full is
        copied when a sequence first writes into it.

        Raises:
            ValueError: not one number for each sequence, or a number that names none.
        """
        index = [int(source) for source in index]
        count = len(self._lengths)
        _CONTRACT.require(
            len(index) == count and all(0 <= source < count for source in index),
            f"index is {index}; it must name one of {count} sequences for each",
        )
        if self.pages is not None:
            self.pages.reorder(index)
            self._write_table()
        else:
            longest = max(self._lengths)
            rows = torch.tensor(index, device=self.k.device)
            for x in (self.k, self.v, self.k_scale, self.v_scale):
                if x is not None and x.dim() > 2:  # a scale of heads belongs to no sequence
                    held = _bytes(x)[:, :, :, :longest]
                    held.copy_(held[:, rows])
        self._set_lengths([self._lengths[source] for source in index])

    def read(self, sequence: int, *, layer: int = 0) -> tuple[Tensor, Tensor]:
        """A copy of the keys ``[Hkv, n, D]`` and values ``[Hkv, n, Dv]`` of a sequence: as stored, times their scale.

        Quantised ones are float32.
        """
        length = self._lengths[sequence]
        read = []
        for cache, scale in ((self.k[layer], self.k_scale), (self.v[layer], self.v_scale)):
            x = self._rows_of(cache, sequence)[:, :length]
            x = x.float() if x.dtype in QUANTISED else x.clone()
            if scale is not None:
                factors = scale[layer]
                factors = factors[:, None] if factors.dim() == 1 else self._rows_of(factors, sequence)[:, :length]
                x = x * factors[..., None].to(x.dtype)
            read.append(x)
        return read[0], read[1]

    def _rows_of(self, x: Tensor, sequence: int) -> Tensor:
        """All rows of a sequence in a layer's cache or scales: [Hkv, N, ...]."""
        if self.pages is None:
            return x[sequence]
        table = torch.tensor(self.pages.tables[sequence], dtype=torch.int64, device=x.device)
        return x[table].transpose(0, 1).flatten(1, 2)

    def _set_lengths(self, lengths: list[int]) -> None:
        self._lengths = lengths
        self.seqlens.copy_(torch.tensor(lengths, dtype=torch.int32))
        self._begin()

    def _write_table(self) -> None:
        """Bring the device's page table up to date."""
        assert self.pages is not None
        assert self.block_table is not None
        table = torch.full(self.block_table.shape, -1, dtype=torch.int32)
        for row, pages in zip(table, self.pages.tables, strict=True):
            row[: len(pages)] = torch.tensor(pages, dtype=torch.int32)
        self.block_table.copy_(table)

    def _copy_pages(self, copies: list[tuple[int, int]]) -> None:
        if not copies:
            return
        sources, targets = (torch.tensor(side, device=self.k.device) for side in zip(*copies, strict=True))
        for x in (self.k, self.v, self.k_scale, self.v_scale):
            if x is not None and x.dim() > 2:
                _bytes(x)[:, targets] = _bytes(x)[:, sources]


def _bytes(x: Tensor) -> Tensor:
    """float8 as bytes, which every device can index."""
    return x.view(torch.uint8) if x.dtype == torch.float8_e4m3fn else x

"""The keys and values of a decoder's layers, dense or in pages, for :func:`iokernels.lean_attention`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from iokernels.ops.append_kv.api import append_kv
from iokernels.ops.lean_attention.api import QUANTISED, lean_attention
from iokernels.ops.shared.caches import as_bytes
from iokernels.ops.shared.integers import index_of, integer, integers
from iokernels.runtime.contracts import FLOATS, short
from iokernels.runtime.contracts.plain import LARGEST

from .pages import Pages
from .state import CONTRACT as _CONTRACT
from .state import checked, restore, saved

_size = partial(integer, _CONTRACT, least=1, most=LARGEST)


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
        batch, capacity = _size("batch", batch), _size("capacity", capacity)
        num_kv_heads, head_dim = _size("num_kv_heads", num_kv_heads), _size("head_dim", head_dim)
        width: int = head_dim if value_dim is None else _size("value_dim", value_dim)
        layers = _size("layers", layers)
        page = None if page is None else _size("page", page)
        pages = None if pages is None else _size("pages", pages)
        _CONTRACT.require(page is not None or pages is None, "pages is given without page, the keys of one")
        if dtype not in (*FLOATS, *QUANTISED):
            allowed = " or ".join(short(x) for x in (*FLOATS, *QUANTISED))
            got = short(dtype) if isinstance(dtype, torch.dtype) else repr(dtype)
            raise TypeError(f"KVCache: dtype is {got}; it must be {allowed}")
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
        self.v = torch.empty(*shape, width, dtype=dtype, device=device)
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
        if not isinstance(scale, Tensor) or scale.dtype != torch.float32:
            got = short(scale.dtype) if isinstance(scale, Tensor) else type(scale).__name__
            raise TypeError(f"KVCache: {name} is {got}; it must be a tensor of float32")
        _CONTRACT.require(
            tuple(scale.shape) in ((heads,), (layers, heads)),
            f"{name} has shape {list(scale.shape)}; it must be [{heads}] or [{layers}, {heads}]",
        )
        # Memory of its own: what the caller does to his tensor later is no change of the cache.
        return scale.detach().to(self.k.device).expand(layers, heads).clone(memory_format=torch.contiguous_format)

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

    def extend(self, count: int | Sequence[int] | Tensor) -> None:
        """Begin a step of ``count`` new positions of every sequence, or of ``count[b]`` of sequence b.

        Several counts are a list, or a tensor or array ``[B]`` of ints, which is read now. Their keys and values are
        undefined until every layer has appended them.

        Raises:
            TypeError: a count is no int.
            ValueError: a count is negative, a sequence would pass the capacity, or there are not enough free pages.
                Nothing has changed then.
        """
        one = not hasattr(count, "__len__") or getattr(count, "shape", None) == ()
        counts = (
            [integer(_CONTRACT, "count", count)] * len(self._lengths) if one else integers(_CONTRACT, "count", count)
        )
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
        layer = self._layer(layer)
        _CONTRACT.require(
            not isinstance(k, Tensor) or (k.dim() == 4 and k.shape[2] == self._rows),
            f"k has shape {list(getattr(k, 'shape', ()))}; the last extend was by {self._rows} positions",
        )
        append_kv(
            k, v, self.k[layer], self.v[layer], cache_seqlens=self.starts, block_table=self.block_table,
            new_seqlens=self._counts if self._ragged else None, rotary=rotary, interleaved=interleaved,
            backend=backend, **self._scales(layer),
        )  # fmt: skip

    def attend(self, q: Tensor, *, layer: int = 0, **options: Any) -> Any:
        """:func:`iokernels.lean_attention` of the newest positions ``q [B, Hq, n, D]`` to a layer; its options.

        n may be 0 too, where a step has no positions: out is empty then.

        Raises:
            ValueError: several rows after an :meth:`extend` by different counts, whose padding does not stand at the
                end of the keys.
        """
        layer = self._layer(layer)
        rows = q.shape[2] if isinstance(q, Tensor) and q.dim() == 4 else 1
        if rows == 0:
            # As one row would be, of which none is kept.
            found = self.attend(torch.nn.functional.pad(q, (0, 0, 0, 1)), layer=layer, **options)
            return tuple(x[:, :, :0] for x in found) if isinstance(found, tuple) else found[:, :, :0]
        _CONTRACT.require(
            not self._ragged or rows == 1,
            "q has several rows and the last extend was by different counts, so they do not end where the keys do",
        )
        return lean_attention(
            q, self.k[layer], self.v[layer], block_table=self.block_table,
            **{"cache_seqlens": self.seqlens, **self._scales(layer), **options},
        )  # fmt: skip

    def _layer(self, layer: Any) -> int:
        most = self.k.shape[0] - 1
        return layer if type(layer) is int and 0 <= layer <= most else index_of(_CONTRACT, "layer", layer, most)

    def _scales(self, layer: int) -> dict[str, Tensor | None]:
        return {
            "k_scale": None if self.k_scale is None else self.k_scale[layer],
            "v_scale": None if self.v_scale is None else self.v_scale[layer],
        }

    # -- between steps

    def truncate(self, lengths: Sequence[int] | Tensor) -> None:
        """Forget the newest keys (of rejected speculation, say): sequence b keeps its first ``lengths[b]``.

        ``lengths`` is a list, or a tensor or array ``[B]``, of ints.

        Raises:
            TypeError: a length is no int.
            ValueError: a length is negative, or longer than the sequence is. Nothing has changed then.
        """
        lengths = integers(_CONTRACT, "lengths", lengths)
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

    def reset(self, sequences: Sequence[int] | Tensor | None = None) -> None:
        """Forget all keys of the named sequences, or of all; their pages become free.

        Raises:
            TypeError: a number is no int.
            ValueError: a number names no sequence; they count from 0. Nothing has changed then.
        """
        last = len(self._lengths) - 1
        named = range(last + 1) if sequences is None else integers(_CONTRACT, "sequences", sequences)
        emptied = {index_of(_CONTRACT, f"sequences[{at}]", sequence, last) for at, sequence in enumerate(named)}
        self.truncate([0 if b in emptied else length for b, length in enumerate(self._lengths)])

    def reorder(self, index: Sequence[int] | Tensor) -> None:
        """Let sequence b go on from the keys of sequence ``index[b]``, as a beam search does.

        Dense caches copy the keys. With pages none are copied now: sequences share pages, and one that is not full is
        copied when a sequence first writes into it.

        Raises:
            TypeError: a number is no int.
            ValueError: not one number for each sequence, or a number that names none.
        """
        index = integers(_CONTRACT, "index", index)
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
                    held = as_bytes(x)[:, :, :, :longest]
                    held.copy_(held[:, rows])
        self._set_lengths([self._lengths[source] for source in index])

    def read(self, sequence: int, *, layer: int = 0) -> tuple[Tensor, Tensor]:
        """A copy of the keys ``[Hkv, n, D]`` and values ``[Hkv, n, Dv]`` of a sequence: as stored, times their scale.

        Quantised ones are float32.

        Raises:
            TypeError: a number is no int.
            ValueError: there is no such sequence, or layer.
        """
        sequence, layer = index_of(_CONTRACT, "sequence", sequence, len(self._lengths) - 1), self._layer(layer)
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

    def state_dict(self) -> dict[str, Any]:
        """What the cache holds, as tensors and lists of its own: the keys of its lengths, nothing of what is free.

        For ``torch.save`` and :meth:`load_state_dict`.
        """
        return saved(self._memory(), self._lengths, self.pages)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Hold what :meth:`state_dict` returned, instead of what is held now. No step has begun then.

        The cache must have as many sequences, layers and heads, of the same widths, dtype and keys of a page; capacity
        and pages may be others.

        Raises:
            TypeError: another dtype.
            ValueError: other sizes, or more keys or pages than there is room for. Nothing has changed then.
        """
        lengths = checked(state, self._memory(), len(self._lengths), self.capacity, self.pages)
        restore(state, self._memory(), self.pages)
        if self.pages is not None:
            self._write_table()
        self._set_lengths(lengths)

    def _memory(self) -> list[tuple[str, Tensor]]:
        named = (("k", self.k), ("v", self.v), ("k_scale", self.k_scale), ("v_scale", self.v_scale))
        return [(name, x) for name, x in named if x is not None]

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
                as_bytes(x)[:, targets] = as_bytes(x)[:, sources]


# Plain data: `torch.load` may read a cache that `torch.save` wrote.
torch.serialization.add_safe_globals([KVCache, Pages])

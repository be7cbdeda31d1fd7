"""``append_kv`` in PyTorch: the backend ``torch``.

On the CPU the host reads lengths and page tables and copies runs of rows. Elsewhere nothing is read back: rows are
scattered, and a row that must not be written repeats another's write (the same bytes to the same place).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .options import SMALLEST, TOP, Append, room
from .rotary import turned


def append(k_new: Tensor, v_new: Tensor, k_cache: Tensor, v_cache: Tensor, options: Append) -> None:
    """Write as :class:`Append` defines it."""
    if k_new.shape[0] * k_new.shape[2] * room(k_cache, options.block_table) == 0:
        return
    k = k_new
    if options.cos is not None and options.sin is not None:
        first = options.cache_seqlens if options.positions is None else options.positions
        k = turned(k_new, options.cos, options.sin, first, options.interleaved)
    k, k_scales = _quantised(k, k_cache.dtype, options.k_scale, options.k_key_scale)
    v, v_scales = _quantised(v_new, v_cache.dtype, options.v_scale, options.v_key_scale)
    writes = [
        (cache, rows)
        for cache, rows in (
            (k_cache, k), (v_cache, v), (options.k_key_scale, k_scales), (options.v_key_scale, v_scales)
        )
        if cache is not None and rows is not None
    ]  # fmt: skip
    if host_reads(k_new):
        for sequence, rows, place, slots in _runs(k_new.shape[2], k_cache, options):
            for cache, new in writes:
                cache[place, :, slots].copy_(new[sequence, :, rows])
    else:
        _scatter(writes, k_cache, options)


def host_reads(x: Tensor) -> bool:
    """Whether reading lengths on the host waits for no other device."""
    return x.device.type == "cpu"


def _quantised(
    x: Tensor, dtype: torch.dtype, head_scale: Tensor | None, key_scale: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Rows [B, Hkv, N, width] as the cache holds them, and their scales [B, Hkv, N] where each has its own."""
    if head_scale is None and key_scale is None and dtype not in TOP:
        return x.to(dtype), None
    x = x.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
    scales = None
    if key_scale is not None:
        scales = x.abs().amax(-1).float().clamp_min(SMALLEST) / TOP[dtype]
        x = x / scales.to(x.dtype)[..., None]
    elif head_scale is not None:
        x = x / head_scale.to(x.dtype)[:, None, None]
    if dtype in TOP:
        x = x.clamp(-TOP[dtype], TOP[dtype])
    return (x.round() if dtype == torch.int8 else x).to(dtype), scales


def _runs(most: int, cache: Tensor, options: Append) -> Iterator[tuple[int, slice, int, slice]]:
    """Rows that lie together in the cache: (sequence, which of its new rows, which sequence or page, where in it)."""
    page, table = cache.shape[2], options.block_table
    counts = [most] * len(options.cache_seqlens) if options.new_seqlens is None else options.new_seqlens.tolist()
    for sequence, held in enumerate(options.cache_seqlens.tolist()):
        first = max(held, 0)
        stop = min(first + min(counts[sequence], most), room(cache, table))
        start = first
        while start < stop:
            slot = start % page
            until = min(stop, start - slot + page)
            place = sequence if table is None else int(table[sequence, start // page])
            if 0 <= place < cache.shape[0]:
                yield sequence, slice(start - first, until - first), place, slice(slot, slot + until - start)
            start = until


def _scatter(writes: list[tuple[Tensor, Tensor]], cache: Tensor, options: Append) -> None:
    """Write all rows at once, without reading a length on the host."""
    page, table = cache.shape[2], options.block_table
    batch, most = writes[0][1].shape[0], writes[0][1].shape[2]
    row = torch.arange(most, device=cache.device)
    position = options.cache_seqlens.long().clamp_min(0)[:, None] + row
    if table is None:
        written, slots = position < page, position
        places = torch.arange(batch, device=cache.device)[:, None].expand(batch, most)
    else:
        entry = position // page
        written, slots = entry < table.shape[1], position % page
        places = table.long().gather(1, entry.clamp(max=table.shape[1] - 1))
        written = written & (places >= 0) & (places < cache.shape[0])
    if options.new_seqlens is not None:
        written = written & (row < options.new_seqlens[:, None])

    written = written.flatten()
    # The row that the others repeat: the first one that is written. If there is none, all write what is there already.
    # One dimension, because an index of none would be read on the host.
    model = written.long().argmax(0, keepdim=True)
    places, slots = (
        torch.where(written, x.flatten(), x.flatten()[model]).clamp(0, size - 1)
        for x, size in ((places, cache.shape[0]), (slots, page))
    )
    for target, new in writes:
        # float8 has no index_put on some devices: its bytes do.
        target, new = (x.view(torch.uint8) if x.dtype == torch.float8_e4m3fn else x for x in (target, new))
        rows = new.transpose(1, 2).flatten(0, 1)  # [B * N, Hkv, width]
        repeated = torch.where(written[model], rows[model], target[places[model], :, slots[model]])
        chosen = written.view(-1, *[1] * (rows.dim() - 1))
        target[places, :, slots] = torch.where(chosen, rows, repeated)

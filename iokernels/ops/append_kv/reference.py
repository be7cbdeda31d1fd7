"""The oracle of ``append_kv``: one key after the other, lengths and page tables read on the host."""

from __future__ import annotations

import torch
from torch import Tensor

from iokernels.runtime.contracts.offsets import on_host
from iokernels.runtime.registration.precision import at_least_single

from .options import SMALLEST, TOP, Append, room


def append(k_new: Tensor, v_new: Tensor, k_cache: Tensor, v_cache: Tensor, options: Append) -> None:
    """Write as :class:`Append` defines it."""
    page = k_cache.shape[2]
    most = room(k_cache, options.block_table)
    for sequence, held in enumerate(on_host("append_kv", "cache_seqlens", options.cache_seqlens)):
        count = k_new.shape[2] if options.new_seqlens is None else int(options.new_seqlens[sequence])
        for i in range(min(count, k_new.shape[2])):
            position = max(held, 0) + i
            if position >= most:
                continue
            where = sequence if options.block_table is None else int(options.block_table[sequence, position // page])
            if not 0 <= where < k_cache.shape[0]:
                continue
            key = wide(k_new[sequence, :, i])
            if options.cos is not None and options.sin is not None:
                first = held if options.positions is None else int(options.positions[sequence])
                angle = min(max(first + i, 0), options.cos.shape[0] - 1)
                key = rotated(key, options.cos[angle], options.sin[angle], options.interleaved)
            for row, cache, scale, key_scale in (
                (key, k_cache, options.k_scale, options.k_key_scale),
                (wide(v_new[sequence, :, i]), v_cache, options.v_scale, options.v_key_scale),
            ):
                if key_scale is not None:
                    scale = row.abs().amax(-1).float().clamp_min(SMALLEST) / TOP[cache.dtype]
                    key_scale[where, :, position % page] = scale
                if scale is not None:
                    row = row / scale.to(row.dtype)[:, None]
                cache[where, :, position % page] = stored(row, cache.dtype)


def wide(x: Tensor) -> Tensor:
    """In the dtype of the arithmetic."""
    return x.to(at_least_single(x.dtype))


def rotated(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """x [..., D] turned by one row of angles: complex numbers times ``cos + i sin``."""
    rot = 2 * cos.shape[-1]
    pairs = x[..., :rot].unflatten(-1, (-1, 2) if interleaved else (2, -1))
    pairs = pairs if interleaved else pairs.transpose(-1, -2)
    turned = torch.view_as_complex(pairs.clone(memory_format=torch.contiguous_format)) * torch.complex(
        cos.to(x.dtype), sin.to(x.dtype)
    )
    turned = torch.view_as_real(turned)
    turned = (turned if interleaved else turned.transpose(-1, -2)).flatten(-2)
    return torch.cat([turned, x[..., rot:]], dim=-1)


def stored(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Rounded to the dtype of a cache."""
    if dtype in TOP:
        x = x.clamp(-TOP[dtype], TOP[dtype])
    return (x.round() if dtype == torch.int8 else x).to(dtype)

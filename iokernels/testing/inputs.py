"""Inputs that find mistakes: distributions that exercise a softmax, and layouts with poison around every element.

Values are drawn in float32 on the device of the generator and then rounded, so a seed gives the same numbers for every
dtype, and a CPU generator the same on every device. Every tensor that this module returns is a view of a larger storage
whose other elements are NaN (in an integer tensor, the largest integer): a kernel that reads beside its tensor and uses
what it read shows it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from .poison import poison_

Kind = Literal["peaked", "flat", "large", "constant"]
Layout = Literal["contiguous", "bnhd", "seq_major", "padded", "strided", "expanded"]

# Elements before and after each tensor. A multiple of 64 keeps the alignment that the allocator gives.
_GUARD = 64
# What breaks it: an odd number of elements.
_ODD = 3


def attention(
    generator: torch.Generator | int,
    batch: int,
    heads: int,
    kv_heads: int,
    seqlen_q: int,
    seqlen_k: int,
    head_dim: int,
    value_dim: int | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    kind: Kind = "peaked",
    layout: Layout | Literal["packed_qkv"] = "contiguous",
) -> tuple[Tensor, Tensor, Tensor]:
    """Draw q ``[B, Hq, Nq, D]``, k ``[B, Hkv, Nk, D]`` and v ``[B, Hkv, Nk, Dv]``.

    Kinds, at the scale ``D**-0.5``: ``peaked``, each query points at one key, whose weight is near one half; ``flat``,
    logits within about 0.1 of zero; ``large``, logits of standard deviation 15, where exp overflows unless the maximum
    is taken off; ``constant``, the logits of a query are equal, but for rounding, though the keys differ.

    Layouts: those of :func:`poisoned_view`, where ``expanded`` applies to k and v; ``packed_qkv``, three views of one
    ``[B, N, Hq*D + Hkv*D + Hkv*Dv]`` tensor, as a joint projection gives (needs ``seqlen_q == seqlen_k``).

    ``generator`` is a ``torch.Generator`` or a seed. The tensors do not require gradients.
    """
    if kind not in get_args(Kind):
        raise ValueError(f"kind is {kind!r}; it must be one of {', '.join(get_args(Kind))}")
    generator = _generator(generator)
    value_dim = head_dim if value_dim is None else value_dim
    values = _draw(generator, batch, heads, kv_heads, seqlen_q, seqlen_k, head_dim, value_dim, kind)
    q, k, v = (x.to(device=device, dtype=dtype) for x in values)
    if layout == "packed_qkv":
        return _packed_views(q, k, v)
    if layout == "expanded":
        return poisoned_view(q, "contiguous"), poisoned_view(k, "expanded"), poisoned_view(v, "expanded")
    return poisoned_view(q, layout), poisoned_view(k, layout), poisoned_view(v, layout)


def packed(
    generator: torch.Generator | int,
    lengths_q: Sequence[int],
    lengths_k: Sequence[int],
    heads: int,
    kv_heads: int,
    head_dim: int,
    value_dim: int | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    kind: Kind = "peaked",
    layout: Layout = "contiguous",
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Draw sequences of the given lengths, packed: (q, k, v, cu_seqlens_q, cu_seqlens_k).

    q is ``[total_q, Hq, D]``, k and v are ``[total_k, Hkv, D or Dv]``; the offsets are int32 ``[B + 1]``. Each sequence
    is drawn as by :func:`attention`; so are ``kind`` and ``layout``, without ``packed_qkv``. Lengths may be 0.
    """
    if len(lengths_q) != len(lengths_k):
        raise ValueError(f"lengths_q has {len(lengths_q)} sequences and lengths_k {len(lengths_k)}")
    generator = _generator(generator)
    value_dim = head_dim if value_dim is None else value_dim
    sequences = [
        _draw(generator, 1, heads, kv_heads, length_q, length_k, head_dim, value_dim, kind)
        for length_q, length_k in zip(lengths_q, lengths_k, strict=True)
    ]
    none = [torch.zeros(1, h, 0, d) for h, d in ((heads, head_dim), (kv_heads, head_dim), (kv_heads, value_dim))]
    tensors = []
    for i in range(3):
        joined = torch.cat([none[i].to(generator.device), *(drawn[i] for drawn in sequences)], dim=2)
        used = "contiguous" if layout == "expanded" and i == 0 else layout
        tensors.append(poisoned_view(joined.to(device=device, dtype=dtype), used)[0].transpose(0, 1))
    cu_q, cu_k = (
        poisoned_view(torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=device))
        for lengths in (lengths_q, lengths_k)
    )
    return tensors[0], tensors[1], tensors[2], cu_q, cu_k


def poisoned_view(x: Tensor, layout: Layout = "contiguous") -> Tensor:
    """A tensor equal to ``x``, with the strides of ``layout``, inside a storage that is NaN everywhere else.

    For ``x`` of ``[..., B, H, N, D]``: ``contiguous``; ``bnhd``, a transposed view of ``[B, N, H, D]``; ``seq_major``,
    of ``[N, B, H, D]``; ``padded``, rows longer than D that start at an odd offset, so nothing is aligned; ``strided``,
    every second element of a row, likewise; ``expanded``, stride 0 over H, with the values of the first head.
    ``bnhd`` and ``expanded`` need three dimensions, ``seq_major`` four; the others take any shape.
    """
    if layout not in get_args(Layout):
        raise ValueError(f"layout is {layout!r}; it must be one of {', '.join(get_args(Layout))}")
    least = {"bnhd": 3, "expanded": 3, "seq_major": 4}.get(layout, 0)
    if x.ndim < least:
        raise ValueError(f"x has {x.ndim} dimensions; the layout {layout!r} needs {least}")
    if layout == "bnhd":
        return _embed(x.transpose(-3, -2)).transpose(-3, -2)
    if layout == "seq_major":
        return _embed(x.movedim(-2, -4)).movedim(-4, -2)
    if layout == "expanded":
        return _embed(x.narrow(-3, 0, 1)).expand_as(x)
    if layout == "padded":
        return _embed(x, row_padding=5, offset=_GUARD + _ODD)
    if layout == "strided":
        return _embed(x, last_stride=2, offset=_GUARD + _ODD)
    return _embed(x)


def _embed(x: Tensor, *, last_stride: int = 1, row_padding: int = 0, offset: int = _GUARD) -> Tensor:
    """Copy ``x`` into a poisoned storage, row-major with the given gaps in the last dimension."""
    row = max(x.shape[-1] if x.ndim else 1, 1) * last_stride + row_padding
    strides = [last_stride]
    for extent in reversed(x.shape[1:]):
        strides.append(row if len(strides) == 1 else strides[-1] * max(extent, 1))
    strides = strides[::-1] if x.ndim else []
    span = math.prod(max(extent, 1) for extent in x.shape[:-1]) * row
    storage = poison_(torch.zeros(offset + span + _GUARD, dtype=x.dtype, device=x.device))
    view = storage.as_strided(x.shape, strides, offset)
    view.copy_(x)
    return view


def _packed_views(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    if q.shape[2] != k.shape[2]:
        raise ValueError(f"packed_qkv needs seqlen_q == seqlen_k, got {q.shape[2]} and {k.shape[2]}")
    joint = _embed(torch.cat([x.transpose(1, 2).flatten(2) for x in (q, k, v)], dim=-1))
    parts = joint.split([x.shape[1] * x.shape[3] for x in (q, k, v)], dim=-1)
    views = [part.unflatten(-1, (x.shape[1], x.shape[3])) for part, x in zip(parts, (q, k, v), strict=True)]
    return views[0].transpose(1, 2), views[1].transpose(1, 2), views[2].transpose(1, 2)


def _generator(generator: torch.Generator | int) -> torch.Generator:
    return generator if isinstance(generator, torch.Generator) else torch.Generator().manual_seed(generator)


def _draw(
    generator: torch.Generator,
    batch: int,
    heads: int,
    kv_heads: int,
    seqlen_q: int,
    seqlen_k: int,
    head_dim: int,
    value_dim: int,
    kind: Kind,
) -> tuple[Tensor, Tensor, Tensor]:
    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=generator.device)

    q = normal(batch, heads, seqlen_q, head_dim)
    k = normal(batch, kv_heads, seqlen_k, head_dim)
    v = normal(batch, kv_heads, seqlen_k, value_dim)
    if kind == "flat":
        return 0.3 * q, 0.3 * k, v
    if kind == "large":
        return 5.0 * q, 3.0 * k, v
    group = heads // kv_heads
    if kind == "constant":
        # Queries along one direction, on which all keys have the same component.
        direction = torch.nn.functional.normalize(normal(batch, kv_heads, 1, head_dim), dim=-1)
        length = (q * direction.repeat_interleave(group, dim=1)).sum(-1, keepdim=True) * math.sqrt(head_dim)
        q = length * direction.repeat_interleave(group, dim=1)
        return q, k + (1.0 - (k * direction).sum(-1, keepdim=True)) * direction, v
    if seqlen_k == 0:
        return q, k, v
    chosen = torch.randint(seqlen_k, (batch, heads, seqlen_q), generator=generator, device=generator.device)
    aimed = torch.take_along_dim(k.repeat_interleave(group, dim=1), chosen[..., None], dim=2)
    # The chosen key's logit stands log(Nk) above the rest, where it weighs about as much as all of them.
    reach = math.sqrt(head_dim) * math.log(seqlen_k + 1.0) / aimed.square().sum(-1, keepdim=True).clamp_min(1e-3)
    return q + reach * aimed, k, v

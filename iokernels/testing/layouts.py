"""Tensors equal to a given one, in every memory layout that PyTorch can express, with poison around each element."""

from __future__ import annotations

import random
from collections.abc import Callable

import torch
from torch import Tensor

from .poison import poison_

_GUARD = 64
"""Elements before and after a tensor. A multiple of 64 keeps the alignment that the allocator gives."""

Layout = Callable[[Tensor, random.Random], Tensor]


def in_order(x: Tensor, order: list[int], *, last: int = 1, gap: int = 0, offset: int = _GUARD) -> Tensor:
    """``x`` with dimension ``order[-1]`` the fastest: ``last`` its stride, ``gap`` elements between its rows."""
    strides = [0] * x.dim()
    step = last
    for position, dim in enumerate(reversed(order)):
        strides[dim] = step
        step *= max(x.shape[dim], 1)
        if position == 0:
            step += gap
    storage = poison_(torch.zeros(offset + step + _GUARD, dtype=x.dtype, device=x.device))
    view = storage.as_strided(x.shape, strides, offset)
    view.copy_(x)
    return view


def contiguous(x: Tensor, r: random.Random) -> Tensor:
    """Row-major, aligned as the allocator does."""
    return in_order(x, list(range(x.dim())))


def offset(x: Tensor, r: random.Random) -> Tensor:
    """Row-major, at an address that is aligned to nothing but the element."""
    return in_order(x, list(range(x.dim())), offset=_GUARD + r.choice((1, 3, 5)))


def padded(x: Tensor, r: random.Random) -> Tensor:
    """Rows longer than their elements."""
    return in_order(x, list(range(x.dim())), gap=r.choice((1, 3, 8)))


def strided(x: Tensor, r: random.Random) -> Tensor:
    """Every second or third element of a row."""
    return in_order(x, list(range(x.dim())), last=r.choice((2, 3)))


def heads_last(x: Tensor, r: random.Random) -> Tensor:
    """``[B, H, N, ...]`` as a transposed view of ``[B, N, H, ...]``."""
    order = list(range(x.dim()))
    if x.dim() >= 3:
        order[1], order[2] = order[2], order[1]
    return in_order(x, order)


def permuted(x: Tensor, r: random.Random) -> Tensor:
    """The dimensions in any order in memory."""
    order = list(range(x.dim()))
    r.shuffle(order)
    return in_order(x, order)


def turned(x: Tensor, r: random.Random) -> Tensor:
    """Column-major: the last two dimensions swapped in memory."""
    order = list(range(x.dim()))
    if x.dim() >= 2:
        order[-1], order[-2] = order[-2], order[-1]
    return in_order(x, order)


def expanded(x: Tensor, r: random.Random) -> Tensor:
    """Stride 0 over one dimension, with the values of its first entry. The one layout that changes values."""
    dims = [dim for dim in range(x.dim()) if x.shape[dim] > 0]
    if not dims:
        return contiguous(x, r)
    dim = r.choice(dims)
    return contiguous(x.narrow(dim, 0, 1), r).expand_as(x)


def negated(x: Tensor, r: random.Random) -> Tensor:
    """A view whose negative bit is set: what lies in memory is ``-x``."""
    if not x.is_floating_point() or x.itemsize == 1:  # PyTorch negates no eight-bit numbers
        return contiguous(x, r)
    return torch._neg_view(contiguous(-x, r))  # pyright: ignore[reportPrivateImportUsage]


def conjugated(x: Tensor, r: random.Random) -> Tensor:
    """The imaginary part of a conjugate: stride 2 and the negative bit."""
    if x.dtype not in (torch.float32, torch.float64):
        return negated(x, r)
    return torch.complex(torch.full_like(x, float("nan")), -x).conj().imag


LAYOUTS: dict[str, Layout] = {  # by name; each takes a tensor and what it draws its gaps and orders from
    layout.__name__: layout
    for layout in (
        contiguous, offset, padded, strided, heads_last, permuted, turned, expanded, negated, conjugated
    )
}  # fmt: skip


def written_elsewhere(x: Tensor, before: Tensor) -> bool:
    """Whether the storage of ``x`` differs from the bytes ``before`` in an element that ``x`` does not show."""
    now = storage_of(x)
    seen = torch.zeros(x.untyped_storage().nbytes() // x.element_size(), dtype=torch.bool)
    seen.as_strided(x.shape, x.stride(), x.storage_offset()).fill_(True)
    seen = seen.repeat_interleave(x.element_size())
    return bool((now != before)[: seen.numel()][~seen].any())


def storage_of(x: Tensor) -> Tensor:
    """A copy of the bytes of the storage that ``x`` is a view of."""
    return torch.empty(0, dtype=torch.uint8).set_(x.untyped_storage()).clone()

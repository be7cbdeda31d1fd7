"""Tensors of equal values that lie in memory in every way that PyTorch has, for the tests of this room."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from iokernels.testing.inputs import poisoned_view

LAYOUTS = ("strided", "padded", "inside", "steps first", "negated", "imaginary", "one batch", "one step")


def laid(x: Tensor, layout: str) -> Tensor:
    """A tensor of the shape of x, among NaNs where it leaves gaps. ``one batch`` and ``one step`` repeat values of x by
    a stride of 0; all other layouts hold the values of x."""
    if layout in ("strided", "padded"):  # a stride of 2; rows with gaps, at an odd offset
        return poisoned_view(x, layout)
    if layout == "inside" and x.dim() > 1:
        return x.transpose(-1, -2).contiguous().transpose(-1, -2)
    if layout == "steps first":
        return x.movedim(-1, 0).contiguous().movedim(0, -1)
    if layout == "negated":
        return torch.ops.aten._neg_view(-x)
    if layout == "imaginary" and x.dtype.itemsize > 2:  # of a conjugate: a negated view of stride 2
        return torch.complex(torch.zeros_like(x), -x).conj().imag
    if layout == "one batch" and x.dim() > 1:
        return x[:1].expand(x.shape)
    if layout == "one step" and x.shape[-1]:
        return x[..., :1].expand(x.shape)
    return x.clone()


def gradients(function: Any, leaves: dict[str, Tensor], upstream: tuple[Tensor, ...], **options: Any) -> list[Tensor]:
    """The results of a call and the gradients of its leaves, None where an argument reaches no result."""
    found = function(**leaves, **options)
    found = found if isinstance(found, tuple) else (found,)
    wanted = [x for x in leaves.values() if isinstance(x, Tensor) and x.requires_grad]
    grads = torch.autograd.grad(found, wanted, [g.to(y.dtype) for g, y in zip(upstream, found, strict=True)])
    return [*(y.detach() for y in found), *grads]


def leaf(x: Tensor) -> Tensor:
    """x as a tensor that wants a gradient, in the layout that it has."""
    return x.detach().requires_grad_()


def truth(x: Tensor) -> Tensor:
    """The same numbers in float64, a leaf of its own memory."""
    return x.detach().resolve_neg().double().clone().requires_grad_()

"""Views of equal values: every layout in which a tensor may come to lean_attention and append_kv."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from iokernels.testing.poison import poison_


def _spread(x: Tensor) -> Tensor:
    """Every other element of the last dimension."""
    wide = poison_(torch.zeros((*x.shape[:-1], 2 * x.shape[-1]), dtype=x.dtype))
    wide[..., ::2] = x
    return wide[..., ::2]


def _moved(x: Tensor) -> Tensor:
    """Behind three others in its storage."""
    line = poison_(torch.zeros(x.numel() + 5, dtype=x.dtype))
    view = line[3 : 3 + x.numel()].view(x.shape)
    view.copy_(x)
    return view


def _reversed(x: Tensor) -> Tensor:
    """The first dimension is the innermost, as of heads that come last."""
    return x.permute(*range(x.dim())[::-1]).contiguous().permute(*range(x.dim())[::-1])


def _swapped(x: Tensor) -> Tensor:
    """The last dimension's stride is that of the one before."""
    return x.transpose(-1, -2).contiguous().transpose(-1, -2) if x.dim() > 1 else _spread(x)


def _heads_inside(x: Tensor) -> Tensor:
    """[B, N, H, D] in memory."""
    return x.transpose(1, 2).contiguous().transpose(1, 2) if x.dim() > 2 else _moved(x)


def _negated(x: Tensor) -> Tensor:
    """With PyTorch's bit that says that memory holds the negative."""
    return torch.ops.aten._neg_view(-x)


def _imaginary(x: Tensor) -> Tensor:
    """A part of a conjugate: negated, and every other element."""
    if x.dtype not in (torch.float32, torch.float64):
        return torch.ops.aten._neg_view(_spread(-x))
    return torch.complex(torch.full_like(x, float("nan")), -x).conj().imag


def _repeated(x: Tensor) -> Tensor:
    """The first entry of the first dimension for all of it: stride 0."""
    return x[:1].clone().expand(x.shape)


def _repeated_inside(x: Tensor) -> Tensor:
    """The same along the last dimension."""
    return x[..., :1].clone().expand(x.shape)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "spread": _spread,
    "moved": _moved,
    "reversed": _reversed,
    "swapped": _swapped,
    "heads inside": _heads_inside,
    "negated": _negated,
    "imaginary": _imaginary,
    "repeated": _repeated,
    "repeated inside": _repeated_inside,
}
"""Each takes a contiguous tensor. All but the last two have its values."""

WRITABLE = tuple(name for name in LAYOUTS if not name.startswith("repeated"))
"""Those that have a place for every element."""

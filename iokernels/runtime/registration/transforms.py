"""What ``torch.func`` and forward-mode differentiation ask of a call, found before a backend is chosen.

Operators stand below autograd, and their gradients are an ``autograd.Function`` outside them. So a backend that is
reached under ``torch.func.jvp`` or with a dual tensor would drop the tangent, and one under ``torch.func.grad`` the
gradient, in silence. :func:`asking` notes which derivative a call's tensors want, and :func:`.dispatch.choose` refuses
every backend but ``reference``, which is plain PyTorch and has them all.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._C import _functorch  # pyright: ignore[reportAttributeAccessIssue]
from torch._C._functorch import TransformType
from torch._functorch.pyfunctorch import temporarily_pop_interpreter_stack
from torch._guards import TracingContext
from torch.autograd import forward_ad

FORWARD = "a forward-mode derivative (torch.func.jvp, jacfwd, a dual tensor)"
REVERSE = "a gradient under torch.func (grad, vjp, jacrev, or vmap of what requires one)"

_asked = threading.local()


def under_transform() -> bool:
    """Whether forward-mode differentiation or a transform of ``torch.func`` is in force."""
    return forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()


@contextmanager
def asking(tensors: Iterable[Any]) -> Iterator[None]:
    """Inside, :func:`derivative` says which derivative of a call with these ``tensors`` is asked."""
    outer = getattr(_asked, "derivative", None)
    _asked.derivative = wanted(tensors)
    try:
        yield
    finally:
        _asked.derivative = outer


def derivative() -> str | None:
    """The derivative that the call being planned must have beside plain autograd's, or None.

    While Dynamo traces, the tensors are its own and say nothing: there, a transform in force counts as asked. Dynamo
    guards on the transforms, so the answer is a constant to it.
    """
    # Up to torch 2.11 is_compiling() is true in what Dynamo traces, and not in what it calls.
    if not torch.compiler.is_compiling() and TracingContext.try_get() is None:
        return getattr(_asked, "derivative", None)
    if forward_ad._current_level >= 0:
        return FORWARD
    kinds = [level.key() for level in _functorch.get_interpreter_stack() or ()]
    if TransformType.Jvp in kinds:
        return FORWARD
    return REVERSE if TransformType.Grad in kinds else None


derivative.__dict__["_dynamo_marked_constant"] = True


def wanted(tensors: Iterable[Any]) -> str | None:
    """The derivative that ``tensors`` ask for at any level of the transforms in force."""
    given = [x for x in tensors if isinstance(x, Tensor)]
    if forward_ad._current_level >= 0 and _at_any_level(given, TransformType.Jvp, _has_tangent):
        return FORWARD
    if torch._C._are_functorch_transforms_active() and torch.is_grad_enabled():
        return REVERSE if _at_any_level(given, TransformType.Grad, lambda x: x.requires_grad) else None
    return None


def _has_tangent(x: Tensor) -> bool:
    return forward_ad.unpack_dual(x, level=0).tangent is not None


def _at_any_level(tensors: list[Tensor], kind: Any, holds: Callable[[Tensor], bool]) -> bool:
    """Whether one of ``tensors`` ``holds`` outside all transforms, or as a transform of this ``kind`` sees it."""
    top = _functorch.peek_interpreter_stack()
    if (top is None or top.key() == kind) and any(holds(x) for x in tensors):
        return True
    if top is None:
        return False
    level = top.level()
    inner = [_functorch.get_unwrapped(x) if _functorch.maybe_get_level(x) == level else x for x in tensors]
    with temporarily_pop_interpreter_stack():
        return _at_any_level(inner, kind, holds)

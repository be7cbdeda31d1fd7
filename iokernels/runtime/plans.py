"""Remembering what validation made of a call.

Checking a call's arguments in Python costs more than launching a short kernel. The outcome depends on shapes, dtypes,
devices and plain arguments only, so it is computed once for each combination and looked up afterwards (1-2 us).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

_T = TypeVar("_T")

_MOST_PLANS = 4096
"""A program with ever-changing shapes must not fill the memory: past this number all plans are forgotten."""


def remembered(
    plans: dict[Any, _T], make: Callable[..., _T], arguments: tuple[Any, ...], tensors: tuple[Tensor | None, ...]
) -> _T:
    """``make(*arguments, *tensors)``, computed once for equal arguments and equal metadata of the tensors.

    ``make`` may look at nothing of a tensor but its shape, dtype, device and whether it requires a gradient. Errors
    are not remembered. While ``torch.compile`` or ``torch.export`` traces, nothing is: sizes are symbols then.
    """
    if torch.compiler.is_compiling():
        return make(*arguments, *tensors)
    try:
        key = (
            make,
            arguments,
            *map(type, arguments),  # 1 == 1.0 == True, and not all of them may be accepted
            *[None if t is None else (t.shape, t.dtype, t.device, t.requires_grad) for t in tensors],
        )
        plan = plans.get(key)
    except (AttributeError, TypeError, RuntimeError):
        # Not a tensor, an unhashable argument or a symbolic size: ``make`` says what is wrong, or can do with it.
        return make(*arguments, *tensors)
    if plan is None:
        plan = make(*arguments, *tensors)
        if len(plans) >= _MOST_PLANS:
            plans.clear()
        plans[key] = plan
    return plan


def is_concrete(x: Tensor) -> bool:
    """Whether ``x`` has values: it is neither a meta tensor nor one of the compiler's fakes."""
    return type(x) in (Tensor, torch.nn.Parameter) and not x.is_meta

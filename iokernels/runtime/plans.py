"""Remembering what validation made of a call.

Checking a call's arguments in Python costs more than launching a short kernel. The outcome depends on shapes, dtypes,
devices and plain arguments only, so it is computed once for each combination and looked up afterwards (1-2 us).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.autograd import forward_ad

from .contracts.plain import untraced, untraced_value
from .registration.transforms import asking

_T = TypeVar("_T")


class Plans(Generic[_T]):
    """The plans of a room: a dictionary that Dynamo does not look into.

    It guards on the length of dictionaries that a traced function is handed, and each new shape in an eager call would
    make compiled code compile again.
    """

    __slots__ = ("_made", "get")

    def __init__(self) -> None:
        self._made: dict[Any, _T] = {}
        self.get = self._made.get

    def __setitem__(self, key: Any, plan: _T) -> None:
        self._made[key] = plan

    def __len__(self) -> int:
        return len(self._made)

    def clear(self) -> None:
        """Forget all."""
        self._made.clear()


_MOST_PLANS = 4096
"""A program with ever-changing shapes must not fill the memory: past this number all plans are forgotten."""


def remembered(
    plans: Plans[_T] | dict[Any, _T],
    make: Callable[..., _T],
    arguments: tuple[Any, ...],
    tensors: tuple[Tensor | None, ...],
) -> _T:
    """``make(*arguments, *tensors)``, computed once for equal arguments and equal metadata of the tensors.

    ``make`` may look at nothing of a tensor but its shape, dtype, device, layout and whether it requires a gradient.
    Errors are not remembered. While ``torch.compile`` or ``torch.export`` traces, nothing is: sizes are symbols then.
    """
    dual = forward_ad._current_level >= 0  # read here, so that Dynamo guards on it
    if torch.compiler.is_compiling():
        return make(*arguments, *tensors)
    if dual or torch._C._are_functorch_transforms_active():  # see transforms.py
        with asking(tensors):
            return make(*arguments, *tensors)
    if torch._C._get_tracing_state() is not None:
        arguments = tuple(map(untraced_value, arguments))
        with untraced():
            return make(*arguments, *tensors)
    try:
        kinds = tuple(map(type, arguments))  # 1 == 1.0 == True, and not all of them may be accepted
        if tuple in kinds:
            kinds += tuple(tuple(map(type, x)) for x in arguments if type(x) is tuple)
        key = (
            make,
            arguments,
            kinds,
            *[None if t is None else (t.shape, t.dtype, t.device, t.layout, t.requires_grad) for t in tensors],
        )
        plan = plans.get(key)
    except (AttributeError, TypeError, RuntimeError):
        # Not a tensor, a nested one, an unhashable argument or a symbolic size: ``make`` says what is wrong, or can do
        # with it.
        return make(*arguments, *tensors)
    if plan is None:
        plan = make(*arguments, *tensors)
        if len(plans) >= _MOST_PLANS:
            plans.clear()
        plans[key] = plan
    return plan


def is_concrete(x: Tensor) -> bool:
    """Whether ``x`` has values: it is neither a meta tensor nor one of a compiler's or a transform's stand-ins."""
    return type(x) in (Tensor, torch.nn.Parameter) and not x.is_meta and not is_functorch_wrapped_tensor(x)

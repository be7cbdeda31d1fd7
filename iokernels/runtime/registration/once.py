"""Backward passes that cannot be differentiated again, and an error that says so when somebody tries."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from iokernels.runtime.errors import UnsupportedError

from .transforms import FORWARD, under_transform, wanted


def differentiable_once(operator: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorate the ``backward`` of an ``autograd.Function`` whose results have no derivative.

    Unlike ``torch.autograd.function.once_differentiable``, the second derivative raises
    :class:`~iokernels.UnsupportedError` by name, also where the incoming gradients are constants. Taking first
    derivatives with ``create_graph=True`` is allowed.
    """

    def decorate(backward: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(backward)
        def once(ctx: Any, *gradients: Tensor | None) -> Any:
            if under_transform() and wanted(gradients) == FORWARD:
                raise UnsupportedError(
                    f"{operator}: its gradients are asked for {FORWARD}, which this backend has not; "
                    'backend="reference" has'
                )
            with torch.no_grad():
                results = backward(ctx, *gradients)
            if not torch.is_grad_enabled() or torch.compiler.is_compiling():
                return results
            sources = [x for x in (*gradients, *ctx.saved_tensors) if x is not None and x.requires_grad]
            made = [x for x in results if isinstance(x, Tensor)]
            if not sources or not made:
                return results
            marked = iter(_Last.apply(operator, len(sources), *sources, *made))  # pyright: ignore[reportArgumentType]
            return tuple(next(marked) if isinstance(x, Tensor) else x for x in results)

        return once

    return decorate


class _Last(torch.autograd.Function):
    """Passes gradients on, as functions of ``sources`` whose derivative is an error."""

    @staticmethod
    def forward(ctx: Any, operator: str, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.operator = operator
        return tuple(x.view_as(x) for x in tensors[count:])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        raise UnsupportedError(
            f"{ctx.operator}: the gradients of this backend cannot be differentiated again; "
            'backend="reference" supports gradients of any order'
        )

"""A second derivative is refused by name; a first one is not disturbed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from iokernels import UnsupportedError
from iokernels.runtime.registration.once import differentiable_once


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, power: int) -> Tensor:
        ctx.save_for_backward(x)
        return x**power

    @staticmethod
    @differentiable_once("square")
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        return 2 * x * dout, None


def leaf() -> Tensor:
    return torch.tensor([1.0, 3.0], requires_grad=True)


def square(x: Tensor) -> Tensor:
    out = Square.apply(x, 2)
    assert isinstance(out, Tensor)
    return out


def test_first_derivative() -> None:
    x = leaf()
    square(x).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [2.0, 6.0]
    assert not x.grad.requires_grad


def test_create_graph_gives_the_first_derivative() -> None:
    x = leaf()
    (dx,) = torch.autograd.grad(square(x).sum(), x, create_graph=True)
    assert dx.tolist() == [2.0, 6.0]


@pytest.mark.parametrize("weight", [1.0, torch.ones(2, requires_grad=True)], ids=["constant", "variable"])
def test_second_derivative_is_refused(weight: Any) -> None:
    x = leaf()
    (dx,) = torch.autograd.grad((square(x) * weight).sum(), x, create_graph=True)
    with pytest.raises(
        UnsupportedError,
        match=r"square: the gradients of this backend cannot be differentiated again; backend=.reference",
    ):
        dx.sum().backward()


def test_compiled() -> None:
    x = leaf()
    compiled = torch.compile(lambda x: square(x).sum(), backend="aot_eager", fullgraph=True)
    compiled(x).backward()
    assert x.grad is not None
    assert x.grad.tolist() == [2.0, 6.0]

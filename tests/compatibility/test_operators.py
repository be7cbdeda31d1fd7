"""Every operator under every transform of PyTorch's; what is expected stands on the page."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from iokernels import UnsupportedError

from .page import cells
from .subjects import BATCH, LENGTH, OPERATORS, Operator

SITUATIONS: dict[str, Callable[[Operator], None]] = {}


def situation(name: str) -> Callable[[Callable[[Operator], None]], Callable[[Operator], None]]:
    def enter(check: Callable[[Operator], None]) -> Callable[[Operator], None]:
        SITUATIONS[name] = check
        return check

    return enter


def same(actual: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)
    assert actual.isfinite().all()


def weighed(y: Tensor) -> Tensor:
    """A scalar whose gradient by ``y`` is not constant."""
    return (y * torch.linspace(0.5, 1.5, y.numel()).view(y.shape).to(y)).sum() + y.square().sum()


def gradients(
    subject: Operator, tensors: tuple[Tensor, ...], call: Callable[..., Tensor] | None = None
) -> list[Tensor]:
    """Of the operator, or of ``call`` that does the same; none of one that does not train."""
    if not subject.trains:
        return []
    call = plain(subject) if call is None else call
    leaves = [x.detach().requires_grad_() for x in tensors]
    return list(torch.autograd.grad(weighed(call(*leaves)), leaves))


def plain(subject: Operator) -> Callable[..., Tensor]:
    return lambda *tensors: subject.call(None, *tensors)


class Called(nn.Module):
    """For what takes modules alone."""

    def __init__(self, subject: Operator) -> None:
        super().__init__()
        self.run = plain(subject)

    def forward(self, *tensors: Tensor) -> Tensor:
        return self.run(*tensors)


@situation("compile")
def check_compile(subject: Operator) -> None:
    """One graph, forward and backward, for all lengths."""
    torch._dynamo.reset()
    compiled = torch.compile(plain(subject), fullgraph=True, dynamic=True, backend="aot_eager")
    for length in (LENGTH, LENGTH + 3):
        tensors = subject.draw(length=length)
        same(compiled(*tensors), subject.call(None, *tensors))
        for one, other in zip(gradients(subject, tensors, compiled), gradients(subject, tensors), strict=True):
            same(one, other, 1e-4)


@situation("export")
def check_export(subject: Operator) -> None:
    """An exported graph has the gradients too."""
    tensors = subject.draw()
    exported: Any = torch.export.export(Called(subject), tensors).module()
    same(exported(*tensors), subject.call(None, *tensors))
    for one, other in zip(gradients(subject, tensors, exported), gradients(subject, tensors), strict=True):
        same(one, other, 1e-4)


@situation("jit.trace")
def check_trace(subject: Operator) -> None:
    tensors, others = subject.draw(), subject.draw()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced: Any = torch.jit.trace(plain(subject), tensors, check_trace=False)
        same(traced(*others), subject.call(None, *others))


@situation("autocast")
def check_autocast(subject: Operator) -> None:
    tensors = subject.draw()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = subject.call(None, *tensors)
        found = gradients(subject, tensors)
    assert y.dtype == torch.bfloat16
    same(y.float(), subject.call(None, *tensors), 0.1)
    assert all(grad.dtype == torch.float32 and grad.isfinite().all() for grad in found)


@situation("meta")
def check_meta(subject: Operator) -> None:
    tensors = subject.draw()
    expected = subject.call(None, *tensors)
    y = subject.call(None, *(x.to("meta") for x in tensors))
    assert (y.shape, y.dtype, y.device.type, y.stride()) == (expected.shape, expected.dtype, "meta", expected.stride())
    grads = gradients(subject, tuple(x.to("meta") for x in tensors))
    assert [grad.shape for grad in grads] == [x.shape for x in tensors[: len(grads)]]


@situation("fake tensors")
def check_fake(subject: Operator) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    tensors = subject.draw()
    expected = subject.call(None, *tensors)
    with FakeTensorMode() as mode:
        y = subject.call(None, *map(mode.from_tensor, tensors))
    assert (y.shape, y.dtype, y.device, y.stride()) == (
        expected.shape,
        expected.dtype,
        expected.device,
        expected.stride(),
    )


@situation("empty")
def check_empty(subject: Operator) -> None:
    """No sequences, or sequences of no length."""
    for batch, length in ((0, LENGTH), (BATCH, 0), (0, 0)):
        tensors = subject.draw(batch, length)
        y = subject.call(None, *tensors)
        assert not y.count_nonzero()
        assert not any(grad.count_nonzero() for grad in gradients(subject, tensors))


@situation("func.grad")
def check_func_grad(subject: Operator) -> None:
    tensors = subject.draw()
    where = tuple(range(len(tensors)))
    found = torch.func.grad(lambda *x: weighed(subject.call(None, *x)), argnums=where)(*tensors)
    for one, other in zip(found, gradients(subject, tensors), strict=True):
        same(one, other, 1e-4)
    y, back, *_ = torch.func.vjp(plain(subject), *tensors)
    same(y, subject.call(None, *tensors))
    assert len(back(torch.ones_like(y))) == len(tensors)


@situation("vmap")
def check_vmap(subject: Operator) -> None:
    draws = [subject.draw() for _ in range(2)]
    stacked = tuple(torch.stack(x) for x in zip(*draws, strict=True))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of a loop in place of one batched kernel
        found = torch.func.vmap(plain(subject))(*stacked)
    same(found, torch.stack([subject.call(None, *x) for x in draws]))


@situation("jvp")
def check_forward_mode(subject: Operator) -> None:
    tensors = subject.draw()
    torch.func.jvp(plain(subject), tensors, tuple(torch.ones_like(x) for x in tensors))


@situation("double backward")
def check_double_backward(subject: Operator) -> None:
    leaves = [x.requires_grad_() for x in subject.draw()]
    first = torch.autograd.grad(weighed(subject.call(None, *leaves)), leaves, create_graph=True)
    sum(grad.square().sum() for grad in first).backward()  # type: ignore[union-attr]


@situation("checkpoint")
def check_checkpoint(subject: Operator) -> None:
    from torch.utils.checkpoint import checkpoint

    tensors = subject.draw()

    def whole(*tensors: Tensor) -> Tensor:
        return checkpoint(plain(subject), *tensors, use_reentrant=False)  # type: ignore[return-value]

    for one, other in zip(gradients(subject, tensors, whole), gradients(subject, tensors), strict=True):
        same(one, other)


@situation("in place")
def check_in_place(subject: Operator) -> None:
    """``y += 1`` on the result; inputs heads first in memory and as transposed views."""

    def added(*tensors: Tensor) -> Tensor:
        y = subject.call(None, *tensors)
        y += 1.0
        return y

    tensors = subject.draw()
    views = tuple(x.transpose(1, 2).contiguous().transpose(1, 2) if x.dim() > 2 else x for x in tensors)
    for given in (tensors, views):
        expected = gradients(subject, given, lambda *x: subject.call(None, *x) + 1.0)
        for one, other in zip(gradients(subject, given, added), expected, strict=True):
            same(one, other)
        same(added(*given), subject.call(None, *given) + 1.0)


@situation("nested")
def check_nested(subject: Operator) -> None:
    tensors = subject.draw()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        nested = torch.nested.nested_tensor([x[: n + 1] for n, x in enumerate(tensors[0])], layout=torch.jagged)
        subject.call(None, nested, *tensors[1:])


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(("row", "column", "says"), cells("Operators"), ids=lambda text: text.replace(" ", "-"))
def test_an_operator_does_what_the_page_says(row: str, column: str, says: str) -> None:
    if says == "refused":
        with pytest.raises((UnsupportedError, TypeError, ValueError), match=r"^\w+: "):
            SITUATIONS[column](OPERATORS[row])
    elif says == "raises":  # what backward needs was changed: autograd says so
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            SITUATIONS[column](OPERATORS[row])
    else:
        assert says == "yes"
        SITUATIONS[column](OPERATORS[row])


@pytest.mark.parametrize("row", OPERATORS)
def test_reference_has_what_the_page_refuses(row: str) -> None:
    subject = OPERATORS[row]
    by_reference = Operator(subject.draw, lambda _, *tensors: subject.call("reference", *tensors))
    if row == "scaled_dot_product_attention":
        import iokernels

        with iokernels.use_backend("reference"):
            check_forward_mode(subject)
            check_double_backward(subject)
        return
    check_forward_mode(by_reference)
    check_double_backward(by_reference)


def test_the_page_has_every_operator_and_situation() -> None:
    table = cells("Operators")
    assert {row for row, _, _ in table} == set(OPERATORS)
    assert {column for _, column, _ in table} == set(SITUATIONS)

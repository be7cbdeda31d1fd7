"""Linear attention and the gated delta rule do not depend on how their tensors lie in memory, on any path."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from iokernels.testing.poison import poison_

from .both import DELTA, LINEAR, OPERATORS, call, given, gradients, leaves, step


def _spread(x: Tensor) -> Tensor:
    """Every third element of a poisoned memory, from the second on."""
    memory = poison_(x.new_empty((*x.shape, 3)))
    memory[..., 1] = x
    return memory[..., 1]


def _heads_last(x: Tensor) -> Tensor:
    """The dimension after the first innermost."""
    return x.movedim(1, -1).contiguous().movedim(-1, 1) if x.dim() > 1 else x


def _offset(x: Tensor) -> Tensor:
    memory = poison_(x.new_empty(x.numel() + 4))[3:-1]
    return memory.copy_(x.flatten()).view(x.shape)


def _negative(x: Tensor) -> Tensor:
    return torch._neg_view(-x)  # pyright: ignore[reportPrivateImportUsage]


def _imaginary(x: Tensor) -> Tensor:
    """The imaginary part of a conjugate: negative bit and a stride of two."""
    return torch.view_as_complex(torch.stack([x, -x], -1)).conj().imag


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "spread": _spread,
    "heads last": _heads_last,
    "offset": _offset,
    "negative": _negative,
    "imaginary": _imaginary,
}


def _alike(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, x in found.items():
        tolerance = 4e-3 if x.dtype == torch.float16 else 1e-5
        torch.testing.assert_close(x, expected[name], rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
@pytest.mark.parametrize(("operator", "backend"), OPERATORS)
def test_results_and_gradients_do_not_depend_on_the_layout(
    operator: str, backend: str, packed: bool, layout: str
) -> None:
    plain, lay = given(operator, backend, packed=packed), LAYOUTS[layout]
    laid = {name: lay(x) if x.is_floating_point() else _spread(x) for name, x in plain.items()}
    _alike(gradients(operator, backend, laid, lay), gradients(operator, backend, plain, Tensor.contiguous))


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
@pytest.mark.parametrize(("operator", "backend"), OPERATORS)
def test_expanded_arguments_count_for_each_place(operator: str, backend: str, packed: bool) -> None:
    """A stride of 0: every argument, and every incoming gradient, is one value for all of a dimension."""
    plain = given(operator, backend, packed=packed)
    expanded = {name: x[:1].expand_as(x) if x.is_floating_point() else x for name, x in plain.items()}
    whole = {name: x.contiguous() for name, x in expanded.items()}

    def one(x: Tensor) -> Tensor:
        return x.flatten()[0].expand_as(x)

    _alike(
        gradients(operator, backend, expanded, one),
        gradients(operator, backend, whole, lambda x: one(x).contiguous()),
    )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("backend", ["reference", "torch", "triton"])
@pytest.mark.parametrize("operator", [LINEAR, DELTA])
def test_steps_do_not_depend_on_the_layout(operator: str, backend: str, layout: str) -> None:
    plain, lay = given(operator, backend, length=2), LAYOUTS[layout]
    state = plain.pop("initial_state")
    # The linear step updates contiguous memory.
    held = lay(state) if operator == DELTA or layout in ("offset", "negative") else state.clone()
    out = step(operator, backend, {name: lay(x) for name, x in plain.items()}, held)
    expected = step(operator, backend, plain, state)
    _alike({"out": out, "state": held}, {"out": expected, "state": state})


@pytest.mark.parametrize("layout", ["spread", "negative"])
@pytest.mark.parametrize("backend", ["reference", "torch", "triton"])
def test_a_decay_for_each_head_in_any_layout(backend: str, layout: str) -> None:
    for operator in (LINEAR, DELTA):
        plain = given(operator, backend)
        plain["log_decay"] = torch.tensor([-0.25, -1.5])
        laid = plain | {"log_decay": LAYOUTS[layout](plain["log_decay"])}
        _alike(
            gradients(operator, backend, laid, Tensor.contiguous),
            gradients(operator, backend, plain, Tensor.contiguous),
        )


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
@pytest.mark.parametrize("backend", ["reference", "torch", "triton"])
@pytest.mark.parametrize("operator", [LINEAR, DELTA])
def test_shapes_and_memory_order_on_meta(operator: str, backend: str, packed: bool) -> None:
    plain = given(operator, backend, packed=packed)
    if not packed:
        plain["v"] = _heads_inside(plain["v"])
    meta = {name: x.to("meta") for name, x in plain.items()}
    own = leaves(meta)
    found, expected = call(operator, backend, meta | own), call(operator, backend, plain)
    for x, y in zip(found, expected, strict=True):
        assert (x.shape, x.dtype, x.is_meta) == (y.shape, y.dtype, True)
    if backend != "reference":
        assert found[0].stride() == expected[0].stride()
    (found[0].sum() + found[1].sum()).backward()
    assert all(x.grad is not None and x.grad.shape == x.shape for x in own.values())
    if not packed:
        assert step(operator, backend, meta, torch.zeros(2, 2, 4, 4, device="meta")).shape == plain["v"].shape


def _heads_inside(x: Tensor) -> Tensor:
    """[B, H, N, D] in the memory of [B, N, H, D]."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)

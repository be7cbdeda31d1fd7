"""fft_conv among PyTorch's machinery: operator checks, compilation, checkpointing, gradients by finite differences."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from iokernels import fft_conv, kernel_spectrum
from iokernels.ops.fft_conv.op import backward_op, forward_op
from iokernels.ops.fft_conv.options import CAUSAL, Options

from ..backends import BACKENDS, usual


def arguments(device: str, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """The tensors of a call, all of which want gradients."""
    made = {
        "u": torch.randn(2, 2, 60), "k": torch.randn(2, 20), "pre_gate": torch.randn(2, 2, 60),
        "post_gate": torch.randn(2, 2, 60), "skip": torch.randn(2), "initial_state": torch.randn(2, 2, 19),
    }  # fmt: skip
    return {name: x.to(device, dtype).requires_grad_() for name, x in made.items()}


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend: str, device: str) -> None:
    # Two runs may differ in the last bits, because libraries look at the alignment; they must not show here.
    given = arguments(device, torch.float64 if backend == "torch" else torch.float32)
    given |= {name: given[name].to(usual(backend)) for name in ("u", "pre_gate", "post_gate") if backend == "cuda"}
    u, k, *tensors = (x.detach() / 8 for x in given.values())
    options = Options(*tensors, mode=CAUSAL)
    torch.library.opcheck(forward_op, (u, k, [], backend, *options))
    torch.library.opcheck(backward_op, (u.flip(0), u, k, [], [True] * 6, backend, *options))


@pytest.mark.parametrize("dynamic", [False, True])
def test_one_graph(dynamic: bool) -> None:
    given = arguments("cpu", torch.float64)

    def loss(n: int) -> Tensor:
        cut = {name: x[..., :n] if x.dim() == 3 and name != "initial_state" else x for name, x in given.items()}
        y, state = fft_conv(**cut, return_state=True)
        return y.square().sum() + state.sum()

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for n in (60, 41):
        found = torch.autograd.grad(compiled(n), list(given.values()))
        expected = torch.autograd.grad(loss(n), list(given.values()))
        for x, y in zip(found, expected, strict=True):
            torch.testing.assert_close(x, y)


def test_one_tensor_as_all_in_one_graph(device: str) -> None:
    x, k = torch.randn(2, 2, 30, device=device, requires_grad=True), torch.randn(2, 30, device=device)

    def function(x: Tensor) -> Tensor:
        return fft_conv(x, k, pre_gate=x, post_gate=x)

    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    (found,), (expected,) = (torch.autograd.grad(f(x).sum(), x) for f in (compiled, function))
    torch.testing.assert_close(found, expected)


def test_spectrum_in_one_graph() -> None:
    u, k = torch.randn(2, 2, 30), torch.randn(2, 30)
    spectrum = kernel_spectrum(k, 30)
    compiled = torch.compile(lambda u: fft_conv(u, spectrum), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(u), fft_conv(u, k))


@pytest.mark.parametrize("options", [{}, {"causal": False}, {"freq_keep": 0.4, "initial_state": None}], ids=str)
def test_finite_differences(options: dict[str, Any]) -> None:
    given = arguments("cpu", torch.float64)
    given = {name: x[..., :9].detach().requires_grad_() for name, x in given.items()}
    given["k"] = given["k"][:, :5].detach().requires_grad_()
    given["initial_state"] = given["initial_state"][..., :4].detach().requires_grad_()
    if options:
        del given["initial_state"]

    def call(*tensors: Tensor) -> Tensor:
        return fft_conv(**dict(zip(given, tensors, strict=True)), **options, backend="torch")

    assert torch.autograd.gradcheck(call, tuple(given.values()))


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_what_is_asked_for(backend: str, device: str) -> None:
    """Each gradient alone is the gradient among all."""
    given = arguments(device)
    for name in ("u", "pre_gate", "post_gate"):
        given[name] = given[name].detach().to(usual(backend)).requires_grad_()
    everything = torch.autograd.grad(fft_conv(**given, backend=backend).float().square().sum(), list(given.values()))
    for (name, _), expected in zip(given.items(), everything, strict=True):
        alone = {other: x.detach().requires_grad_(other == name) for other, x in given.items()}
        (found,) = torch.autograd.grad(fft_conv(**alone, backend=backend).float().square().sum(), alone[name])
        assert found.dtype == expected.dtype
        torch.testing.assert_close(found, expected, msg=lambda text, name=name: f"{name}: {text}")


def test_checkpointing(device: str) -> None:
    given = arguments(device)
    loss = checkpoint(lambda u: fft_conv(**given | {"u": u}), given["u"], use_reentrant=False).square().sum()
    expected = torch.autograd.grad(fft_conv(**given).square().sum(), list(given.values()))
    for x, y in zip(torch.autograd.grad(loss, list(given.values())), expected, strict=True):
        torch.testing.assert_close(x, y)

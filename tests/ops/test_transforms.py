"""Forward-mode differentiation and ``torch.func`` on every public function: a right result, or an error that names the
operator and the backend that has one. Never a zero in silence."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from iokernels import UnsupportedError, fft_conv_step, flash_attention, flash_rnn

from .public_calls import CALLS, NAMES, PURE, RUNS, STEPS, results

# PyTorch's forward-mode formulas are TorchScript, which it deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")

STEP = 1e-5


def function_of(name: str, argument: str, backend: str | None, dtype: torch.dtype) -> tuple[Any, Tensor, Tensor]:
    """The results of a call as a function of one argument, its value, and a direction."""
    call = CALLS[name]
    given = call.tensors(dtype)

    def run(x: Tensor) -> tuple[Tensor, ...]:
        tensors = {key: value.clone() for key, value in given.items()}
        tensors[argument] = x * 1 if argument in call.writes else x
        return results(call.run(tensors, backend))

    return run, given[argument], torch.randn_like(given[argument])


def of_backend(name: str, argument: str, backend: str) -> tuple[Any, Tensor, Tensor]:
    return function_of(name, argument, backend, torch.float16 if backend == "cuda" else torch.float32)


def slope(run: Callable[[Tensor], tuple[Tensor, ...]], x: Tensor, direction: Tensor) -> list[Tensor]:
    """The derivative of every result along a direction, by central differences in float64."""
    with torch.no_grad():
        ahead, behind = run(x + STEP * direction), run(x - STEP * direction)
    return [(a - b) / (2 * STEP) for a, b in zip(ahead, behind, strict=True)]


def compared(name: str) -> int:
    """How many results have the derivative that differences see: the stabiliser of an sLSTM counts as a constant, and
    its states are relative to it."""
    return 1 if name == "flash_rnn slstm" else 9


def arguments(names: tuple[str, ...]) -> list[tuple[str, str]]:
    apart = ("flash_rnn slstm", "state")
    return [(name, argument) for name in names for argument in CALLS[name].shapes if (name, argument) != apart]


@pytest.mark.parametrize(("name", "argument"), arguments(NAMES))
def test_reference_has_forward_mode_derivatives(name: str, argument: str) -> None:
    run, x, direction = function_of(name, argument, "reference", torch.float64)
    expected = slope(run, x, direction)[: compared(name)]
    tangents = torch.func.jvp(run, (x,), (direction,))[1]
    for tangent, wanted in zip(tangents, expected, strict=False):
        torch.testing.assert_close(tangent, wanted, rtol=1e-5, atol=1e-6)
    with torch.no_grad(), forward_ad.dual_level():
        duals = [forward_ad.unpack_dual(y).tangent for y in run(forward_ad.make_dual(x, direction))]
    for tangent, same in zip(duals, tangents, strict=True):
        assert torch.equal(torch.zeros_like(same) if tangent is None else tangent, same)


@pytest.mark.parametrize(("name", "backend"), RUNS)
def test_a_backend_without_forward_mode_says_so(name: str, backend: str) -> None:
    message = rf"{name.split(' ')[0]}\w*: the call asks for a forward-mode derivative .*Backends that can: reference"
    message = message.replace("hip_attention", "block_sparse_attention")  # which is what runs
    for argument in CALLS[name].shapes:
        run, x, direction = of_backend(name, argument, backend)
        with pytest.raises(UnsupportedError, match=message):
            torch.func.jvp(run, (x,), (direction,))
    with pytest.raises(UnsupportedError, match=message), torch.no_grad(), forward_ad.dual_level():
        run(forward_ad.make_dual(x, direction))
    if name in PURE:  # the others refuse what requires a gradient
        with pytest.raises(UnsupportedError, match=message), forward_ad.dual_level():
            run(forward_ad.make_dual(x.clone().requires_grad_(), direction))
    with pytest.raises(UnsupportedError, match=message):
        torch.func.jacfwd(lambda x: run(x)[0].sum())(x)


@pytest.mark.parametrize("name", NAMES)
def test_the_default_backend_says_so_too(name: str) -> None:
    run, x, direction = function_of(name, next(iter(CALLS[name].shapes)), None, torch.float32)
    with pytest.raises(UnsupportedError, match="Backends that can: reference"):
        torch.func.jvp(run, (x,), (direction,))


@pytest.mark.parametrize("name", ["flash_attention", "flash_rnn lstm", "fft_conv"])
def test_what_has_no_tangent_is_not_disturbed(name: str) -> None:
    run, x, direction = of_backend(name, next(iter(CALLS[name].shapes)), "torch")
    expected = run(x)[0]
    out, tangent, *_ = torch.func.jvp(lambda scale: scale * run(x)[0], (torch.tensor(2.0),), (torch.tensor(1.0),))
    assert torch.equal(out, 2.0 * expected)
    assert torch.equal(tangent, expected)
    with forward_ad.dual_level():
        forward_ad.make_dual(x.clone(), direction)
        assert torch.equal(run(x)[0], expected)


@pytest.mark.parametrize("outer", [torch.func.vmap, lambda f: lambda x: torch.func.jvp(f, (x,), (x,))[0]])
def test_a_tangent_of_an_outer_transform_is_seen(outer: Any) -> None:
    run, x, direction = of_backend("flash_attention", "q", "torch")
    with pytest.raises(UnsupportedError, match="forward-mode"):
        torch.func.jvp(outer(lambda x: run(x)[0]), (x[None],), (direction[None],)) if outer is torch.func.vmap else (
            torch.func.jvp(lambda x: outer(lambda y: y * run(x)[0].sum())(direction), (x,), (direction,))
        )


@pytest.mark.parametrize(("name", "backend"), [run for run in RUNS if run[0] in PURE])
def test_torch_func_grad_is_refused_by_name(name: str, backend: str) -> None:
    run, x, _ = of_backend(name, next(iter(CALLS[name].shapes)), backend)
    message = "the call asks for a gradient under torch.func .*Backends that can: reference"
    if name == "lean_attention":
        message = "an input requires one|asks for a gradient"
    loss = lambda x: run(x)[0].float().sum()  # noqa: E731
    for attempt in (
        lambda: torch.func.grad(loss)(x),
        lambda: torch.func.vjp(loss, x),
        lambda: torch.func.jacrev(loss)(x),
        lambda: torch.func.vmap(torch.func.grad(loss))(x[None]),
        lambda: torch.func.grad(lambda x: torch.func.vmap(loss)(x).sum())(x[None]),
        lambda: torch.func.vmap(loss)(x[None].clone().requires_grad_()),
    ):
        with pytest.raises(UnsupportedError, match=message):
            attempt()


@pytest.mark.parametrize("name", PURE)
def test_reference_has_gradients_under_torch_func(name: str) -> None:
    run, x, _ = function_of(name, next(iter(CALLS[name].shapes)), "reference", torch.float64)
    loss: Any = lambda x: sum(y.sin().sum() for y in run(x))  # noqa: E731
    leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss(leaf), leaf)
    torch.testing.assert_close(torch.func.grad(loss)(x), expected)


@pytest.mark.parametrize(("name", "backend"), RUNS)
def test_vmap_is_one_call_a_slice(name: str, backend: str) -> None:
    call = CALLS[name]
    dtype = torch.float16 if backend == "cuda" else torch.float32
    first, second = call.tensors(dtype), call.tensors(dtype)
    for key in call.shapes:
        second[key] = second[key].flip(-1).contiguous()
    stacked = {key: torch.stack([first[key], second[key]]) for key in call.shapes}

    def run(tensors: dict[str, Tensor]) -> Any:
        return results(call.run({**{key: first[key] for key in call.integers}, **tensors}, backend))

    with torch.no_grad():
        mapped = torch.func.vmap(run)(stacked)
        for index, tensors in enumerate((first, second)):
            for got, expected in zip(mapped, run(tensors), strict=True):
                assert torch.equal(got[index], expected)


@pytest.mark.parametrize("name", STEPS)
def test_vmap_refuses_a_state_that_all_slices_would_write(name: str) -> None:
    call = CALLS[name]
    given = call.tensors(torch.float32)
    mapped = next(key for key in call.shapes if key not in call.writes)
    with torch.no_grad(), pytest.raises(UnsupportedError, match="is written and is one for all slices"):
        torch.func.vmap(lambda x: call.run({**given, mapped: x}, "torch"))(torch.stack([given[mapped]] * 2))


@pytest.mark.parametrize("transform", ["jvp", "grad"])
def test_a_compiled_transform_is_no_silent_zero(transform: str) -> None:
    run, x, direction = of_backend("flash_attention", "q", "torch")
    loss = lambda x: run(x)[0].sum()  # noqa: E731

    def differentiated(x: Tensor, direction: Tensor) -> Tensor:
        return torch.func.jvp(loss, (x,), (direction,))[1] if transform == "jvp" else torch.func.grad(loss)(x)

    torch._dynamo.reset()
    with pytest.raises(UnsupportedError, match="flash_attention: the call asks for a"):
        torch.compile(differentiated, backend="aot_eager")(x, direction)


def test_a_compiled_function_notices_a_dual_tensor() -> None:
    q, tangent = torch.randn(2, 1, 2, 8, 16)
    compiled = torch.compile(lambda x: flash_attention(x, x, x), backend="aot_eager", fullgraph=True)
    compiled(q)
    with pytest.raises(Exception, match="forward-mode"), forward_ad.dual_level():
        compiled(forward_ad.make_dual(q, tangent))


def test_the_gradient_of_a_dual_gradient_is_refused() -> None:
    q = torch.randn(1, 2, 8, 16, requires_grad=True)
    out = flash_attention(q, q.detach(), q.detach())
    with forward_ad.dual_level():
        dout = forward_ad.make_dual(torch.ones_like(out), torch.ones_like(out))
        with pytest.raises(UnsupportedError, match="flash_attention: its gradients are asked for a forward-mode"):
            torch.autograd.grad(out, q, dout)


def test_a_clipped_recurrence_under_transforms() -> None:
    gates, recurrent = torch.randn(1, 3, 4, 1, 4).double(), torch.randn(4, 1, 4, 4).double()

    def loss(x: Tensor) -> Tensor:
        return flash_rnn(x, recurrent, None, cell="lstm", recurrent_clip=1e-3, backend="reference").sum()

    direction = torch.randn_like(gates)
    (expected,) = slope(lambda x: (loss(x),), gates, direction)
    # The clip shapes gradients that go backward; the function itself is not clipped.
    assert torch.func.jvp(loss, (gates,), (direction,))[1].item() == pytest.approx(expected.item(), rel=1e-6)
    leaf = gates.clone().requires_grad_()
    (clipped,) = torch.autograd.grad(loss(leaf), leaf)
    assert torch.equal(torch.func.grad(loss)(gates), clipped)
    assert torch.equal(torch.func.vmap(torch.func.grad(loss))(gates[None])[0], clipped)


def test_a_step_of_a_convolution_is_differentiable_forward() -> None:
    u, k, state = torch.randn(1, 2).double(), torch.randn(2, 3).double(), torch.randn(1, 2, 2).double()

    def run(k: Tensor) -> tuple[Tensor]:
        return (fft_conv_step(u, k, state.clone()),)

    direction = torch.randn_like(k)
    (tangent,) = torch.func.jvp(run, (k,), (direction,))[1]
    torch.testing.assert_close(tangent, slope(run, k, direction)[0], rtol=1e-6, atol=1e-8)

"""short_conv and its step at their borders: layouts, results that are changed, states that are written, nothing at all.

Expected values come from torch's own convolution in float64, or from sums written here.
"""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from iokernels import fft_conv, fft_conv_step, lazy_state, short_conv, short_conv_step
from iokernels.testing import budget

from ..conv_layouts import LAYOUTS, gradients, laid, leaf, truth

BACKENDS = ("reference", "torch", "triton")
LIMITS = {torch.float32: 2e-6, torch.bfloat16: 4e-3}


def usual(x: Tensor, weight: Tensor, *, bias: Any = None, activation: Any = None, initial_state: Any = None) -> Any:
    """What torch has for it: (out, the last inputs)."""
    before = x.new_zeros(*x.shape[:2], weight.shape[1] - 1) if initial_state is None else initial_state
    row = torch.cat([before, x], 2)
    out = F.conv1d(row, weight[:, None], bias, groups=x.shape[1])
    return F.silu(out) if activation else out, row[:, :, x.shape[2] :]


def packed_usual(x: Tensor, weight: Tensor, *, cu_seqlens: Tensor, initial_state: Tensor, **options: Any) -> Any:
    parts = x.tensor_split(cu_seqlens.tolist()[1:-1])
    found = [usual(part.t()[None], weight, initial_state=s[None], **options)
             for part, s in zip(parts, initial_state, strict=True)]  # fmt: skip
    return torch.cat([out[0].t() for out, _ in found]), torch.cat([state for _, state in found])


def check(found: list[Tensor], expected: list[Tensor], limit: float, names: Any) -> None:
    for name, x, y in zip(names, found, expected, strict=True):
        error = budget.relative_rms(x.resolve_neg(), y, tuple(range(y.dim()))).item()
        assert error <= limit, f"{name}: {error:.3g} of {limit:.3g}"


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("width", [4, 11])
@pytest.mark.parametrize("backend", BACKENDS)
def test_layouts_change_nothing_on_any_path(backend: str, width: int, layout: str, device: str) -> None:
    """Dense and packed, with a state and without, few taps and many."""
    for packed, state in ((False, False), (False, True), (True, True)):
        shapes = {"x": (17, 3) if packed else (2, 3, 17), "weight": (3, width), "bias": (3,)}
        if state:
            shapes["initial_state"] = (2, 3, width - 1)
        given = {name: leaf(laid(torch.randn(shape, device=device), layout)) for name, shape in shapes.items()}
        options: dict[str, Any] = {"activation": "silu"}
        if packed:
            options["cu_seqlens"] = laid(torch.tensor([0, 6, 17], dtype=torch.int32, device=device), "strided")
        function = packed_usual if packed else usual
        right = {name: truth(x) for name, x in given.items()}
        upstream = tuple(torch.randn_like(y) for y in function(**{n: x.detach() for n, x in right.items()}, **options))
        expected = gradients(function, right, upstream, **options)
        found = gradients(
            short_conv, given, tuple(laid(g.float(), layout) for g in upstream), return_state=True, backend=backend,
            **options,
        ) if layout not in ("one batch", "one step") else gradients(
            short_conv, given, tuple(g.float() for g in upstream), return_state=True, backend=backend, **options
        )  # fmt: skip
        check(found, expected, 4e-6, ("out", "final state", *given))


@pytest.mark.parametrize("layout", ["contiguous", "inside", "packed"])
@pytest.mark.parametrize("width", [1, 3, 7, 12])
@pytest.mark.parametrize("backend", BACKENDS)
def test_results_may_be_changed_in_place(backend: str, width: int, layout: str, device: str) -> None:
    """Whatever the memory order: it is the custom for a residual, ``y += x``."""
    for state in (False, True):
        shape = (9, 3) if layout == "packed" else (2, 3, 9)
        x = laid(torch.randn(shape, device=device), layout).requires_grad_()
        weight = torch.randn(3, width, device=device, requires_grad=True)
        options: dict[str, Any] = {"activation": "silu", "backend": backend, "return_state": state}
        if layout == "packed":
            options["cu_seqlens"] = torch.tensor([0, 4, 9], dtype=torch.int32, device=device)
        found = short_conv(x, weight, **options)
        out, *rest = found if state else (found,)
        upstream = torch.randn_like(out)
        expected = torch.autograd.grad((out * upstream).sum() * 2, [x, weight], retain_graph=True)
        out += out.detach()
        out.mul_(2.0)
        for final in rest:
            final += 1.0
        for actual, right in zip(torch.autograd.grad((out * upstream).sum(), [x, weight]), expected, strict=True):
            torch.testing.assert_close(actual, right)


@pytest.mark.parametrize("width", [2, 4, 8, 12])
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_gradient_of_a_final_state_of_a_short_sequence(backend: str, width: int, device: str) -> None:
    """Fewer inputs than the state holds: it begins with zeros, or with what is left of the initial one."""
    for n in (1, 2, width - 1, width):
        for start in (False, True):
            given = {"x": torch.randn(2, 3, n, device=device), "weight": torch.randn(3, width, device=device)}
            if start:
                given["initial_state"] = torch.randn(2, 3, width - 1, device=device)
            upstream = (torch.randn(2, 3, n, device=device), torch.randn(2, 3, width - 1, device=device))
            right = {name: truth(x) for name, x in given.items()}
            expected = gradients(usual, right, tuple(g.double() for g in upstream))
            leaves = {name: leaf(x) for name, x in given.items()}
            found = gradients(short_conv, leaves, upstream, return_state=True, backend=backend)
            check(found, expected, 2e-6, ("out", "final state", *given))


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_comes_of_nothing(backend: str, device: str) -> None:
    """No sequences, no channels, no rows; dense, packed and in a step."""
    for b, h, n, width in ((0, 2, 5, 3), (2, 0, 5, 3), (2, 2, 0, 3), (2, 2, 0, 1), (0, 0, 0, 1), (2, 0, 5, 12)):
        for padding in ("causal", "same"):
            shapes = {"x": (b, h, n), "weight": (h, width), "bias": (h,)}
            given: Any = {name: torch.randn(s, device=device, requires_grad=True) for name, s in shapes.items()}
            out = short_conv(**given, padding=padding, activation="silu", backend=backend)
            assert out.shape == (b, h, n)
            assert not any(g.any() for g in torch.autograd.grad(out.sum(), list(given.values())))
        state = torch.randn(b, h, width - 1, device=device)
        assert short_conv_step(given["x"][:, :, :1].sum(2), given["weight"], state, backend=backend).shape == (b, h)
    for total, h, width, ends in (
        (0, 2, 3, [0]),
        (0, 2, 3, [0, 0]),
        (5, 0, 3, [0, 2, 5]),
        (5, 2, 3, [0]),
        (0, 0, 1, [0]),
    ):
        x, weight = (torch.randn(s, device=device, requires_grad=True) for s in ((total, h), (h, width)))
        offsets = torch.tensor(ends, dtype=torch.int32, device=device)
        out, state = short_conv(x, weight, cu_seqlens=offsets, return_state=True, backend=backend)
        assert (out.shape, state.shape) == ((total, h), (len(ends) - 1, h, width - 1))
        assert not any(g.any() for g in torch.autograd.grad(out.sum(), [x, weight]))


@pytest.mark.parametrize("backend", [*BACKENDS, None])
def test_shapes_on_meta(backend: str | None) -> None:
    x, weight = (torch.randn(s, device="meta", requires_grad=True) for s in ((2, 3, 9), (3, 4)))
    out, state = short_conv(x, weight, return_state=True, backend=backend)
    assert [g.shape for g in torch.autograd.grad(out.sum() + state.sum(), [x, weight])] == [x.shape, weight.shape]
    ends = torch.zeros(3, dtype=torch.int32, device="meta")
    assert short_conv(x[0].t(), weight, cu_seqlens=ends, backend=backend).shape == (9, 3)
    slots = torch.zeros(2, dtype=torch.int32, device="meta")
    assert short_conv_step(x[:, :, 0], weight, state, state_indices=slots, backend=backend).is_meta


OVERLAPPING = {
    "expanded": lambda: torch.zeros(1, 3, 3).expand(2, 3, 3),
    "windows": lambda: torch.zeros(30).as_strided((2, 3, 3), (1, 10, 1)),
    "channels": lambda: torch.zeros(2, 1, 3).expand(2, 3, 3),
}


@pytest.mark.parametrize("how", OVERLAPPING)
def test_a_step_refuses_a_state_whose_elements_share_memory(how: str) -> None:
    """Also after a call of the same shape that was right."""
    x, weight = torch.randn(2, 3), torch.randn(3, 4)
    for backend in BACKENDS:
        short_conv_step(x, weight, torch.zeros(2, 3, 3), backend=backend)
        with pytest.raises(ValueError, match=r"^short_conv_step: state has shape .* share memory.*state\.clone\(\)"):
            short_conv_step(x, weight, OVERLAPPING[how](), backend=backend)
    with pytest.raises(ValueError, match=r"^fft_conv_step: state has shape .* share memory"):
        fft_conv_step(x, weight, OVERLAPPING[how]())


STATES = {
    "transposed": lambda: torch.zeros(2, 3, 3).transpose(1, 2),
    "part of a cache": lambda: torch.zeros(5, 7, 9)[1:3, 2:5, ::4],
    "interleaved": lambda: torch.zeros(40).as_strided((2, 3, 3), (1, 12, 2)),
    "negated": lambda: torch.ops.aten._neg_view(torch.zeros(2, 3, 3)),
}


@pytest.mark.parametrize("how", STATES)
def test_a_step_writes_a_state_wherever_it_lies(how: str, device: str) -> None:
    x, weight, past = torch.randn(2, 3, device=device), torch.randn(3, 4, device=device), torch.randn(2, 3, 3)
    right, moved = usual(x[:, :, None].double(), weight.double(), activation="silu", initial_state=past.double())
    for backend in BACKENDS:
        state = STATES[how]().to(device)
        state.copy_(past)
        out = short_conv_step(x, weight, state, activation="silu", backend=backend)
        check([out, state], [right[:, :, 0], moved], 2e-6, ("out", "state"))
    state = STATES[how]().to(device)
    state.copy_(past)
    linear = usual(x[:, :, None].double(), weight.double(), initial_state=past.double())[0]
    check([fft_conv_step(x, weight.flip(1), state)], [linear[:, :, 0]], 2e-6, ["y"])
    torch.testing.assert_close(state, moved.float())


@pytest.mark.parametrize("backend", BACKENDS)
def test_steps_leave_the_backward_of_a_prompt_alone(backend: str, device: str) -> None:
    for width in (4, 12):
        x, weight = torch.randn(2, 3, 20, device=device), torch.randn(3, width, device=device)
        for function, step in ((short_conv, short_conv_step), (fft_conv, fft_conv_step)):
            options: dict[str, Any] = {"backend": backend} if step is short_conv_step else {}
            leaves = [leaf(x), leaf(weight)]
            expected = torch.autograd.grad(function(*leaves, backend=backend).square().sum(), leaves)
            out, state = function(*leaves, return_state=True, backend=backend)
            assert state.untyped_storage().nbytes() == state.numel() * state.element_size(), "of its own memory alone"
            for _ in range(3):
                step(x[:, :, 0], weight, state, **options)
            found = torch.autograd.grad(out.square().sum(), leaves)
            assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_graph_that_has_saved_a_state_notices_that_a_step_wrote_it(backend: str, device: str) -> None:
    """A wrong gradient in silence would be the alternative."""
    weight = torch.randn(3, 4, device=device, requires_grad=True)
    state = torch.randn(2, 3, 3, device=device)
    out = short_conv(torch.randn(2, 3, 9, device=device), weight, initial_state=state, backend="torch")
    short_conv_step(torch.randn(2, 3, device=device), weight, state, backend=backend)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_step_under_autocast_takes_a_state_of_either_dtype(backend: str, device: str) -> None:
    x, weight, past = (
        torch.randn(2, 3, device=device),
        torch.randn(3, 4, device=device),
        torch.randn(2, 3, 3).bfloat16(),
    )
    rounded = [y.bfloat16().double() for y in (x, weight)]
    right, moved = usual(rounded[0][:, :, None], rounded[1], initial_state=past.double())
    for dtype in (torch.float32, torch.bfloat16):
        state = past.to(device, dtype)
        with torch.autocast(device, torch.bfloat16):
            out = short_conv_step(x, weight, state, backend=backend)
        assert out.dtype == torch.bfloat16
        check([out, state], [right[:, :, 0], moved], 4e-3, ("out", "state"))
    with pytest.raises(TypeError, match=r"^short_conv_step: state is bfloat16; it must be float32, as x is"):
        short_conv_step(x, weight, past.to(device), backend=backend)


def test_lazy_states_keep_float32_sums_under_autocast() -> None:
    k, u = torch.randn(3, 80), torch.randn(2, 3, 80).bfloat16()
    whole = fft_conv(u.double(), k.double(), backend="reference")
    with torch.autocast("cpu", torch.bfloat16):
        _, window = fft_conv(u[:, :, :10], k, return_state=True)
        lazy = lazy_state(k, 2, 70, dtype=torch.bfloat16, initial_state=window)
        for state in (lazy, window):
            made = torch.stack([fft_conv_step(u[:, :, t].float(), k, state) for t in range(10, 80)], 2)
            assert made.dtype == torch.bfloat16
            assert budget.relative_rms(made, whole[:, :, 10:]).max() < 3e-3


def test_a_lazy_state_is_saved_and_loaded_by_default() -> None:
    k, u = torch.randn(3, 80), torch.randn(2, 3, 80)
    state = lazy_state(k, 2, 80)
    for t in range(70):
        fft_conv_step(u[:, :, t], k, state)
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    loaded = torch.load(file)
    assert torch.equal(fft_conv_step(u[:, :, 70], k, loaded), fft_conv_step(u[:, :, 70], k, state))
    assert loaded.position == 71
    torch.testing.assert_close(fft_conv_step(u[:, :, 71], k, loaded), fft_conv(u, k)[:, :, 71])


def test_a_lazy_state_of_no_sequences() -> None:
    state = lazy_state(torch.randn(3, 40), 0, 80, initial_state=torch.zeros(0, 3, 39))
    for _ in range(80):
        assert fft_conv_step(torch.zeros(0, 3), torch.randn(3, 40), state).shape == (0, 3)

"""The modules around convolutions where PyTorch's own work: export, meta, states, 16 bits, autocast, nothing at all."""

from __future__ import annotations

import copy
import io
import operator
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from iokernels.nn import FFTConv, HyenaOperator, ImplicitFilter, LongConv, ShortConv1d
from iokernels.testing import budget

MODULES: dict[str, Any] = {
    "short": lambda **given: ShortConv1d(6, 4, activation="silu", **given),
    "wide short": lambda **given: ShortConv1d(6, 12, **given),
    "fft": lambda **given: FFTConv(6, 12, squash=0.01, smooth=1, **given),
    "two-sided fft": lambda **given: FFTConv(6, 12, causal=False, **given),
    "long": lambda **given: LongConv(6, 12, **given),
    "hyena": lambda **given: HyenaOperator(6, 12, order=3, **given),
}
CAUSAL = [name for name in MODULES if name != "two-sided fft"]


def steps_last(name: str) -> bool:
    return "long" not in name and name != "hyena"


def given(name: str, **options: Any) -> Tensor:
    return torch.randn((2, 6, 12) if steps_last(name) else (2, 12, 6), **options)


def step_through(name: str, module: Any, x: Tensor, state: Any) -> Tensor:
    axis = 2 if steps_last(name) else 1
    return torch.stack([module.step(row, state) for row in x.unbind(axis)], axis)


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("name", MODULES)
def test_an_exported_module_runs_and_trains(name: str, strict: bool) -> None:
    module, x = MODULES[name](), given(name, requires_grad=True)
    exported = torch.export.export(module, (x.detach(),), strict=strict).module()
    y, expected = exported(x), module(x)
    torch.testing.assert_close(y, expected)
    weights = torch.randn_like(y)
    found, right = (
        torch.autograd.grad((out * weights).sum(), [x, *net.parameters()])
        for out, net in ((y, exported), (expected, module))
    )
    for a, b in zip(found, right, strict=True):
        torch.testing.assert_close(a, b)
    with torch.no_grad():
        torch.testing.assert_close(exported(x), expected)


@pytest.mark.parametrize("name", ["short", "fft"])
def test_an_exported_module_is_compiled_again(name: str) -> None:
    module, x = MODULES[name](), given(name, requires_grad=True)
    exported = torch.export.export(module, (x.detach(),)).module()
    compiled = torch.compile(exported, backend="aot_eager")
    (found,), (right,) = (torch.autograd.grad(net(x).square().sum(), x) for net in (compiled, module))
    torch.testing.assert_close(found, right)


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("name", MODULES)
def test_a_module_made_on_meta_is_the_one_whose_weights_it_loads(name: str, assign: bool) -> None:
    module, x = MODULES[name](), given(name)
    with torch.device("meta"):
        other = MODULES[name]()
    if not assign:
        other = other.to_empty(device="cpu")
        for tensor in (*other.parameters(), *other.buffers()):
            tensor.data.fill_(float("nan"))
    other.load_state_dict(module.state_dict(), assign=assign)
    assert torch.equal(other(x), module(x))


@pytest.mark.parametrize("name", MODULES)
def test_parameters_are_all_that_a_module_made_on_meta_lacks(name: str) -> None:
    """``reset_parameters`` of what has it fills a module as its constructor does."""
    with torch.device("meta"):
        module = MODULES[name]()
    module = module.to_empty(device="cpu")
    for tensor in (*module.parameters(), *module.buffers()):
        tensor.data.fill_(float("nan"))
    for part in module.modules():
        reset = getattr(part, "reset_parameters", None)
        if reset is not None:
            reset()
    assert all(p.isfinite().all() for p in module.parameters())
    assert module(given(name)).isfinite().all()


def test_resets_draw_what_constructors_draw() -> None:
    for make in (lambda: ShortConv1d(6, 4), lambda: FFTConv(6, 9), lambda: ImplicitFilter(6, 9)):
        torch.manual_seed(5)
        first = make()
        torch.manual_seed(5)
        other = make()
        torch.manual_seed(5)
        other.reset_parameters()
        for a, b in zip(first.parameters(), other.parameters(), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("name", MODULES)
def test_shapes_on_meta(name: str) -> None:
    module, x = MODULES[name](device="meta"), given(name, device="meta", requires_grad=True)
    y = module(x)
    y.sum().backward()
    assert y.is_meta
    assert x.grad is not None
    assert x.grad.shape == y.shape == x.shape
    if name in CAUSAL:
        assert step_through(name, module, x, module.init_state(2)).shape == x.shape


@pytest.mark.parametrize("name", MODULES)
def test_nothing_comes_of_nothing(name: str) -> None:
    module = MODULES[name]()
    empty = [(0, 6, 12), (2, 6, 0)] if steps_last(name) else [(0, 12, 6), (2, 0, 6)]
    for shape in empty:
        x = torch.randn(shape, requires_grad=True)
        y = module(x)
        assert y.shape == shape
        grads = torch.autograd.grad(y.sum(), [x, *module.parameters()], allow_unused=True)
        assert not any(g is not None and g.any() for g in grads)
    if name in CAUSAL:
        assert module.step(torch.randn(0, 6), module.init_state(0)).shape == (0, 6)


@pytest.mark.parametrize("name", CAUSAL)
def test_steps_under_autocast_and_in_16_bits_are_the_whole(name: str) -> None:
    module, x = MODULES[name](), given(name)
    expected = module(x)
    with torch.autocast("cpu", torch.bfloat16):
        whole, steps = module(x), step_through(name, module, x, module.init_state(2))
    assert steps.dtype == whole.dtype == torch.bfloat16
    assert budget.relative_rms(steps, whole, (0, 1, 2)) < 1e-2
    assert budget.relative_rms(steps, expected, (0, 1, 2)) < 2e-2
    half, given_half = copy.deepcopy(module).bfloat16(), x.bfloat16()
    steps = step_through(name, half, given_half, half.init_state(2))
    assert steps.dtype == torch.bfloat16
    assert budget.relative_rms(steps, half(given_half), (0, 1, 2)) < 1e-2


@pytest.mark.parametrize("name", CAUSAL)
def test_a_state_is_saved_and_loaded_by_default(name: str) -> None:
    module, x = MODULES[name](), given(name)
    state, file = module.init_state(2), io.BytesIO()
    first = step_through(name, module, x.narrow(2 if steps_last(name) else 1, 0, 5), state)
    torch.save(state, file)
    file.seek(0)
    second = step_through(name, module, x.narrow(2 if steps_last(name) else 1, 5, 7), torch.load(file))
    torch.testing.assert_close(torch.cat([first, second], 2 if steps_last(name) else 1), module(x))


@pytest.mark.parametrize("name", CAUSAL)
def test_a_state_of_another_batch_dtype_or_module_is_refused_by_name(name: str) -> None:
    module = MODULES[name]()
    with pytest.raises(ValueError, match="state has shape"):
        module.step(torch.randn(2, 6), module.init_state(3))
    with pytest.raises(TypeError, match="state is"):
        module.step(torch.randn(2, 6), 3)
    if steps_last(name):
        with pytest.raises(TypeError, match=r"state is (torch\.)?float32; it must be (torch\.)?float64"):
            module.step(torch.randn(2, 6).double(), module.init_state(2))
    if name == "hyena":
        with pytest.raises(TypeError, match="it must be what init_state of this module made"):
            module.step(torch.randn(2, 6), HyenaOperator(6, 12).init_state(2))


def test_filters_are_written_in_float32_whatever_they_are_stored_in() -> None:
    module = ImplicitFilter(40, 300)
    rounded = copy.deepcopy(module).bfloat16()
    exact = copy.deepcopy(rounded).double()
    assert rounded(300).dtype == torch.float32
    assert budget.relative_rms(rounded(300), exact(300)).max() < 1e-5
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(module(300), copy.deepcopy(module)(300))
        assert budget.relative_rms(module(300), copy.deepcopy(module).double()(300)).max() < 1e-5
    back = copy.deepcopy(module).bfloat16().float()
    assert torch.equal(back.features, module.features)
    assert torch.equal(back.window, module.window)
    assert budget.relative_rms(back(300), exact(300)).max() < 1e-5
    assert not list(module.buffers())


def test_windows_have_unit_energy_at_any_rate() -> None:
    for slow, fast in ((0.0, 0.0), (-2.0, 15.0), (3.0, 200.0)):
        module = ImplicitFilter(5, 50, slow=slow, fast=fast)
        torch.testing.assert_close(module.window.square().sum(1), torch.ones(5), rtol=1e-5, atol=0.0)
        rates = torch.linspace(slow, fast, 5)
        torch.testing.assert_close(module.window[:, 0] / module.window[:, -1], rates.exp(), rtol=1e-4, atol=0.0)
    assert torch.equal(ImplicitFilter(3, 1).window, torch.ones(3, 1))


@pytest.mark.parametrize("name", MODULES)
def test_results_may_be_changed_in_place(name: str) -> None:
    module, x = MODULES[name](), given(name, requires_grad=True)
    y = module(x)
    y += x
    y.mul_(2.0)
    (found,) = torch.autograd.grad(y.sum(), x)
    (right,) = torch.autograd.grad(module(x).sum(), x)
    torch.testing.assert_close(found, 2.0 * (right + 1.0))


def test_a_call_typed_as_for_conv1d_is_an_error() -> None:
    with pytest.raises(TypeError, match=r"bias is int; .* channels is given once: ShortConv1d\(channels, kernel_size"):
        ShortConv1d(16, 16, 4)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("value", ["4", 2.5, True, -1, 2**63, 10**400, torch.tensor(4)], ids=lambda v: str(v)[:9])
@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("channels", lambda v: ShortConv1d(v, 4)),
        ("kernel_size", lambda v: ShortConv1d(4, v)),
        ("batch", lambda v: ShortConv1d(4, 4).init_state(v)),
        ("channels", lambda v: FFTConv(v, 4)),
        ("length", lambda v: FFTConv(3, v)),
        ("smooth", lambda v: FFTConv(3, 4, smooth=v)),
        ("batch", lambda v: FFTConv(3, 4).init_state(v)),
        ("length", lambda v: FFTConv(3, 4).init_state(1, v)),
        ("width", lambda v: LongConv(v, 4)),
        ("length", lambda v: LongConv(4, v)),
        ("width", lambda v: HyenaOperator(v, 4)),
        ("length", lambda v: HyenaOperator(4, v)),
        ("order", lambda v: HyenaOperator(4, 4, order=v)),
        ("kernel_size", lambda v: HyenaOperator(4, 4, short_width=v)),
        ("length", lambda v: HyenaOperator(4, 4).init_state(1, v)),
        ("bands", lambda v: ImplicitFilter(4, 4, bands=v)),
    ],
)
def test_sizes_that_are_none_are_refused_by_name(name: str, make: Any, value: Any) -> None:
    with pytest.raises((TypeError, ValueError), match=rf"^\w+: .*\b{name} "):
        make(value)


def test_numpy_sizes_are_sizes() -> None:
    numpy = pytest.importorskip("numpy")
    module = ShortConv1d(numpy.int64(6), numpy.int32(4))
    assert isinstance(module.channels, int)
    assert module(torch.randn(2, 6, 5)).shape == (2, 6, 5)
    assert HyenaOperator(numpy.int64(4), numpy.int64(8)).init_state(numpy.int16(2), numpy.int8(3)).long[0].length == 3


def test_layers_of_a_filter_are_linear_layers() -> None:
    """So that whatever wraps or replaces linear layers finds them, and state_dicts keep their names."""
    module = HyenaOperator(6, 12)
    linear = [name for name, part in module.named_modules() if isinstance(part, nn.Linear)]
    assert linear == ["in_proj", "filter.layers.0", "filter.layers.1", "filter.head", "out_proj"]
    assert operator.contains(module.state_dict(), "filter.layers.0.weight")

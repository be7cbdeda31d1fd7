"""``iokernels.nn``'s convolutions: against torch's modules, against formulas by hand, and step by step."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from iokernels.nn import FFTConv, HyenaOperator, ImplicitFilter, LongConv, ShortConv1d

EXACT: dict[str, Any] = {"rtol": 1e-9, "atol": 1e-11}


@pytest.fixture(autouse=True)
def _double() -> Any:
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)


def direct(u: Tensor, k: Tensor) -> Tensor:
    """The causal convolution of every channel as a sum over a matrix of lags."""
    n = u.shape[2]
    lag = torch.arange(n)[:, None] - torch.arange(n)
    taps = F.pad(k[:, :n], (0, max(n - k.shape[1], 0)))
    matrix = torch.where(lag >= 0, taps[:, lag.clamp(min=0)], 0.0)
    return torch.einsum("hnm,bhm->bhn", matrix, u)


def assert_same(actual: Tensor, expected: Tensor, leaves: list[Tensor]) -> None:
    """Values and gradients."""
    weights = torch.randn_like(expected)
    torch.testing.assert_close(actual, expected, **EXACT)
    found, right = (torch.autograd.grad((y * weights).sum(), leaves, retain_graph=True) for y in (actual, expected))
    for a, b in zip(found, right, strict=True):
        assert b.abs().max() > 1e-6
        torch.testing.assert_close(a, b, **EXACT)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("width", "padding", "torchs"), [(4, "causal", 3), (3, "same", "same"), (5, 2, 2), (1, 0, 0)])
def test_short_conv_is_the_depthwise_conv1d(bias: bool, width: int, padding: Any, torchs: Any) -> None:
    torch.manual_seed(3)
    theirs = nn.Conv1d(6, 6, width, groups=6, bias=bias, padding=torchs)
    torch.manual_seed(3)
    ours = ShortConv1d(6, width, bias, padding=padding)
    assert {n: p.shape for n, p in ours.state_dict().items()} == {n: p.shape for n, p in theirs.state_dict().items()}
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
    ours.load_state_dict(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 6, 17, requires_grad=True)
    expected = theirs(x)[..., :17] if padding == "causal" else theirs(x)
    actual = ours(x)
    weights = torch.randn_like(expected)
    torch.testing.assert_close(actual, expected, **EXACT)
    for a, b in zip(
        torch.autograd.grad((actual * weights).sum(), [x, *ours.parameters()]),
        torch.autograd.grad((expected * weights).sum(), [x, *theirs.parameters()]),
        strict=True,
    ):
        torch.testing.assert_close(a, b, **EXACT)


def test_short_conv_streams() -> None:
    module = ShortConv1d(5, 4, activation="silu")
    x = torch.randn(2, 5, 12)
    whole = module(x)
    out, state = module(x[:, :, :7], initial_state=module.init_state(2), return_state=True)
    rest = [module.step(x[:, :, i], state) for i in range(7, 12)]
    torch.testing.assert_close(torch.cat([out, torch.stack(rest, 2)], 2), whole, **EXACT)
    packed = module(x.transpose(1, 2).flatten(0, 1), cu_seqlens=torch.tensor([0, 12, 24], dtype=torch.int32))
    torch.testing.assert_close(packed.unflatten(0, (2, 12)).transpose(1, 2), whole, **EXACT)
    with pytest.raises(ValueError, match="a step needs causal padding"):
        ShortConv1d(5, 4, padding="same").step(x[:, :, 0], state)


@pytest.mark.parametrize("n", [1, 20, 32])
def test_fft_conv_is_the_sum_over_lags(n: int) -> None:
    module = FFTConv(4, 32)
    u, pre, post = (torch.randn(2, 4, n, requires_grad=True) for _ in range(3))
    assert module.k is not None
    assert module.skip is not None
    expected = post * (direct(u * pre, module.k) + module.skip[:, None] * (u * pre))
    assert_same(module(u, pre_gate=pre, post_gate=post), expected, [u, pre, post, module.k, module.skip])
    given = torch.randn(4, 9, requires_grad=True)
    bare = FFTConv(4, skip=False)
    assert list(bare.parameters()) == []
    assert_same(bare(u, given), direct(u, given), [u, given])


def test_two_sided_filter_of_a_shorter_sequence() -> None:
    module = FFTConv(3, 10, causal=False, skip=False)
    assert module.k is not None
    u = torch.randn(2, 3, 7, requires_grad=True)
    lag = torch.arange(7)[:, None] - torch.arange(7)
    expected = torch.einsum("hnm,bhm->bhn", module.k[:, lag + 9], u)
    assert_same(module(u), expected, [u, module.k])


def test_squash_and_smooth() -> None:
    module = FFTConv(1, 5, squash=0.25, smooth=1)
    k = torch.tensor([[0.0, 3.0, -3.0, 0.3, 0.6]])
    # Means of three neighbours with zeros beyond the ends: 1, 0, 0.1, -0.7, 0.3; then a quarter closer to zero.
    torch.testing.assert_close(module.taps(k), torch.tensor([[0.75, 0.0, 0.0, -0.45, 0.05]]), **EXACT)
    (dk,) = torch.autograd.grad(module.taps(k.requires_grad_()).sum(), k)
    torch.testing.assert_close(dk * 3, torch.tensor([[1.0, 1.0, 1.0, 2.0, 2.0]]), **EXACT)


def test_filters_start_with_unit_energy() -> None:
    module = FFTConv(400, 64)
    assert module.k is not None
    assert module.k.square().sum(1).mean().item() == pytest.approx(1.0, abs=0.15)
    written = ImplicitFilter(400, 64)(64)
    assert written.square().sum(1).mean().item() == pytest.approx(1.0, abs=0.5)
    late = module.k[:, 32:].square().sum(1)
    assert late[:40].max() < 1e-6 < late[-40:].min()  # from quick filters to slow ones


@pytest.mark.parametrize("order", [2, 3])
def test_hyena_by_hand(order: int) -> None:
    module = HyenaOperator(6, 40, order=order)
    nn.init.normal_(module.skip)
    x = torch.randn(2, 21, 6, requires_grad=True)
    mixed = (x @ module.in_proj.weight.t() + module.in_proj.bias).transpose(1, 2)
    short = module.short_conv
    mixed = F.conv1d(mixed, short.weight, short.bias, padding=2, groups=6 * (order + 1))[..., :21]
    z, first, *gates = mixed.chunk(order + 1, dim=1)
    z = first * z
    for gate, k, skip in zip(gates, module.filter(21).chunk(order - 1), module.skip, strict=True):
        z = gate * (direct(z, k) + skip[:, None] * z)
    expected = z.transpose(1, 2) @ module.out_proj.weight.t() + module.out_proj.bias
    assert_same(module(x), expected, [x, *module.parameters()])


def test_implicit_filter_is_a_function_of_position() -> None:
    module = ImplicitFilter(5, 30, bands=3, hidden=16)
    torch.testing.assert_close(module(30)[:, :12], module(12), **EXACT)
    assert module.features.shape == (30, 7)
    energy = module.window.square().sum(1)
    torch.testing.assert_close(energy, torch.ones(5), **EXACT)
    assert (module.window[:, 1:] < module.window[:, :-1]).all()
    with pytest.raises(ValueError, match="n is 31; the filter was made for 30"):
        module(31)


CAUSAL = {
    "long conv": lambda: LongConv(6, 24, squash=0.01, smooth=1),
    "hyena": lambda: HyenaOperator(6, 24),
    "hyena of order 3": lambda: HyenaOperator(6, 24, order=3, short_width=5),
}


@pytest.mark.parametrize("name", CAUSAL)
def test_steps_equal_the_whole_and_see_no_later_row(name: str) -> None:
    module = CAUSAL[name]()
    x = torch.randn(3, 24, 6)
    whole = module(x)
    for length in (None, 15):
        state = module.init_state(3, length)
        steps = [module.step(x[:, i], state) for i in range(length or 24)]
        torch.testing.assert_close(torch.stack(steps, 1), whole[:, : length or 24], **EXACT)
        with pytest.raises(ValueError, match="state is full"):
            module.step(x[:, 0], state)
    changed = x.clone()
    changed[:, 9] += 1.0
    after = module(changed)
    torch.testing.assert_close(after[:, :9], whole[:, :9], **EXACT)
    assert (after[:, 9:] - whole[:, 9:]).abs().amax(-1).min() > 1e-9


@pytest.mark.parametrize("name", CAUSAL)
def test_modules_are_ordinary(name: str) -> None:
    """They copy, pickle, compile without a break, and run in half precision under autocast."""
    module = CAUSAL[name]().float()
    x = torch.randn(2, 20, 6, dtype=torch.float32, requires_grad=True)
    expected = module(x)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        torch.testing.assert_close(other(x), expected)
    fresh = CAUSAL[name]().float()
    fresh.load_state_dict(module.state_dict())
    torch.testing.assert_close(fresh(x), expected)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    (dx,), (right,) = (torch.autograd.grad(f(x).square().sum(), x) for f in (compiled, module))
    torch.testing.assert_close(dx, right)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = module(x)
    assert half.dtype == torch.bfloat16
    assert (half - expected).norm() < 0.03 * expected.norm()
    torch._dynamo.reset()


def test_dropout_is_for_training() -> None:
    module = HyenaOperator(6, 16, dropout=0.5)
    x = torch.randn(2, 16, 6)
    assert not torch.equal(module(x), module(x))
    module.eval()
    plain = HyenaOperator(6, 16)
    plain.load_state_dict(module.state_dict())
    torch.testing.assert_close(module(x), plain(x), **EXACT)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ShortConv1d(0, 3), "channels is 0 and kernel_size 3"),
        (lambda: FFTConv(3, 0), "length is 0"),
        (lambda: FFTConv(3, 4, squash=-1.0), "squash is -1.0"),
        (lambda: FFTConv(3, 4, smooth=-1), "smooth is -1"),
        (lambda: FFTConv(3)(torch.randn(1, 3, 4)), "pass a filter"),
        (lambda: FFTConv(3, 4)(torch.randn(1, 3, 5)), "u has 5 steps; the filter was made for 4"),
        (lambda: FFTConv(3, 4, causal=False).init_state(1), "only a causal filter"),
        (lambda: HyenaOperator(4, 8, order=1), "order is 1"),
        (lambda: HyenaOperator(4, 8, dropout=1.0), "dropout is 1.0"),
        (lambda: HyenaOperator(4, 8).init_state(1, 9), "length is 9; it must be from 1 to 8"),
        (lambda: ImplicitFilter(4, 8, bands=0), "bands is 0"),
    ],
)  # fmt: skip
def test_refusals(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()

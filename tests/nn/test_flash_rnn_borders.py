"""``nn.LSTM``, ``nn.GRU``, ``nn.RNN`` and ``nn.SLSTM`` wherever those of torch are used: parameters that something
replaces, exported programs, meta tensors, autocast, no step and no sequence, states and inputs of any kind."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from typing import Any

import pytest
import torch
import torch.nn.utils.parametrizations as parametrizations
from torch import Tensor
from torch.nn.utils import prune, weight_norm

from iokernels.nn.flash_rnn import GRU, LSTM, RNN, SLSTM

MODULES = {"LSTM": (LSTM, torch.nn.LSTM), "GRU": (GRU, torch.nn.GRU), "RNN": (RNN, torch.nn.RNN)}
HEADS = (1, 2)
every_network = pytest.mark.parametrize(("name", "heads"), [(name, heads) for name in MODULES for heads in HEADS])


def network(name: str, heads: int, **options: Any) -> Any:
    torch.manual_seed(0)
    if name == "SLSTM":
        return SLSTM(8, heads, **options)
    return MODULES[name][0](8, 8, num_heads=heads, **options)


def every(found: Any) -> list[Tensor]:
    """All tensors of a result, h first."""
    return [found] if isinstance(found, Tensor) else [x for part in found for x in every(part)]


def equal(actual: Any, expected: Any) -> None:
    for one, other in zip(every(actual), every(expected), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


X = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("weight", ["weight_ih_l0", "weight_hh_l0"])
@every_network
def test_weight_norm_of_both_kinds(name: str, heads: int, weight: str) -> None:
    expected = network(name, heads)(X)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        old: Any = weight_norm(network(name, heads), weight)
    new: Any = parametrizations.weight_norm(network(name, heads), weight)
    for net, scale in ((old, f"{weight}_g"), (new, f"parametrizations.{weight}.original0")):
        equal(net(X), expected)
        every(net(X))[0].sum().backward()
        assert net.get_parameter(scale).grad.abs().max() > 0
        net.flatten_parameters()
        assert every(net.double()(X.double()))[0].dtype == torch.float64
    equal(copy.deepcopy(new)(X.double()), new(X.double()))


@every_network
def test_pruning_reaches_the_weights(name: str, heads: int) -> None:
    net, dense = network(name, heads), network(name, heads)
    prune.l1_unstructured(net, "weight_ih_l0", 0.5)
    with torch.no_grad():
        dense.weight_ih_l0.mul_(net.weight_ih_l0_mask)
    equal(net(X), dense(X))
    every(net(X))[0].sum().backward()
    assert net.weight_ih_l0_orig.grad.count_nonzero() == net.weight_ih_l0_mask.count_nonzero()


@pytest.mark.parametrize("name", [*MODULES, "SLSTM"])
def test_functional_call_takes_plain_tensors(name: str) -> None:
    net = network(name, 2)
    twice = {key: (2 * value).detach().requires_grad_() for key, value in net.named_parameters()}
    expected = network(name, 2)
    with torch.no_grad():
        for parameter in expected.parameters():
            parameter.mul_(2)
    found = torch.func.functional_call(net, twice, (X,))
    equal(found, expected(X))
    grads = torch.autograd.grad(every(found)[0].sum(), list(twice.values()))
    assert all(grad.abs().max() > 0 for key, grad in zip(twice, grads, strict=True) if key != "norm_weight")


@pytest.mark.filterwarnings("ignore:.*Function'> should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize(("name", "heads"), [("LSTM", 1), ("LSTM", 2), ("GRU", 2), ("SLSTM", 2)])
def test_what_was_exported_can_be_trained(name: str, heads: int, strict: bool) -> None:
    """With parameters that want a gradient, and with frozen ones and an input that does."""
    for frozen in (False, True):
        net = network(name, heads).requires_grad_(not frozen)
        exported = torch.export.export(net, (X,), strict=strict).module()
        found = []
        for module in (exported, net):
            x = X.clone().requires_grad_()
            y = every(module(x))[0]
            named = [p for _, p in sorted(module.named_parameters()) if p.requires_grad]
            with warnings.catch_warnings():
                warnings.simplefilter("error")  # PyTorch warns of operators whose gradients it does not know
                found.append([y, *torch.autograd.grad(y.sin().sum(), [x, *named])])
        equal(*found)


@pytest.mark.parametrize("name", [*MODULES, "SLSTM"])
def test_built_on_meta(name: str) -> None:
    made: Any = network(name, 2)
    shapes = [y.shape for y in every(made(X))]
    for assign in (False, True):
        empty = network(name, 2, device="meta")
        assert [y.shape for y in every(empty(X.to("meta")))] == shapes
        if not assign:
            empty.to_empty(device="cpu")
        empty.load_state_dict(made.state_dict(), assign=assign)
        equal(empty(X), made(X))
    equal(pickle.loads(pickle.dumps(made))(X), made(X))
    equal(copy.deepcopy(made)(X), made(X))


@pytest.mark.parametrize("name", [*MODULES, "SLSTM"])
@pytest.mark.parametrize("heads", HEADS)
def test_autocast_gives_its_dtype(name: str, heads: int) -> None:
    net = network(name, heads)
    with torch.autocast("cpu", torch.bfloat16):
        out = net(X) if name == "SLSTM" else every(net(X, None))
        again = None if name == "SLSTM" else every(net(X, net(X)[1]))
    assert {y.dtype for y in every(out) + every(again or [])} == {torch.bfloat16}
    for one, other in zip(every(out), every(net(X)), strict=True):
        assert (one - other).norm() < 0.03 * other.norm()
    every(out)[0].float().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in net.parameters())


@every_network
def test_no_step_and_no_sequence(name: str, heads: int) -> None:
    net = network(name, heads, num_layers=2, bidirectional=True)
    states = torch.randn(4, 2, 8)
    hx = (states, -states) if name == "LSTM" else states
    out, after = net(torch.zeros(0, 2, 8), hx)
    assert out.shape == (0, 2, 16)
    equal(after, hx)
    x = torch.zeros(5, 0, 8, requires_grad=True)
    out, after = net(x)
    assert (out.shape, every(after)[0].shape) == ((5, 0, 16), (4, 0, 8))
    out.sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize("conv_size", [0, 1, 4])
def test_slstm_of_no_token_leaves_its_state(conv_size: int) -> None:
    net = SLSTM(8, 2, conv_size=conv_size)
    _, state = net(X[:, :2], return_state=True)
    out, same = net(X[:, :0], state, return_state=True)
    assert out.shape == (2, 0, 8)
    equal(same, state)
    assert net(X[:0]).shape == (0, 5, 8)
    # One token, fewer than the convolution sees.
    equal(net(X[:, 2:3], state), net(X[:, :3])[:, 2:])


@pytest.mark.parametrize("name", [*MODULES, "SLSTM"])
def test_states_own_their_memory(name: str) -> None:
    """What is done to a state does not reach the prompt, its backward pass, or the rest of the state."""
    net = network(name, 2)
    state = every(net(X, return_state=True)[1] if name == "SLSTM" else net(X)[1])
    assert all(y.untyped_storage().nbytes() == y.numel() * y.element_size() for y in state)
    x = X.clone().requires_grad_()
    out, after = net(x, return_state=True) if name == "SLSTM" else net(x)
    with torch.no_grad():
        if name == "SLSTM":
            net.step(X[:, :1], after)
        else:
            for y in every(after):
                y.zero_()
    out.sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("name", [*MODULES, "SLSTM"])
def test_states_survive_torch_load(name: str) -> None:
    net = network(name, 2)
    state = net(X, return_state=True)[1] if name == "SLSTM" else net(X)[1]
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    loaded = torch.load(file)
    assert type(loaded) is type(state)
    equal(loaded, state)


@every_network
def test_a_state_of_another_float_dtype(name: str, heads: int) -> None:
    net = network(name, heads)
    states = torch.randn(1, 5, 8).bfloat16()

    def run(dtype: torch.dtype) -> Any:
        h = states.to(dtype)
        return net(X, (h, h) if name == "LSTM" else h)

    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        assert {y.dtype for y in every(run(dtype))} == {torch.float32}
    equal(run(torch.float64), run(torch.float32))
    low = network(name, heads, dtype=torch.bfloat16)
    h = states.float()
    assert {y.dtype for y in every(low(X.bfloat16(), (h, h) if name == "LSTM" else h))} == {torch.bfloat16}


@pytest.mark.parametrize("heads", HEADS)
def test_a_layout_changes_nothing(heads: int) -> None:
    turned = X.permute(2, 1, 0).contiguous().permute(2, 1, 0)
    gapped = torch.stack([X, X + torch.nan], -1)[..., 0]
    imaginary = torch.complex(torch.zeros_like(X), -X).conj().imag
    expanded = X[:1].expand(2, -1, -1)
    for name in MODULES:
        net, expected = network(name, heads), network(name, heads)(X)
        for x in (turned, gapped, imaginary, torch.ops.aten._neg_view(-X)):
            equal(net(x), expected)
        equal(net(expanded), net(expanded.contiguous()))
        h = torch.randn(1, 1, 8).expand(1, 5, 8)
        hx, whole = ((y, y) if name == "LSTM" else y for y in (torch.ops.aten._neg_view(-h), h.contiguous()))
        equal(net(X, hx), net(X, whole))
    mixer = network("SLSTM", heads)
    for x in (turned, gapped, imaginary, torch.ops.aten._neg_view(-X)):
        equal(mixer(x), mixer(X))

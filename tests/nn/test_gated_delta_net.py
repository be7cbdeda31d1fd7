"""``iokernels.nn.GatedDeltaNet`` against its definition token by token, and its generation against its training."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from iokernels.nn.linear_attention.gated_delta_net import GatedDeltaNet, GatedDeltaNetState

from .stepping import check_from_nothing_by_steps, check_generation_continues_training

VARIANTS: list[dict[str, Any]] = [
    {},
    {"allow_neg_eigval": True, "bias": True},
    {"use_decay": False, "use_gate": False, "conv_size": 1},
    {"head_dim": 3, "expand_v": 2.0, "num_key_heads": 2, "conv_size": 3},
]


def made(**options: Any) -> GatedDeltaNet:
    torch.manual_seed(0)
    return GatedDeltaNet(12, 4, **{"dtype": torch.float64, **options})


def by_definition(net: GatedDeltaNet, x: Tensor) -> Tensor:
    """One sequence [N, E], one token and one head after the other."""
    mixed = net.in_proj(x)
    if net.conv_weight is not None:
        past = torch.cat([mixed.new_zeros(net.conv_size - 1, mixed.shape[1]), mixed])
        mixed = torch.stack([(past[t : t + net.conv_size] * net.conv_weight[:, 0].T).sum(0) for t in range(x.shape[0])])
    keys = net.num_key_heads * net.head_dim
    q, k, v = F.silu(mixed).split([keys, keys, net.num_heads * net.value_dim], dim=1)
    beta = torch.sigmoid(net.beta_proj(x)) * (2 if net.allow_neg_eigval else 1)
    outs = []
    for head in range(net.num_heads):
        key_head = head // (net.num_heads // net.num_key_heads)
        columns = slice(key_head * net.head_dim, (key_head + 1) * net.head_dim)
        values = slice(head * net.value_dim, (head + 1) * net.value_dim)
        state = x.new_zeros(net.head_dim, net.value_dim)
        rows = []
        for t in range(x.shape[0]):
            query, key = (y[t, columns] / y[t, columns].norm() for y in (q, k))
            if net.use_decay:
                step = F.softplus(net.decay_proj(x[t])[head] + net.dt_bias[head])
                state = state * torch.exp(-torch.exp(net.A_log[head]) * step)
            state = state + beta[t, head] * torch.outer(key, v[t, values] - key @ state)
            rows.append(net.head_dim**-0.5 * query @ state)
        out = torch.stack(rows)
        out = out / (out.square().mean(1, keepdim=True) + net.norm_eps).sqrt() * net.norm_weight
        if net.gate_proj is not None:
            out = out * F.silu(net.gate_proj(x)[:, values])
        outs.append(out)
    return net.out_proj(torch.cat(outs, 1))


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_it_is_what_it_says(options: dict[str, Any]) -> None:
    net = made(**options)
    x = torch.randn(2, 9, 12, dtype=torch.float64)
    found = net(x)
    torch.testing.assert_close(found, torch.stack([by_definition(net, row) for row in x]))
    wrong = copy.deepcopy(net)
    wrong.beta_proj.bias.data += 0.01
    assert (wrong(x) - found).abs().max() > 1e-5


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_generation_continues_training(options: dict[str, Any]) -> None:
    check_generation_continues_training(made(**options))


def test_from_nothing_by_steps() -> None:
    check_from_nothing_by_steps(made())


def test_states_have_the_dtype_that_memory_needs() -> None:
    net = GatedDeltaNet(12, 4, dtype=torch.bfloat16)
    state = net.init_state(2)
    assert isinstance(state, GatedDeltaNetState)
    assert (state.conv.dtype, state.memory.dtype) == (torch.bfloat16, torch.float32)
    assert net.A_log.dtype == net.dt_bias.dtype == torch.float32
    x = torch.randn(2, 5, 12, dtype=torch.bfloat16)
    out, after = net(x, state, return_state=True)
    assert out.dtype == torch.bfloat16
    assert [y.dtype for y in after] == [y.dtype for y in state]
    assert all((y == 0).all() for y in state), "forward leaves its state alone"


def test_every_parameter_has_a_gradient() -> None:
    net = made(allow_neg_eigval=True, bias=True)
    net(torch.randn(2, 9, 12, dtype=torch.float64)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in net.parameters())


def test_eigenvalues() -> None:
    net = made(allow_neg_eigval=True)
    beta, decay = net._gates(100 * torch.randn(1, 200, 12, dtype=torch.float64))
    assert beta.max() > 1.9
    assert beta.min() >= 0
    assert decay is not None
    assert (decay <= 0).all()
    assert made()._gates(100 * torch.randn(1, 200, 12, dtype=torch.float64))[0].max() <= 1


def test_decays_start_between_weak_and_strong() -> None:
    net = GatedDeltaNet(64, 64)
    step = F.softplus(net.dt_bias)
    assert 0.0009 < step.min() < 0.01 < step.max() < 0.11
    assert net.A_log.exp().max() <= 16


def test_saved_parameters_load() -> None:
    net, other = made(), made()
    other.reset_parameters()
    x = torch.randn(1, 5, 12, dtype=torch.float64)
    assert not torch.equal(net(x), other(x))
    other.load_state_dict(net.state_dict())
    assert torch.equal(net(x), other(x))


def test_autocast_and_compile() -> None:
    net = GatedDeltaNet(16, 2)
    x = torch.randn(2, 9, 16)
    with torch.autocast("cpu", torch.bfloat16):
        assert net(x).isfinite().all()
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), net(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_heads": 5}, r"embed_dim is 12; without head_dim, 5 must divide it"),
        ({"num_heads": 0}, r"both must be above 0"),
        ({"num_key_heads": 3}, r"num_key_heads is 3; it must divide the 4 heads"),
        ({"conv_size": 0}, r"conv_size is 0; it must be at least 1"),
        ({"expand_v": 0.0}, r"widths must be at least 1"),
    ],
    ids=str,
)
def test_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^GatedDeltaNet: .*{message}"):
        GatedDeltaNet(**{"embed_dim": 12, "num_heads": 4, **options})


def test_refused_inputs() -> None:
    net = made()
    with pytest.raises(ValueError, match=r"GatedDeltaNet: x has .*dimension 2 \(embed_dim\) must be 12"):
        net(torch.randn(2, 5, 13, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"requires a gradient, and the step has none"):
        net.step(torch.randn(2, 1, 12, dtype=torch.float64), net.init_state(2))

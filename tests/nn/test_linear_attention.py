"""The modules of linear attention: each against its paper's formula, and one interface for all of them."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from iokernels.nn import BasedAttention, GatedDeltaNet, LightningAttention, Retention

EMBED, HEADS = 16, 2
BASED: dict[str, Any] = {"feature_dim": 4, "window": 5}
MIXERS: dict[str, tuple[type[nn.Module], dict[str, Any]]] = {
    "lightning": (LightningAttention, {}),
    "lightning of a deep layer": (
        LightningAttention,
        {"slopes": "minimax", "layer": 2, "layers": 4, "gate": "sigmoid", "head_dim": 6, "bias": True},
    ),
    "retention": (Retention, {}),
    "based": (BasedAttention, BASED),
    "based, linear": (BasedAttention, BASED | {"parts": ("linear",)}),
    "based, window": (BasedAttention, BASED | {"parts": ("window",)}),
    "based, window of one": (BasedAttention, {"window": 1, "feature_dim": 4}),
    "gated delta net": (GatedDeltaNet, {"allow_neg_eigval": True}),
    "delta net": (GatedDeltaNet, {"use_decay": False, "conv_size": 1, "use_gate": False}),
}
EXACT: dict[str, Any] = {"rtol": 1e-9, "atol": 1e-11}


def made(name: str, dtype: torch.dtype = torch.float64) -> Any:
    kind, options = MIXERS[name]
    torch.manual_seed(0)
    return kind(EMBED, HEADS, dtype=dtype, **options)


def noise(*size: int, seed: int = 1, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def tensors(state: Any) -> list[Tensor]:
    return [x for x in state if x is not None]


@pytest.mark.parametrize("name", MIXERS)
def test_in_pieces_and_by_steps_as_at_once(name: str):
    mixer, x = made(name), noise(2, 19, EMBED)
    whole, last = mixer(x, return_state=True)
    assert whole.shape == x.shape
    assert whole.std() > 1e-3
    torch.testing.assert_close(mixer(x), whole, **EXACT)

    with torch.no_grad():
        first, middle = mixer(x[:, :8], return_state=True)
    kept = copy.deepcopy(middle)
    second, end = mixer(x[:, 8:], middle, return_state=True)
    torch.testing.assert_close(torch.cat([first, second], 1), whole, **EXACT)
    for ours, expected, given, before in zip(*map(tensors, (end, last, middle, kept)), strict=True):
        torch.testing.assert_close(ours, expected, **EXACT)
        assert torch.equal(given, before), "forward modified the state that it was given"

    with torch.no_grad():
        state = mixer.init_state(2)
        places = [tensor.data_ptr() for tensor in tensors(state)]
        # From nothing, by ones and by a few, and from what forward left.
        steps = torch.cat([mixer.step(part, state) for part in x.split([1, 1, 1, 4, 1, 6, 5], dim=1)], 1)
        after = torch.cat([mixer.step(part, kept) for part in x[:, 8:].split(1, dim=1)], 1)
    torch.testing.assert_close(steps, whole, **EXACT)
    torch.testing.assert_close(after, second, **EXACT)
    for ours, expected in zip(tensors(state), tensors(last), strict=True):
        torch.testing.assert_close(ours, expected, **EXACT)
    assert places == [tensor.data_ptr() for tensor in tensors(state)], "a step did not update the state in place"


@pytest.mark.parametrize("name", MIXERS)
def test_a_copied_state_goes_its_own_way(name: str):
    mixer, x = made(name), noise(1, 9, EMBED)
    with torch.no_grad():
        _, state = mixer(x[:, :6], return_state=True)
        other = copy.deepcopy(state)
        expected = mixer.step(x[:, 6:7], state)
        mixer.step(x[:, 7:8], state)
        torch.testing.assert_close(mixer.step(x[:, 6:7], other), expected, rtol=0, atol=0)


@pytest.mark.parametrize("name", MIXERS)
def test_gradients_reach_every_parameter_and_the_past(name: str):
    mixer, x = made(name), noise(2, 12, EMBED).requires_grad_()
    _, state = mixer(x[:, :7], return_state=True)
    mixer(x[:, 7:], state).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in mixer.parameters())
    assert x.grad is not None
    moved = x.grad.abs().amax((0, 2)) > 0
    assert moved[7:].all()
    # A window sees no further than its width, and one of a single token nothing before that.
    reach = getattr(mixer, "window", 0) - 1 if getattr(mixer, "parts", ()) == ("window",) else 7
    assert moved[7 - reach : 7].all()


@pytest.mark.parametrize("name", MIXERS)
def test_state_dict_and_dtypes(name: str):
    mixer = made(name)
    kind, options = MIXERS[name]
    other = kind(EMBED, HEADS, dtype=torch.float64, **options)
    other.load_state_dict(mixer.state_dict())
    x = noise(2, 9, EMBED)
    torch.testing.assert_close(other(x), mixer(x), rtol=0, atol=0)
    built = kind(EMBED, HEADS, device="meta", dtype=torch.float64, **options).to_empty(device="cpu")
    built.load_state_dict(mixer.state_dict())
    torch.testing.assert_close(built(x), mixer(x), rtol=0, atol=0)

    exact = mixer(x)
    for dtype in (torch.bfloat16, torch.float32):
        low = copy.deepcopy(mixer).to(dtype)
        out, state = low(x.to(dtype), return_state=True)
        assert out.dtype == dtype
        fresh = low.init_state(2)
        for ours, empty in zip(tensors(state), tensors(fresh), strict=True):
            assert (ours.dtype, ours.shape) == (empty.dtype, empty.shape)
        assert getattr(fresh, "memory", None) is None or fresh.memory.dtype == torch.float32
        error = (out.double() - exact).square().mean().sqrt() / exact.square().mean().sqrt()
        assert error < (0.03 if dtype == torch.bfloat16 else 1e-5)


@pytest.mark.parametrize("name", ["lightning", "retention", "based", "gated delta net"])
def test_autocast(name: str):
    mixer, x = made(name, torch.float32), noise(2, 9, EMBED, dtype=torch.float32)
    exact = mixer(x)
    with torch.autocast("cpu", torch.bfloat16):
        out, state = mixer(x, return_state=True)
        with torch.no_grad():
            mixer.step(x[:, :1], state)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), exact, rtol=0.1, atol=0.04)
    assert not torch.equal(out.float(), exact)


def test_decays_stay_exact_in_half_precision():
    mixer = Retention(EMBED, HEADS)
    exact = torch.tensor([math.log1p(-(2.0**-5)), math.log1p(-(2.0**-6))])
    for module in (mixer, mixer.to(torch.bfloat16), copy.deepcopy(mixer).half()):
        torch.testing.assert_close(module.decay.log_decay, exact, rtol=1e-6, atol=0)
    assert not [name for name in mixer.state_dict() if "decay" in name]


# Dynamo makes an instance of every autograd.Function that it traces, and torch warns of that.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiles_whole():
    mixer = made("based")
    compiled = torch.compile(mixer, fullgraph=True, dynamic=True, backend="aot_eager")
    for length in (7, 12):
        x, state = noise(2, length, EMBED), mixer.init_state(2)
        (ours, left), (expected, right) = (m(x, state, return_state=True) for m in (compiled, mixer))
        torch.testing.assert_close(ours, expected, **EXACT)
        for mine, eager in zip(tensors(left), tensors(right), strict=True):
            torch.testing.assert_close(mine, eager, **EXACT)
        for mine, eager in zip(
            *(torch.autograd.grad(out.square().sum(), [*mixer.parameters()]) for out in (ours, expected)), strict=True
        ):
            torch.testing.assert_close(mine, eager, **EXACT)
    torch.compiler.reset()


def split_heads(x: Tensor, *widths: int) -> list[Tensor]:
    """[N, sum of widths] to a [HEADS, N, width / HEADS] each."""
    return [part.unflatten(1, (HEADS, -1)).transpose(0, 1) for part in x.split(widths, dim=1)]


def turned(x: Tensor) -> Tensor:
    """Rotary embedding as complex numbers: x [H, N, D], pairs of neighbours."""
    width = x.shape[2]
    angles = torch.arange(x.shape[1])[:, None] * 10000.0 ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
    z = torch.view_as_complex(x.unflatten(2, (-1, 2)).contiguous()) * torch.polar(torch.ones_like(angles), angles)
    return torch.view_as_real(z).flatten(2)


def test_lightning_by_hand():
    mixer, x = made("lightning"), noise(1, 11, EMBED)
    q, k, v = split_heads(x[0] @ mixer.in_proj.weight.T, EMBED, EMBED, EMBED)
    q, k = F.silu(q), F.silu(k)
    outs = []
    for head in range(HEADS):
        keep, memory = math.exp(-(2.0 ** (-8 * (head + 1) / HEADS))), torch.zeros(8, 8, dtype=torch.float64)
        rows = []
        for t in range(11):
            memory = keep * memory + torch.outer(k[head, t], v[head, t])
            rows.append(q[head, t] @ memory / math.sqrt(8))
        outs.append(torch.stack(rows))
    mixed = torch.cat(outs, 1)
    mixed = mixed / (mixed.square().mean(1, keepdim=True) + 1e-6).sqrt()
    expected = (mixed * (x[0] @ mixer.gate_proj.weight.T)) @ mixer.out_proj.weight.T
    torch.testing.assert_close(mixer(x)[0], expected, rtol=1e-6, atol=1e-8)


def test_retention_by_hand():
    """The parallel form of the paper: (Q K^T * D) V with D_nm = gamma^(n - m)."""
    mixer, x = made("retention"), noise(1, 11, EMBED)
    q, k, v = split_heads(x[0] @ mixer.in_proj.weight.T, EMBED, EMBED, 2 * EMBED)
    distance = torch.arange(11)[:, None] - torch.arange(11)
    gamma = 1 - 2.0 ** (-5 - torch.arange(HEADS, dtype=torch.float64))
    decay = torch.where(distance >= 0, gamma[:, None, None] ** distance.clamp(min=0), 0.0)
    y = (turned(q) @ turned(k).transpose(1, 2) / math.sqrt(8) * decay) @ v  # [H, N, 16]
    y = (y - y.mean(2, keepdim=True)) / (y.var(2, unbiased=False, keepdim=True) + 1e-5).sqrt()
    expected = (F.silu(x[0] @ mixer.gate_proj.weight.T) * y.transpose(0, 1).flatten(1)) @ mixer.out_proj.weight.T
    torch.testing.assert_close(mixer(x)[0], expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("parts", [("linear",), ("window",), ("linear", "window"), ("window", "linear")])
def test_based_by_hand(parts: tuple[str, ...]):
    torch.manual_seed(0)
    mixer, x = BasedAttention(EMBED, HEADS, parts=parts, dtype=torch.float64, **BASED), noise(1, 11, EMBED)
    distance = torch.arange(11)[:, None] - torch.arange(11)
    outs = []
    if mixer.linear_proj is not None:
        q, k, v = split_heads(x[0] @ mixer.linear_proj.weight.T, HEADS * 4, HEADS * 4, EMBED)
        s = q @ k.transpose(1, 2) / math.sqrt(4)
        weights = torch.where(distance >= 0, 1 + s + s * s / 2, 0.0)
        outs.append(weights / weights.sum(2, keepdim=True) @ v)
    if mixer.window_proj is not None:
        q, k, v = split_heads(x[0] @ mixer.window_proj.weight.T, EMBED, EMBED, EMBED)
        s = turned(q) @ turned(k).transpose(1, 2) / math.sqrt(8)
        outs.append(s.masked_fill((distance < 0) | (distance >= 5), float("-inf")).softmax(2) @ v)
    expected = torch.cat([out.transpose(0, 1).flatten(1) for out in outs], 1) @ mixer.out_proj.weight.T
    torch.testing.assert_close(mixer(x)[0], expected, **EXACT)


REFUSED = {
    "heads do not divide": (LightningAttention, (16, 3), {}, "3 must divide it"),
    "no heads": (Retention, (16, 0), {}, "num_heads 0"),
    "slopes": (LightningAttention, (16, 2), {"slopes": "steep"}, "slopes is 'steep'"),
    "gate": (LightningAttention, (16, 2), {"gate": "tanh"}, "gate is 'tanh'"),
    "layer": (LightningAttention, (16, 2), {"slopes": "minimax", "layer": 4, "layers": 4}, "layer is 4"),
    "odd heads": (Retention, (6, 2), {}, "head_dim is 3"),
    "odd heads of a window": (BasedAttention, (6, 2), {}, "must be even"),
    "no values": (Retention, (16, 2), {"expand_v": 0.0}, "expand_v 0.0"),
    "no parts": (BasedAttention, (16, 2), {"parts": ()}, "parts is"),
    "a part twice": (BasedAttention, (16, 2), {"parts": ("linear", "linear")}, "parts is"),
    "feature_dim": (BasedAttention, (16, 2), {"feature_dim": 0}, "feature_dim is 0"),
    "window": (BasedAttention, (16, 2), {"window": 0}, "window is 0"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_sizes_are_refused_by_name(case: str):
    kind, sizes, options, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        kind(*sizes, **options)


@pytest.mark.parametrize("name", MIXERS)
def test_bad_calls_are_refused_by_name(name: str):
    mixer = made(name)
    with pytest.raises(ValueError, match="x has shape"):
        mixer(torch.zeros(2, 3, EMBED + 1, dtype=torch.float64))
    with pytest.raises(ValueError, match="x has 2 dimensions"):
        mixer.step(torch.zeros(3, EMBED, dtype=torch.float64), mixer.init_state(3))
    with pytest.raises(ValueError, match="gradient"):
        mixer.step(torch.zeros(1, 1, EMBED, dtype=torch.float64), mixer.init_state(1))

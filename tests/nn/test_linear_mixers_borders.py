"""The linear mixers at their borders: zero tokens, no tokens, wrong states, and states kept, loaded and changed."""

from __future__ import annotations

import copy
import io
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from iokernels.nn import BasedAttention, GatedDeltaNet, LightningAttention, Retention

WIDTH, HEADS = 16, 2
MIXERS: dict[str, Any] = {
    "lightning": LightningAttention,
    "retention": Retention,
    "based": BasedAttention,
    "gated_delta": GatedDeltaNet,
}
FIXED = ("lightning", "retention")
"""Those with decays that no parameter holds."""


def made(name: str, **options: Any) -> Any:
    torch.manual_seed(0)
    extra: dict[str, Any] = {"window": 3, "feature_dim": 4} if name == "based" else {}
    return MIXERS[name](WIDTH, HEADS, **extra, **options)


def noise(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, WIDTH, generator=torch.Generator().manual_seed(1)).to(dtype)


def _finite(x: Tensor, out: Tensor, mixer: nn.Module) -> None:
    out.float().sum().backward()
    assert out.isfinite().all()
    assert x.grad is not None
    assert x.grad.isfinite().all()
    assert x.grad.abs().max() < 1e4, "a gradient of a vector of zeros is none"
    for name, parameter in mixer.named_parameters():
        assert parameter.grad is None or parameter.grad.isfinite().all(), name


@pytest.mark.parametrize("how", ["float16", "bfloat16", "float32", "autocast"])
@pytest.mark.parametrize("name", MIXERS)
def test_a_zero_token_stays_zero(name: str, how: str) -> None:
    """The first tokens of a text, of which nothing is in the window of a convolution either, and all tokens."""
    dtype = torch.float32 if how == "autocast" else getattr(torch, how)
    for zeros in (4, 9):
        mixer, x = made(name, dtype=dtype), noise(2, 9, dtype=dtype)
        x[:, :zeros] = 0.0
        x.requires_grad_()
        with torch.autocast("cpu", dtype=torch.float16, enabled=how == "autocast"):
            out = mixer(x)
        assert out[:, :zeros].abs().max() == 0.0
        _finite(x, out, mixer)


@pytest.mark.parametrize("first", [0, WIDTH], ids=["queries", "keys"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_vectors_of_zeros_among_others_have_no_gradient(dtype: torch.dtype, first: int) -> None:
    """Not one of 1e12, which is what an epsilon makes of it."""
    mixer, x = made("gated_delta", dtype=dtype), noise(2, 9, dtype=dtype).requires_grad_()
    zeros = slice(first, first + WIDTH)
    with torch.no_grad():
        mixer.in_proj.weight[zeros] = 0.0
    out = mixer(x)
    _finite(x, out, mixer)
    assert mixer.in_proj.weight.grad[zeros].abs().max() == 0.0


@pytest.mark.parametrize("size", [1e-3, 6e-8])
def test_short_keys_in_float16_have_gradients(size: float) -> None:
    """The length of a key is not below an epsilon that float16 rounds to 0."""
    mixer = made("gated_delta", dtype=torch.float16, conv_size=1)
    x = (size * torch.ones(1, 3, WIDTH)).half().requires_grad_()
    out = mixer(x)
    out.sum().backward()
    assert out.isfinite().all()
    assert x.grad is not None
    assert x.grad.isfinite().all()


def test_keys_and_queries_have_length_1_in_16_bits() -> None:
    mixer = made("gated_delta", dtype=torch.bfloat16)
    q, k, _ = mixer._heads(noise(1, 50, dtype=torch.bfloat16).repeat(1, 1, 3))
    for x in (q, k):
        torch.testing.assert_close(x.float().norm(dim=-1), torch.ones(1, HEADS, 50), rtol=4e-3, atol=0.0)


@pytest.mark.parametrize("shape", [(2, 0), (0, 3), (0, 0)], ids=str)
@pytest.mark.parametrize("name", MIXERS)
def test_no_tokens_and_no_sequences(name: str, shape: tuple[int, int]) -> None:
    mixer = made(name)
    x = noise(*shape).requires_grad_()
    before = mixer.init_state(shape[0])
    out, state = mixer(x, before, return_state=True)
    assert out.shape == x.shape
    out.sum().backward()
    assert x.grad is not None
    for kept, found in zip(before, state, strict=True):
        torch.testing.assert_close(found, kept, rtol=0.0, atol=0.0)
    assert mixer(x.detach()).shape == x.shape
    with torch.no_grad():
        assert mixer.step(x, before).shape == x.shape


@pytest.mark.parametrize("name", MIXERS)
def test_a_state_that_does_not_fit_is_named(name: str) -> None:
    mixer, x, kind = made(name), noise(2, 3), MIXERS[name].__name__
    wrong: list[tuple[Any, str]] = [
        (mixer.init_state(3), r"state\.\w+ has shape .* from the B of x"),
        (mixer.init_state(2, dtype=torch.float64), "state.memory is float64; it must be float32"),
        ("state", f"state is str; it must be {kind}State"),
        (tuple(mixer.init_state(2)), f"state is tuple; it must be {kind}State"),
        (mixer.init_state(2)._replace(memory="memory"), "state.memory is str"),
        (mixer.init_state(2)._replace(memory=torch.zeros(2, HEADS, 3, 3)), "state.memory has shape"),
    ]
    for state, message in wrong:
        with pytest.raises((TypeError, ValueError), match=f"{kind}: {message}"):
            mixer(x, state)
        with torch.no_grad(), pytest.raises((TypeError, ValueError), match=f"{kind}: {message}"):
            mixer.step(x, state)


@pytest.mark.parametrize("name", MIXERS)
def test_a_state_whose_sequences_share_memory_is_not_stepped(name: str) -> None:
    mixer, x = made(name), noise(2, 1)
    one, whole = mixer.init_state(1), mixer.init_state(2)
    for field in one._fields:
        shared = getattr(one, field)
        state = whole._replace(**{field: shared.expand(2, *shared.shape[1:])})
        with torch.no_grad(), pytest.raises(ValueError, match=f"state.{field} has elements that share memory"):
            mixer.step(x, state)
        torch.testing.assert_close(mixer(x, state), mixer(x, whole))


@pytest.mark.parametrize("name", MIXERS)
def test_a_state_is_its_own(name: str) -> None:
    """No part of it is a view of the prompt, and stepping it leaves the prompt's gradients what they are."""
    mixer, x = made(name), noise(2, 40)
    gradients = []
    for stepped in (False, True):
        mixer.zero_grad()
        own = x.clone().requires_grad_()
        out, state = mixer(own, return_state=True)
        if stepped:
            for field in state:
                assert field.untyped_storage().nbytes() <= field.numel() * field.element_size()
            with torch.no_grad():
                mixer.step(x[:, :1], state)
        out.sum().backward()
        gradients.append((own.grad, [p.grad for p in mixer.parameters()]))
    torch.testing.assert_close(gradients[0], gradients[1], rtol=0.0, atol=0.0)


@pytest.mark.parametrize("name", MIXERS)
def test_a_state_is_saved_and_loaded_with_the_defaults(name: str) -> None:
    mixer, x = made(name), noise(2, 5)
    with torch.no_grad():
        _, state = mixer(x, return_state=True)
        file = io.BytesIO()
        torch.save(state, file)
        file.seek(0)
        found = torch.load(file)
        assert type(found) is type(state)
        torch.testing.assert_close(mixer.step(x[:, :1], found), mixer.step(x[:, :1], copy.deepcopy(state)))


@pytest.mark.parametrize("way", ["to_empty", "assign"])
@pytest.mark.parametrize("name", MIXERS)
def test_a_module_built_on_meta_is_the_module(name: str, way: str) -> None:
    mixer, x = made(name), noise(2, 5)
    other = made(name, device="meta")
    if way == "to_empty":
        other.to_empty(device="cpu")
    assert other.load_state_dict(mixer.state_dict(), assign=way == "assign").missing_keys == []
    torch.testing.assert_close(other(x), mixer(x), rtol=0.0, atol=0.0)
    with torch.no_grad():
        found = other.step(x[:, :1], other.init_state(2))
        torch.testing.assert_close(found, mixer.step(x[:, :1], mixer.init_state(2)), rtol=0.0, atol=0.0)


@pytest.mark.parametrize("name", FIXED)
def test_decays_come_back_from_a_round_trip_exactly(name: str) -> None:
    mixer = made(name)
    before = mixer.decay.log_decay.clone()
    for there in (nn.Module.bfloat16, nn.Module.half, nn.Module.double):
        there(mixer)
        assert mixer.decay.log_decay.dtype == torch.float32
        assert torch.equal(mixer.float().decay.log_decay, before)
    assert torch.equal(copy.deepcopy(mixer).decay.log_decay, before)


@pytest.mark.parametrize("name", MIXERS)
def test_shapes_on_meta(name: str) -> None:
    mixer, plain = made(name, device="meta"), made(name)
    x = noise(2, 3)
    own = x.to("meta").requires_grad_()
    out, state = mixer(own, mixer.init_state(2), return_state=True)
    out.sum().backward()
    assert own.grad is not None
    assert own.grad.shape == x.shape
    expected = plain(x, plain.init_state(2), return_state=True)[1]
    assert [(f.shape, f.dtype, f.is_meta) for f in state] == [(f.shape, f.dtype, True) for f in expected]
    with torch.no_grad():
        assert mixer.step(x.to("meta"), mixer.init_state(2)).shape == x.shape


def test_exported_with_parameters_that_require_gradients() -> None:
    mixer, x = made("gated_delta"), noise(2, 5)
    torch.testing.assert_close(torch.export.export(mixer, (x,)).module()(x), mixer(x))


WRONG = ("16", 2.5, True, -1, 10**400, 2**63, None, np.float32(2.0))


@pytest.mark.parametrize("name", MIXERS)
def test_wrong_sizes_are_named(name: str) -> None:
    kind = MIXERS[name]
    for wrong in WRONG:
        for argument in ("embed_dim", "num_heads"):
            with pytest.raises((TypeError, ValueError), match=f"^{kind.__name__}: .*{argument}"):
                kind(**{"embed_dim": WIDTH, "num_heads": HEADS, argument: wrong})
        with pytest.raises((TypeError, ValueError), match=f"^{kind.__name__}: batch is"):
            made(name).init_state(wrong)
        if wrong is not True:
            with pytest.raises(TypeError, match=f"^{kind.__name__}: bias is"):
                kind(WIDTH, HEADS, bias=wrong)
    with pytest.raises(TypeError, match="dtype is"):
        made(name).init_state(1, dtype=torch.int32)
    with pytest.raises((TypeError, ValueError), match="device is"):
        made(name).init_state(1, device="nowhere")
    assert kind(np.int64(WIDTH), np.int32(HEADS))(noise(1, 2)).shape == (1, 2, WIDTH)


OTHERS = {
    "lightning": ("head_dim",),
    "retention": ("head_dim", "expand_v", "norm_eps"),
    "based": ("feature_dim", "window"),
    "gated_delta": ("head_dim", "num_key_heads", "conv_size", "expand_v", "norm_eps", "use_decay", "use_gate"),
}


@pytest.mark.parametrize(("name", "argument"), [(name, x) for name, rest in OTHERS.items() for x in rest])
def test_other_wrong_options_are_named(name: str, argument: str) -> None:
    kind = MIXERS[name]
    for wrong in ("4", -1, [4]):
        with pytest.raises((TypeError, ValueError), match=f"^{kind.__name__}: .*{argument}"):
            kind(WIDTH, HEADS, **{argument: wrong})

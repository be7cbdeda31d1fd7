"""Linear attention and the gated delta rule at their borders: resets, strong decays, nothing at all, in-place use."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from iokernels import (
    alibi_slopes,
    autotune,
    gated_delta_rule,
    gated_delta_rule_step,
    lightning_attention,
    linear_attention,
    linear_attention_state,
    linear_attention_step,
    minimax_slopes,
    retention_slopes,
)
from iokernels.ops.gated_delta_rule import op as delta_op
from iokernels.ops.gated_delta_rule.options import DeltaOptions
from iokernels.ops.linear_attention import op
from iokernels.ops.linear_attention.options import Options

from ..backends import CUDA
from .both import DELTA, LINEAR, OPERATORS, call, given, gradients, leaves, step
from .calls import tiles

INF = float("inf")
PYTHON = ("reference", "torch", "triton")
COMPILED = [*((LINEAR, x) for x in ("torch", "triton")), pytest.param(LINEAR, "cuda", marks=CUDA.marks),
            *((DELTA, x) for x in ("torch", "triton"))]  # fmt: skip
"""Backends that are operators of their own."""


@pytest.mark.parametrize("backend", PYTHON)
def test_a_reset_of_the_delta_rule_gives_the_value_by_hand(backend: str) -> None:
    x, decay = torch.ones(1, 1, 2, 1), torch.tensor([[[0.0, -INF]]])
    plain = {"q": x, "k": x, "v": x, "beta": torch.full((1, 1, 2), 0.5), "log_decay": decay}
    own: dict[str, Any] = {name: value.clone().requires_grad_() for name, value in plain.items()}
    out = gated_delta_rule(**own, scale=1.0, backend=backend)
    out.sum().backward()
    torch.testing.assert_close(out.flatten(), torch.tensor([0.5, 0.5]))
    # Nothing is held before either token: out = beta (k . q) v.
    expected = {"q": 0.5, "k": 0.5, "v": 0.5, "beta": 1.0, "log_decay": 0.0}
    for name, value in expected.items():
        torch.testing.assert_close(own[name].grad, torch.full_like(own[name], value), msg=name)


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
@pytest.mark.parametrize(("operator", "backend"), OPERATORS)
def test_a_reset_anywhere_is_a_new_beginning(operator: str, backend: str, packed: bool) -> None:
    """At the first, a middle and the last row of chunks of 16: what follows does not know what was before."""
    rows = 40
    arguments = given(operator, backend, 1, 2, rows, 8, packed=packed, seed=3)
    axis = 0 if packed else 2
    for place in (0, 1, 15, 16, 17, 31, 39):
        arguments["log_decay"].select(axis, place).fill_(-INF)
    if packed:
        arguments["cu_seqlens"] = torch.tensor([0, 17, rows], dtype=torch.int32)
    with autotune.override(**tiles()):
        found = gradients(operator, backend, arguments, lambda x: x)
    for name, x in found.items():
        assert x.isfinite().all(), name
    reset = arguments["log_decay"].isinf()
    assert found["dlog_decay"][reset].abs().max() == 0.0
    exact = {name: x.double() if x.is_floating_point() else x for name, x in arguments.items()}
    alone = {
        name: x.narrow(axis, rows - 1, 1) for name, x in exact.items() if name not in ("initial_state", "cu_seqlens")
    }
    if packed:
        alone["cu_seqlens"] = torch.tensor([0, 1], dtype=torch.int32)
    expected = call(operator, "reference", alone)[0].select(axis, 0)
    torch.testing.assert_close(found["out"].select(axis, rows - 1).double(), expected, rtol=4e-3, atol=4e-3)
    truth = gradients(operator, "reference", exact, lambda x: x.double())
    for name, x in truth.items():
        error = (found[name].double() - x).norm() / x.norm().clamp_min(1e-6)
        assert error < (2e-2 if found["out"].dtype == torch.float16 else 1e-5), (name, error)


@pytest.mark.parametrize("backend", PYTHON)
@pytest.mark.parametrize("operator", [LINEAR, DELTA])
def test_a_step_with_a_reset_forgets_the_state(operator: str, backend: str) -> None:
    arguments = given(operator, backend, length=2)
    state = arguments.pop("initial_state")
    arguments["log_decay"][:, :, 0] = -INF
    out = step(operator, backend, arguments, state)
    fresh = torch.zeros_like(state)
    torch.testing.assert_close(out, step(operator, backend, arguments, fresh))
    torch.testing.assert_close(state, fresh)


def _alternating(dtype: torch.dtype, decay_dtype: torch.dtype, packed: bool, operator: str) -> dict[str, Any]:
    """Decays of -110 and -0.3 in turns, every number 1, and a state before."""
    rows = 128
    lead = (rows, 1) if packed else (1, 1, rows)
    made: dict[str, Any] = {name: torch.ones(*lead, 1, dtype=dtype) for name in "qkv"}
    made["log_decay"] = torch.tensor([-110.0, -0.3] * (rows // 2), dtype=decay_dtype).view(lead)
    made["scale"] = 1.0
    if operator == DELTA:
        made["beta"] = torch.full(lead, 0.5, dtype=decay_dtype)
    if packed:
        made["cu_seqlens"] = torch.tensor([0, 50, rows], dtype=torch.int32)
    made["initial_state"] = torch.ones(2 if packed else 1, 1, 1, 1, dtype=decay_dtype)
    return made


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
@pytest.mark.parametrize("backend", PYTHON)
@pytest.mark.parametrize("operator", [LINEAR, DELTA])
def test_weak_decays_beside_strong_ones_are_exact(operator: str, backend: str, packed: bool) -> None:
    found = gradients(operator, backend, _alternating(torch.float32, torch.float32, packed, operator), lambda x: x)
    exact = _alternating(torch.float64, torch.float64, packed, operator)
    truth = gradients(operator, "reference", exact, lambda x: x.double())
    if operator == LINEAR:
        assert found["out"].flatten()[-1].item() == pytest.approx(1 + math.exp(-0.3), rel=1e-6)
        assert found["state"].flatten()[-1].item() == pytest.approx(1 + math.exp(-0.3), rel=1e-6)
    for name, x in truth.items():
        assert (found[name].double() - x).abs().max() <= 1e-6 * x.abs().max() + 1e-30, name


@pytest.mark.parametrize("form", ["token", "head"])
@pytest.mark.parametrize("backend", ["torch", "triton", CUDA])
def test_weak_decays_beside_strong_ones_in_16_bits(backend: str, form: str) -> None:
    """A weight that lies 0.05 of a float16 step from where it would round to the other side: it comes out right only if
    its decay is known to 2e-5 of it, in the first chunk and in the last row."""
    step_size = 2.0**-11
    weight = (1500 + 0.45) * step_size
    rows = 128
    ones, values = torch.ones(1, 1, rows, 1).half(), torch.zeros(1, 1, rows, 1).half()
    values[:, :, ::2] = 1.0
    if form == "token":
        decay = torch.tensor([-110.0, math.log(weight)] * (rows // 2)).view(1, 1, rows)
    else:  # a token ago, weight ** 12 is left: rows of the far end of a chunk against their neighbours
        weight, decay = weight**12, torch.tensor([12 * math.log(weight)])
        step_size = 2.0 ** (math.floor(math.log2(weight)) - 10)
    out = linear_attention(ones, ones, values, log_decay=decay, scale=1.0, backend=backend)
    got = out.flatten()[1::2].double()
    if form == "token":
        assert torch.equal(got, torch.full_like(got, 1500 * step_size))
    else:
        powers = weight ** torch.arange(1, rows, 2, dtype=torch.float64)
        assert ((got - powers.cumsum(0)).abs() <= step_size).all()


@pytest.mark.parametrize(("operator", "backend"), COMPILED)
def test_positive_decays_count_as_zero(operator: str, backend: str) -> None:
    """On a GPU nobody reads the values, so the operators themselves clamp; here they are called without the check."""
    arguments = given(operator, backend, length=20)
    decay = arguments["log_decay"]
    positive = torch.arange(20) % 3 == 0
    both = []
    for value in (0.7, 0.0):
        own = decay.clone()
        own[..., positive] = value
        own.requires_grad_()
        q, k, v, initial = (arguments[name] for name in ("q", "k", "v", "initial_state"))
        if operator == LINEAR:
            out, state = op.attend(q, k, v, True, backend, Options(own, initial, None, 0.5))
        else:
            options = DeltaOptions(own, initial, None, 0.5)
            out, state = delta_op.gated_delta_rule(q, k, v, arguments["beta"], backend, options)
        (gradient,) = torch.autograd.grad(out.float().sum() + state.sum(), own)
        both.append((out.detach(), state.detach(), gradient))
        if value > 0.0:
            assert gradient[..., positive].abs().max() == 0.0, "a clamped decay moves nothing"
    torch.testing.assert_close(both[0][:2], both[1][:2], rtol=0.0, atol=0.0)
    torch.testing.assert_close(both[0][2][..., ~positive], both[1][2][..., ~positive], rtol=0.0, atol=0.0)


@pytest.mark.parametrize("form", ["head", "token"])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_positive_decays_count_as_zero_in_steps(backend: str, form: str) -> None:
    for operator in (LINEAR, DELTA):
        arguments = given(operator, backend, length=2)
        q, k, v, state = (arguments[name] for name in ("q", "k", "v", "initial_state"))
        found = []
        for value in (0.7, 0.0):
            decay = torch.full((2,), value) if form == "head" else torch.full((2, 2, 2), value)
            own = state.clone()
            if operator == LINEAR:
                out = op.step(q, k, v, own, backend, Options(decay, None, None, 0.5))
            else:
                whole = decay if form == "token" else decay[None, :, None].expand(2, 2, 2)
                out = delta_op.step_op(q, k, v, arguments["beta"], own, whole, 0.5, backend)
            found.append((out, own))
        torch.testing.assert_close(found[0], found[1], rtol=0.0, atol=0.0)


@pytest.mark.parametrize("segments", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("operator", "backend"), COMPILED)
def test_a_state_that_nobody_writes_stays_to_the_bit(
    operator: str, backend: str, dtype: torch.dtype, segments: int
) -> None:
    """Keys of zeros, no decay, several chunks: nothing rounds the state on its way, nor its gradient."""
    rows = 140
    q, v = (torch.randn(1, 1, rows, 16).to(dtype) for _ in range(2))
    own: dict[str, Any] = {"q": 0 * q, "k": torch.zeros_like(q), "v": v}
    if operator == DELTA:
        own["beta"] = torch.rand(1, 1, rows)
    own["initial_state"] = (1.0 + 2.0**-20 * torch.randn(1, 1, 16, 16)).requires_grad_()
    incoming = 1.0 + 2.0**-20 * torch.randn(1, 1, 16, 16)
    with autotune.override(**tiles(segments=segments)):
        _, state = call(operator, backend, own)
        (gradient,) = torch.autograd.grad(state, own["initial_state"], incoming)
    torch.testing.assert_close(state, own["initial_state"], rtol=0.0, atol=0.0)
    torch.testing.assert_close(gradient, incoming, rtol=0.0, atol=0.0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("backend", PYTHON)
def test_where_the_normaliser_is_zero_there_is_nothing(backend: str, dtype: torch.dtype) -> None:
    """A query of zeros, and keys of zeros before the first of others: out is 0 there, and so are the gradients."""
    arguments: dict[str, Any] = given(LINEAR, backend, length=20, state=False)
    arguments["normalize"] = True
    for name in "qkv":
        arguments[name] = arguments[name].abs().to(dtype)
    arguments["q"][:, :, 7] = 0.0
    arguments["k"][:, :, :3] = 0.0
    found = gradients(LINEAR, backend, arguments, lambda x: x)
    nothing = [0, 1, 2, 7]
    assert found["out"][:, :, nothing].abs().max() == 0.0
    assert found["dq"][:, :, nothing].abs().max() == 0.0
    exact = {name: x.double() if isinstance(x, Tensor) else x for name, x in arguments.items()}
    truth = gradients(LINEAR, "reference", exact, lambda x: x.double())
    for name, x in truth.items():
        assert found[name].isfinite().all(), name
        assert (found[name].double() - x).norm() <= (1e-2 if dtype == torch.float16 else 1e-5) * x.norm(), name


@pytest.mark.parametrize("form", ["head", "token"])
@pytest.mark.parametrize(("operator", "backend"), COMPILED)
def test_a_state_that_nobody_writes_decays_exactly(operator: str, backend: str, form: str) -> None:
    rows = 40
    own: dict[str, Any] = {name: torch.zeros(1, 2, rows, 16).half() for name in "qkv"}
    if operator == DELTA:
        own["beta"] = torch.rand(1, 2, rows)
    decay = -0.2 * torch.rand((2,) if form == "head" else (1, 2, rows))
    own |= {"log_decay": decay, "initial_state": torch.rand(1, 2, 16, 16).requires_grad_()}
    with autotune.override(**tiles()):
        _, state = call(operator, backend, own)
        (gradient,) = torch.autograd.grad(state.sum(), own["initial_state"])
    total = decay.double().sum(-1).view(1, 2) if form == "token" else rows * decay.double().view(1, 2)
    kept = total.exp()[..., None, None].expand(1, 2, 16, 16)
    torch.testing.assert_close(gradient.double(), kept, rtol=2e-6, atol=0.0)
    torch.testing.assert_close(state.double(), kept * own["initial_state"].double(), rtol=2e-6, atol=0.0)


SIZES = {"batch": {"batch": 0}, "length": {"length": 0}, "both": {"batch": 0, "length": 0},
         "packed": {"length": 0, "packed": True}}  # fmt: skip


@pytest.mark.parametrize("state", [True, False], ids=["state", "none"])
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize(("operator", "backend"), OPERATORS)
def test_nothing_is_a_call_too(operator: str, backend: str, sizes: str, state: bool) -> None:
    arguments = given(operator, backend, **SIZES[sizes], state=state)
    found = gradients(operator, backend, arguments, lambda x: x)
    assert found["out"].shape == arguments["v"].shape
    sequences = 2 if sizes in ("length", "packed") else 0
    assert found["state"].shape == (sequences, 2, 4, 4)
    expected = arguments["initial_state"] if state else torch.zeros(sequences, 2, 4, 4)
    torch.testing.assert_close(found["state"], expected, rtol=0.0, atol=0.0)
    for name, x in leaves(arguments).items():
        assert f"d{name}" not in found or found[f"d{name}"].shape == x.shape, name
    if sizes != "packed":
        own = torch.ones(arguments["v"].shape[0], 2, 4, 4)
        kept = own.clone()
        assert step(operator, backend, arguments, own).shape == arguments["v"].shape
        assert torch.equal(own, kept)


@pytest.mark.parametrize(("operator", "backend"), OPERATORS)
def test_no_sequences_are_a_call_too(operator: str, backend: str) -> None:
    arguments = given(operator, backend, packed=True, length=3)
    arguments["cu_seqlens"] = torch.zeros(1, dtype=torch.int32)
    arguments["initial_state"] = arguments["initial_state"][:0]
    arguments["v"][0] = math.nan  # of no sequence
    found = gradients(operator, backend, arguments, lambda x: x)
    assert found["state"].shape == (0, 2, 4, 4)
    assert found["out"].abs().max() == 0.0
    assert all(x.abs().max() == 0.0 for name, x in found.items() if name.startswith("d") and x.numel())


@pytest.mark.parametrize("layout", ["bhnd", "bnhd", "packed"])
@pytest.mark.parametrize(("operator", "backend"), OPERATORS)
def test_results_can_be_changed_in_place(operator: str, backend: str, layout: str) -> None:
    """``y += x``, and a step with the state that was returned, before the backward pass: its gradients stay."""
    arguments = given(operator, backend, packed=layout == "packed")
    if layout == "bnhd":
        for name in "qkv":
            arguments[name] = arguments[name].transpose(1, 2).contiguous().transpose(1, 2)
    found = []
    for changed in (False, True):
        own = leaves(arguments)
        out, state = call(operator, backend, arguments | own)
        loss = state.sum()
        if changed:
            out += 1.0
            out.mul_(1.0)
            token = given(operator, backend, state.shape[0], length=1, seed=5)
            step(operator, backend, token, state.detach())
            if backend != "reference":
                assert state.grad_fn is not None
        (out.float().sum() + loss).backward()
        found.append({name: x.grad for name, x in own.items()})
    torch.testing.assert_close(found[0], found[1], rtol=0.0, atol=0.0)


@pytest.mark.parametrize("backend", PYTHON)
@pytest.mark.parametrize("operator", [LINEAR, DELTA])
def test_autograd_sees_that_a_step_changed_its_state(operator: str, backend: str) -> None:
    """A state that a graph needs and a step then changed is an error of autograd, not a wrong gradient."""
    arguments = given(operator, backend, length=1)
    own = leaves(arguments)
    state = arguments["initial_state"]
    out = call(operator, backend, arguments | own | {"initial_state": state})[0]
    before = state._version  # pyright: ignore[reportPrivateUsage]
    step(operator, backend, arguments, state)
    assert state._version > before  # pyright: ignore[reportPrivateUsage]
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.parametrize("backend", PYTHON)
@pytest.mark.parametrize("operator", [LINEAR, DELTA])
def test_steps_refuse_a_state_whose_elements_share_memory(operator: str, backend: str) -> None:
    arguments = given(operator, backend, length=1)
    name = "not contiguous" if operator == LINEAR else "share memory"
    for state in (torch.zeros(1, 2, 4, 4).expand(2, 2, 4, 4), torch.zeros(99).as_strided((2, 2, 4, 4), (16, 8, 4, 1))):
        with pytest.raises(ValueError, match=f"{operator}_step: state .*{name}"):
            step(operator, backend, arguments, state)


WRONG_COUNTS = (-1, 2.5, "4", True, 10**400, 2**63, None, np.float64(2.0), torch.tensor(2))
COUNTED = {
    "batch": lambda x: linear_attention_state(x, 2, 3, 4),
    "heads": lambda x: linear_attention_state(1, x, 3, 4),
    "key_width": lambda x: linear_attention_state(1, 2, x, 4),
    "value_width": lambda x: linear_attention_state(1, 2, 3, x),
    "alibi_slopes: heads": alibi_slopes,
    "retention_slopes: heads": retention_slopes,
    "minimax_slopes: heads": lambda x: minimax_slopes(x, 1, 2),
    "minimax_slopes: layer": lambda x: minimax_slopes(4, x, 2),
    "minimax_slopes: layers": lambda x: minimax_slopes(4, 0, x),
}


@pytest.mark.parametrize("name", COUNTED)
def test_wrong_counts_are_named(name: str) -> None:
    for wrong in WRONG_COUNTS:
        with pytest.raises((TypeError, ValueError), match=f"{name} is"):
            COUNTED[name](wrong)
    assert COUNTED[name](np.int64(1)).dtype == torch.float32


def test_other_wrong_arguments_are_named() -> None:
    q = torch.zeros(1, 2, 3, 4)
    beta = torch.zeros(1, 2, 3)
    state = torch.zeros(1, 2, 4, 4)
    calls: list[tuple[str, Any]] = [
        ("normalize is", lambda: linear_attention_state(1, 2, 3, 4, normalize=1)),  # pyright: ignore[reportArgumentType]
        ("feature_map is", lambda: linear_attention_state(1, 2, 3, 4, feature_map="x")),
        ("dtype is", lambda: linear_attention_state(1, 2, 3, 4, dtype="x")),  # pyright: ignore[reportArgumentType]
        ("device is", lambda: linear_attention_state(1, 2, 3, 4, device="nowhere")),
        ("device is", lambda: alibi_slopes(2, device=2.5)),  # pyright: ignore[reportArgumentType]
        ("slopes is", lambda: lightning_attention(q, q, q, slopes=torch.ones(2, dtype=torch.int64))),
        ("slopes has", lambda: lightning_attention(q, q, q, slopes=torch.ones(3))),
        ("slopes has layout", lambda: lightning_attention(q, q, q, slopes=torch.ones(2).to_sparse())),
        ("slopes has", lambda: lightning_attention(q, q, q, slopes=torch.ones(1, 2))),
        ("slopes is", lambda: lightning_attention(q, q, q, slopes=0.5)),  # pyright: ignore[reportArgumentType]
        ("slopes has a value", lambda: lightning_attention(q, q, q, slopes=torch.tensor([1.0, math.nan]))),
        ("log_decay has shape", lambda: gated_delta_rule(q, q, q, beta, log_decay=torch.zeros(3))),
        ("log_decay has shape", lambda: gated_delta_rule_step(q, q, q, beta, state, log_decay=torch.zeros(1))),
        ("cu_seqlens is", lambda: linear_attention(q[0], q[0], q[0], cu_seqlens=[0, 2])),  # pyright: ignore[reportArgumentType]
        ("cu_seqlens is", lambda: gated_delta_rule(q[0], q[0], q[0], beta[0], cu_seqlens=torch.tensor([0, 2]))),
        ("state is", lambda: linear_attention_step(q, q, q, None)),  # pyright: ignore[reportArgumentType]
        ("state is float64", lambda: gated_delta_rule_step(q, q, q, beta, state.double())),
        ("state has shape", lambda: linear_attention_step(q, q, q, state.expand(3, 2, 4, 4).contiguous())),
    ]
    for message, run in calls:
        with pytest.raises((TypeError, ValueError), match=message):
            run()

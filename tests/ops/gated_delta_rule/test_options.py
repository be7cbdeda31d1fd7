"""gated_delta_rule against its oracle: every option, its edges, its step, and what it leaves alone."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from iokernels import UnsupportedError, autotune
from iokernels.ops.gated_delta_rule import case as gated_delta_rule
from iokernels.ops.gated_delta_rule import gated_delta_rule as rule
from iokernels.ops.gated_delta_rule import gated_delta_rule_step as step
from iokernels.ops.gated_delta_rule import portable
from iokernels.ops.gated_delta_rule.case import step as gated_delta_rule_step
from iokernels.ops.gated_delta_rule.case import traffic
from iokernels.ops.gated_delta_rule.triton.tuning import STEP, Config
from iokernels.testing import inputs
from iokernels.testing.case import Case, Point
from iokernels.testing.case.proof import Proof, prove_point

BACKENDS = ("torch", "triton")
CASE, STEP_CASE = gated_delta_rule.CASE, gated_delta_rule_step.CASE


@pytest.fixture(autouse=True)
def _several_segments(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """So that short sequences cross them in the backend ``torch``, and several blocks of columns in the step."""
    monkeypatch.setattr(portable, "SEGMENT_ELEMENTS", 1)
    with autotune.override(**{STEP: Config(32, 16, 4, 1)}):
        yield


def drawn(text: str, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0) -> dict[str, Any]:
    """The arguments of a call whose shape ``text`` describes."""
    made = CASE.make_inputs(CASE.vocabulary.parse(text), dtype, torch.device(device), seed)
    return {**{name: x.detach() for name, x in made.tensors.items()}, **made.options}


@pytest.mark.parametrize("point", CASE.check_points(), ids=lambda point: point.name)
@pytest.mark.parametrize(
    ("backend", "dtype"),
    [("torch", torch.float64), ("torch", torch.float32), *(("triton", x) for x in gated_delta_rule.HALVES),
     ("triton", torch.float32)],
    ids=str,
)  # fmt: skip
def test_every_option(backend: str, point: Point, dtype: torch.dtype, device: str) -> None:
    prove_point(CASE, backend, point.shape, dtype, device)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("point", [p for p in CASE.check_points() if p.quick], ids=lambda point: point.name)
def test_half_precision_of_torch(point: Point, dtype: torch.dtype, device: str) -> None:
    prove_point(CASE, "torch", point.shape, dtype, device)


@pytest.mark.parametrize("point", STEP_CASE.check_points(), ids=lambda point: point.name)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_step(backend: str, point: Point, dtype: torch.dtype, device: str) -> None:
    assert _judge(STEP_CASE, point, dtype, device, backend) == "ok"


def _judge(case: Case, point: Point, dtype: torch.dtype, device: str, backend: str) -> str:
    return str(Proof(case, point.shape, dtype, torch.device(device)).judge(lambda x: case.run(x, backend)).status)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_limits_see_a_slightly_wrong_result(backend: str, device: str) -> None:
    def wrong(given: Any) -> dict[str, Tensor]:
        tensors: dict[str, Any] = dict(given.tensors)
        tensors["beta"] = 1.01 * tensors["beta"]
        out, state = rule(**tensors, **given.options, return_state=True, backend=backend)
        return {"out": out, "final_state": state}

    point = CASE.check_points()[0]
    assert Proof(CASE, point.shape, torch.bfloat16, torch.device(device)).judge(wrong).status == "wrong"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("length", [500, 1024])
def test_long_sequences(backend: str, length: int, device: str) -> None:
    shape = CASE.vocabulary.parse(f"b=1,h=1,n={length},d=16,state=1,gate=0.01")
    dtype = torch.bfloat16 if backend == "triton" else torch.float32
    prove_point(CASE, backend, shape, dtype, device)


def test_against_a_truth_by_hand(device: str) -> None:
    """Two keys at right angles, the first of them written twice: its old value is gone, the other stays."""
    k = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]], device=device)[None, None]
    v = torch.tensor([[3.0], [5.0], [7.0]], device=device)[None, None]
    beta = torch.tensor([[[1.0, 1.0, 1.0]]], device=device)
    for backend in ("reference", *BACKENDS):
        out, state = rule(k, k, v, beta, scale=1.0, return_state=True, backend=backend)
        torch.testing.assert_close(out.flatten(), torch.tensor([3.0, 5.0, 7.0], device=device))
        torch.testing.assert_close(state.flatten(), torch.tensor([7.0, 5.0], device=device))
        # With beta = 2 the state is reflected: what it held under the key changes its sign.
        flipped = rule(
            k[:, :, :1], k[:, :, :1], 0 * v[:, :, :1], 2 * beta[:, :, :1], initial_state=state, return_state=True,
            backend=backend,
        )[1]  # fmt: skip
        torch.testing.assert_close(flipped.flatten(), torch.tensor([-7.0, 5.0], device=device))


def test_gradients_in_float64() -> None:
    given = drawn("b=1,h=2,hk=1,n=6,d=3,dv=2,state=1,gate=0.5", torch.float64)
    leaves = [x.requires_grad_() for x in given.values()]

    def call(*tensors: Tensor) -> Any:
        tensors_by_name: dict[str, Any] = dict(zip(given, tensors, strict=True))
        return rule(**tensors_by_name, return_state=True, backend="torch")

    assert torch.autograd.gradcheck(call, leaves)


def test_gradients_of_packed_sequences_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(portable, "CHUNK", 2)
    given = drawn("b=3,h=1,n=5,d=2,state=1,gate=0.5,packed=1,empty=1", torch.float64)
    offsets = given.pop("cu_seqlens")
    leaves = [x.requires_grad_() for x in given.values()]

    def call(*tensors: Tensor) -> Any:
        tensors_by_name: dict[str, Any] = dict(zip(given, tensors, strict=True))
        return rule(**tensors_by_name, cu_seqlens=offsets, return_state=True, backend="torch")

    assert torch.autograd.gradcheck(call, leaves)


@pytest.mark.parametrize("backend", BACKENDS)
def test_alike_keys_reflected_again_and_again(backend: str, device: str) -> None:
    """The hardest systems: one key, beta 2. Powers of such a matrix reach 2^60; the state only changes its sign."""
    given = drawn("b=1,h=1,n=130,d=16,gate=0", torch.float32, device)
    k = given["k"][:, :, :1].expand_as(given["k"])
    given.update(k=k, beta=torch.full_like(given["beta"], 2.0))
    truth = rule(**{name: x.double() for name, x in given.items()}, backend="reference")
    error = rule(**given, backend=backend).double() - truth
    assert error.norm() <= 1e-5 * truth.norm()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("cut", [1, 64, 70])
def test_parts_chained_by_the_state_are_the_whole(backend: str, cut: int, device: str) -> None:
    given = drawn("b=2,h=2,n=100,d=16,dv=24,state=1", torch.float32, device)
    whole, after = rule(**given, return_state=True, backend=backend)
    state = given.pop("initial_state")
    parts = []
    for rows in (slice(0, cut), slice(cut, 100)):
        part, state = rule(
            **{name: x[:, :, rows] for name, x in given.items()}, initial_state=state, return_state=True,
            backend=backend,
        )  # fmt: skip
        parts.append(part)
    torch.testing.assert_close(torch.cat(parts, 2), whole, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(state, after, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_a_chunk_and_then_steps_are_the_whole(backend: str, device: str) -> None:
    given = drawn("b=2,h=2,n=70,d=16,dv=24,state=1", torch.float32, device)
    whole, after = rule(**given, return_state=True, backend=backend)
    first = given.pop("initial_state")
    kept = first.clone()
    start = {name: x[:, :, :66] for name, x in given.items()}
    out, state = rule(**start, initial_state=first, return_state=True, backend=backend)
    assert torch.equal(first, kept), "an initial state is read only"
    outs = [out]
    for rows in (slice(66, 67), slice(67, 70)):
        held = state.data_ptr()
        outs.append(step(**{name: x[:, :, rows] for name, x in given.items()}, state=state, backend=backend))
        assert state.data_ptr() == held
    torch.testing.assert_close(torch.cat(outs, 2), whole, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(state, after, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_strong_decay_forgets_and_costs_no_accuracy_after(backend: str, device: str) -> None:
    given = drawn("b=1,h=1,n=40,d=16,state=1,gate=0.5", torch.float32, device)
    given["log_decay"][:, :, 20] = -1000.0
    out = rule(**given, backend=backend)
    tail = {name: x[:, :, 20:] for name, x in given.items() if name != "initial_state"}
    fresh = rule(**{name: x.double() for name, x in tail.items()}, backend="reference")
    error = (out[:, :, 20:].double() - fresh).norm() / fresh.norm()
    assert error <= 1e-6


@pytest.mark.parametrize("layout", ["bnhd", "seq_major", "padded", "strided", "expanded"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_layouts(backend: str, layout: Any, device: str) -> None:
    """Every element beside the tensors is NaN: whoever reads it shows it."""
    given = drawn("b=2,h=4,n=40,d=16,dv=24,state=1", torch.float32, device)
    if layout == "expanded":
        given = {name: x[:, :1].expand_as(x) for name, x in given.items()}
    truth = _all(given, "reference")
    placed = {}
    for name, x in given.items():
        four = x if x.dim() == 4 else x[..., None]
        placed[name] = inputs.poisoned_view(four, layout).reshape(x.shape) if x.dim() == 4 else x
    found = _all(placed, backend)
    for one, other in zip(found, truth, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    out, v = found[0], placed["v"]
    assert (out.transpose(1, 2) if v.stride(1) < v.stride(2) else out).is_contiguous(), "out follows the order of v"


def _all(given: dict[str, Any], backend: str) -> list[Tensor]:
    leaves = {name: x.detach().requires_grad_() for name, x in given.items()}
    out, state = rule(**leaves, return_state=True, backend=backend)
    return [out.detach(), state.detach(), *torch.autograd.grad(out.sin().sum() + state.cos().sum(), [*leaves.values()])]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(0, 2, 5), (1, 2, 0), (2, 0, 5)], ids=str)
def test_empty(backend: str, shape: tuple[int, int, int], device: str) -> None:
    batch, heads, length = shape
    q = torch.randn(batch, heads or 1, length, 16, device=device)[:, :heads]
    if heads == 0:
        with pytest.raises(ValueError, match="k has 0 heads"):
            rule(q, q, q, q[..., 0], backend=backend)
        return
    first = torch.randn(batch, heads, 16, 16, device=device)
    q.requires_grad_()
    first.requires_grad_()
    out, state = rule(q, q, q, q[..., 0], initial_state=first, return_state=True, backend=backend)
    assert out.shape == q.shape
    torch.testing.assert_close(state, first)
    (out.sum() + state.sum()).backward()
    assert first.grad is not None
    assert (first.grad == 1).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_of_no_packed_sequence(backend: str, device: str) -> None:
    given = drawn("b=3,h=2,n=30,d=16,packed=1", torch.float32, device)
    given["cu_seqlens"] = torch.tensor([0, 17, 17, 18], dtype=torch.int32, device=device)
    leaves = {name: x.requires_grad_() for name, x in given.items() if name != "cu_seqlens"}
    out, state = rule(**given, return_state=True, backend=backend)
    assert (out[18:] == 0).all()
    assert (state[1] == 0).all()
    assert (state[[0, 2]] != 0).any()
    for gradient in torch.autograd.grad(out.sum() + state.sum(), [*leaves.values()]):
        assert gradient.isfinite().all()
        assert (gradient[18:] == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_what_is_asked_for_has_a_gradient(backend: str, device: str) -> None:
    given = drawn("b=1,h=2,n=20,d=16", torch.float32, device)
    given["v"].requires_grad_()
    rule(**given, backend=backend).sum().backward()
    assert given["v"].grad is not None
    assert all(x.grad is None for name, x in given.items() if name != "v")
    with torch.no_grad():
        assert not rule(**given, backend=backend).requires_grad


def test_autocast() -> None:
    given = drawn("b=1,h=2,n=20,d=16")
    with torch.autocast("cpu", torch.bfloat16):
        assert rule(**given).dtype == torch.bfloat16


def test_second_derivatives_are_refused_by_name() -> None:
    given = drawn("b=1,h=1,n=5,d=4")
    k = given.pop("k").requires_grad_()
    (gradient,) = torch.autograd.grad(rule(k=k, **given).square().sum(), k, create_graph=True)
    with pytest.raises(UnsupportedError, match="gated_delta_rule: the gradients of this backend cannot"):
        gradient.sum().backward()


def test_time_is_linear_in_memory_too() -> None:
    """What the backend ``torch`` keeps for its backward pass does not grow with the square of the length."""
    given = drawn("b=1,h=1,n=256,d=16")
    given["v"].requires_grad_()
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        rule(**given)
    assert sum(kept) <= 4 * 256 * 16


def refused(**changes: Any) -> Any:
    given = {**drawn("b=2,h=4,hk=2,n=5,d=8,dv=6"), **changes}
    return rule(**given)


OFFSETS = torch.tensor([0, 5], dtype=torch.int32)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"k": torch.ones(2, 2, 5, 9)}, ValueError, r"k has .*dimension 3 \(K\) must be 8, from the K of q"),
        ({"v": torch.ones(2, 3, 5, 6), "beta": torch.ones(2, 3, 5), "log_decay": None}, ValueError,
         r"k has 2 heads and v has 3; the heads of k must divide those of v"),
        ({"beta": torch.ones(2, 4, 6)}, ValueError, r"beta has .*dimension 2 \(N\) must be 5"),
        ({"beta": torch.ones(2, 4, 5).int()}, TypeError, r"beta is int32; it must be float16"),
        ({"beta": None}, TypeError, r"beta is None; it must be a torch\.Tensor"),
        ({"k": torch.ones(2, 2, 5, 8).half()}, TypeError, r"k is float16; it must be float32, as q is"),
        ({"log_decay": torch.zeros(3)}, ValueError, r"log_decay has .*dimension 1 \(H\) must be 4"),
        ({"log_decay": torch.full((2, 4, 5), 0.5)}, ValueError, r"log_decay is 0\.5 somewhere; it must be at most 0"),
        ({"log_decay": torch.full((4,), math.nan)}, ValueError, r"log_decay is nan somewhere"),
        ({"log_decay": -0.5}, TypeError, r"log_decay is float; it must be a torch\.Tensor"),
        ({"initial_state": torch.zeros(2, 4, 6, 8)}, ValueError, r"initial_state has .*\(K\) must be 8, from the K"),
        ({"initial_state": torch.zeros(2, 4, 8, 6).half()}, TypeError, r"initial_state is float16; it must be float32"),
        ({"initial_state": torch.zeros(2, 4, 8, 6).double()}, TypeError,
         r"initial_state is float64; it must be float32 where q is float32"),
        ({"scale": math.inf}, ValueError, r"scale is inf; it must be finite"),
        ({"return_state": 1}, TypeError, r"return_state is int; it must be a bool"),
        ({"cu_seqlens": OFFSETS}, ValueError, r"q has 4 dimensions, .*; it must have 3: \[T, Hk, K\]"),
        ({"cu_seqlens": [0, 5]}, TypeError, r"cu_seqlens is list; it must be a torch\.Tensor"),
        ({"backend": "cuda"}, UnsupportedError, r"backend 'cuda' cannot run this call: it has no such implementation"),
        ({"backend": "triton", **{x: torch.ones(1, 1, 2, 300) for x in "qk"}, "v": torch.ones(1, 1, 2, 4),
          "beta": torch.ones(1, 1, 2), "log_decay": None}, UnsupportedError, r"backend 'triton' .*: K is 300, and"),
    ],
    ids=str,
)  # fmt: skip
def test_refused(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^gated_delta_rule: {message}"):
        refused(**change)


@pytest.mark.parametrize(
    ("offsets", "message"),
    [
        ([1, 5], "cu_seqlens starts with 1; it must start with 0"),
        ([0, 4, 3], r"cu_seqlens is \[0, 4, 3\]; it must not decrease"),
        ([0, 99], "cu_seqlens ends with 99, past the"),
        ([], "cu_seqlens is empty"),
    ],
)
def test_refused_offsets(offsets: list[int], message: str) -> None:
    given = drawn("b=2,h=2,n=20,d=8,packed=1")
    given["cu_seqlens"] = torch.tensor(offsets, dtype=torch.int32)
    with pytest.raises(ValueError, match=f"^gated_delta_rule: {message}"):
        rule(**given)


def test_refused_steps() -> None:
    given = drawn("b=1,h=2,n=1,d=8")
    with pytest.raises(TypeError, match=r"^gated_delta_rule_step: state is float64; it must be float32 where"):
        step(**given, state=torch.zeros(1, 2, 8, 8).double())
    with pytest.raises(ValueError, match=r"state has .*must be 8"):
        step(**given, state=torch.zeros(1, 2, 8, 9))
    given["q"].requires_grad_()
    with pytest.raises(ValueError, match=r"q requires a gradient, and the step has none"):
        step(**given, state=torch.zeros(1, 2, 8, 8))


def test_keys_are_not_normalised(device: str) -> None:
    """What is documented: nothing is done to k behind the caller's back."""
    given = drawn("b=1,h=1,n=30,d=16", torch.float32, device)
    doubled = rule(**{**given, "k": 0.5 * given["k"]}, backend="torch")
    torch.testing.assert_close(doubled, rule(**{**given, "k": 0.5 * given["k"]}, backend="reference"))
    normal = rule(**{**given, "k": F.normalize(given["k"], dim=-1)}, backend="torch")
    assert (doubled - normal).abs().max() > 0.1


def test_bytes_by_hand() -> None:
    """The account of the forward walk, without using its code: two blocks of columns, one chunk and a bit."""
    shape = CASE.vocabulary.parse("b=1,h=1,n=70,d=32")
    found = traffic.accounts(shape, torch.float16, traffic.TILES)
    qk, v, inverse, numbers, state = 2 * 70 * 32 * 2, 70 * 32 * 2, 70 * 64 * 4, 2 * 70 * 4, 32 * 32 * 4
    assert found["gated_delta_rule_fwd_kernel"].model == (v + 2 * (qk + inverse + numbers), v + state)
    assert found["gated_delta_rule_inverse_kernel"].model == (qk // 2 + numbers, inverse)

"""short_conv against its oracle: every option, and the edges of short filters.

The kernels run with small tiles, so that short sequences cross many of them.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from iokernels import short_conv, short_conv_step
from iokernels.ops.short_conv.case import CASE
from iokernels.testing.budget import check_relative_rms
from iokernels.testing.case import Point
from iokernels.testing.case.proof import Proof
from iokernels.testing.inputs import poisoned_view

BACKENDS = ("torch", "triton")
LIMITS = {torch.float16: 1.5e-3, torch.bfloat16: 3e-3, torch.float32: 2e-6}
assert CASE.accounts is not None
SMALL_TILES = CASE.accounts.test_configs


pytestmark = pytest.mark.tiles(**SMALL_TILES)


PROOFS = [
    pytest.param(point, dtype, id=f"{point.name}-{dtype}")
    for point in CASE.check_points()
    for dtype in LIMITS
    if point.quick or dtype != torch.float16
]


@pytest.mark.parametrize(("point", "dtype"), PROOFS)
def test_backends_are_within_their_limits(point: Point, dtype: torch.dtype, device: str) -> None:
    proof = Proof(CASE, point.shape, dtype, torch.device(device))
    for backend in BACKENDS:
        verdict = proof.judge(lambda inputs, backend=backend: CASE.run(inputs, backend))
        verdict.require_ok(f"{backend}, {dtype}, {point.shape}")


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("width", [4, 13])
def test_every_row_is_within_the_limit(width: int, dtype: torch.dtype, device: str) -> None:
    torch.manual_seed(0)
    x, dout = (torch.randn(1, 6, 200, device=device).to(dtype) for _ in range(2))
    weight = (torch.randn(6, width, device=device) * width**-0.5).to(dtype)
    amplitudes = torch.logspace(-4, 3, 6, device=device)[:, None].to(dtype)
    for backend in BACKENDS:
        rows = []
        for name, kind in ((backend, dtype), ("reference", torch.float64)):
            leaf = (x * amplitudes).to(kind).requires_grad_()
            out = short_conv(leaf, weight.to(kind), activation="silu", backend=name)
            rows.append([out, *torch.autograd.grad(out, leaf, dout.to(kind))])
        for what, actual, expected in zip(("out", "dx"), *rows, strict=True):
            check_relative_rms(actual, expected, limit=LIMITS[dtype], what=f"{what} of {backend}")


@pytest.mark.parametrize("wrong", ["zeros", "shifted", "tap"])
def test_a_wrong_result_fails(wrong: str, device: str) -> None:
    proof = Proof(CASE, CASE.check_points()[0].shape, torch.bfloat16, torch.device(device))

    def run(inputs: Any) -> dict[str, Tensor]:
        given = dict(inputs.tensors)
        if wrong == "tap":
            given["weight"] = given["weight"] * torch.tensor([1.0, 1.0, 1.0, 1.01], dtype=torch.bfloat16).to(device)
        out = short_conv(**given, **inputs.options, backend="torch")
        return {"out": out * 0 if wrong == "zeros" else out.roll(1, 2) if wrong == "shifted" else out}

    assert proof.judge(run).status == "wrong"


@pytest.mark.parametrize(
    ("width", "padding"),
    [
        *itertools.product([1, 2, 4, 5, 11], ["causal", "same", "valid"]),
        *itertools.product([2, 4, 5, 11], [1, (0, 1)]),
    ],
)
def test_equals_conv1d(width: int, padding: Any) -> None:
    torch.manual_seed(width)
    x = torch.randn(2, 6, 23, dtype=torch.float64, requires_grad=True)
    conv = torch.nn.Conv1d(6, 6, width, groups=6, dtype=torch.float64)
    around = {"causal": (width - 1, 0), "valid": (0, 0), 1: (1, 1), (0, 1): (0, 1)}
    around["same"] = ((width - 1) // 2, width - 1 - (width - 1) // 2)
    expected = F.silu(conv(F.pad(x, around[padding])))
    assert conv.bias is not None
    actual = short_conv(x, conv.weight.squeeze(1), bias=conv.bias, activation="silu", padding=padding)
    leaves = [x, conv.weight, conv.bias]
    for a, b in zip(
        [actual, *torch.autograd.grad(actual.sin().sum(), leaves)],
        [expected, *torch.autograd.grad(expected.sin().sum(), leaves)],
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_same_padding_is_that_of_torch() -> None:
    x = torch.randn(1, 3, 12, dtype=torch.float64)
    for width in (2, 3, 4, 7):
        weight = torch.randn(3, 1, width, dtype=torch.float64)
        # torch pads in a copy where the two sides differ, and says so.
        expected = F.conv1d(F.pad(x, ((width - 1) // 2, width // 2)), weight, groups=3)
        torch.testing.assert_close(short_conv(x, weight.squeeze(1), padding="same"), expected)


@pytest.mark.parametrize("width", [4, 10])
@pytest.mark.parametrize("backend", BACKENDS)
def test_chunks_and_steps_equal_the_whole(backend: str, width: int, device: str) -> None:
    torch.manual_seed(0)
    x, weight, bias = (torch.randn(shape, device=device) for shape in ((2, 5, 31), (5, width), (5,)))
    start = torch.randn(2, 5, width - 1, device=device)
    options: dict[str, Any] = {"bias": bias, "activation": "silu", "backend": backend}
    whole, final = short_conv(x, weight, initial_state=start, return_state=True, **options)
    state, outs = start, []
    for chunk in x[:, :, :27].split([9, 1, 0, 2, 15], dim=2):
        out, state = short_conv(chunk, weight, initial_state=state, return_state=True, **options)
        outs.append(out)
    for i in range(27, 31):
        before = state.clone()
        outs.append(short_conv_step(x[:, :, i], weight, state, **options)[:, :, None])
        assert not torch.equal(before, state)
    torch.testing.assert_close(torch.cat(outs, 2), whole, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(state, final, rtol=0, atol=0)


@pytest.mark.parametrize("layout", ["contiguous", "bnhd", "padded", "strided", "expanded"])
@pytest.mark.parametrize("width", [3, 9])
def test_layouts_among_poison(layout: Any, width: int, device: str) -> None:
    torch.manual_seed(0)
    values = [torch.randn(2, 6, length, device=device) for length in (21, width - 1, 21)]
    if layout == "expanded":  # one sequence for all
        values = [x[:1].expand_as(x) for x in values]
    x, state, dout = (poisoned_view(x, layout) for x in values)
    weight, bias = poisoned_view(torch.randn(6, width, device=device), "strided"), torch.randn(6, device=device)
    results = []
    for backend, given in (("triton", (x, state, dout)), ("reference", [v.double() for v in values])):
        x_, state_, dout_ = (v.detach() for v in given)
        leaves = [x_.requires_grad_(), weight.detach().to(x_.dtype).requires_grad_(), state_.requires_grad_()]
        out, final = short_conv(
            leaves[0], leaves[1], bias=bias.to(x_.dtype), activation="silu", initial_state=leaves[2],
            return_state=True, backend=backend,
        )  # fmt: skip
        results.append([out, final, *torch.autograd.grad([out, final], leaves, [dout_, final.detach().clone()])])
    for name, actual, expected in zip(("out", "final", "dx", "dweight", "dstate"), *results, strict=True):
        check_relative_rms(actual, expected, limit=2e-6, what=name, dim=(0, 1, 2) if actual.dim() == 3 else (0, 1))


def test_output_keeps_the_memory_order(device: str) -> None:
    x = torch.randn(2, 9, 6, device=device).transpose(1, 2)
    for backend in BACKENDS:
        out, state = short_conv(x, torch.randn(6, 4, device=device), return_state=True, backend=backend)
        assert out.transpose(1, 2).is_contiguous()
        assert state.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("width", [1, 4, 33])
def test_step_with_slots(backend: str, width: int, dtype: torch.dtype, device: str) -> None:
    torch.manual_seed(0)
    x, weight, cache = (
        torch.randn(shape, device=device).to(dtype) for shape in ((4, 7), (7, width), (6, 7, width - 1))
    )
    bias = torch.randn(7, device=device)
    indices = torch.tensor([5, -1, 0, 2], dtype=torch.int32, device=device)
    state = poisoned_view(cache, "strided")
    out = short_conv_step(
        x, weight, state, bias=bias, activation="swish", state_indices=indices, backend=backend
    )  # fmt: skip
    for row, slot in enumerate(indices.tolist()):
        if slot < 0:
            assert not out[row].any()
            continue
        expected, final = short_conv(
            x[row : row + 1, :, None].double(), weight.double(), bias=bias.double(), activation="silu",
            initial_state=cache[slot : slot + 1].double(), return_state=True, backend="reference",
        )  # fmt: skip
        check_relative_rms(out[row], expected[0, :, 0], limit=LIMITS[dtype], what="out")
        assert torch.equal(state[slot].double(), final[0])
    untouched = [slot for slot in range(6) if slot not in indices.tolist()]
    assert torch.equal(state[untouched], cache[untouched])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_filter_in_single_precision_with_half_inputs(backend: str, device: str) -> None:
    torch.manual_seed(0)
    for width in (4, 12):
        x = torch.randn(2, 6, 40, device=device).bfloat16().requires_grad_()
        weight = (torch.randn(6, width, device=device) * width**-0.5).requires_grad_()
        bias = torch.randn(6, device=device, requires_grad=True)
        out = short_conv(x, weight, bias=bias, activation="silu", backend=backend)
        leaves = [t.detach().double().requires_grad_() for t in (x, weight, bias)]
        truth = short_conv(leaves[0], leaves[1], bias=leaves[2], activation="silu", backend="reference")
        dout = torch.randn_like(out)
        found = torch.autograd.grad(out, [x, weight, bias], dout)
        expected = torch.autograd.grad(truth, leaves, dout.double())
        assert [g.dtype for g in found] == [torch.bfloat16, torch.float32, torch.float32]
        for actual, right in zip([out, *found], [truth, *expected], strict=True):
            check_relative_rms(actual.flatten(), right.flatten(), limit=3e-3, what="single")


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradient_of_one_output_alone(backend: str, device: str) -> None:
    torch.manual_seed(0)
    for width in (4, 10):
        leaves = [torch.randn(s, device=device, requires_grad=True) for s in ((2, 3, 5), (3, width), (2, 3, width - 1))]
        for which in (0, 1):
            found = []
            for name in (backend, "reference"):
                result = short_conv(leaves[0], leaves[1], initial_state=leaves[2], return_state=True, backend=name)
                found.append(torch.autograd.grad(result[which].sin().sum(), leaves, allow_unused=True))
            for actual, expected in zip(*found, strict=True):
                if expected is None:  # of the filter, on which the state does not depend
                    assert actual is not None
                    assert not actual.any()
                else:
                    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2)])
def test_some_inputs_need_no_gradient(wanted: tuple[int, ...], device: str) -> None:
    torch.manual_seed(0)
    for width in (3, 9):
        for silu in (None, "silu"):
            tensors = [torch.randn(s, device=device) for s in ((2, 3, 20), (3, width), (3,))]
            leaves = [tensors[i].requires_grad_() for i in wanted]
            grads = [
                torch.autograd.grad(
                    short_conv(tensors[0], tensors[1], bias=tensors[2], activation=silu, backend=name).sin().sum(),
                    leaves,
                )
                for name in ("triton", "reference")
            ]
            for actual, expected in zip(*grads, strict=True):
                torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("width", [4, 10])
def test_nothing_at_all(backend: str, width: int, device: str) -> None:
    """No sequences, and packed rows of no sequence: zeros, and gradients of zero."""
    weight = torch.randn(3, width, device=device, requires_grad=True)
    none = torch.zeros(1, dtype=torch.int32, device=device)
    packed: dict[str, Any] = {"cu_seqlens": none}
    for x, options in ((torch.randn(0, 3, 5, device=device), {}), (torch.randn(5, 3, device=device), packed)):
        leaf = x.requires_grad_()
        out, final = short_conv(leaf, weight, return_state=True, backend=backend, **options)
        assert out.shape == x.shape
        assert not out.any()
        assert final.shape == (0, 3, width - 1)
        assert all(not g.any() for g in torch.autograd.grad(out.sum(), [leaf, weight]))


@pytest.mark.parametrize("width", [4, 10])
def test_offsets_of_64_bits_change_nothing(width: int, device: str, monkeypatch: Any) -> None:
    """As where a tile spans more than 2^31 elements, which no test can allocate."""
    from iokernels.ops.short_conv.triton import launch as triton_launch

    leaves = [torch.randn(s, device=device, requires_grad=True) for s in ((2, 3, 20), (3, width), (2, 3, width - 1))]
    results = []
    for wide in (False, True):
        monkeypatch.setattr(triton_launch, "is_wide", lambda *_, wide=wide: wide)
        found = short_conv(
            leaves[0], leaves[1], initial_state=leaves[2], activation="silu", return_state=True, backend="triton"
        )
        results.append([*found, *torch.autograd.grad(found, leaves, [torch.ones_like(part) for part in found])])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))

"""short_conv inside PyTorch's machinery, its errors, its traffic and its launch parameters."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, given, seed, settings
from torch import Tensor
from torch._dynamo.testing import CompileCounter

import iokernels
from iokernels import autotune, short_conv, short_conv_step
from iokernels.ops.short_conv.case import CASE
from iokernels.ops.short_conv.op import backward_op, forward_op, step_op
from iokernels.ops.short_conv.options import ShortOptions
from iokernels.ops.short_conv.triton.tuning import KERNELS, TUNABLES, ShortProblem, default
from iokernels.runtime.device import named
from iokernels.testing.inputs import poisoned_view
from iokernels.testing.tracer import trace

from ...tiers import examples

# Dynamo makes an instance of every autograd.Function that it traces, and PyTorch warns of instances.
pytestmark = pytest.mark.filterwarnings("ignore:.*Function'> should not be instantiated:DeprecationWarning")
assert CASE.accounts is not None
SMALL_TILES = CASE.accounts.test_configs


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def packing(*lengths: int) -> Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)


OPTION_SETS: dict[str, ShortOptions] = {
    "plain": ShortOptions(left=3),
    "everything": ShortOptions(torch.randn(5), torch.randn(2, 5, 3), None, 3, 0, True, True),
    "same": ShortOptions(left=1, right=2),
    "packed": ShortOptions(torch.randn(5), torch.randn(3, 5, 3), packing(4, 0, 7), 3, 0, True, True),
}


@pytest.mark.parametrize("inside", [False, True], ids=["channels outside", "channels inside"])
@pytest.mark.parametrize("name", OPTION_SETS)
def test_opcheck(name: str, inside: bool) -> None:
    options = OPTION_SETS[name]
    batch = 1 if name == "packed" else 2
    x = torch.randn(batch, 11, 5).transpose(1, 2) if inside else torch.randn(batch, 5, 11)
    weight = torch.randn(5, 4)
    torch.library.opcheck(forward_op, (x, weight, "torch", *options))
    out, final = forward_op(x, weight, "torch", *options)
    for dout, needs in ((out, [True, True, options.bias is not None, options.initial_state is not None]),
                        (out, [False, True, False, False])):  # fmt: skip
        dfinal = final if options.return_state else None
        torch.library.opcheck(backward_op, (dout, dfinal, x, weight, needs, "torch", *options))
    schema = [argument.name for argument in forward_op._schema.arguments][3:]
    assert schema == list(ShortOptions._fields)
    types = [str(argument.type) for argument in forward_op._schema.arguments][3:]
    assert ["Tensor" in kind for kind in types].index(False) == 3


def test_opcheck_of_the_step() -> None:
    indices = torch.tensor([2, -1], dtype=torch.int32)
    for slots in (None, indices):
        state = torch.randn(2 if slots is None else 4, 5, 3)
        torch.library.opcheck(
            step_op, (torch.randn(2, 5), torch.randn(5, 4), state, torch.randn(5), slots, True, "torch")
        )


@pytest.mark.parametrize("name", ["plain", "states", "same", "packed"])
def test_compile_makes_one_graph_for_three_lengths(name: str) -> None:
    torch.manual_seed(0)
    counter = CompileCounter()
    compiled = torch.compile(short_conv, fullgraph=True, dynamic=True, backend=counter)
    weight = torch.randn(6, 4, requires_grad=True)
    for length in (17, 33, 50):
        options: dict[str, Any] = {"activation": "silu"}
        x = torch.randn(2, 6, length, requires_grad=True)
        if name == "states":
            options |= {"initial_state": torch.randn(2, 6, 3, requires_grad=True), "return_state": True}
        elif name == "same":
            options["padding"] = "same"
        elif name == "packed":
            x = torch.randn(length, 6, requires_grad=True)
            options["cu_seqlens"] = packing(5, length - 9, 4)
        results = []
        for function in (compiled, short_conv):
            found = function(x, weight, **options)
            found = found if isinstance(found, tuple) else (found,)
            loss = sum((part.sin().sum() for part in found), torch.zeros(()))
            results.append([*found, *torch.autograd.grad(loss, [x, weight])])
        for actual, expected in zip(*results, strict=True):
            torch.testing.assert_close(actual, expected)
    assert counter.frame_count == 1


def test_compiled_step_writes_its_state() -> None:
    torch.manual_seed(0)
    compiled = torch.compile(short_conv_step, fullgraph=True, backend="aot_eager")
    x, weight, states = torch.randn(2, 5), torch.randn(5, 4, requires_grad=True), [torch.randn(2, 5, 3)] * 2
    states = [state.clone() for state in states]
    outs = [step(x, weight, state) for step, state in zip((compiled, short_conv_step), states, strict=True)]
    torch.testing.assert_close(*outs)
    torch.testing.assert_close(*states)
    torch.testing.assert_close(states[0][:, :, -1], x)
    assert not outs[1].requires_grad


def test_autocast_and_second_derivatives() -> None:
    x, weight = torch.randn(2, 3, 9, requires_grad=True), torch.randn(3, 4, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, state = short_conv(x, weight, initial_state=torch.randn(2, 3, 3), return_state=True)
    assert out.dtype == state.dtype == torch.bfloat16
    (dx,) = torch.autograd.grad(short_conv(x, weight, activation="silu").sum(), x, create_graph=True)
    with pytest.raises(iokernels.UnsupportedError, match='backend="reference" supports gradients of any order'):
        torch.autograd.grad(dx.sum(), weight)
    leaves = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((1, 2, 4), (2, 3))]
    assert torch.autograd.gradgradcheck(
        lambda x, w: short_conv(x, w, activation="silu", backend="reference"), leaves
    )  # fmt: skip


X, WEIGHT = torch.randn(2, 3, 8), torch.randn(3, 4)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x": X[0]}, ValueError, r"x has 2 dimensions, shape \[3, 8\]; it must have 3: \[B, H, N\]"),
        ({"x": X.long()}, TypeError, "x is int64"),
        ({"weight": WEIGHT[:2]}, ValueError, r"weight has shape \[2, 4\]; its dimension 0 \(H\) must be 3"),
        ({"weight": WEIGHT[:, :0]}, ValueError, "it has no taps"),
        ({"weight": WEIGHT.double()}, TypeError, "weight is float64; it must be float32"),
        ({"bias": torch.randn(4)}, ValueError, "bias has shape"),
        ({"activation": "relu"}, ValueError, "activation is 'relu'"),
        ({"padding": "full"}, TypeError, "padding is 'full'"),
        ({"padding": 4}, ValueError, r"padding is 4; each side must be from 0 to 3"),
        ({"x": X[:, :, :2], "padding": "valid"}, ValueError, "too few for the 4 taps"),
        ({"padding": "same", "return_state": True}, ValueError, "need causal padding"),
        ({"return_state": 1}, TypeError, "return_state is int"),
        ({"initial_state": torch.randn(2, 3, 4)}, ValueError, "initial_state has shape"),
        ({"initial_state": torch.randn(2, 3, 3).half()}, TypeError, "initial_state is float16"),
        ({"x": X[0].t(), "cu_seqlens": packing(4, 5)}, ValueError, "past the 8 packed rows"),
        ({"x": X[0].t(), "cu_seqlens": torch.tensor([1, 8], dtype=torch.int32)}, ValueError, "must start with 0"),
        ({"x": X[0].t(), "cu_seqlens": packing(6, -2)}, ValueError, "must not decrease"),
        ({"x": X[0].t(), "cu_seqlens": packing(8).long()}, TypeError, "cu_seqlens is int64"),
        ({"x": X[0].t(), "cu_seqlens": packing(8), "padding": "valid"}, ValueError, "must sum to W - 1"),
        ({"x": X.double(), "weight": WEIGHT.double(), "backend": "triton"}, iokernels.UnsupportedError, "not float64"),
        ({"weight": torch.randn(3, 129), "backend": "triton"}, iokernels.UnsupportedError, "129 taps"),
        ({"backend": "cuda"}, iokernels.UnsupportedError, "no such implementation"),
    ],
)  # fmt: skip
def test_refusals(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    given: dict[str, Any] = {"x": X, "weight": WEIGHT} | changes
    with pytest.raises(error, match=message):
        short_conv(**given)


def test_refusals_of_the_step() -> None:
    state = torch.randn(2, 3, 3)
    for changes, message in (
        ({"state": torch.randn(2, 3, 4)}, "state has shape"),
        ({"state": torch.randn(3, 3, 3)}, "state has shape"),
        ({"state_indices": torch.tensor([0, 2], dtype=torch.int32)}, "names row 2 of 2 states"),
        ({"state_indices": torch.tensor([1, 1], dtype=torch.int32)}, "must differ"),
    ):
        given: dict[str, Any] = {"x": X[:, :, 0], "weight": WEIGHT, "state": state} | changes
        with pytest.raises(ValueError, match=message):
            short_conv_step(**given)


@st.composite
def calls(draw: st.DrawFn) -> dict[str, Any]:
    """Shapes, layouts and options of one call; everything may come together."""
    packed = draw(st.booleans())
    width = draw(st.sampled_from([1, 2, 4, 7, 12]))
    return {
        "lengths": draw(st.lists(st.integers(0, 40), min_size=1, max_size=3)) if packed else [draw(st.integers(1, 40))],
        "packed": packed,
        "channels": draw(st.integers(1, 7)),
        "width": width,
        "padding": draw(st.sampled_from(["causal", "same"])),
        "silu": draw(st.booleans()),
        "bias": draw(st.booleans()),
        "state": draw(st.booleans()),
        "layout": draw(st.sampled_from(["contiguous", "bnhd", "padded", "strided"])),
        "dtype": draw(st.sampled_from([torch.float16, torch.bfloat16, torch.float32])),
    }


@pytest.mark.interpreted
def test_no_byte_outside_the_tensors_and_no_atomics() -> None:
    @seed(0)
    @settings(max_examples=examples(15), deadline=None, database=None, suppress_health_check=(HealthCheck.too_slow,))
    @given(calls())
    def check(call: dict[str, Any]) -> None:
        width, channels, lengths = call["width"], call["channels"], call["lengths"]
        batch = len(lengths) if call["packed"] else 2
        x = torch.randn(1 if call["packed"] else 2, channels, sum(lengths)).to(call["dtype"])
        x = poisoned_view(x, call["layout"]).requires_grad_()
        weight = torch.randn(channels, width, requires_grad=True)
        options: dict[str, Any] = {"activation": "silu" if call["silu"] else None, "padding": call["padding"]}
        options["bias"] = torch.randn(channels, requires_grad=True) if call["bias"] else None
        if call["packed"]:
            options["cu_seqlens"] = packing(*lengths)
        if call["state"] and call["padding"] == "causal":
            state = torch.randn(batch, channels, width - 1).to(call["dtype"])
            options |= {"initial_state": state.requires_grad_(), "return_state": True}
        with autotune.override(**SMALL_TILES), trace() as traced:
            found = short_conv(x[0].t() if call["packed"] else x, weight, **options, backend="triton")
            found = found if isinstance(found, tuple) else (found,)
            torch.autograd.backward(found, [torch.randn_like(part) for part in found])
        assert traced.bytes().atomic == 0
        assert all(part.isfinite().all() for part in found)

    check()


@pytest.mark.interpreted
@pytest.mark.parametrize("width", [4, 9])
def test_offsets_out_of_range_stay_inside_the_tensors(width: int) -> None:
    """On a GPU nobody reads the offsets before the kernels do, so whatever they say must do no harm."""
    from iokernels.ops.short_conv.options import ShortNeeds
    from iokernels.ops.short_conv.triton import launch as triton_launch

    x, weight = torch.randn(1, 3, 40), torch.randn(3, width)
    for bad in ([0, 99, 40], [-5, 20, 10], [30, 10, 2**30], [0, 0, -(2**31)]):
        offsets = torch.tensor(bad, dtype=torch.int32)
        options = ShortOptions(torch.randn(3), torch.randn(2, 3, width - 1), offsets, width - 1, 0, True, True)
        with autotune.override(**SMALL_TILES), trace():
            out, final = triton_launch.forward(x, weight, options)
            needs = ShortNeeds(True, True, True, True)
            grads = triton_launch.backward(out, final, x, weight, options, needs)
        assert all(part is None or part.isfinite().all() for part in (out, final, *grads))


@pytest.mark.parametrize("gpu", ["a100-sxm", "h100-sxm", "rtx-4090", "rtx-5090"])
def test_defaults_lie_in_the_space(gpu: str) -> None:
    device = named(gpu)
    sizes = itertools.product(KERNELS, (1, 4, 8, 16, 128), (2, 4), (False, True), (1, 64, 2**20), (1, 64, 8192))
    for kernel, width, itemsize, inside, rows, channels in sizes:
        if ("wide" in kernel) != (width > 8):
            continue
        problem = ShortProblem(kernel, width, itemsize, inside, rows, channels, 4, device.sm, device.smem_block)
        assert TUNABLES[kernel].space.refusal(problem, device, default(problem)) is None, problem
        assert TUNABLES[kernel].problem_of(TUNABLES[kernel].key(problem), device) == problem


@pytest.mark.parametrize("gpu", ["rtx-5090"])  # the least shared memory
def test_default_configurations_fit(gpu: str, compiled_apart: Callable[..., str]) -> None:
    # A process of its own, because the tests' process interprets its kernels.
    command = ("-m", "iokernels", "inspect", "short_conv", "--gpu", gpu, "--points", "--json", "-")
    kernels = json.loads(compiled_apart(*command))["rows"]
    names = {"fwd", "bwd", "state", "wide_fwd", "wide_bwd", "wide_dweight"}
    assert {kernel["kernel"].removesuffix("_kernel").removeprefix("short_conv_") for kernel in kernels} == names
    for kernel in kernels:
        assert kernel["shared_bytes"] <= named(gpu).smem_block, kernel
        assert kernel["blocks_per_sm"] >= 1, kernel
        assert kernel["spill_bytes"] <= 16, kernel
        if "wide" in kernel["kernel"]:
            assert kernel["matrix"], kernel

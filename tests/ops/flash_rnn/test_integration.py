"""flash_rnn inside PyTorch's machinery: opcheck, compile, export, autocast, gradient modes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from iokernels import UnsupportedError, flash_rnn
from iokernels.ops.flash_rnn.cells import CELLS
from iokernels.ops.flash_rnn.op import backward_op, exported_op, forward_op
from iokernels.ops.flash_rnn.options import Options
from iokernels.runtime import device as devices

from ..backends import CUDA
from .calls import draw, results

# Dynamo makes an instance of every autograd.Function that it traces, and PyTorch warns of instances.
pytestmark = pytest.mark.filterwarnings("ignore:.*Function'> should not be instantiated:DeprecationWarning")

BACKENDS = ["torch"] + (["triton"] if devices.INTERPRET or torch.cuda.is_available() else []) + [CUDA]


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("time_first", [False, True])
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend: str, cell: str, time_first: bool) -> None:
    x = draw(cell, 3, 5, 2, 8, state=time_first, time_first=time_first)
    lengths = torch.tensor([2, 5, 0], dtype=torch.int32) if time_first else None
    options = Options(x.get("initial_state"), lengths, cell, 0.5 if time_first else 0.0, False, cell == "gru")
    arguments = x["gates"], x["recurrent"], x["bias"]
    kind: dict[str, Any] = {"test_utils": ("test_schema", "test_faketensor")}
    for keep in (False, True):
        torch.library.opcheck(forward_op, (*arguments, keep, backend, *options), **kind)
    out, state, values, history = forward_op(*arguments, True, backend, *options)
    gates = x["gates"] if options.recompute_gates else None
    for dstate, needs in ((state, [True, True, True, time_first]), (None, [True, False, False, False])):
        torch.library.opcheck(
            backward_op,
            (out, dstate, gates, *arguments[1:], out, values, history, needs, backend, *options),
            **kind,
        )


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_compile_makes_one_graph_for_three_lengths(cell: str) -> None:
    counter = CompileCounter()
    compiled = torch.compile(flash_rnn, fullgraph=True, dynamic=True, backend=counter)
    for steps in (7, 18, 33):
        x = draw(cell, 3, steps, 2, 8)
        lengths = torch.tensor([2, steps, 0], dtype=torch.int32)
        options: dict[str, Any] = {"cell": cell, "return_state": True, "lengths": lengths, "recurrent_clip": 0.7}
        for actual, expected in zip(compiled(**x, **options), flash_rnn(**x, **options), strict=True):
            torch.testing.assert_close(actual, expected)
    assert counter.frame_count == 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiled_gradients_equal_eager_ones(backend: str) -> None:
    compiled = torch.compile(flash_rnn, fullgraph=True, dynamic=True, backend="aot_eager")
    for index, steps in enumerate((7, 18, 9)):
        x = draw("slstm", 3, steps, 2, 8)
        found = []
        for function in (compiled, flash_rnn):
            leaves = {name: tensor.detach().requires_grad_() for name, tensor in x.items()}
            with torch._dynamo.config.patch(error_on_recompile=index > 0):
                h, state = function(**leaves, cell="slstm", return_state=True, backend=backend)
                found.append(torch.autograd.grad(h.sin().sum() + state[:3].cos().sum(), list(leaves.values())))
        for actual, expected in zip(*found, strict=True):
            torch.testing.assert_close(actual, expected)


def test_export_with_a_dynamic_length() -> None:
    class Network(torch.nn.Module):
        def forward(self, gates: Tensor, recurrent: Tensor, bias: Tensor) -> Tensor:
            return flash_rnn(gates, recurrent, bias)

    x = draw("lstm", 3, 9, 2, 8, state=False)
    steps = torch.export.Dim("steps", min=2, max=4096)
    exported = torch.export.export(Network(), tuple(x.values()), dynamic_shapes={"gates": {1: steps}, "recurrent": {},
                                                                                "bias": {}})  # fmt: skip
    assert exported_op in [node.target for node in exported.graph.nodes if node.op == "call_function"]
    x = draw("lstm", 3, 20, 2, 8, state=False)
    torch.testing.assert_close(exported.module()(*x.values()), flash_rnn(**x))


def test_autocast() -> None:
    x = draw("lstm", 2, 4, 2, 8)
    with torch.autocast("cpu", torch.bfloat16):
        h, state = flash_rnn(**x, return_state=True)
    assert (h.dtype, state.dtype) == (torch.bfloat16, torch.float32)
    half = {name: t if name == "initial_state" else t.bfloat16() for name, t in x.items()}
    torch.testing.assert_close(h, flash_rnn(**half), rtol=0, atol=0)


def test_second_derivatives() -> None:
    x = {name: t.double().requires_grad_() for name, t in draw("elman", 2, 3, 1, 4).items()}
    for backend in ("reference", "torch"):
        (dx,) = torch.autograd.grad(flash_rnn(**x, cell="elman", backend=backend).square().sum(), x["gates"],
                                    create_graph=True)  # fmt: skip
        if backend == "reference":
            assert torch.autograd.grad(dx.sum(), x["recurrent"])[0].any()
        else:
            with pytest.raises(UnsupportedError, match="cannot be differentiated again"):
                torch.autograd.grad(dx.sum(), x["recurrent"])


def test_nothing_is_kept_without_gradients() -> None:
    x = draw("lstm", 2, 4, 2, 8, state=False)
    _, _, values, history = forward_op(*x.values(), False, "torch", *Options())
    assert values.numel() == history.numel() == 0
    _, _, values, history = forward_op(*x.values(), True, "torch", *Options(recompute_gates=True))
    assert values.numel() == 0
    assert history.shape == (2, 4, 1, 2, 8)


@pytest.mark.parametrize("backend", BACKENDS)
def test_same_bits_every_time_and_arguments_untouched(backend: str) -> None:
    x = draw("slstm", 3, 6, 2, 8)
    before = {name: t.clone() for name, t in x.items()}
    first, second = (results(x, "slstm", backend=backend) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert all(torch.equal(x[name], before[name]) for name in x)
    assert first["h"].stride(1) < first["h"].stride(0)
    late = flash_rnn(**draw("slstm", 3, 6, 2, 8, time_first=True), cell="slstm", backend=backend)
    assert late.stride(0) < late.stride(1)
    torch.testing.assert_close(late, first["h"], rtol=0, atol=0)

"""linear_attention in PyTorch's machinery: operator checks, torch.compile, checkpointing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from iokernels import linear_attention, linear_attention_step
from iokernels.ops.linear_attention.op import backward_op, forward_op, step_op
from iokernels.ops.linear_attention.options import Options

from ..backends import BACKENDS, usual
from .calls import draw, results, tiles

pytestmark = [
    pytest.mark.tiles(**tiles()),
    # Dynamo makes an instance of every autograd.Function that it traces, and PyTorch warns of instances.
    pytest.mark.filterwarnings("ignore:.*Function'> should not be instantiated:DeprecationWarning"),
    # What the machine has is looked up once and remembered, which is as right when traced.
    pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`:UserWarning"),
]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend: str, packed: bool, device: str) -> None:
    dtype, normalize = usual(backend), backend != "cuda"
    given = draw(1, 2, 20, 8, 8, dtype=dtype, decay="token", normalize=normalize, state=True, device=device)
    q, k, v = (given[name].detach() for name in ("q", "k", "v"))
    offsets = torch.tensor([0, 20], dtype=torch.int32, device=device) if packed else None
    options = Options(given["log_decay"], given["initial_state"], offsets, 0.3, False, normalize)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(forward_op, (q, k, v, backend, *options), test_utils=checks)
    out, state, denominator = forward_op(q, k, v, backend, *options)
    needs = [True, True, True, True, True]
    arguments = (out, state, q, k, v, out, state, denominator, needs, backend, *options)
    torch.library.opcheck(backward_op, arguments, test_utils=checks)
    if backend == "cuda":
        return
    step = (q[:, :, :1], k[:, :, :1], v[:, :, :1], state, backend, given["log_decay"][:, :, :1], *options[3:])
    torch.library.opcheck(step_op, step, test_utils=checks)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_compiled(backend: str, packed: bool, device: str) -> None:
    """One graph, for two lengths, with the same results; the operator is one node of it."""
    graphs, normalize = [], backend != "cuda"

    def look(module: torch.fx.GraphModule, _inputs: Any) -> Any:
        graphs.append(module)
        return module.forward

    @torch.compile(fullgraph=True, dynamic=True, backend=look)
    def compiled(q: Any, k: Any, v: Any, log_decay: Any, offsets: Any) -> Any:
        return linear_attention(
            q, k, v, log_decay=log_decay, normalize=normalize, return_state=True, cu_seqlens=offsets, backend=backend
        )

    for length in (20, 33):
        given = draw(1, 2, length, 8, 8, dtype=usual(backend), decay="token", normalize=normalize, device=device)
        leaves = [given[name] for name in ("q", "k", "v", "log_decay")]
        offsets = None
        if packed:
            leaves = [x.squeeze(0).transpose(0, 1) for x in leaves]
            offsets = torch.tensor([0, 5, length], dtype=torch.int32, device=device)
        found = []
        for call in (compiled, compiled._torchdynamo_orig_callable):  # type: ignore[attr-defined]
            own = [x.detach().clone().requires_grad_() for x in leaves]
            out, state = call(*own, offsets)  # pyright: ignore[reportCallIssue]
            found.append([out, state, *torch.autograd.grad(out.square().sum() + state.sum(), own)])
        for x, y in zip(*found, strict=True):
            torch.testing.assert_close(x, y)
    assert len(graphs) == 1


def test_compiled_step(device: str) -> None:
    given = draw(1, 2, 1, 8, 8, decay="token", state=True, device=device)
    state = given.pop("initial_state")
    tensors = {name: given[name] for name in ("q", "k", "v", "log_decay")}

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(state: Any, **tensors: Any) -> Any:
        return linear_attention_step(state=state, **tensors, backend="torch")

    moved, expected = state.clone(), state.clone()
    torch.testing.assert_close(
        compiled(moved, **tensors), linear_attention_step(state=expected, **tensors, backend="torch")
    )
    torch.testing.assert_close(moved, expected)
    assert not torch.equal(moved, state)


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_tensor_for_everything(backend: str, device: str) -> None:
    relative, absolute = (1e-4, 1e-5) if usual(backend) == torch.float32 else (1e-2, 1e-2)
    x = torch.randn(1, 2, 20, 8, device=device, dtype=usual(backend), requires_grad=True)
    compiled = torch.compile(
        lambda x: linear_attention(x, x, x, backend=backend), fullgraph=True, backend="aot_eager"
    )  # fmt: skip
    for call in (compiled, lambda x: linear_attention(x, x, x, backend=backend)):
        (gradient,) = torch.autograd.grad(call(x).sum(), x)
        own = x.detach().double().requires_grad_()
        (truth,) = torch.autograd.grad(linear_attention(own, own, own, backend="reference").sum(), own)
        torch.testing.assert_close(gradient.double(), truth, rtol=relative, atol=absolute)


def test_checkpointing(device: str) -> None:
    given = draw(1, 2, 20, 8, 8, decay="head", device=device)
    expected = results(given, "torch")["dq"]
    q = given["q"].detach().requires_grad_()
    out = checkpoint(lambda q: linear_attention(**{**given, "q": q}, backend="torch"), q, use_reentrant=False)
    (gradient,) = torch.autograd.grad(out, q, torch.ones_like(out))
    again = linear_attention(**{**given, "q": q}, backend="torch")
    torch.testing.assert_close(gradient, torch.autograd.grad(again, q, torch.ones_like(again))[0])
    assert gradient.shape == expected.shape

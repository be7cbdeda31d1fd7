"""flash_attention inside PyTorch's machinery: opcheck, compile, export, checkpointing, autocast, gradient modes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch.utils.checkpoint import checkpoint

import iokernels
from iokernels import flash_attention, flash_attention_varlen
from iokernels.ops.flash_attention.op import backward_op, exported_op, forward_op
from iokernels.ops.flash_attention.options import Options

# Dynamo makes an instance of every autograd.Function that it traces, and PyTorch warns of instances.
pytestmark = pytest.mark.filterwarnings("ignore:.*Function'> should not be instantiated:DeprecationWarning")


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()


def inputs(length: int, heads: int = 4, kv_heads: int = 4, width: int = 16, **kind: Any) -> list[Tensor]:
    return [torch.randn(2, h, length, width, **kind) for h in (heads, kv_heads, kv_heads)]


def attention_of(length: int, name: str) -> dict[str, Any]:
    """Options by name, sized for two sequences of ``length`` with four heads."""
    return {
        "plain": {},
        "causal": {"causal": True},
        "window": {"window": (5, 2)},
        "scale": {"scale": 0.3},
        "softcap": {"softcap": 2.0},
        "bias": {"bias": torch.randn(1, 4, length, length, requires_grad=True)},
        "mask, slopes": {"mask": torch.rand(length, length) < 0.8, "alibi_slopes": torch.rand(4)},
        "sinks": {"sinks": torch.randn(4, requires_grad=True)},
    }[name]


OPTION_SETS: dict[str, dict[str, Any]] = {
    "plain": {"scale": 0.25},
    "causal": {"scale": 0.25, "window_right": 0},
    "window, softcap": {"scale": 0.25, "window_left": 3, "window_right": 1, "softcap": 3.0},
    "bias, sinks": {"bias": (1, 4, 1, 9), "sinks": (4,)},
    "mask, slopes, dropout": {
        "mask": torch.ones(2, 1, 7, 9, dtype=torch.bool).tril(),
        "alibi_slopes": torch.full((1, 4), 0.2),
        "dropout_p": 0.25,
        "dropout_seed": torch.tensor([3]),
    },
    "packed": {
        "cu_seqlens_q": torch.tensor([0, 3, 6], dtype=torch.int32),
        "cu_seqlens_k": torch.tensor([0, 4, 9], dtype=torch.int32),
        "max_seqlen_q": 3,
        "max_seqlen_k": 5,
    },
}
LAYOUTS = {
    "heads outside": lambda x: x,
    "heads inside": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "every other column": lambda x: x.repeat_interleave(2, dim=-1)[..., ::2],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", OPTION_SETS)
def test_opcheck(name: str, layout: str) -> None:
    batch = 1 if name == "packed" else 2
    arguments: dict[str, Any] = {
        key: torch.randn(value) if isinstance(value, tuple) else value for key, value in OPTION_SETS[name].items()
    }
    options = Options(**arguments)
    kv_heads, value_width = (4, 8) if name == "plain" else (2, 6)
    q, k, v = (
        LAYOUTS[layout](torch.randn(shape))
        for shape in ((batch, 4, 7, 8), (batch, kv_heads, 9, 8), (batch, kv_heads, 9, value_width))
    )
    torch.library.opcheck(forward_op, (q, k, v, "torch", *options))
    out, lse = forward_op(q, k, v, "torch", *options)
    dout = torch.randn_like(out)
    for dlse, needs in (
        (None, [True, True, True, options.bias is not None, options.sinks is not None]),
        (torch.randn_like(lse), [True, False, True, False, False]),
    ):
        torch.library.opcheck(backward_op, (dout, dlse, q, k, v, out, lse, needs, "torch", *options))


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("name", ["plain", "causal", "window", "scale", "softcap", "bias", "mask, slopes", "sinks"])
def test_compile_makes_one_graph_for_three_lengths(name: str, kv_heads: int) -> None:
    counter = CompileCounter()
    compiled = torch.compile(flash_attention, fullgraph=True, dynamic=True, backend=counter)
    for length in (17, 33, 50):
        q, k, v = inputs(length, kv_heads=kv_heads, requires_grad=True)
        options = attention_of(length, name)
        for actual, expected in zip(
            compiled(q, k, v, return_lse=True, **options), flash_attention(q, k, v, return_lse=True, **options),
            strict=True,
        ):  # fmt: skip
            torch.testing.assert_close(actual, expected)
    assert counter.frame_count == 1


@pytest.mark.parametrize("name", ["plain", "causal", "bias", "mask, slopes", "sinks"])
def test_compiled_gradients_equal_eager_ones(name: str) -> None:
    compiled = torch.compile(flash_attention, fullgraph=True, dynamic=True, backend="aot_eager")
    for index, length in enumerate((17, 33, 50)):
        leaves = inputs(length, kv_heads=2, requires_grad=True)
        options = attention_of(length, name)
        leaves += [x for x in options.values() if isinstance(x, Tensor) and x.requires_grad]
        grads = []
        for function in (compiled, flash_attention):
            with torch._dynamo.config.patch(error_on_recompile=index > 0):
                out, lse = function(*leaves[:3], return_lse=True, **options)
                grads.append(torch.autograd.grad(out.sin().sum() + lse.cos().sum(), leaves))
        for actual, expected in zip(*grads, strict=True):
            torch.testing.assert_close(actual, expected)


def test_compiled_without_gradients_and_with_dropout() -> None:
    counter = CompileCounter()
    compiled = torch.compile(flash_attention, fullgraph=True, dynamic=True, backend=counter)
    for length in (17, 33, 50):
        q, k, v = inputs(length)
        torch.manual_seed(length)
        actual = compiled(q, k, v, dropout_p=0.3)
        torch.manual_seed(length)
        torch.testing.assert_close(actual, flash_attention(q, k, v, dropout_p=0.3))
    assert counter.frame_count == 1


def packed(lengths: list[int], **kind: Any) -> dict[str, Any]:
    offsets = torch.tensor([sum(lengths[:i]) for i in range(len(lengths) + 1)], dtype=torch.int32)
    q, k, v = (torch.randn(sum(lengths), heads, 16, **kind) for heads in (4, 2, 2))
    return {
        "q": q,
        "k": k,
        "v": v,
        "cu_seqlens_q": offsets,
        "cu_seqlens_k": offsets,
        "max_seqlen_q": max(lengths),
        "max_seqlen_k": max(lengths),
    }


def test_compiled_varlen() -> None:
    counter = CompileCounter()
    compiled = torch.compile(flash_attention_varlen, fullgraph=True, dynamic=True, backend=counter)
    for lengths in ([5, 9, 3, 2, 1], [12, 7, 20, 4, 11, 3], [6, 30]):
        arguments = packed(lengths, requires_grad=True)
        leaves = [arguments[name] for name in "qkv"]
        results = []
        for function in (compiled, flash_attention_varlen):
            out = function(**arguments, causal=True)
            results.append([out, *torch.autograd.grad(out.sin().sum(), leaves)])
        for actual, expected in zip(*results, strict=True):
            torch.testing.assert_close(actual, expected)
    assert counter.frame_count == 1


def test_compiled_self_attention_of_one_tensor() -> None:
    x = torch.randn(2, 4, 17, 16, requires_grad=True)
    compiled = torch.compile(flash_attention, fullgraph=True, dynamic=True, backend="aot_eager")
    (actual,), (expected,) = (
        torch.autograd.grad(function(x, x, x).sin().sum(), x) for function in (compiled, flash_attention)
    )
    torch.testing.assert_close(actual, expected)


def test_compiled_code_notices_use_backend() -> None:
    compiled = torch.compile(flash_attention, fullgraph=True, dynamic=True, backend="eager")
    leaves = inputs(20, requires_grad=True)
    assert torch.autograd.grad(compiled(*leaves).sum(), leaves[0], create_graph=True)[0] is not None
    with iokernels.use_backend("reference"):
        (dq,) = torch.autograd.grad(compiled(*leaves).square().sum(), leaves[0], create_graph=True)
        torch.autograd.grad(dq.sum(), leaves)  # only the reference can
    with iokernels.use_backend("torch"):
        torch.testing.assert_close(compiled(*leaves), flash_attention(*leaves))


def test_export_with_a_dynamic_length() -> None:
    class Attention(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return flash_attention(q, k, v, causal=True)

    length = torch.export.Dim("length", min=2, max=4096)
    exported = torch.export.export(Attention(), tuple(inputs(17)), dynamic_shapes={name: {2: length} for name in "qkv"})
    targets = [node.target for node in exported.graph.nodes if node.op == "call_function"]
    assert exported_op in targets
    q, k, v = inputs(40)
    torch.testing.assert_close(exported.module()(q, k, v), flash_attention(q, k, v, causal=True))


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_checkpointing(dropout_p: float) -> None:
    leaves = inputs(20, requires_grad=True)

    def block(*leaves: Tensor) -> Tensor:
        return flash_attention(*leaves, causal=True, dropout_p=dropout_p).sin()

    results = []
    for run in (block, lambda *x: checkpoint(block, *x, use_reentrant=False)):
        torch.manual_seed(1)
        out = run(*leaves)
        results.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype) -> None:
    leaves = inputs(20, requires_grad=True)
    with torch.autocast("cpu", dtype=dtype):
        out, lse = flash_attention(*leaves, return_lse=True)
        compiled = torch.compile(flash_attention, fullgraph=True, backend="aot_eager")(*leaves)
    assert out.dtype == dtype
    assert lse.dtype == torch.float32
    torch.testing.assert_close(out, flash_attention(*(x.to(dtype) for x in leaves)))
    torch.testing.assert_close(out, compiled)
    grads = torch.autograd.grad(out.float().sin().sum(), leaves)
    assert all(grad.dtype == torch.float32 for grad in grads)
    wide = [x.double() for x in leaves]
    with torch.autocast("cpu", dtype=dtype):
        assert flash_attention(*wide).dtype == torch.float64


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_modes_without_gradients(mode: Any) -> None:
    leaves = inputs(20, requires_grad=True)
    expected = flash_attention(*leaves)
    assert expected.requires_grad
    with mode():
        out = flash_attention(*leaves)
        assert not out.requires_grad
        torch.testing.assert_close(out, expected)
        packing = packed([4, 6])
        assert flash_attention_varlen(**packing).shape == (10, 4, 16)


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2), (1, 2)])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_some_inputs_need_no_gradient(wanted: tuple[int, ...], kv_heads: int) -> None:
    tensors = inputs(20, kv_heads=kv_heads)
    leaves = [tensors[i].requires_grad_() for i in wanted]
    grads = [
        torch.autograd.grad(flash_attention(*tensors, causal=True, backend=backend).sin().sum(), leaves)
        for backend in ("torch", "reference")
    ]
    for actual, expected in zip(*grads, strict=True):
        torch.testing.assert_close(actual, expected)


def test_gradient_of_the_lse_alone() -> None:
    leaves = inputs(20, requires_grad=True)
    grads = [
        torch.autograd.grad(flash_attention(*leaves, return_lse=True, backend=backend)[1].sin().sum(), leaves[:2])
        for backend in ("torch", "reference")
    ]
    for actual, expected in zip(*grads, strict=True):
        torch.testing.assert_close(actual, expected)


def test_double_backward_is_refused_by_name() -> None:
    leaves = inputs(9, requires_grad=True)
    dq, _, dv = torch.autograd.grad(flash_attention(*leaves, backend="torch").sin().sum(), leaves, create_graph=True)
    for grad in (dq, dv):
        with pytest.raises(RuntimeError, match='backend="reference" supports gradients of any order'):
            torch.autograd.grad(grad.sum(), leaves[0], retain_graph=True)


def test_gradient_penalty_of_dout_alone_is_refused() -> None:
    """dv depends on dout, which needs a gradient although q does not."""
    q, k, v = inputs(9)
    v.requires_grad_()
    weight = torch.ones((), requires_grad=True)
    (dv,) = torch.autograd.grad((flash_attention(q, k, v, backend="torch") * weight).sum(), v, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiated again"):
        torch.autograd.grad(dv.sum(), weight)


def test_reference_differentiates_twice() -> None:
    leaves = [x.double().requires_grad_() for x in inputs(4, heads=2, kv_heads=1, width=3)]
    sinks = torch.randn(2, dtype=torch.float64, requires_grad=True)

    def function(*leaves: Tensor) -> Any:
        q, k, v, sinks = leaves
        return flash_attention(q, k, v, sinks=sinks, causal=True, return_lse=True, backend="reference")

    assert torch.autograd.gradgradcheck(function, [*leaves, sinks])


def test_the_operators_take_every_option() -> None:
    """Tensors first, in the order of the schema: ``attend`` and the backward pass split them there."""
    schema = [argument.name for argument in forward_op._schema.arguments][4:]
    assert schema == list(Options._fields)
    types = [str(argument.type) for argument in forward_op._schema.arguments][4:]
    assert types[:7] == ["Optional[Tensor]"] * 7
    assert "Optional[Tensor]" not in types[7:]

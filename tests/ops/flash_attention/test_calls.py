"""How flash_attention may be called: what autograd, the compiler and other libraries' numbers make of its arguments."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch._functorch.config as functorch_config
from torch import Tensor

from iokernels import flash_attention, flash_attention_varlen, scaled_dot_product_attention
from iokernels.runtime.errors import UnsupportedError

# Dynamo makes an instance of every autograd.Function that it traces, and torch warns of that.
COMPILES = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")


def inputs(*shape: int, gradients: bool = False) -> list[Tensor]:
    return [torch.randn(*(shape or (1, 2, 6, 8)), requires_grad=gradients) for _ in range(3)]


def packed(**changes: Any) -> dict[str, Any]:
    q, k, v = inputs(9, 2, 8)
    offsets = torch.tensor([0, 4, 9], dtype=torch.int32)
    given = {"q": q, "k": k, "v": v, "cu_seqlens_q": offsets, "cu_seqlens_k": offsets, "max_seqlen_q": 5}
    return {**given, "max_seqlen_k": 5, **changes}


# ---- autograd ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["reference", "torch", "triton"])
def test_slopes_that_are_a_parameter_are_taken_where_no_gradients_are_recorded(backend: str) -> None:
    slopes = torch.nn.Parameter(torch.tensor([0.5, 0.1]))
    q, k, v = inputs()
    expected = flash_attention(q, k, v, alibi_slopes=slopes.detach(), backend=backend)
    with torch.no_grad():
        assert torch.equal(flash_attention(q, k, v, alibi_slopes=slopes, backend=backend), expected)
        flash_attention_varlen(**packed(alibi_slopes=slopes, backend=backend))
    # The accepted calls do not vouch for these.
    with pytest.raises(ValueError, match="alibi_slopes requires a gradient"):
        flash_attention(q, k, v, alibi_slopes=slopes, backend=backend)
    with pytest.raises(ValueError, match=r"flash_attention_varlen: alibi_slopes requires a gradient"):
        flash_attention_varlen(**packed(alibi_slopes=slopes, backend=backend))


@pytest.mark.parametrize("backend", ["reference", "torch", "triton"])
def test_a_bias_larger_than_the_sequences_has_no_gradient_beyond_them(backend: str) -> None:
    """The longest lengths are bounds, and the bias has their size."""
    bias = torch.zeros(12, 11, requires_grad=True)
    out = flash_attention_varlen(**packed(bias=bias, max_seqlen_q=12, max_seqlen_k=11, backend=backend))
    (dbias,) = torch.autograd.grad(out.square().sum(), bias)
    assert dbias[:5, :5].abs().min() > 0
    assert not dbias[5:].any()
    assert not dbias[:, 5:].any()


@pytest.mark.parametrize("options", [{"causal": True}, {"bias": torch.zeros(5, 9)}], ids=["causal", "bias"])
@pytest.mark.parametrize("backend", ["reference", "torch", "triton"])
def test_no_heads_of_queries_are_no_work(backend: str, options: dict[str, Any]) -> None:
    q, k = torch.zeros(1, 0, 5, 16, requires_grad=True), torch.zeros(1, 2, 9, 16, requires_grad=True)
    out = flash_attention(q, k, k, **options, backend=backend)
    assert out.shape == q.shape
    assert not torch.autograd.grad(out.sum(), k)[0].any()


# ---- torch.compile -------------------------------------------------------------------------------------------------


def two_layers(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Linear in v, so that its gradient says whether both passes dropped the same weights."""
    return flash_attention(torch.nn.functional.gelu(q), k, flash_attention(q, k, v, dropout_p=0.5), dropout_p=0.5)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # and inductor's own
@pytest.mark.parametrize(
    ("backend", "budget"), [("aot_eager", 1.0), ("aot_eager", 0.5), ("aot_eager", 0.01), ("inductor", 0.2)]
)
def test_a_recomputing_backward_pass_drops_the_same_weights(backend: str, budget: float) -> None:
    torch.compiler.reset()
    q, k, v = inputs(1, 2, 32, 8, gradients=True)
    with functorch_config.patch(activation_memory_budget=budget):
        out = torch.compile(two_layers, backend=backend, fullgraph=True)(q, k, v)
    torch.manual_seed(77)
    (dv,) = torch.autograd.grad(out, v, torch.ones_like(out))
    torch.testing.assert_close((dv * v).sum(), out.sum())
    torch.compiler.reset()


@COMPILES
def test_dropout_without_any_saved_memory_is_refused() -> None:
    torch.compiler.reset()
    compiled = torch.compile(two_layers, backend="aot_eager", fullgraph=True)
    with functorch_config.patch(activation_memory_budget=0.0):
        with pytest.raises(Exception, match="dropout_p is above 0 and activation_memory_budget is 0") as raised:
            compiled(*inputs(gradients=True))
        assert UnsupportedError.__name__ in str(raised.value)
        with torch.no_grad():
            assert compiled(*inputs()).isfinite().all()
    torch.compiler.reset()


@COMPILES
def test_layers_of_one_graph_drop_different_weights() -> None:
    torch.compiler.reset()
    q, k = torch.zeros(2, 1, 1, 4, 8)
    v = torch.eye(8)[:4][None, None]

    def both(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return flash_attention(q, k, v, dropout_p=0.5), flash_attention(q, k, v, dropout_p=0.5)

    first, second = torch.compile(both, backend="aot_eager", fullgraph=True)(q, k, v)
    assert not torch.equal(first, second)
    torch.compiler.reset()


@COMPILES
@torch._dynamo.config.patch(capture_scalar_outputs=True)
def test_the_longest_length_may_be_a_traced_item() -> None:
    torch.compiler.reset()

    def attend(q: Tensor, k: Tensor, v: Tensor, offsets: Tensor) -> Tensor:
        longest: Any = offsets.diff().max().item()
        return flash_attention_varlen(
            q, k, v, cu_seqlens_q=offsets, cu_seqlens_k=offsets, max_seqlen_q=longest, max_seqlen_k=longest, causal=True
        )

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    for ends in ([0, 4, 9], [0, 1, 9]):
        offsets = torch.tensor(ends, dtype=torch.int32)
        q, k, v = inputs(9, 2, 8, gradients=True)
        expected, actual = attend(q, k, v, offsets), compiled(q, k, v, offsets)
        torch.testing.assert_close(actual, expected)
        wanted = torch.autograd.grad(expected.square().sum(), [q, k, v])
        torch.testing.assert_close(torch.autograd.grad(actual.square().sum(), [q, k, v]), wanted)
    torch.compiler.reset()


# ---- numbers -------------------------------------------------------------------------------------------------------


def test_numpy_integers_and_bools_are_integers_and_bools() -> None:
    expected = flash_attention_varlen(**(call := packed(causal=True)))
    call |= {"causal": np.bool_(True), "max_seqlen_q": np.int64(5), "max_seqlen_k": np.int32(5)}
    call["deterministic"] = np.bool_(False)
    assert torch.equal(flash_attention_varlen(**call), expected)
    with pytest.raises(TypeError, match="causal is ndarray; it must be a bool"):
        flash_attention_varlen(**packed(causal=np.ones(2, dtype=bool)))
    with pytest.raises(TypeError, match=r"max_seqlen_q is .*; it must be an int"):
        flash_attention_varlen(**packed(max_seqlen_q=np.float64(5)))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"cu_seqlens_k": torch.tensor([0, 4, 9])}, TypeError, r"cu_seqlens_k is int64; .* pass cu_seqlens_k\.int\(\)"),
        ({"max_seqlen_q": torch.tensor(5)}, TypeError, r"max_seqlen_q is Tensor; .* pass max_seqlen_q\.item\(\)"),
        ({"max_seqlen_q": 10**400}, ValueError, "max_seqlen_q does not fit 64 bits"),
        ({"softcap": 1e300}, ValueError, r"softcap is 1e\+300; it must be 0, or from"),
        ({"softcap": 1e-300}, ValueError, "softcap is 1e-300; it must be 0, or from"),
        ({"scale": -1e300}, ValueError, r"scale is -1e\+300; it must be within"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
@pytest.mark.parametrize("backend", ["reference", "torch", "triton"])
def test_a_refusal_says_what_to_write(
    backend: str, changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match="^flash_attention_varlen: " + message):
        flash_attention_varlen(**packed(**changes, backend=backend))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_nested_tensors_are_refused_by_name() -> None:
    nested = torch.nested.nested_tensor([torch.randn(2, 3, 8), torch.randn(2, 4, 8)])
    with pytest.raises(TypeError, match="query is a nested tensor; it must be a dense one"):
        scaled_dot_product_attention(nested, nested, nested)


def test_float64_takes_numbers_beyond_float32() -> None:
    q, k, v = (x.double() for x in inputs())
    capped = flash_attention(q, k, v, softcap=1e100)
    torch.testing.assert_close(capped, flash_attention(q, k, v))
    assert math.isfinite(flash_attention(q * 1e-150, k * 1e-150, v, scale=1e300).sum().item())

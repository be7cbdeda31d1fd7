"""In what precision ``reference`` computes: in float32 at least, with one rounding at the end, so that it is an oracle
in half precision too; in the precision of its inputs for the error budget alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import iokernels as io
from iokernels.runtime.registration.precision import eagerly

from .public_calls import CALLS, NAMES, PURE, Call, Tensors, results

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")

HALF = (torch.float16, torch.bfloat16)


def _sdpa(x: Tensors, backend: str | None) -> Tensor:
    with io.use_backend(backend or "torch"):
        return io.scaled_dot_product_attention(x["q"], x["k"], x["v"], attn_mask=x["mask"], scale=1.0)


# Tensors that many sequences or rows share, whose gradients are sums.
SHARED: dict[str, Call] = {
    "flash_attention_varlen, one bias": Call(
        lambda x, backend: io.flash_attention_varlen(
            x["q"], x["k"], x["v"], cu_seqlens_q=x["cu"], cu_seqlens_k=x["cu"], max_seqlen_q=8, max_seqlen_k=8,
            bias=x["bias"], sinks=x["sinks"], return_lse=True, backend=backend,
        ),
        {"q": (96, 2, 16), "k": (96, 1, 16), "v": (96, 1, 16), "bias": (1, 2, 8, 8), "sinks": (2,)},
        integers={"cu": list(range(0, 97, 8))},
    ),
    "flash_attention, one key head": Call(
        lambda x, backend: io.flash_attention(x["q"], x["k"], x["v"], scale=2.0, backend=backend),
        {"q": (1, 16, 9, 16), "k": (1, 1, 9, 16), "v": (1, 1, 9, 16)},
    ),
    "scaled_dot_product_attention": Call(
        _sdpa,
        {"q": (3, 4, 9, 16), "k": (3, 4, 9, 16), "v": (3, 4, 9, 16), "mask": (1, 1, 9, 9)},
    ),
    "linear_attention, packed, one decay a head": Call(
        lambda x, backend: io.linear_attention(
            x["q"], x["k"], x["v"], log_decay=x["decay"], cu_seqlens=x["cu"], return_state=True, backend=backend
        ),
        {"q": (96, 2, 8), "k": (96, 2, 8), "v": (96, 2, 8), "decay": (2,)},
        integers={"cu": list(range(0, 97, 8))},
        negative=("decay",),
    ),
    "short_conv, packed": Call(
        lambda x, backend: io.short_conv(
            x["x"], x["weight"], bias=x["bias"], activation="silu", cu_seqlens=x["cu"], backend=backend
        ),
        {"x": (96, 4), "weight": (4, 3), "bias": (4,)},
        integers={"cu": list(range(0, 97, 8))},
    ),
    "fft_conv, band-limited": Call(
        lambda x, backend: io.fft_conv(x["u"], x["k"], freq_keep=0.5, skip=x["skip"], backend=backend),
        {"u": (3, 2, 32), "k": (2, 32), "skip": (2,)},
    ),
    "lean_attention, prefix and pages": Call(
        lambda x, backend: io.lean_attention(
            x["q"], x["k"], x["v"], cache_seqlens=x["lengths"], block_table=x["table"].view(2, 2), k_prefix=x["kp"],
            v_prefix=x["vp"], sinks=x["sinks"], scale=1.0, backend=backend,
        ),
        {"q": (2, 4, 3, 16), "k": (3, 2, 16, 16), "v": (3, 2, 16, 16), "kp": (2, 5, 16), "vp": (2, 5, 16),
         "sinks": (4,)},
        integers={"lengths": [20, 32], "table": [0, 1, 2, 1]},
    ),
}  # fmt: skip
EVERY = {**CALLS, **SHARED}

LOW = ("flash", "scaled", "lean", "block", "hip", "fft", "short", "flash_rnn")
"""The operators whose formula runs in half precision where it is run eagerly."""


def outputs(call: Call, given: Tensors, backend: str = "reference") -> list[Tensor]:
    """The results, and the gradients of everything real if the call has any."""
    reals = [] if call.writes else [given[name].requires_grad_() for name in call.shapes]
    found = list(results(call.run(given, backend)))
    wanted = [x for x in found if x.requires_grad]
    if wanted:
        torch.manual_seed(2)
        # Numbers that every dtype has.
        douts = [torch.randn(x.shape, dtype=torch.float64).bfloat16().to(x) for x in wanted]
        gradients = torch.autograd.grad(wanted, reals, douts, allow_unused=True)
        found += [torch.zeros_like(x) if g is None else g for x, g in zip(reals, gradients, strict=True)]
    return [x.detach() for x in found]


def exact(call: Call, dtype: torch.dtype) -> list[Tensor]:
    """The same of the same numbers in float64."""
    return outputs(call, {name: x.double() if x.is_floating_point() else x for name, x in call.tensors(dtype).items()})


def largest(x: Tensor) -> float:
    return x.abs().max().item() if x.numel() else 0.0


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("name", EVERY)
def test_results_and_gradients_in_half_precision_are_rounded_once(name: str, dtype: torch.dtype) -> None:
    found, truth = outputs(EVERY[name], EVERY[name].tensors(dtype)), exact(EVERY[name], dtype)
    assert any(x.dtype == dtype for x in found)
    for x, y in zip(found, truth, strict=True):
        size = largest(y)
        noise = 3e-6 * size
        rounded = (y.to(x.dtype).double() - y).abs()
        assert largest(x.double() - y) <= 1.01 * largest(rounded) + noise
        rms = (x.double() - y).square().mean().sqrt().item()
        assert rms <= 1.01 * rounded.square().mean().sqrt().item() + noise


class _Arithmetic(TorchDispatchMode):
    """The dtypes in which products and sums were made."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: set[torch.dtype] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if func.overloadpacket in (torch.ops.aten.bmm, torch.ops.aten.mm, torch.ops.aten.mul, torch.ops.aten.sum):
            self.dtypes.add(made.dtype)
        return made


def arithmetic(call: Call, dtype: torch.dtype) -> set[torch.dtype]:
    with _Arithmetic() as record:
        outputs(call, call.tensors(dtype))
    return record.dtypes


@pytest.mark.parametrize("name", [name for name in EVERY if name.startswith(LOW)])
def test_eagerly_the_formula_runs_in_the_low_precision(name: str) -> None:
    assert torch.bfloat16 not in arithmetic(EVERY[name], torch.bfloat16)
    with eagerly():
        assert torch.bfloat16 in arithmetic(EVERY[name], torch.bfloat16)
    assert torch.bfloat16 not in arithmetic(EVERY[name], torch.bfloat16)


@pytest.mark.parametrize("name", [name for name in EVERY if not name.startswith(LOW)])
def test_what_is_defined_in_float32_has_no_other_precision(name: str) -> None:
    call = EVERY[name]
    expected = results(call.run(call.tensors(torch.bfloat16), "reference"))
    with eagerly():
        found = results(call.run(call.tensors(torch.bfloat16), "reference"))
    assert all(map(torch.equal, found, expected))


def test_neither_plans_nor_compiled_code_remember_the_precision() -> None:
    q, k, v = torch.randn(3, 1, 2, 40, 16).bfloat16()

    def attend() -> Tensor:
        return io.flash_attention(q, k, v, scale=1.0, backend="reference")

    torch._dynamo.reset()
    compiled = torch.compile(attend, backend="eager", fullgraph=True)
    expected = attend()
    for _ in range(2):
        with eagerly():
            low = attend()
            assert not low.equal(expected)
            assert compiled().equal(low)
        assert attend().equal(expected)
        assert compiled().equal(expected)


@pytest.mark.parametrize("name", PURE)
def test_higher_derivatives_pass_through_the_rounding(name: str) -> None:
    """Forward over reverse and reverse twice, of the first argument, against the same in float64."""
    call = CALLS[name]
    argument = next(iter(call.shapes))

    def derivatives(convert: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        given = {n: convert(x) if x.is_floating_point() else x for n, x in call.tensors(torch.bfloat16).items()}
        direction = convert(torch.linspace(-1.0, 1.0, given[argument].numel()).bfloat16()).view_as(given[argument])

        def value(x: Tensor) -> Tensor:
            return results(call.run(given | {argument: x}, "reference"))[0]

        forward = torch.func.jvp(value, (given[argument],), (direction,))[1]
        x = given[argument].requires_grad_()
        (first,) = torch.autograd.grad(value(x).double().square().sum(), x, create_graph=True)
        (second,) = torch.autograd.grad((first * direction).double().sum(), x)
        return forward.detach(), second

    for found, truth in zip(derivatives(lambda x: x), derivatives(lambda x: x.double()), strict=True):
        assert found.dtype == torch.bfloat16
        assert largest(truth) > 1e-3
        assert largest(found.double() - truth) <= 2e-2 * largest(truth)


# The others are refused, by name: reference reads what they hold on the host.
@pytest.mark.parametrize("name", [name for name in NAMES if not CALLS[name].integers and name != "hip_attention"])
def test_shapes_and_dtypes_on_meta_are_those_of_the_numbers(name: str) -> None:
    call = CALLS[name]
    with torch.no_grad():
        made = results(call.run(call.tensors(torch.float16, "meta"), "reference"))
        wanted = results(call.run(call.tensors(torch.float16), "reference"))
    for x, y in zip(made, wanted, strict=True):
        assert (x.shape, x.dtype, x.is_meta) == (y.shape, y.dtype, True)


@pytest.mark.parametrize("name", ["flash_attention with options", "linear_attention", "fft_conv", "short_conv"])
def test_an_exported_call_in_half_precision_is_the_call(name: str) -> None:
    call = CALLS[name]

    class Module(torch.nn.Module):
        def forward(self, given: Tensors) -> Any:
            return call.run(given, "reference")

    given = call.tensors(torch.bfloat16)
    exported = torch.export.export(Module(), (given,)).module()
    assert all(map(torch.equal, results(exported(given)), results(call.run(given, "reference"))))

"""Unusual tensors and numbers on every public function: views with a negation bit, layouts without strides, meta
tensors, sizes that ``torch.jit.trace`` turned into tensors, NumPy's scalars and numbers out of range."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import iokernels as io
from iokernels import UnsupportedError

from .public_calls import CALLS, NAMES, RUNS, results, usual

WITH_REFERENCE = [(name, "reference") for name in NAMES] + list(RUNS)


@pytest.fixture(autouse=True)
def _without_gradients() -> Any:
    with torch.no_grad():
        yield


def negated(x: Tensor) -> Tensor:
    """The values of ``x`` as a view that the dispatcher has yet to negate."""
    view = torch.complex(torch.zeros_like(x), -x).conj().imag
    assert view.is_neg()
    return view


@pytest.mark.parametrize(("name", "backend"), WITH_REFERENCE)
def test_a_negated_view_has_its_value(name: str, backend: str) -> None:
    call = CALLS[name]
    dtype = torch.float16 if backend == "cuda" else torch.float32
    expected = [x.clone() for x in results(call.run(call.tensors(dtype), backend))]
    for argument in call.shapes:
        given = call.tensors(dtype)
        if given[argument].dtype != torch.float32 or argument in call.writes:
            continue
        given[argument] = negated(given[argument])
        for got, wanted in zip(results(call.run(given, backend)), expected, strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("name", ["append_kv", "gated_delta_rule_step", "short_conv_step"])
def test_a_negated_view_is_written_as_what_it_says(name: str, backend: str) -> None:
    call = CALLS[name]
    given, plain = call.tensors(torch.float32), call.tensors(torch.float32)
    state = given[call.writes[0]] = negated(given[call.writes[0]])
    for got, wanted in zip(results(call.run(given, backend)), results(call.run(plain, backend)), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(state.resolve_neg(), plain[call.writes[0]], rtol=1e-5, atol=1e-6)


def test_a_spectrum_of_a_negated_filter_is_that_of_its_values() -> None:
    u, k = torch.randn(1, 2, 16), torch.randn(2, 5)
    for backend in ("torch", "triton"):
        spectrum = io.kernel_spectrum(negated(k), 16, backend=backend)
        torch.testing.assert_close(io.fft_conv(u, spectrum), io.fft_conv(u, k, backend=backend))


LAYOUTS = {
    "sparse_coo": lambda x: x.to_sparse(),
    "mkldnn": lambda x: x.to_mkldnn(),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", NAMES)
def test_a_layout_without_strides_is_refused(name: str, layout: str) -> None:
    call = CALLS[name]
    given = call.tensors(torch.float32)
    call.run({key: x.clone() for key, x in given.items()}, None)  # its plan must not vouch for what follows
    for argument in call.shapes:
        if layout == "mkldnn" and (given[argument].dim() < 2 or argument in ("decay", "bias", "beta")):
            continue  # it has no views, which some of these arguments are made into first
        wrong = {**given, argument: LAYOUTS[layout](given[argument])}
        with pytest.raises(TypeError, match=rf"\w+: \w+ has layout {layout}; it must be dense: pass \w+\.to_dense\(\)"):
            call.run(wrong, None)


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize("name", NAMES)
def test_quantised_and_nested_tensors_are_refused(name: str) -> None:
    call = CALLS[name]
    argument = next(iter(call.shapes))
    x = call.tensors(torch.float32)[argument]
    for layout in (torch.jagged, torch.strided):
        nested = torch.nested.nested_tensor(list(x.unbind(0)), layout=layout)
        with pytest.raises(TypeError, match=rf"\w+: {argument}\w* is a nested tensor; it must be a dense one"):
            call.run({**call.tensors(torch.float32), argument: nested}, None)
    quantised = torch.quantize_per_tensor(x, 0.1, 0, torch.qint8)
    with pytest.raises(TypeError, match=rf"\w+: {argument}\w* is quantised, qint8; pass \w+\.dequantize\(\)"):
        call.run({**call.tensors(torch.float32), argument: quantised}, None)


@pytest.mark.parametrize(("name", "backend"), [*((name, None) for name in NAMES), *RUNS])
def test_meta_tensors_give_shapes(name: str, backend: str | None) -> None:
    call = CALLS[name]
    dtype = usual(backend)
    expected = results(call.run(call.tensors(dtype), backend))
    for got, wanted in zip(results(call.run(call.tensors(dtype, "meta"), backend)), expected, strict=True):
        assert got.is_meta
        assert (got.shape, got.dtype, got.stride()) == (wanted.shape, wanted.dtype, wanted.stride())


READ_ON_THE_HOST = ("flash_attention_varlen", "lean_attention", "append_kv", "hip_attention")


@pytest.mark.parametrize("name", READ_ON_THE_HOST)
def test_the_oracle_says_what_it_reads_of_meta_tensors(name: str) -> None:
    with pytest.raises(UnsupportedError, match=rf"{name}: backend 'reference' .* meta tensor.* no values"):
        CALLS[name].run(CALLS[name].tensors(torch.float32, "meta"), "reference")


@pytest.mark.parametrize("name", [name for name in NAMES if name not in READ_ON_THE_HOST])
def test_the_oracle_gives_shapes_of_meta_tensors(name: str) -> None:
    call = CALLS[name]
    made = results(call.run(call.tensors(torch.float32, "meta"), "reference"))
    for got, wanted in zip(made, results(call.run(call.tensors(torch.float32), "reference")), strict=True):
        assert (got.shape, got.dtype) == (wanted.shape, wanted.dtype)


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace:DeprecationWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize(("name", "backend"), [*((name, None) for name in NAMES), *RUNS])
def test_a_traced_call_is_the_operator(name: str, backend: str | None) -> None:
    call = CALLS[name]
    given = call.tensors(usual(backend))

    def run(*tensors: Tensor) -> tuple[Tensor, ...]:
        return results(call.run(dict(zip(given, tensors, strict=True)), backend))

    traced: Any = torch.jit.trace(run, [x.clone() for x in given.values()], check_trace=False)
    assert "iokernels::" in str(traced.graph)
    others = [x * 0.5 if key in call.shapes else x for key, x in given.items()]
    for got, wanted in zip(traced(*(x.clone() for x in others)), run(*(x.clone() for x in others)), strict=True):
        assert torch.equal(got, wanted)


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace:DeprecationWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_a_scale_made_of_a_traced_size() -> None:
    q = torch.randn(1, 2, 8, 16)
    traced: Any = torch.jit.trace(lambda q: io.flash_attention(q, q, q, scale=1 / q.shape[-1]), (q,), check_trace=False)
    torch.testing.assert_close(traced(2 * q), io.flash_attention(2 * q, 2 * q, 2 * q, scale=1 / 16))


def scaled(x: Any) -> dict[str, Any]:
    """A call of every function that takes a scale, by its name."""
    q, lengths = torch.randn(1, 2, 8, 16), torch.tensor([8], dtype=torch.int32)
    beta, state = torch.rand(1, 2, 8), torch.zeros(1, 2, 16, 16)
    index = io.BlockIndex(torch.zeros(1, 1, 1, 1, dtype=torch.int32), torch.ones(1, 1, 1, dtype=torch.int32), 16, 8,
                          0, 8, 8, 8)  # fmt: skip
    return {
        "flash_attention": partial(io.flash_attention, q, q, q, scale=x),
        "lean_attention": partial(io.lean_attention, q, q, q, cache_seqlens=lengths, scale=x),
        "block_sparse_attention": partial(io.block_sparse_attention, q, q, q, index, scale=x),
        "hip_attention": partial(io.hip_attention, q, q, q, scale=x),
        "linear_attention": partial(io.linear_attention, q, q, q, scale=x),
        "linear_attention_step": partial(io.linear_attention_step, q, q, q, state, scale=x),
        "gated_delta_rule": partial(io.gated_delta_rule, q, q, q, beta, scale=x),
        "gated_delta_rule_step": partial(io.gated_delta_rule_step, q, q, q, beta, state, scale=x),
    }


SCALED = tuple(scaled(1.0))


@pytest.mark.parametrize("name", SCALED)
@pytest.mark.parametrize("value", [np.float32(0.5), np.float64(0.5), np.float16(0.5), np.int64(2)])
def test_a_scale_may_be_a_numpy_scalar(name: str, value: Any) -> None:
    torch.manual_seed(0)
    got = scaled(value)[name]()
    torch.manual_seed(0)
    assert torch.equal(got, scaled(float(value))[name]())


@pytest.mark.parametrize("name", SCALED)
@pytest.mark.parametrize(
    "value", [10**400, -(10**5000), float("nan"), np.float32("inf")], ids=["large", "long", "nan", "inf"]
)
def test_a_scale_without_a_float_is_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"{name}: scale is .*; it must be finite"):
        scaled(value)[name]()


@pytest.mark.parametrize("name", SCALED)
@pytest.mark.parametrize("value", [True, np.bool_(True), "1", 1j, torch.tensor(1.0)])
def test_a_scale_that_is_no_number_is_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(TypeError, match=rf"{name}: scale is \w+; it must be a number"):
        scaled(value)[name]()


@pytest.mark.parametrize("name", ["flash_attention", "lean_attention"])
def test_windows_and_softcap_of_every_kind(name: str) -> None:
    torch.manual_seed(0)
    run = scaled(1.0)[name]
    with pytest.raises(TypeError, match=f"{name}: softcap is NoneType; it must be a number: pass 0.0 to turn it off"):
        run(softcap=None)
    assert torch.equal(run(window=(np.int64(1), np.int32(0))), run(window=(1, 0)))
    assert torch.equal(run(window=(2**63 - 1, 2**40)), run())
    for wrong in ((True, False), (np.bool_(True), 0), (1.0, 0), "11"):
        run(window=(1, 0))  # equal to (True, False), and its plan is remembered
        with pytest.raises(TypeError, match=f"{name}: window is .*; it must be None or two ints"):
            run(window=wrong)
    for wrong in ((2**63, 0), (0, 10**5000), (-2, 0)):
        with pytest.raises(ValueError, match=f"{name}: window is .*; each side must be"):
            run(window=wrong)


@pytest.mark.parametrize("name", [name for name, call in CALLS.items() if call.integers])
def test_indices_of_64_bits_are_refused_with_the_word_to_change(name: str) -> None:
    call = CALLS[name]
    for argument in call.integers:
        given = call.tensors(torch.float32)
        given[argument] = given[argument].long()
        with pytest.raises(TypeError, match=r"\w+ is int64; it must be int32: pass \w+\.int\(\)"):
            call.run(given, None)


@pytest.mark.parametrize("name", NAMES)
def test_eager_calls_of_other_shapes_do_not_make_compiled_code_compile_again(name: str) -> None:
    call = CALLS[name]
    torch._dynamo.reset()
    compiled = torch.compile(lambda given: call.run(given, None), backend="eager", fullgraph=name != "hip_attention")
    compiled(call.tensors(torch.float32))
    call.run(call.tensors(torch.float64), None)
    call.run(call.tensors(torch.float32, "meta"), None)
    with torch._dynamo.config.patch(error_on_recompile=True):
        compiled(call.tensors(torch.float32))


@pytest.mark.parametrize(("name", "backend"), [run for run in RUNS if CALLS[run[0]].writes])
def test_a_graph_that_has_saved_what_is_written_does_not_go_backward(name: str, backend: str) -> None:
    call = CALLS[name]
    given = call.tensors(torch.float32)
    for argument in call.writes:
        factor = torch.ones((), requires_grad=True)
        with torch.enable_grad():
            product = (factor * given[argument]).sum()
        call.run(given, backend)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            product.backward()
    with torch.inference_mode():
        call.run(call.tensors(torch.float32), backend)

"""lean_attention inside PyTorch's machinery: opcheck, fake tensors, compile, export, autocast."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch._subclasses.fake_tensor import FakeTensorMode

from iokernels import lean_attention
from iokernels.ops.lean_attention.op import attend
from iokernels.ops.lean_attention.options import SCHEDULES, Options
from iokernels.runtime import device as devices

from ..backends import CUDA, usual
from .calls import Call, make

KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "window, softcap, sinks": {"window": (5, 0), "softcap": 2.0, "sinks": True},
    "pages": {"page": 3},
    "int8": {"cache_dtype": torch.int8, "scales": "key"},
    "prefix": {"prefix": 7, "batch_invariant": True},
}


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def plain_memory(call: Call) -> Call:
    """The same values in tensors of their own, without poison: what a graph may clone or compare."""
    finite = {name: x.nan_to_num() if x.is_floating_point() else x for name, x in call.tensors.items()}
    return call._replace(tensors={name: x.contiguous() for name, x in finite.items()})


@pytest.mark.parametrize(
    ("backend", "layout"),
    [("torch", "contiguous"), ("torch", "bnhd"), ("torch", "strided"),
     pytest.param("triton", "contiguous", marks=pytest.mark.interpreted),
     pytest.param("cuda", "contiguous", marks=CUDA.marks)],
)  # fmt: skip
@pytest.mark.parametrize("kind", KINDS)
def test_opcheck(kind: str, backend: str, layout: str) -> None:
    given = {name: x for name, x in KINDS[kind].items() if name not in ("window", "softcap", "batch_invariant")}
    call = make(0, (11, 4), heads=4, kv_heads=2, layout=layout, **{"dtype": usual(backend), **given})
    tensors: Any = {name: x.nan_to_num() if x.is_floating_point() and layout == "contiguous" else x
               for name, x in call.tensors.items()}  # fmt: skip
    if layout != "contiguous":
        for name in ("k_cache", "v_cache"):
            tensors[name].nan_to_num_()
    arguments = [tensors.pop(name) for name in ("q", "k_cache", "v_cache")]
    options = Options(**tensors, scale=0.3, window_left=5, window_right=0, softcap=1.5)
    torch.library.opcheck(attend, (*arguments, backend, *options))


def test_fake_tensors_read_no_values() -> None:
    """Shapes follow from shapes: nothing asks a fake tensor what is in it."""
    for kind, given in KINDS.items():
        call = make(1, (11, 4), heads=4, kv_heads=2, value_dim=24, layout="bnhd", **given)
        with FakeTensorMode() as mode:
            fakes = call._replace(tensors={name: mode.from_tensor(x) for name, x in call.tensors.items()})
            for backend in ("torch", "triton") if devices.INTERPRET else ("torch",):
                out, lse = fakes(backend)
                assert out.shape == (2, 4, call.tensors["q"].shape[2], 24), kind
                assert lse.shape == out.shape[:3]
                assert lse.dtype == torch.float32
        real, _ = call("torch")
        assert real.stride() == out.stride()


@pytest.mark.parametrize("kind", KINDS)
def test_one_graph_for_all_lengths_batches_and_caches(kind: str) -> None:
    counter = CompileCounter()
    compiled = torch.compile(lean_attention, fullgraph=True, dynamic=True, backend=counter)
    for index, lengths in enumerate(((11, 4, 0, 8, 2), (30, 0, 9), (17, 5, 40, 2, 1, 6, 3))):
        call = plain_memory(make(index, lengths, heads=4, kv_heads=2, spare=25 + 8 * index, **KINDS[kind]))
        tensors = {"q": call.tensors["q"], **call.tensors}
        actual = compiled(**tensors, **call.options, return_lse=True)
        for one, other in zip(actual, lean_attention(**tensors, **call.options, return_lse=True), strict=True):
            torch.testing.assert_close(one, other)
    assert counter.frame_count == 1


def test_compiled_by_aot_without_a_recompilation() -> None:
    compiled = torch.compile(lean_attention, fullgraph=True, dynamic=True, backend="aot_eager")
    for index, lengths in enumerate(((11, 4, 0, 8, 2), (30, 0, 9))):
        call = plain_memory(make(index, lengths, heads=4, kv_heads=2))
        with torch._dynamo.config.patch(error_on_recompile=index > 0):
            torch.testing.assert_close(compiled(**call.tensors), lean_attention(**call.tensors))


def test_export_with_a_dynamic_batch() -> None:
    class Decode(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> Tensor:
            return lean_attention(q, k, v, cache_seqlens=lengths)

    def arguments(*lengths: int) -> tuple[Tensor, ...]:
        tensors = plain_memory(make(3, lengths, heads=4, kv_heads=2)).tensors
        return tuple(tensors[name] for name in ("q", "k_cache", "v_cache", "cache_seqlens"))

    batch = torch.export.Dim("batch", min=2, max=1024)
    room = torch.export.Dim("room", min=4, max=2**20)
    shapes = ({0: batch}, {0: batch, 2: room}, {0: batch, 2: room}, {0: batch})
    exported = torch.export.export(Decode(), arguments(11, 4, 8), dynamic_shapes=shapes)
    assert attend in [node.target for node in exported.graph.nodes if node.op == "call_function"]
    others = arguments(5, 40, 0, 17, 3)
    torch.testing.assert_close(exported.module()(*others), Decode()(*others))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_casts_q_and_leaves_caches(dtype: torch.dtype) -> None:
    call = make(4, (20, 7), dtype=dtype)
    wide = call.with_tensors(q=call.tensors["q"].float())
    with torch.autocast("cpu", dtype=dtype):
        out, lse = wide("torch")
    assert out.dtype == dtype
    assert lse.dtype == torch.float32
    assert torch.equal(out, call("torch")[0])
    double = make(4, (20, 7), dtype=torch.float64)
    with torch.autocast("cpu", dtype=dtype):
        assert double("torch")[0].dtype == torch.float64


def test_inference_mode_and_nothing_is_changed() -> None:
    call = make(5, (20, 0, 7), heads=4, kv_heads=2, page=4, sinks=True)
    before = {name: x.clone() for name, x in call.tensors.items()}
    for backend in ("torch", "triton") if devices.INTERPRET else ("torch",):
        with torch.inference_mode():
            call(backend)
        for name, x in call.tensors.items():
            assert torch.equal(x.nan_to_num(), before[name].nan_to_num()), name


def test_the_operator_takes_every_option() -> None:
    schema = attend._schema.arguments
    assert [argument.name for argument in schema][4:] == list(Options._fields)
    assert not any(argument.alias_info for argument in schema)
    assert SCHEDULES[0] == Options(torch.zeros(0)).schedule

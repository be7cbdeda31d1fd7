"""The selectors and hip_attention inside PyTorch's machinery, their traffic and their launch parameters."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from iokernels import PageBounds, hip_attention, page_bounds, select_exact, select_hip, select_quest
from iokernels.ops.hip_attention.case.compile import problem
from iokernels.ops.hip_attention.case.shapes import SELECT
from iokernels.ops.hip_attention.op import bounds_op, exact_op, global_op, pages_op, stage_op
from iokernels.ops.hip_attention.options import Region, Stage
from iokernels.ops.hip_attention.triton.tuning import KERNELS, TUNABLES, SelectProblem, default
from iokernels.runtime import device as devices
from iokernels.runtime.device import named
from iokernels.testing.case import load
from iokernels.testing.inputs import poisoned_view
from iokernels.testing.tracer import trace

# Dynamo makes an instance of every autograd.Function that it traces, and PyTorch warns of instances.
pytestmark = pytest.mark.filterwarnings("ignore:.*Function'> should not be instantiated:DeprecationWarning")
SMALL: dict[str, Any] = {"budget": 32, "sink": 5, "window": 20, "block_q": 16}


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def tensors(rows: int, keys: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(torch.randn(1, heads, length, 16, dtype=dtype) for heads, length in ((4, rows), (2, keys), (2, keys)))  # pyright: ignore


def test_opcheck() -> None:
    q, k, _ = tensors(20, 150)
    region = Region("kv", 16, 5, 20, True)
    torch.library.opcheck(stage_op, (q, k, None, None, "torch", *region, *Stage(64, 4, 2)))
    ids, counts = stage_op(q, k, None, None, "torch", *region, *Stage(64, 4, 2))
    torch.library.opcheck(stage_op, (q, k, ids, counts, "torch", *region, *Stage(8, 1, 5, 64)))
    kmin, kmax = page_bounds(k)
    torch.library.opcheck(pages_op, (q, kmin, kmax, "torch", 150, 16, 3, *region))
    torch.library.opcheck(bounds_op, (k, kmin.clone(), kmax.clone(), "torch", 16, 2))
    torch.library.opcheck(exact_op, (q, k, 8, 5, *region))
    torch.library.opcheck(global_op, (q, k, 2, 16, 8, 5, *region))
    for op, first in ((stage_op, 5), (pages_op, 7), (exact_op, 4), (global_op, 6)):
        names = [argument.name for argument in op._schema.arguments][first:]
        assert names[: len(Region._fields)] == list(Region._fields)


@pytest.mark.parametrize("selector", ["hip", "quest", "global"])
def test_compile_makes_one_graph_for_three_lengths(selector: str) -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if selector == "quest":
            return hip_attention(q, k, v, selection=lambda q, k: select_quest(q, k, **SMALL))
        if selector == "global":
            return hip_attention(q, k, v, selection=lambda q, k: select_hip(q, k, search="global", **SMALL))
        return hip_attention(q, k, v, **SMALL)

    counter = CompileCounter()
    compiled = torch.compile(attend, fullgraph=True, dynamic=True, backend=counter)
    for rows in (50, 70, 91):
        results = []
        leaves = [x.requires_grad_() for x in tensors(rows, rows + 200)]
        for function in (compiled, attend):
            out = function(*leaves)
            results.append([out, *torch.autograd.grad(out.sin().sum(), leaves)])
        for actual, expected in zip(*results, strict=True):
            torch.testing.assert_close(actual, expected)
    assert counter.frame_count == 1


def test_compiled_bounds_are_written_where_asked() -> None:
    k = torch.randn(1, 2, 48, 8)
    bounds = page_bounds(k)
    k[:, :, 32:] = torch.randn(1, 2, 16, 8)

    def update(out: PageBounds) -> PageBounds:
        return page_bounds(k, out=out, first=32)

    compiled = torch.compile(update, fullgraph=True, backend="aot_eager")
    got, kept = (PageBounds(*(x.clone() for x in bounds)) for _ in range(2))
    compiled(got)
    for x, y in zip(got, update(kept), strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0)
    assert not torch.equal(got.kmin, bounds.kmin)


def test_autocast() -> None:
    q, k, v = tensors(40, 200)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = hip_attention(q, k, v, **SMALL)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, hip_attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), **SMALL))


@pytest.mark.interpreted
@pytest.mark.parametrize("layout", ["bnhd", "padded", "strided"])
def test_no_byte_outside_the_tensors_and_no_atomics(layout: Any) -> None:
    q, k, v = (poisoned_view(x, layout) for x in tensors(37, 150))
    with trace() as traced:
        out = hip_attention(q, k, v, backend="triton", **SMALL)
        index = select_quest(q, k, backend="triton", **SMALL)
    assert {kernel.name for kernel in traced.kernels} >= {
        "hip_attention_stage_kernel", "hip_attention_best_kernel", "hip_attention_pages_kernel",
        "hip_attention_bounds_kernel",
    }  # fmt: skip
    assert traced.bytes().atomic == 0
    assert out.isfinite().all()
    index.validate(deep=True)


def test_nothing_waits_for_a_device() -> None:
    """Meta tensors have no values to read: what runs on them neither asks for one nor has sizes that depend on one."""
    q, k, _ = (x.to("meta") for x in tensors(100, 1000))
    for select in (select_hip, select_quest, select_exact):
        assert select(q, k, **SMALL).indices.shape[:3] == (1, 2, 7)
    assert select_hip(q, k, search="global", **SMALL).indices.shape == (1, 2, 7, 4)


@pytest.mark.skipif(devices.INTERPRET or not torch.cuda.is_available(), reason="needs a GPU")
def test_a_step_of_decoding_in_a_cuda_graph() -> None:
    q, k, v = (x.cuda() for x in tensors(1, 8192, torch.bfloat16))
    options: dict[str, Any] = {"budget": 256, "sink": 16, "window": 64, "backend": "triton"}
    hip_attention(q, k, v, **options)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = hip_attention(q, k, v, **options)
    for _ in range(2):
        for x in (q, k, v):
            x.copy_(torch.randn_like(x))
        graph.replay()
        torch.testing.assert_close(out, hip_attention(q, k, v, **options))


@pytest.mark.parametrize("gpu", ["a100-sxm", "h100-sxm", "rtx-4090", "rtx-5090", "b200"])
def test_defaults_lie_in_the_space(gpu: str) -> None:
    device = named(gpu)
    sizes = itertools.product(
        KERNELS, (16, 64, 128, 256), (2, 4), (True, False), (1, 16, 512), (1, 512, 8192), (1, 4096)
    )
    for kernel, width, itemsize, cores, rows, candidates, lists in sizes:
        if itemsize == 2 and not cores:
            continue
        problem = SelectProblem(
            kernel, width, itemsize, cores, rows, candidates, lists, device.sm, device.smem_block
        )  # fmt: skip
        assert TUNABLES[kernel].space.refusal(problem, device, default(problem)) is None, problem
        assert TUNABLES[kernel].problem_of(TUNABLES[kernel].key(problem), device) == problem


def test_a_launch_asks_for_its_own_problem() -> None:
    shape, device = SELECT.parse("b=2,h=32,hkv=8,n=4k,nk=32k,d=128"), named("h100-sxm")
    found = problem(shape, torch.bfloat16, "hip_attention_stage", device)
    assert found == SelectProblem(
        "hip_attention_stage", 128, 2, True, 64, 128, 1024, device.sm, device.smem_block
    )  # fmt: skip


@pytest.mark.parametrize("gpu", ["a100-sxm"])
def test_default_configurations_fit(gpu: str, compiled_apart: Callable[..., str]) -> None:
    # A process of its own, because the tests' process interprets its kernels.
    command = ("-m", "iokernels", "inspect", "select_hip", "--gpu", gpu, "--points", "--json", "-")
    kernels = json.loads(compiled_apart(*command))["rows"]
    assert {kernel["kernel"] for kernel in kernels} == {f"{kernel}_kernel" for kernel in KERNELS}
    for kernel in kernels:
        assert kernel["shared_bytes"] <= named(gpu).smem_block, kernel
        assert kernel["blocks_per_sm"] >= 1, kernel
        assert kernel["spill_bytes"] <= 64, kernel
        if kernel["kernel"].startswith(("hip_attention_stage", "hip_attention_pages")) and "fp32" not in str(kernel):
            assert kernel["matrix"], kernel


def test_bytes_follow_the_budget_and_not_the_length() -> None:
    """Selection in decoding reads a sixteenth of the keys and a constant; dense attention all keys and values."""
    case = load("select_hip")
    assert case.accounts is not None
    moved = []
    for keys in (8192, 16384, 65536, 131072):
        shape = case.vocabulary.parse(f"b=1,h=8,hkv=2,n=1,nk={keys},d=128")
        configs = dict(case.accounts.configs(shape, torch.bfloat16))
        found = case.accounts.model(shape, torch.bfloat16, configs)
        moved.append(sum(account.model.total for account in found.values()))
    dense = [keys * 2 * 2 * 128 * 2 for keys in (8192, 16384, 65536, 131072)]
    # Once the later stages are full, twice the keys cost what a sixteenth of their growth does, and scores.
    assert moved[3] - moved[2] < 1.1 * (dense[3] - dense[2]) / 32
    assert moved[1] < dense[1] / 2

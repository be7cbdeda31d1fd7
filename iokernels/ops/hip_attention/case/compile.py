"""The selection kernels without data: which configurations a call takes, compiling them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from iokernels import autotune
from iokernels.ops.block_sparse_attention.options import Options
from iokernels.ops.block_sparse_attention.triton.tuning import FWD
from iokernels.ops.hip_attention.options import (
    HEADS,
    STAGES,
    Region,
    Stage,
    candidates,
    list_heads,
    most_chunks,
    query_blocks,
)
from iokernels.ops.hip_attention.select.call import hip_plan
from iokernels.ops.hip_attention.triton.tuning import BEST, BOUNDS, KERNELS, PAGES, TUNABLES, SelectProblem
from iokernels.runtime.device import DeviceSpec, assume, spec_of
from iokernels.testing.case import Compilation, Pass
from iokernels.testing.case.shape import Shape

from .shapes import SELECT, VOCABULARY

PAGE = 16
"""Keys of a page where Quest selects."""


def region_of(shape: Shape) -> Region:
    """From what, and for whom, a call selects."""
    return Region(HEADS[shape.heads], shape.bq, shape.sink, shape.window, bool(shape.causal))


def tensors(shape: Shape, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """q and k as meta tensors."""

    def heads(rows: int, count: int) -> Tensor:
        if shape.bnhd:
            return torch.empty(shape.b, rows, count, shape.d, dtype=dtype, device="meta").transpose(1, 2)
        return torch.empty(shape.b, count, rows, shape.d, dtype=dtype, device="meta")

    return heads(shape.n, shape.h), heads(shape.nk, shape.hkv)


def plan(shape: Shape) -> tuple[Stage, ...]:
    """The stages of a search; ``slots`` as each would keep of a long enough sequence."""
    return hip_plan(STAGES, shape.budget, region_of(shape))


def quest_slots(shape: Shape) -> int:
    """Pages that a list has room for."""
    return min(shape.budget // PAGE, most_chunks(shape.n, shape.nk, PAGE, region_of(shape)))


def launch_search(shape: Shape, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Launch the Triton kernels of a hierarchical search; return its lists."""
    from iokernels.ops.hip_attention.triton import launch as triton_launch

    return launch_stages(shape, dtype, triton_launch.stage)


def launch_stages(shape: Shape, dtype: torch.dtype, stage_of: Callable[..., tuple[Tensor, Tensor]]) -> Any:
    """Launch all stages of a hierarchical search; return its lists."""
    (q, k), region = tensors(shape, dtype), region_of(shape)
    lists: Any = (None, None)
    for stage in plan(shape):
        most = candidates(shape.n, shape.nk, lists[0], stage, region)
        stage = stage._replace(slots=min(stage.slots, most))
        lists = stage_of(q, k, *lists, region, stage)
    return lists


def _launch_quest(shape: Shape, dtype: torch.dtype) -> None:
    from iokernels.ops.hip_attention.triton import launch as triton_launch

    q, k = tensors(shape, dtype)
    kmin, kmax = (k.new_empty(shape.b, shape.hkv, -(-shape.nk // PAGE), shape.d) for _ in range(2))
    triton_launch.page_bounds_(k, kmin, kmax, PAGE, 0)
    triton_launch.pages(q, kmin, kmax, shape.nk, region_of(shape), PAGE, quest_slots(shape))


def launch_select(shape: Shape, dtype: torch.dtype, which: Pass) -> None:
    """Launch the kernels of a selector with meta tensors."""
    if shape.quest:
        _launch_quest(shape, dtype)
    else:
        launch_search(shape, dtype)


def launch(shape: Shape, dtype: torch.dtype, which: Pass) -> None:
    """Launch the kernels of a search and of the attention that follows with meta tensors."""
    from iokernels.ops.block_sparse_attention.triton import launch as block_sparse_launch

    ids, counts = launch_search(shape, dtype)
    q, k = tensors(shape, dtype)
    values = k.new_empty(*k.shape[:3], shape.dv)
    block_sparse_launch.forward(q, k, values, attention_options(shape, ids, counts))


def problem(shape: Shape, dtype: torch.dtype, kernel: str, device: DeviceSpec) -> SelectProblem:
    """What the launch parameters of a kernel depend on: of the stages, the first, which scores the most chunks."""
    from iokernels.ops.hip_attention.triton import launch as triton_launch

    with assume(device):
        (q, k), region = tensors(shape, dtype), region_of(shape)
        if kernel == BOUNDS:
            return triton_launch.problem(BOUNDS, k, 1, -(-shape.nk // PAGE), shape.b * shape.hkv)
        quest = kernel == PAGES or (kernel == BEST and "quest" in shape and shape.quest)
        chunk, stride = (PAGE, 1) if quest else STAGES[0][:2]
        count = most_chunks(shape.n, shape.nk, chunk, region)
        return triton_launch.Launch(q, k, region, stride, count).problem(kernel)


def configs(shape: Shape, dtype: torch.dtype) -> dict[str, Any]:
    """The configuration that each kernel would be launched with."""
    device = spec_of(torch.device("meta"))
    return {
        kernel: autotune.select(TUNABLES[kernel], problem(shape, dtype, kernel, device), device) for kernel in KERNELS
    }


def attention_options(shape: Shape, ids: Tensor, counts: Tensor) -> Options:
    """What block-sparse attention is told of the lists."""
    return Options(
        ids, counts, block_q=shape.bq, block_k=STAGES[-1].chunk, sink=shape.sink, window=shape.window,
        kv_len=shape.nk, scale=shape.d**-0.5, causal=bool(shape.causal),
    )  # fmt: skip


def attention_configs(shape: Shape, dtype: torch.dtype) -> dict[str, Any]:
    """Those of a search and of the attention that follows."""
    from iokernels.ops.block_sparse_attention.triton import launch as block_sparse_launch

    q, k = tensors(shape, dtype)
    region = region_of(shape)
    lists = list_heads(region.heads, shape.h, shape.hkv)
    blocks = query_blocks(shape.n, shape.bq)
    ids = torch.empty((shape.b, lists, blocks, listed(shape)), dtype=torch.int32, device="meta")
    options = attention_options(shape, ids, ids[..., 0])
    launch = block_sparse_launch.Launch(q, k, k.new_empty(*k.shape[:3], shape.dv), options)
    return {**configs(shape, dtype), FWD: launch.config(FWD)}


def listed(shape: Shape) -> int:
    """Entries that a list has room for."""
    block = STAGES[-1].chunk
    return min(shape.budget // block, most_chunks(shape.n, shape.nk, block, region_of(shape)))


SELECT_COMPILATION = Compilation(
    launch=launch_select,
    points=tuple(
        (SELECT.parse(f"b=1,{text}"), dtype)
        for text, dtype in (
            ("h=32,hkv=8,n=16k,d=128", torch.bfloat16),
            ("h=32,hkv=8,n=4k,d=256,quest=1,bnhd=1", torch.float16),
            ("h=8,hkv=2,n=4k,d=64", torch.float32),
        )
    ),
)

COMPILATION = Compilation(
    launch=launch,
    points=tuple(
        (VOCABULARY.parse(f"b=1,h=32,hkv=8,{text}"), dtype)
        for text, dtype in (("n=16k,d=128", torch.bfloat16), ("n=1,nk=128k,d=128", torch.bfloat16))
    ),
)

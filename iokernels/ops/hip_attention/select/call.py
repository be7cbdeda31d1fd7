"""What every selector makes of its arguments, beside the selectors: the region, the stages, the backend, the result."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from iokernels.ops.block_sparse_attention.arguments import UNBOUNDED, keys, one_of, too_long
from iokernels.ops.block_sparse_attention.index import KEY_BLOCKS, BlockIndex
from iokernels.ops.hip_attention.options import (
    HEADS,
    QUERY_BLOCKS,
    STAGES,
    HipStage,
    Region,
    Stage,
    list_heads,
    query_blocks,
)
from iokernels.runtime import device as devices
from iokernels.runtime import dispatch
from iokernels.runtime.contracts import FLOATS, Contract, Spec
from iokernels.runtime.contracts.plain import flag, untraced_value

MAX_HEAD_DIM = 256
"""Widest head that the kernels hold on chip, in Triton and in CUDA C++."""

select_hip_contract = Contract("select_hip", q=Spec("B Hq Nq D", FLOATS), k=Spec("B Hkv Nk D", same_dtype_as="q"))


def region_of(
    contract: Contract, q: Tensor, k: Tensor, heads: Any, block_q: Any, sink: Any, window: Any, causal: Any
) -> Region:
    """Check the arguments that all selectors have."""
    sizes = contract.check(q=q, k=k)
    contract.require(
        sizes["Hkv"] > 0 and sizes["Hq"] % sizes["Hkv"] == 0,
        f"q has {sizes['Hq']} heads and k has {sizes['Hkv']}; the heads of k must divide those of q",
    )
    contract.require(sizes["D"] > 0, "the heads are 0 wide; they must be at least 1")
    return options_of(contract.operator, heads, block_q, sink, window, causal)


def options_of(where: str, heads: Any, block_q: Any, sink: Any, window: Any, causal: Any) -> Region:
    """Check those that are no tensors."""
    if heads not in HEADS:
        raise ValueError(f"{where}: heads is {heads!r}; it must be one of {', '.join(HEADS)}")
    return Region(
        heads, one_of(where, "block_q", block_q, QUERY_BLOCKS), keys(where, "sink", sink),
        keys(where, "window", window), flag(where, "causal", causal),
    )  # fmt: skip


def budget_of(where: str, budget: Any, block: int) -> Any:
    """Check the keys of a list; a list has room for all there are at most."""
    budget = keys(where, "budget", budget, least=-UNBOUNDED)
    if budget < block:
        raise ValueError(f"{where}: budget is {budget}; it must be at least a block, {block}")
    return budget


def nothing_in(q: Tensor, k: Tensor) -> Any:
    """Whether there is no row, or no key to select."""
    return q.shape[0] == 0 or q.shape[1] == 0 or q.shape[2] == 0 or k.shape[2] == 0


def nothing_of(q: Tensor, k: Tensor, region: Region, block_k: int) -> BlockIndex:
    """The index of a call without rows or keys: empty lists."""
    lists, blocks = list_heads(region.heads, q.shape[1], k.shape[1]), query_blocks(q.shape[2], region.block_q)
    counts = torch.zeros((q.shape[0], lists, max(blocks, 1)), dtype=torch.int32, device=q.device)
    return index_of(q, k, counts.new_zeros((*counts.shape, 1)), counts, region, block_k)


def backend_of(operator: str, backend: str | None, q: Tensor, k: Tensor) -> str:
    """The backend that a selector runs on."""
    requested = dispatch.requested(backend)
    refusals = {
        "triton": lambda: kernel_refusal(q, k),
        "cuda": lambda: cuda_refusal(q, k),
        "torch": lambda: None,
        "reference": lambda: None,
    }
    if operator != "select_hip":
        del refusals["cuda"]
    if operator == "page_bounds":
        del refusals["reference"]
    return dispatch.choose(operator, requested, q.device.type, refusals)


def kernel_refusal(q: Tensor, k: Tensor) -> str | None:
    """Why the Triton kernels cannot take a call, as the end of a sentence."""
    return too_long(k.shape[2]) or devices.kernel_refusal(q, {"D": q.shape[3]}, MAX_HEAD_DIM)


def cuda_refusal(q: Tensor, k: Tensor) -> str | None:
    """Why the CUDA kernel of the hierarchical search cannot take ``q``, as the end of a sentence."""
    if q.dtype not in (torch.float16, torch.bfloat16):
        return f"its kernel takes float16 and bfloat16, not {str(q.dtype).removeprefix('torch.')}"
    if q.shape[3] > MAX_HEAD_DIM:
        return f"D is {q.shape[3]}, and its kernel holds heads up to {MAX_HEAD_DIM} wide"
    return too_long(k.shape[2]) or devices.cuda_refusal(q.device)


def index_of(q: Tensor, k: Tensor, ids: Tensor, counts: Tensor, region: Region, block_k: int) -> BlockIndex:
    """The lists as an index, with the always-on keys that they were made for."""
    return BlockIndex(
        ids, counts, region.block_q, block_k, region.sink, region.window, *map(untraced_value, (q.shape[2], k.shape[2]))
    )  # fmt: skip


def hip_plan(stages: Sequence[HipStage | tuple[int, ...]], budget: int, region: Region) -> tuple[Stage, ...]:
    """The stages of a search; ``slots`` is what each would keep of a long enough sequence."""
    given = stages_of("select_hip", stages)
    for above, stage in zip([None, *given], given):  # noqa: B905, the last has none below
        ok = stage.chunk >= 2 and stage.chunk & (stage.chunk - 1) == 0
        select_hip_contract.require(ok, f"stages has chunks of {stage.chunk}; they must be powers of two, at least 2")
        select_hip_contract.require(
            above is None or above.chunk > stage.chunk,
            f"stages has chunks of {stage.chunk} after {above.chunk if above else 0}; they must become smaller",
        )
        select_hip_contract.require(
            stage.stride_q in (1, 2, 4, 8, 16),
            f"stages has stride_q {stage.stride_q}; it must be 1, 2, 4, 8 or 16, so that blocks of queries are whole",
        )
    last = one_of("select_hip", "the last chunk of stages", given[-1].chunk, KEY_BLOCKS)
    budget = budget_of("select_hip", budget, last)
    plan, parent = [], 0
    for position, stage in enumerate(given):
        # A stage whose chunks hold all of a short sequence must not lose any: the first and last may be in part.
        keep = budget if position == len(given) - 1 else max(stage.keep, budget) + 2 * stage.chunk
        plan.append(Stage(stage.chunk, stage.stride_q, keep // stage.chunk, parent))
        parent = stage.chunk
    return tuple(plan)


def stages_of(where: str, stages: Any) -> tuple[HipStage, ...]:
    """The stages of an argument, each two or three whole numbers."""
    if stages is STAGES:
        return STAGES
    if not isinstance(stages, (tuple, list)):
        raise TypeError(f"{where}: stages is {type(stages).__name__}; it must be a tuple of (chunk, stride_q, keep)")
    if len(stages) == 0:
        raise ValueError(f"{where}: stages is empty; there must be at least one")
    given = []
    for number, stage in enumerate(stages):
        if not isinstance(stage, (tuple, list)) or len(stage) not in (2, 3):
            raise TypeError(f"{where}: stages[{number}] is {stage!r}; it must be (chunk, stride_q, keep)")
        named = zip(HipStage._fields, stage, strict=False)
        given.append(HipStage(*(keys(where, f"{name} of stages[{number}]", value) for name, value in named)))
    return tuple(given)

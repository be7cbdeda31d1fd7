"""Launches the Triton kernels of the selectors: their backend ``triton``.

A stage is two launches: the search, and the choice of the best chunks, which replaces top-k, sort, unique and count.
Nothing else runs between them, nothing waits for the device, and no size depends on data: a CUDA graph can hold it.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from iokernels import autotune
from iokernels.ops.hip_attention.options import (
    Region,
    Stage,
    candidates,
    empty_lists,
    most_chunks,
    query_blocks,
    searched_heads,
)
from iokernels.ops.shared.triton_tiles import padded, strides
from iokernels.runtime.device import guard, spec_of

from .best import hip_attention_best_kernel
from .pages import hip_attention_bounds_kernel, hip_attention_pages_kernel
from .stage import hip_attention_stage_kernel
from .tuning import BEST, BOUNDS, PAGES, STAGE, TUNABLES, SelectConfig, SelectProblem


def stage(
    q: Tensor, k: Tensor, ids: Tensor | None, counts: Tensor | None, region: Region, stage: Stage
) -> tuple[Tensor, Tensor]:
    """One stage of the hierarchical search: ``(ids, counts)`` of the best chunks, ascending."""
    launch = Launch(q, k, region, stage.stride_q, candidates(q.shape[2], k.shape[2], ids, stage, region))
    scores = launch.scores()
    ratio = stage.parent // stage.chunk if ids is not None else 1
    ids, counts = (None if x is None else x.contiguous() for x in (ids, counts))
    config = launch.config(STAGE)
    blocks = launch.lists * triton.cdiv(launch.candidates, config.block_c)
    if blocks > 0:
        with guard(q.device):
            hip_attention_stage_kernel[(blocks,)](
                q, k, ids, counts, scores, strides(q), strides(k), *launch.heads, *launch.rows(k.shape[2]),
                launch.candidates, 0 if ids is None else ids.shape[3], 1 if ids is None else ids.shape[1],
                region.sink, region.window,
                LISTED=ids is not None, RATIO=ratio, CHUNK=stage.chunk, STEPS=stage.chunk.bit_length() - 1,
                STRIDE_Q=stage.stride_q, CAUSAL=region.causal, HEAD_DIM=q.shape[3], BLOCK_D=padded(q.shape[3]),
                BLOCK_R=config.block_r, BLOCK_C=config.block_c,
                ROW_TILES=triton.cdiv(launch.heads[1] * launch.means, config.block_r),
                PRECISION=_precision(), num_warps=config.num_warps, num_stages=1,
            )  # fmt: skip
    return launch.best(scores, ids, ratio, stage.slots)


def pages(
    q: Tensor, kmin: Tensor, kmax: Tensor, kv_len: int, region: Region, page: int, slots: int
) -> tuple[Tensor, Tensor]:
    """The pages with the highest upper bounds of q . k: ``(ids, counts)``, ascending."""
    launch = Launch(q, kmin, region, 1, most_chunks(q.shape[2], kv_len, page, region))
    scores = launch.scores()
    config = launch.config(PAGES)
    blocks = launch.lists * triton.cdiv(launch.candidates, config.block_c)
    if blocks > 0:
        with guard(q.device):
            hip_attention_pages_kernel[(blocks,)](
                q, kmin, kmax, scores, strides(q), strides(kmin), strides(kmax), *launch.heads, *launch.rows(kv_len),
                launch.candidates, region.sink, region.window,
                PAGE=page, CAUSAL=region.causal, HEAD_DIM=q.shape[3], BLOCK_D=padded(q.shape[3]),
                BLOCK_R=config.block_r, BLOCK_C=config.block_c, PRECISION=_precision(),
                num_warps=config.num_warps, num_stages=1,
            )  # fmt: skip
    return launch.best(scores, None, 1, slots)


def page_bounds_(k: Tensor, kmin: Tensor, kmax: Tensor, page: int, first_page: int) -> None:
    """Write the bounds of the pages from ``first_page`` on into kmin and kmax ``[B, Hkv, pages, D]``."""
    batch, heads, kv_len, width = k.shape
    count = triton.cdiv(kv_len, page)
    config = _select(BOUNDS, k, 1, count, batch * heads)
    blocks = batch * heads * triton.cdiv(count - first_page, config.block_c)
    if blocks > 0:
        with guard(k.device):
            hip_attention_bounds_kernel[(blocks,)](
                k, kmin, kmax, strides(k), strides(kmin), strides(kmax), heads, kv_len, count, first_page,
                HEAD_DIM=width, BLOCK_D=padded(width), PAGE=page, BLOCK_P=config.block_c,
                num_warps=config.num_warps,
            )  # fmt: skip


class Launch:
    """What the kernels of one call need, from shapes and options only."""

    def __init__(self, q: Tensor, k: Tensor, region: Region, stride_q: int, count: int) -> None:
        self.q, self.region, self.candidates = q, region, count
        self.kv_heads = k.shape[1]
        searched = searched_heads(region.heads, q.shape[1], k.shape[1])
        # Searched heads, query heads to each, and how many of them read one key head.
        self.heads = (searched, q.shape[1] // searched, searched // k.shape[1])
        self.blocks = query_blocks(q.shape[2], region.block_q)
        self.means = triton.cdiv(min(region.block_q, q.shape[2]), stride_q)
        self.lists = q.shape[0] * searched * self.blocks

    def rows(self, kv_len: int) -> tuple[int, ...]:
        """The sizes of the query blocks, in the order of the kernels' arguments."""
        return self.blocks, self.region.block_q, self.means, self.q.shape[2], kv_len

    def scores(self) -> Tensor:
        """Room for the scores of all candidates."""
        shape = (self.q.shape[0], self.heads[0], self.blocks, self.candidates)
        return self.q.new_empty(shape, dtype=torch.float32)

    def best(self, scores: Tensor, parents: Tensor | None, ratio: int, slots: int) -> tuple[Tensor, Tensor]:
        """The best candidates of every list, in one launch."""
        ids, counts = empty_lists(self.q, self.kv_heads, slots, self.region)
        if counts.numel() > 0:
            config = self.config(BEST)
            with guard(self.q.device):
                hip_attention_best_kernel[(counts.numel(),)](
                    scores, parents, ids, counts, self.heads[0], ids.shape[1], self.blocks, self.candidates,
                    0 if parents is None else parents.shape[3], slots,
                    LISTED=parents is not None, RATIO=ratio, BLOCK=triton.next_power_of_2(self.candidates),
                    num_warps=config.num_warps,
                )  # fmt: skip
        return ids, counts

    def config(self, kernel: str) -> SelectConfig:
        """The launch parameters of ``kernel``."""
        return _select(kernel, self.q, self.heads[1] * self.means, self.candidates, self.lists)

    def problem(self, kernel: str) -> SelectProblem:
        """What they depend on."""
        return problem(kernel, self.q, self.heads[1] * self.means, self.candidates, self.lists)


def problem(kernel: str, x: Tensor, rows: int, count: int, lists: int) -> SelectProblem:
    """What the launch parameters of ``kernel`` depend on."""
    device = spec_of(x.device)
    return SelectProblem(
        kernel,
        padded(x.shape[3]),
        x.element_size(),
        x.dtype != torch.float32 or _precision() != "ieee",
        autotune.bucket(rows),
        autotune.bucket(count),
        autotune.bucket(lists),
        device.sm,
        device.smem_block,
    )


def _select(kernel: str, x: Tensor, rows: int, count: int, lists: int) -> Any:
    return autotune.select(TUNABLES[kernel], problem(kernel, x, rows, count, lists), spec_of(x.device))


def _precision() -> str:
    return "tf32" if torch.get_float32_matmul_precision() != "highest" else "ieee"

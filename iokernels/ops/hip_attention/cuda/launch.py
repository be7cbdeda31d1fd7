"""Launches ``csrc/hip_attention/select.cu``: the backend ``cuda`` of the hierarchical selector, one launch a stage."""

from __future__ import annotations

import torch
from torch import Tensor

from iokernels import autotune
from iokernels.ops.hip_attention.options import Region, Stage, candidates, empty_lists, query_blocks, searched_heads
from iokernels.ops.shared.arrivals import ARRIVALS, arrivals_of
from iokernels.ops.shared.cuda_tiles import in_sixteens
from iokernels.ops.shared.windows import clamp
from iokernels.runtime.cuda.kernel import CudaKernel, cuda_kernel
from iokernels.runtime.device import guard, spec_of

from . import tuning


def stage(
    q: Tensor, k: Tensor, ids: Tensor | None, counts: Tensor | None, region: Region, stage: Stage
) -> tuple[Tensor, Tensor]:
    """One stage of the hierarchical search: ``(ids, counts)`` of the best chunks, ascending."""
    out_ids, out_counts = empty_lists(q, k.shape[1], stage.slots, region)
    if out_counts.numel() > 0:
        with guard(q.device):
            launch = Launch(q, k, candidates(q.shape[2], k.shape[2], ids, stage, region), region, stage)
            launch.run(ids, counts, out_ids, out_counts)
    return out_ids, out_counts


class Launch:
    """What the launch of a stage of ``count`` candidates needs, from shapes and options only."""

    def __init__(self, q: Tensor, k: Tensor, count: int, region: Region, stage: Stage) -> None:
        self.q, self.k, self.region, self.stage, self.candidates = q, k, region, stage, count
        self.heads = searched_heads(region.heads, q.shape[1], k.shape[1])
        self.group = q.shape[1] // self.heads
        self.blocks = query_blocks(q.shape[2], region.block_q)
        self.means = -(-min(region.block_q, q.shape[2]) // stage.stride_q)
        self.searches = q.shape[0] * self.heads * self.blocks
        device = spec_of(q.device)
        self.problem = tuning.Problem(
            -(-q.shape[3] // 32) * 32,
            autotune.bucket(self.group * self.means),
            device.sm,
            device.sms,
            device.smem_block,
            device.smem_sm,
            autotune.bucket(count),
            autotune.bucket(self.searches),
        )
        self.config = autotune.select(tuning.TUNABLE, self.problem, device)

    @property
    def grid(self) -> int:
        """Blocks: tiles of candidates of every searched head of every block of queries."""
        return self.searches * -(-self.candidates // self.config.block_c)

    def kernel(self) -> CudaKernel:
        """The kernel, compiled for dtype, width and tiles; stages and options are its arguments."""
        return cuda_kernel(
            "hip_attention/select.cu",
            "hip_attention_select_cuda_kernel",
            Element=self.q.dtype,
            HEAD_DIM=self.q.shape[3],
            BLOCK_R=self.config.block_r,
            WHOLE=self.group * self.means <= self.config.block_r,
            WARPS=self.config.num_warps,
            ALIGNED=in_sixteens(self.q) and in_sixteens(self.k),
        )

    def run(self, ids: Tensor | None, counts: Tensor | None, out_ids: Tensor, out_counts: Tensor) -> None:
        """Write the lists of the stage, from those of the stage before."""
        q, k, region, stage = self.q, self.k, self.region, self.stage
        ratio = 1 if ids is None else stage.parent // stage.chunk
        scores = (q.shape[0], self.heads, self.blocks, self.candidates)
        args = {
            "q_ptr": q,
            "k_ptr": k,
            "parents_ptr": None if ids is None else ids.contiguous(),
            "parent_counts_ptr": None if counts is None else counts.contiguous(),
            "scores_ptr": q.new_empty(scores, dtype=torch.float32),
            "ids_ptr": out_ids,
            "counts_ptr": out_counts,
            "arrivals_ptr": arrivals_of(q.device, out_counts.numel()),
            "stride_q": q.stride(),
            "stride_k": k.stride(),
            "heads": self.heads,
            "lists": out_ids.shape[1],
            "group": self.group,
            "kv_group": self.heads // k.shape[1],
            "blocks": self.blocks,
            "block_q": region.block_q,
            "means": self.means,
            "rows_of_mean": stage.stride_q,
            "q_len": q.shape[2],
            "kv_len": k.shape[2],
            "candidates": self.candidates,
            "slots": 0 if ids is None else ids.shape[3],
            "most_kept": out_ids.shape[3],
            "sink": clamp(region.sink),
            "window": clamp(region.window),
            "causal": int(region.causal),
            "steps": stage.chunk.bit_length() - 1,
            "ratio_log2": ratio.bit_length() - 1,
        }
        smem = tuning.shared_bytes(self.problem, self.config)
        try:
            self.kernel().launch((self.grid,), 32 * self.config.num_warps, smem, args)
        except BaseException:
            ARRIVALS.clear()  # a kernel that was broken off leaves counts behind
            raise

"""The Triton kernels of block_sparse_attention without data: their configurations, compiling them, tuning them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from iokernels.ops.block_sparse_attention.options import Options
from iokernels.ops.block_sparse_attention.triton.tuning import DKV, DQ, FWD, KERNELS, TUNABLES, Problem
from iokernels.runtime.device import DeviceSpec
from iokernels.testing.case import Compilation, Pass, Tuning
from iokernels.testing.case.shape import Shape

from .shapes import VOCABULARY, list_heads, query_blocks


def meta_call(shape: Shape, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Options]:
    """q, k, v and the options of a call of ``shape``, as meta tensors."""

    def empty(*size: int, of: torch.dtype = dtype) -> Tensor:
        return torch.empty(size, dtype=of, device="meta")

    def heads(sequence: int, count: int, width: int) -> Tensor:
        if shape.bnhd:
            return empty(shape.b, sequence, count, width).transpose(1, 2)
        return empty(shape.b, count, sequence, width)

    lists = (shape.b, list_heads(shape), query_blocks(shape))
    room = min(-(-shape.budget // shape.bk), -(-shape.nk // shape.bk))
    options = Options(
        indices=empty(*lists, room, of=torch.int32),
        counts=empty(*lists, of=torch.int32),
        block_q=shape.bq,
        block_k=shape.bk,
        sink=shape.sink,
        window=shape.window,
        kv_len=shape.nk,
        scale=shape.d**-0.5,
        causal=bool(shape.causal),
    )
    return (
        heads(shape.n, shape.h, shape.d), heads(shape.nk, shape.hkv, shape.d), heads(shape.nk, shape.hkv, shape.dv),
        options,
    )  # fmt: skip


def configs(shape: Shape, dtype: torch.dtype) -> dict[str, Any]:
    """The configuration that each kernel would be launched with."""
    from iokernels.ops.block_sparse_attention.triton import launch as triton_launch

    launch = triton_launch.Launch(*meta_call(shape, dtype))
    return {kernel: launch.config(kernel) for kernel in KERNELS}


def launch(shape: Shape, dtype: torch.dtype, which: Pass, needs: tuple[bool, ...] = (True, True, True)) -> None:
    """Launch the kernels of a pass with meta tensors."""
    from iokernels.ops.block_sparse_attention.triton import launch as triton_launch

    q, k, v, options = meta_call(shape, dtype)
    out, lse = q.new_empty(*q.shape[:3], shape.dv), q.new_empty(q.shape[:3], dtype=torch.float32)
    if which != "bwd":
        out, lse = triton_launch.forward(q, k, v, options)
    if which != "fwd":
        dlse = lse if shape.lse else None
        triton_launch.backward(out, dlse, q, k, v, out, lse, options, needs)


COMPILATION = Compilation(
    launch=launch,
    points=tuple(
        (VOCABULARY.parse(f"b=1,h=32,hkv=8,{text}"), dtype)
        for text, dtype in (
            ("n=16k,d=128", torch.bfloat16),
            ("n=16k,d=128,bk=8,bnhd=1,lse=1", torch.float16),
            ("n=16k,d=64,lists=2,causal=0", torch.bfloat16),
            ("n=4k,d=256,bk=16", torch.bfloat16),
            ("n=4k,d=128", torch.float32),
            ("n=1,nk=64k,d=128,bk=16", torch.bfloat16),
        )
    ),
)

_LEAVES = {FWD: (), DQ: ("q",), DKV: ("k", "v")}


def _problem(shape: Shape, dtype: torch.dtype, kernel: str, device: DeviceSpec) -> Problem:
    from iokernels.ops.block_sparse_attention.triton import launch as triton_launch

    return triton_launch.Launch(*meta_call(shape, dtype)).problem(kernel, device)


def _launch_kernel(shape: Shape, dtype: torch.dtype, kernel: str) -> None:
    if kernel == FWD:
        launch(shape, dtype, "fwd")
    else:
        launch(shape, dtype, "bwd", (kernel == DQ, kernel == DKV, kernel == DKV))


TUNING = Tuning(TUNABLES, lambda shape: KERNELS, _problem, _launch_kernel, _LEAVES)

"""The Triton kernels of flash_attention without data: which configurations a call takes, and compiling them."""

from __future__ import annotations

from typing import Any

import torch

from iokernels.ops.flash_attention.options import Needs, Options, empty_statistics
from iokernels.ops.flash_attention.triton.tuning import KERNELS
from iokernels.testing.case import Compilation, Pass
from iokernels.testing.case.shape import Shape

from .shapes import VOCABULARY, lengths


def meta_call(shape: Shape, dtype: torch.dtype) -> tuple[Any, Any, Any, Options]:
    """q, k, v and the options of a call of ``shape``, as meta tensors."""

    def empty(*size: int, of: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(size, dtype=of, device="meta")

    def heads(sequence: int, count: int, width: int) -> torch.Tensor:
        if shape.packed:
            return empty(sequence, count, width).transpose(0, 1).unsqueeze(0)
        if shape.bnhd:
            return empty(shape.b, sequence, count, width).transpose(1, 2)
        return empty(shape.b, count, sequence, width)

    sides = lengths(shape)
    rows, keys = (sum(side) for side in zip(*sides, strict=True)) if shape.packed else (shape.n, shape.nk)
    options = Options(
        scale=shape.d**-0.5,
        window_left=shape.left,
        window_right=0 if shape.causal else shape.right,
        softcap=shape.softcap,
        dropout_p=shape.dropout,
        bias=empty(shape.b if shape.bias == 1 else 1, shape.h, shape.n, shape.nk) if shape.bias else None,
        mask=empty(shape.b, shape.h, shape.n, shape.nk, of=torch.bool) if shape.mask else None,
        sinks=empty(shape.h) if shape.sinks else None,
        alibi_slopes=empty(1, shape.h, of=torch.float32) if shape.alibi else None,
        dropout_seed=empty(1, of=torch.int64) if shape.dropout else None,
    )
    if shape.packed:
        offsets = empty(shape.b + 1, of=torch.int32)
        options = options._replace(
            cu_seqlens_q=offsets, cu_seqlens_k=offsets, max_seqlen_q=shape.n, max_seqlen_k=shape.nk
        )
    q, k, v = heads(rows, shape.h, shape.d), heads(keys, shape.hkv, shape.d), heads(keys, shape.hkv, shape.dv)
    return q, k, v, options


def configs(shape: Shape, dtype: torch.dtype) -> dict[str, Any]:
    """The configuration that each kernel would be launched with."""
    from iokernels.ops.flash_attention.triton import launch as triton_launch

    q, k, v, options = meta_call(shape, dtype)
    launch = triton_launch.Launch(q, k, v, options)
    return {kernel: launch.config(kernel, q) for kernel in KERNELS}


def launch(shape: Shape, dtype: torch.dtype, which: Pass) -> None:
    """Launch the kernels of a pass with meta tensors."""
    from iokernels.ops.flash_attention.triton import launch as triton_launch

    q, k, v, options = meta_call(shape, dtype)
    out, lse = q.new_empty(*q.shape[:3], shape.dv), empty_statistics(q, options)
    if which != "bwd":
        out, lse = triton_launch.forward(q, k, v, options)
    if which != "fwd":
        needs = Needs(True, True, True, options.bias is not None, options.sinks is not None)
        triton_launch.backward(out, lse if shape.lse else None, q, k, v, out, lse, options, needs)


_EVERYTHING = "causal=1,left=256,softcap=30,bias=2,sinks=1,mask=1,alibi=1,dropout=0.1,lse=1"

COMPILATION = Compilation(
    launch=launch,
    points=tuple(
        (VOCABULARY.parse(f"b=2,h=4,n=1k,bnhd=1,{text}"), dtype)
        for text, dtype in (
            ("d=64", torch.bfloat16),
            ("d=64,causal=1", torch.bfloat16),
            ("d=128", torch.bfloat16),
            ("d=128,causal=1", torch.bfloat16),
            ("d=64,causal=1,packed=1", torch.float16),
            (f"d=40,dv=96,{_EVERYTHING}", torch.float16),
            ("d=256,causal=1", torch.bfloat16),
            ("d=64,causal=1", torch.float32),
            (f"d=256,{_EVERYTHING}", torch.float32),
        )
    ),
)

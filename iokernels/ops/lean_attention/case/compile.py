"""The Triton kernels of lean_attention without data: which configurations a call takes, and compiling them."""

from __future__ import annotations

from typing import Any

import torch

from iokernels.ops.lean_attention.options import Options
from iokernels.ops.lean_attention.triton.tuning import KERNEL
from iokernels.testing.case import Compilation, Pass
from iokernels.testing.case.shape import Shape

from .shapes import SCHEDULES, VOCABULARY, cache_dtype, cache_size, most_pages


def meta_call(shape: Shape, dtype: torch.dtype) -> tuple[Any, Any, Any, Options]:
    """q, both caches and the options of a call of ``shape``, as meta tensors."""
    of_cache = cache_dtype(shape, dtype)

    def empty(*size: int, of: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(size, dtype=of, device="meta")

    def heads(sequences: int, count: int, rows: int, width: int, of: torch.dtype) -> torch.Tensor:
        if shape.bnhd:
            return empty(sequences, rows, count, width, of=of).transpose(1, 2)
        return empty(sequences, count, rows, width, of=of)

    def factors() -> torch.Tensor | None:
        size = (None, (shape.hkv,), cache_size(shape))[shape.scales]
        return None if size is None else empty(*size, of=torch.float32)

    options = Options(
        cache_seqlens=empty(shape.b, of=torch.int32),
        block_table=empty(shape.b, most_pages(shape), of=torch.int32) if shape.page else None,
        sinks=empty(shape.h) if shape.sinks else None,
        k_scale=factors(),
        v_scale=factors(),
        k_prefix=empty(shape.hkv, shape.prefix, shape.d, of=of_cache) if shape.prefix else None,
        v_prefix=empty(shape.hkv, shape.prefix, shape.dv, of=of_cache) if shape.prefix else None,
        scale=shape.d**-0.5,
        window_left=shape.left,
        window_right=0 if shape.causal else shape.right,
        softcap=shape.softcap,
        schedule=SCHEDULES[shape.schedule],
    )
    k_cache, v_cache = (heads(*cache_size(shape), width, of_cache) for width in (shape.d, shape.dv))
    return heads(shape.b, shape.h, shape.n, shape.d, dtype), k_cache, v_cache, options


def configs(shape: Shape, dtype: torch.dtype) -> dict[str, Any]:
    """The configuration that the call would be launched with."""
    from iokernels.ops.lean_attention.triton import launch as triton_launch

    return {KERNEL: triton_launch.Launch(*meta_call(shape, dtype)).config}


def launch(shape: Shape, dtype: torch.dtype, which: Pass) -> None:
    """Launch the kernels of a call with meta tensors."""
    from iokernels.ops.lean_attention.triton import launch as triton_launch

    triton_launch.forward(*meta_call(shape, dtype))


_LLAMA = "b=4,h=32,hkv=4,nk=4k,d=128"
_EVERYTHING = "n=3,left=256,softcap=30,sinks=1,lse=1,bnhd=1"

COMPILATION = Compilation(
    launch=launch,
    points=tuple(
        (VOCABULARY.parse(text), dtype)
        for text, dtype in (
            (f"{_LLAMA},schedule=1", torch.bfloat16),
            ("b=4,h=64,hkv=1,nk=4k,d=256,n=2,schedule=1", torch.bfloat16),
            (f"{_LLAMA},page=16,schedule=2", torch.bfloat16),
            (f"{_LLAMA},cache=1,scales=1,schedule=1", torch.bfloat16),
            (f"{_LLAMA},cache=2,scales=2,page=16,schedule=1", torch.float16),
            (f"{_LLAMA},prefix=1k,schedule=1", torch.bfloat16),
            ("b=2,h=8,hkv=2,nk=4k,d=64,schedule=1", torch.float32),
            (f"b=2,h=8,hkv=2,nk=4k,d=40,dv=96,cache=2,scales=2,page=16,schedule=1,{_EVERYTHING}", torch.float16),
            (f"b=2,h=8,hkv=2,nk=4k,d=256,prefix=1k,cache=1,scales=1,schedule=2,{_EVERYTHING}", torch.float32),
        )
    ),
)

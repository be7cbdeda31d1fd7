"""The Triton kernel of append_kv without data."""

from __future__ import annotations

import torch

from iokernels.ops.append_kv.options import Append
from iokernels.testing.case import Compilation, Pass
from iokernels.testing.case.shape import Shape

from .shapes import CACHE_DTYPES, VOCABULARY, angles, first


def launch(shape: Shape, dtype: torch.dtype, which: Pass) -> None:
    """Launch the kernel with meta tensors."""
    from iokernels.ops.append_kv import triton

    def empty(*size: int, of: torch.dtype = torch.int32) -> torch.Tensor:
        return torch.empty(size, dtype=of, device="meta")

    def new(width: int) -> torch.Tensor:
        if shape.bnhd:
            return empty(shape.b, shape.n, shape.h, width, of=dtype).transpose(1, 2)
        return empty(shape.b, shape.h, shape.n, width, of=dtype)

    held, cached = first(shape), CACHE_DTYPES[shape.cache] or dtype
    angle = empty(angles(shape), shape.rot // 2, of=torch.float32) if shape.rot else None
    scale = empty(shape.h, of=torch.float32) if shape.scales == 1 else None
    key_scale = empty(*held, of=torch.float32) if shape.scales == 2 else None
    options = Append(
        empty(shape.b),
        block_table=empty(shape.b, held[0] // shape.b) if shape.page else None,
        new_seqlens=empty(shape.b) if shape.ragged else None,
        positions=empty(shape.b) if shape.positions else None,
        cos=angle,
        sin=angle,
        interleaved=bool(shape.interleaved),
        k_scale=scale,
        v_scale=scale,
        k_key_scale=key_scale,
        v_key_scale=key_scale,
    )
    triton.append(
        new(shape.d), new(shape.dv), empty(*held, shape.d, of=cached), empty(*held, shape.dv, of=cached), options
    )


COMPILATION = Compilation(
    launch=launch,
    points=tuple(
        (VOCABULARY.parse(f"b=2,h=4,nk=1k,{text}"), dtype)
        for text, dtype in (
            ("d=128,page=16,rot=128", torch.bfloat16),
            ("d=128,n=512", torch.float16),
            ("d=128,n=8,page=16,rot=64,interleaved=1,positions=1,ragged=1,cache=2,scales=2", torch.bfloat16),
            ("d=256,page=64,rot=256,cache=1,scales=2,bnhd=1", torch.bfloat16),
            ("d=40,dv=96,n=8,cache=1,scales=1", torch.float32),
        )
    ),
)

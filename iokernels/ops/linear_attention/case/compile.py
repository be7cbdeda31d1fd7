"""The Triton kernels of linear_attention without data: their configurations, and compiling them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from iokernels.ops.linear_attention.options import Needs, Options, empty_denominator, empty_state
from iokernels.ops.linear_attention.triton.tuning import KERNELS
from iokernels.testing.case import Compilation, Pass
from iokernels.testing.case.shape import Shape

from .shapes import STEP_VOCABULARY, VOCABULARY, lengths


def meta_call(shape: Shape, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Options]:
    """q, k, v and the options of a call of ``shape``, as meta tensors."""

    def empty(*size: int, of: torch.dtype = dtype) -> Tensor:
        return torch.empty(size, dtype=of, device="meta")

    packed = shape.get("packed")
    rows, batch = (sum(lengths(shape)), 1) if packed else (shape.n, shape.b)

    def heads(count: int, width: int) -> Tensor:
        if packed or shape.bnhd:
            return empty(batch, rows, count, width).transpose(1, 2)
        return empty(batch, count, rows, width)

    decay = None
    if shape.decay:
        decay = empty(shape.h, of=torch.float32)
        if shape.decay == 1:
            decay = empty(batch, rows, shape.h, of=torch.float32).transpose(1, 2)
    options = Options(
        log_decay=decay,
        cu_seqlens=empty(shape.b + 1, of=torch.int32) if packed else None,
        scale=shape.d**-0.5,
        taylor=bool(shape.taylor),
        normalize=bool(shape.normalize),
    )
    q, k, v = heads(shape.hk, shape.d), heads(shape.hk, shape.d), heads(shape.h, shape.dv)
    if shape.get("state"):
        options = options._replace(initial_state=empty_state(q, v, options))
    return q, k, v, options


def crossing(shape: Shape, kernel: str) -> bool:
    """Whether ``kernel`` takes part in the gradient of decays."""
    return learns(shape) and "_bwd_" in kernel


def learns(shape: Shape) -> bool:
    """Whether there are decays that want a gradient."""
    return bool(shape.decay and shape.get("learn"))


def configs(shape: Shape, dtype: torch.dtype) -> dict[str, Any]:
    """The configuration that each kernel would be launched with."""
    from iokernels.ops.linear_attention.triton import launch as triton_launch

    made = triton_launch.Launch(*meta_call(shape, dtype))
    return {kernel: made.config(kernel, crossing(shape, kernel)) for kernel in KERNELS}


def launch(shape: Shape, dtype: torch.dtype, which: Pass) -> None:
    """Launch the kernels of a pass with meta tensors."""
    if which != "bwd":
        forward(shape, dtype)
    if which != "fwd":
        backward(shape, dtype, Needs(True, True, True, learns(shape), bool(shape.get("state"))))


def forward(shape: Shape, dtype: torch.dtype) -> None:
    """Launch the kernels of the forward pass with meta tensors."""
    from iokernels.ops.linear_attention.triton import launch as triton_launch

    triton_launch.forward(*meta_call(shape, dtype))


def backward(shape: Shape, dtype: torch.dtype, needs: Needs) -> None:
    """Launch the kernels that these gradients take with meta tensors."""
    from iokernels.ops.linear_attention.triton import launch as triton_launch

    q, k, v, options = meta_call(shape, dtype)
    state = empty_state(q, v, options)
    triton_launch.backward(
        v, state if shape.get("state") else None, q, k, v, v if options.normalize else None,
        state if needs.log_decay else None, empty_denominator(v, options), options, needs,
    )  # fmt: skip


def launch_step(shape: Shape, dtype: torch.dtype, which: Pass = "fwd") -> None:
    """Launch the kernel of the step with meta tensors."""
    from iokernels.ops.linear_attention.triton import launch as triton_launch

    q, k, v, options = meta_call(shape, dtype)
    triton_launch.step(q, k, v, empty_state(q, v, options), options)


COMPILATION = Compilation(
    launch=launch,
    # Together every branch of every kernel: whole and cut, dense and packed, with and without all. A test takes the
    # first few by their place.
    points=tuple(
        (VOCABULARY.parse(f"bnhd=1,{text}"), dtype)
        for text, dtype in (
            ("b=4,h=32,n=4k,d=64,learn=0", torch.bfloat16),
            ("b=4,h=32,n=4k,d=128,learn=0", torch.bfloat16),
            ("b=1,h=8,n=16k,d=128,decay=1,state=1", torch.bfloat16),
            ("b=8,h=16,hk=4,n=512,d=64,decay=1,packed=1", torch.float16),
            ("b=1,h=4,hk=1,n=4k,d=100,dv=200,decay=1,normalize=1,state=1", torch.float16),
            ("b=4,h=32,n=2k,d=256,learn=0", torch.bfloat16),
            ("b=4,h=16,n=2k,d=16,dv=64,decay=0,taylor=1,normalize=1", torch.bfloat16),
            ("b=1,h=4,n=4k,d=24,dv=64,decay=1,taylor=1,normalize=1,state=1", torch.bfloat16),
            ("b=4,h=32,n=2k,d=64,learn=0", torch.float32),
            ("b=4,h=32,n=2k,d=256,decay=1", torch.float32),
            ("b=1,h=4,n=2k,d=16,dv=64,decay=1,taylor=1,normalize=1", torch.float32),
        )
    ),
)
STEP_COMPILATION = Compilation(
    launch=launch_step,
    points=tuple(
        (STEP_VOCABULARY.parse(f"b=2,h=4,n=1,{text}"), dtype)
        for text, dtype in (
            ("d=128", torch.bfloat16),
            ("d=256,decay=1,normalize=1", torch.float16),
            ("d=40,dv=96,decay=0", torch.float32),
            ("d=16,dv=64,decay=0,taylor=1,normalize=1", torch.bfloat16),
        )
    ),
)

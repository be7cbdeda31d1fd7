"""The Triton kernels of gated_delta_rule without data: their configurations, compiling them, tuning them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from iokernels.ops.gated_delta_rule.options import DeltaOptions, empty_inverses
from iokernels.ops.gated_delta_rule.triton.tuning import KERNELS, STEP, TUNABLES, Problem
from iokernels.runtime.device import DeviceSpec
from iokernels.testing.case import Compilation, Pass, Tuning
from iokernels.testing.case.shape import Shape

from .shapes import STEP_VOCABULARY, VOCABULARY, lengths


def meta_call(shape: Shape, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor, DeltaOptions]:
    """q, k, v, beta and the options of a call of ``shape``, as meta tensors."""

    def empty(*size: int, of: torch.dtype = dtype) -> Tensor:
        return torch.empty(size, dtype=of, device="meta")

    def heads(count: int, width: int) -> Tensor:
        if shape.get("packed"):
            return empty(rows, count, width).transpose(0, 1).unsqueeze(0)
        if shape.bnhd:
            return empty(shape.b, rows, count, width).transpose(1, 2)
        return empty(shape.b, count, rows, width)

    packed = shape.get("packed")
    rows = sum(lengths(shape)) if packed else shape.n
    batch = 1 if packed else shape.b
    decay = None
    if shape.decay:
        decay = empty(shape.h, of=torch.float32)[None, :, None].expand(batch, -1, rows)
        if shape.decay == 1:
            decay = empty(batch, shape.h, rows, of=torch.float32)
    options = DeltaOptions(
        log_decay=decay,
        initial_state=empty(shape.b, shape.h, shape.d, shape.dv, of=torch.float32) if shape.get("state") else None,
        cu_seqlens=empty(shape.b + 1, of=torch.int32) if packed else None,
        scale=shape.d**-0.5,
    )
    beta = empty(batch, shape.h, rows, of=torch.float32)
    return heads(shape.hk, shape.d), heads(shape.hk, shape.d), heads(shape.h, shape.dv), beta, options


def configs(shape: Shape, dtype: torch.dtype) -> dict[str, Any]:
    """The configuration that each kernel would be launched with."""
    from iokernels.ops.gated_delta_rule.triton import launch as triton_launch

    q, k, v, _, options = meta_call(shape, dtype)
    made = triton_launch.Launch(q, k, v, options)
    return {kernel: made.config(kernel, q) for kernel in KERNELS}


def launch(shape: Shape, dtype: torch.dtype, which: Pass) -> None:
    """Launch the kernels of a pass with meta tensors."""
    from iokernels.ops.gated_delta_rule.triton import launch as triton_launch

    q, k, v, beta, options = meta_call(shape, dtype)
    if which != "bwd":
        triton_launch.forward(q, k, v, beta, options)
    if which != "fwd":
        dfinal = options.initial_state
        triton_launch.backward(v, dfinal, q, k, v, beta, empty_inverses(q, v, "triton"), options)


def launch_step(shape: Shape, dtype: torch.dtype, which: Pass = "fwd") -> None:
    """Launch the kernel of the step with meta tensors."""
    from iokernels.ops.gated_delta_rule.triton import launch as triton_launch

    q, k, v, beta, options = meta_call(shape, dtype)
    state = torch.empty((shape.b, shape.h, shape.d, shape.dv), device="meta")
    triton_launch.step(q, k, v, beta, state, options.log_decay, options.scale)


COMPILATION = Compilation(
    launch=launch,
    points=tuple(
        (VOCABULARY.parse(f"b=2,h=4,n=1k,bnhd=1,{text}"), dtype)
        for text, dtype in (
            ("d=128", torch.bfloat16),
            ("d=64", torch.bfloat16),
            ("d=128,decay=0,state=1", torch.float16),
            ("d=40,dv=96,hk=2,packed=1,state=1", torch.bfloat16),
            ("d=256", torch.bfloat16),
            ("d=128", torch.float32),
            ("d=256,state=1", torch.float32),
        )
    ),
)
STEP_COMPILATION = Compilation(
    launch=launch_step,
    points=tuple(
        (STEP_VOCABULARY.parse(f"b=2,h=4,n=1,{text}"), dtype)
        for text, dtype in (
            ("d=128", torch.bfloat16),
            ("d=256,decay=0", torch.float16),
            ("d=40,dv=96", torch.float32),
        )
    ),
)

_PASSES = tuple(kernel for kernel in KERNELS if kernel != STEP)
_LEAVES = {kernel: ("q",) if "_bwd_" in kernel else () for kernel in KERNELS}


def _problem(shape: Shape, dtype: torch.dtype, kernel: str, device: DeviceSpec) -> Problem:
    from iokernels.ops.gated_delta_rule.triton import launch as triton_launch

    q, k, v, _, options = meta_call(shape, dtype)
    return triton_launch.Launch(q, k, v, options).problem(kernel, q, device)


def _launch_kernel(shape: Shape, dtype: torch.dtype, kernel: str) -> None:
    if kernel == STEP:
        launch_step(shape, dtype)
    else:
        launch(shape, dtype, "bwd" if "_bwd_" in kernel else "fwd")


TUNING = Tuning(
    {kernel: TUNABLES[kernel] for kernel in _PASSES}, lambda shape: _PASSES, _problem, _launch_kernel, _LEAVES
)
STEP_TUNING = Tuning({STEP: TUNABLES[STEP]}, lambda shape: (STEP,), _problem, _launch_kernel, _LEAVES)

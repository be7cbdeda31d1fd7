"""The Triton kernels of short_conv without data: which configurations a call takes, compiling and tuning them."""

from __future__ import annotations

from typing import Any

import torch

from iokernels.ops.short_conv.options import ShortNeeds, ShortOptions, empty_rows, out_length
from iokernels.ops.short_conv.triton.tuning import DIRECT_WIDTH, KERNELS, TUNABLES, ShortProblem
from iokernels.runtime.device import DeviceSpec
from iokernels.testing.case import Compilation, Pass, Tuning
from iokernels.testing.case.shape import Shape

from .shapes import VOCABULARY, lengths, sides


def meta_call(shape: Shape, dtype: torch.dtype) -> tuple[Any, Any, ShortOptions]:
    """x, weight and the options of a call of ``shape``, as meta tensors."""

    def empty(*size: int, of: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(size, dtype=of, device="meta")

    if shape.packed:
        x = empty(sum(lengths(shape)), shape.h).transpose(0, 1).unsqueeze(0)
    else:
        x = empty(shape.b, shape.n, shape.h).transpose(1, 2) if shape.bnh else empty(shape.b, shape.h, shape.n)
    state = None
    if shape.state:
        inside = shape.packed or shape.bnh
        state = empty(shape.b, shape.w - 1, shape.h).transpose(1, 2) if inside else empty(shape.b, shape.h, shape.w - 1)
    left, right = sides(shape)
    options = ShortOptions(
        empty(shape.h) if shape.bias else None, state,
        empty(shape.b + 1, of=torch.int32) if shape.packed else None, left, right, bool(shape.silu), bool(shape.state),
    )  # fmt: skip
    return x, empty(shape.h, shape.w), options


def configs(shape: Shape, dtype: torch.dtype) -> dict[str, Any]:
    """The configuration that each kernel would be launched with."""
    from iokernels.ops.short_conv.triton import launch as triton_launch

    launch = triton_launch.Launch(*meta_call(shape, dtype))
    return {kernel: launch.config(kernel) for kernel in KERNELS}


def launch(shape: Shape, dtype: torch.dtype, which: Pass) -> None:
    """Launch the kernels of a pass with meta tensors."""
    if which != "bwd":
        _launch_forward(shape, dtype)
    if which != "fwd":
        _launch_backward(shape, dtype, ShortNeeds(True, True, bool(shape.bias), bool(shape.state)))


def _launch_forward(shape: Shape, dtype: torch.dtype) -> None:
    from iokernels.ops.short_conv.triton import launch as triton_launch

    triton_launch.forward(*meta_call(shape, dtype))


def _launch_backward(shape: Shape, dtype: torch.dtype, needs: ShortNeeds) -> None:
    from iokernels.ops.short_conv.triton import launch as triton_launch

    x, weight, options = meta_call(shape, dtype)
    dout = empty_rows(x, out_length(x.shape[2], shape.w, options))
    triton_launch.backward(dout, options.initial_state, x, weight, options, needs)


COMPILATION = Compilation(
    launch=launch,
    points=tuple(
        (VOCABULARY.parse(f"b=2,h=256,n=2k,{text}"), dtype)
        for text, dtype in (
            ("w=4,silu=1,bias=1,bnh=1", torch.bfloat16),
            ("w=4,silu=1,bias=1", torch.bfloat16),
            ("w=4,silu=1,bias=1,state=1,packed=1", torch.float16),
            ("w=3,padding=1,bnh=1", torch.float32),
            ("w=8,silu=1,bias=1,state=1,bnh=1", torch.bfloat16),
            ("w=8,silu=1,bias=1,state=1", torch.float32),
            ("w=16,padding=2", torch.float16),
            ("w=128,silu=1,bias=1,bnh=1", torch.bfloat16),
            ("w=128,silu=1,bias=1,state=1,packed=1", torch.float32),
        )
    ),
)

_LEAVES = {
    "short_conv_fwd": (),
    "short_conv_bwd": ("x", "weight"),
    "short_conv_wide_fwd": (),
    "short_conv_wide_bwd": ("x",),
    "short_conv_wide_dweight": ("weight",),
}


def _kernels(shape: Shape) -> tuple[str, ...]:
    """Those of direct sums, or of matrix products."""
    return KERNELS[:2] if shape.w <= DIRECT_WIDTH else KERNELS[2:]


def _problem(shape: Shape, dtype: torch.dtype, kernel: str, device: DeviceSpec) -> ShortProblem:
    from iokernels.ops.short_conv.triton import launch as triton_launch

    return triton_launch.Launch(*meta_call(shape, dtype)).problem(kernel, device)


def _launch_one(shape: Shape, dtype: torch.dtype, kernel: str) -> None:
    wanted = _LEAVES[kernel]
    if wanted:
        _launch_backward(shape, dtype, ShortNeeds("x" in wanted, "weight" in wanted))
    else:
        _launch_forward(shape, dtype)


TUNING = Tuning(TUNABLES, _kernels, _problem, _launch_one, _LEAVES)

"""The Triton kernels of fft_conv without data: which configurations a call takes, and compiling them."""

from __future__ import annotations

from typing import Any

import torch

from iokernels.ops.fft_conv.options import CAUSAL, CIRCULAR, TWO_SIDED, Needs, Options
from iokernels.ops.fft_conv.triton.tuning import KERNELS, OUTER_KERNEL, Through
from iokernels.runtime.device import spec_of
from iokernels.testing.case import Compilation, Pass
from iokernels.testing.case.shape import Shape

from .shapes import VOCABULARY


def mode(shape: Shape) -> str:
    """The mode of a call."""
    if shape.causal:
        return CAUSAL
    return TWO_SIDED if shape.nk == 2 * shape.n - 1 else CIRCULAR


def meta_call(shape: Shape, dtype: torch.dtype) -> tuple[Any, Any, Options]:
    """u, k and the options of a call of ``shape``, as meta tensors."""

    def empty(*size: int, of: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(size, dtype=of, device="meta")

    def signal() -> torch.Tensor:
        if shape.bnh:
            return empty(shape.b, shape.n, shape.h).transpose(1, 2)
        return empty(shape.b, shape.h, shape.n)

    options = Options(
        pre_gate=signal() if shape.gated else None,
        post_gate=signal() if shape.gated else None,
        skip=empty(shape.h, of=torch.float32) if shape.skip else None,
        initial_state=empty(shape.b, shape.h, shape.nk - 1, of=torch.float32) if shape.state else None,
        mode=mode(shape),
        keep=shape.keep,
        batch_invariant=bool(shape.invariant),
    )
    return signal(), empty(shape.h, shape.nk, of=torch.float32), options


def launcher(shape: Shape, dtype: torch.dtype) -> Any:
    """What the launcher knows of a call."""
    from iokernels.ops.fft_conv.triton import launch as triton_launch

    u, k, options = meta_call(shape, dtype)
    return triton_launch.Launch(u, k, [], options, spec_of(u.device))


def configs(shape: Shape, dtype: torch.dtype) -> dict[str, Any]:
    """The configuration that each kernel would be launched with."""
    launch = launcher(shape, dtype)
    found: dict[str, Any] = {kernel: launch.config(kernel) for kernel in KERNELS}
    covers = [launch.blocks(config) for config in found.values()]
    through = [cover for cover in covers if isinstance(cover, Through)]
    return found | ({OUTER_KERNEL: launch.outer_config(through[0])} if through else {})


def launch(shape: Shape, dtype: torch.dtype, which: Pass) -> None:
    """Launch the kernels of a pass with meta tensors."""
    from iokernels.ops.fft_conv.triton import launch as triton_launch

    u, k, options = meta_call(shape, dtype)
    if which != "bwd":
        triton_launch.forward(u, k, [], options)
    if which != "fwd":
        needs = Needs(True, True, bool(shape.gated), bool(shape.gated), bool(shape.skip), bool(shape.state))
        triton_launch.backward(u, u, k, [], options, needs)


COMPILATION = Compilation(
    launch=launch,
    points=tuple(
        (VOCABULARY.parse(f"b=64,h=64,{text}"), dtype)
        for text, dtype in (
            ("n=2k,keep=0.25,gated=1,bnh=1", torch.float16),
            ("n=2k,nk=60,gated=1,state=1", torch.float16),
            ("n=600,nk=60,causal=0,invariant=1", torch.float16),
            ("n=4k", torch.bfloat16),
            ("n=256", torch.float32),
            ("n=16k,nk=8k,gated=1,state=1", torch.float16),
        )
    ),
)

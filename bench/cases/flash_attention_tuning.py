"""How the Triton kernels of flash_attention are tuned: what each choice depends on, and launching one kernel alone."""

from __future__ import annotations

import torch

from iokernels.bench.case import Tuning
from iokernels.bench.cases.flash_attention_kernels import meta_call
from iokernels.bench.shape import Shape
from iokernels.ops.flash_attention.options import Needs
from iokernels.ops.flash_attention.tuning import Problem
from iokernels.ops.flash_attention.tuning_space import TUNABLES
from iokernels.runtime.device import DeviceSpec

_LEAVES = {
    "flash_attention_fwd": (),
    "flash_attention_bwd_dq": ("q",),
    "flash_attention_bwd_dkv": ("k", "v"),
    "flash_attention_bwd_dbias": ("bias",),
}


def kernels(shape: Shape) -> tuple[str, ...]:
    """All, but for the gradient of a bias where there is none."""
    return tuple(name for name in TUNABLES if shape.bias or not name.endswith("dbias"))


def problem(shape: Shape, dtype: torch.dtype, kernel: str, device: DeviceSpec) -> Problem:
    """What a call of ``shape`` asks of ``kernel``."""
    from iokernels.ops.flash_attention import triton_launch

    q, k, v, options = meta_call(shape, dtype)
    return triton_launch.Launch(q, k, v, options).problem(kernel, q, device)


def launch(shape: Shape, dtype: torch.dtype, kernel: str) -> None:
    """Launch ``kernel`` with meta tensors; before a gradient, delta."""
    from iokernels.ops.flash_attention import triton_launch

    q, k, v, options = meta_call(shape, dtype)
    if kernel == "flash_attention_fwd":
        triton_launch.forward(q, k, v, options)
        return
    out, lse = q.new_empty(*q.shape[:3], shape.dv), q.new_empty(q.shape[:3], dtype=torch.float32)
    wanted = _LEAVES[kernel]
    needs = Needs("q" in wanted, "k" in wanted, "v" in wanted, "bias" in wanted, False)
    triton_launch.backward(out, lse if shape.lse else None, q, k, v, out, lse, options, needs)


TUNING = Tuning(TUNABLES, kernels, problem, launch, _LEAVES)

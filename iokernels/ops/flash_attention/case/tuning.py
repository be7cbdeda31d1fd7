"""How the kernels of flash_attention are tuned: what each choice depends on, and launching one kernel alone."""

from __future__ import annotations

from typing import Any

import torch

from iokernels.ops.flash_attention.cuda import tuning as tuning_cuda
from iokernels.ops.flash_attention.options import Needs
from iokernels.ops.flash_attention.triton.tuning import TUNABLES
from iokernels.runtime.device import DeviceSpec, assume
from iokernels.testing.case import Tuning
from iokernels.testing.case.shape import Shape

from .compile import meta_call

_LEAVES = {
    "flash_attention_fwd": (),
    "flash_attention_bwd_dq": ("q",),
    "flash_attention_bwd_dkv": ("k", "v"),
    "flash_attention_bwd_dbias": ("bias",),
    tuning_cuda.FORWARD: (),
    tuning_cuda.BACKWARD_Q: ("q",),
    tuning_cuda.BACKWARD_KV: ("k", "v"),
}


def kernels(shape: Shape) -> tuple[str, ...]:
    """All, but for the gradient of a bias where there is none, and for those in CUDA C++ where they refuse the call."""
    refused = shape.mask or shape.bias or shape.alibi or shape.sinks or shape.dropout
    triton = (name for name in TUNABLES if shape.bias or not name.endswith("dbias"))
    return (*triton, *(() if refused else tuning_cuda.KERNELS))


def problem(shape: Shape, dtype: torch.dtype, kernel: str, device: DeviceSpec) -> Any:
    """What a call of ``shape`` asks of ``kernel``."""
    from iokernels.ops.flash_attention.cuda import launch as cuda
    from iokernels.ops.flash_attention.triton import launch as triton_launch

    q, k, v, options = meta_call(shape, dtype)
    if kernel in tuning_cuda.KERNELS:
        with assume(device):
            return cuda.Launch(q, k, v, options).problem._replace(kernel=kernel)
    return triton_launch.Launch(q, k, v, options).problem(kernel, q, device)


def launch(shape: Shape, dtype: torch.dtype, kernel: str) -> None:
    """Launch ``kernel`` with meta tensors; before a gradient, delta."""
    from iokernels.ops.flash_attention.cuda import launch as cuda
    from iokernels.ops.flash_attention.triton import launch as triton_launch

    backend = cuda if kernel in tuning_cuda.KERNELS else triton_launch
    q, k, v, options = meta_call(shape, dtype)
    wanted = _LEAVES[kernel]
    if not wanted:
        backend.forward(q, k, v, options)
        return
    out, lse = q.new_empty(*q.shape[:3], shape.dv), q.new_empty(q.shape[:3], dtype=torch.float32)
    needs = Needs("q" in wanted, "k" in wanted, "v" in wanted, "bias" in wanted, False)
    backend.backward(out, lse if shape.lse else None, q, k, v, out, lse, options, needs)


_FUNCTIONS = {
    tuning_cuda.FORWARD: "flash_attention_forward",
    tuning_cuda.BACKWARD_Q: "flash_attention_backward_q",
    tuning_cuda.BACKWARD_KV: "flash_attention_backward_kv",
}

TUNING = Tuning(TUNABLES | tuning_cuda.TUNABLES, kernels, problem, launch, _LEAVES, functions=_FUNCTIONS)

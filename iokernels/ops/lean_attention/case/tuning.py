"""How the kernels of lean_attention are tuned: what the choice depends on, and launching them."""

from __future__ import annotations

from typing import Any

import torch

from iokernels.ops.lean_attention.cuda import tuning as tuning_cuda
from iokernels.ops.lean_attention.options import capacity
from iokernels.ops.lean_attention.triton.tuning import KERNEL, TUNABLES
from iokernels.runtime.device import DeviceSpec, assume
from iokernels.testing.case import Tuning
from iokernels.testing.case.shape import Shape

from .compile import meta_call


def kernels(shape: Shape) -> tuple[str, ...]:
    """One choice for a call of each backend: how keys are divided and by which kernels belong together."""
    return KERNEL, tuning_cuda.KERNEL


def problem(shape: Shape, dtype: torch.dtype, kernel: str, device: DeviceSpec) -> Any:
    """What a call of ``shape`` asks of the kernels of a backend."""
    from iokernels.ops.lean_attention.cuda import launch as cuda
    from iokernels.ops.lean_attention.triton import launch as triton_launch

    q, k_cache, v_cache, options = meta_call(shape, dtype)
    with assume(device):
        if kernel == tuning_cuda.KERNEL:
            return cuda.Launch(q, k_cache, v_cache, options, capacity(k_cache, options)).problem
        return triton_launch.Launch(q, k_cache, v_cache, options).problem


def launch(shape: Shape, dtype: torch.dtype, kernel: str) -> None:
    """Launch the kernels of a backend with meta tensors."""
    from iokernels.ops.lean_attention.cuda import launch as cuda
    from iokernels.ops.lean_attention.triton import launch as triton_launch

    backend = cuda if kernel == tuning_cuda.KERNEL else triton_launch
    backend.forward(*meta_call(shape, dtype))


TUNING = Tuning(
    {**TUNABLES, tuning_cuda.KERNEL: tuning_cuda.TUNABLE},
    kernels,
    problem,
    launch,
    {KERNEL: (), tuning_cuda.KERNEL: ()},
)

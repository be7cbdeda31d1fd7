"""How the Triton kernels of lean_attention are tuned: what the choice depends on, and launching them."""

from __future__ import annotations

import torch

from iokernels.bench.case import Tuning
from iokernels.bench.cases.lean_attention_kernels import meta_call
from iokernels.bench.shape import Shape
from iokernels.ops.lean_attention.tuning import KERNEL, Problem
from iokernels.ops.lean_attention.tuning_space import TUNABLES
from iokernels.runtime.device import DeviceSpec, assume


def kernels(shape: Shape) -> tuple[str, ...]:
    """One choice for a call: how keys are divided and by which kernels belong together."""
    return (KERNEL,)


def problem(shape: Shape, dtype: torch.dtype, kernel: str, device: DeviceSpec) -> Problem:
    """What a call of ``shape`` asks of the kernels."""
    from iokernels.ops.lean_attention import triton_launch

    with assume(device):
        return triton_launch.Launch(*meta_call(shape, dtype)).problem


def launch(shape: Shape, dtype: torch.dtype, kernel: str) -> None:
    """Launch the kernels with meta tensors."""
    from iokernels.ops.lean_attention import triton_launch

    triton_launch.forward(*meta_call(shape, dtype))


TUNING = Tuning(TUNABLES, kernels, problem, launch, {KERNEL: ()})

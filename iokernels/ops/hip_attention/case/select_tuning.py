"""How the selection kernels are tuned: what each choice depends on, and launching one kernel alone."""

from __future__ import annotations

from typing import Any

import torch

from iokernels.ops.hip_attention.cuda import tuning as tuning_cuda
from iokernels.ops.hip_attention.select.call import MAX_HEAD_DIM
from iokernels.ops.hip_attention.triton.tuning import BEST, BOUNDS, KERNELS, PAGES, STAGE, TUNABLES
from iokernels.runtime.device import DeviceSpec, assume
from iokernels.testing.case import Tuning
from iokernels.testing.case.shape import Shape

from . import select_cuda as cuda
from .compile import launch_select
from .compile import problem as triton_problem


def kernels(shape: Shape) -> tuple[str, ...]:
    """Those that a call launches; of the search, in either language."""
    if shape.quest:
        return PAGES, BOUNDS, BEST
    return (STAGE, BEST, tuning_cuda.KERNEL) if shape.d <= MAX_HEAD_DIM else (STAGE, BEST)


def problem(shape: Shape, dtype: torch.dtype, kernel: str, device: DeviceSpec) -> Any:
    """What a call of ``shape`` asks of ``kernel``: of the stages, the first, which scores the most chunks."""
    if kernel == tuning_cuda.KERNEL:
        with assume(device):
            return cuda.launcher(shape, dtype).problem
    return triton_problem(shape, dtype, kernel, device)


def launch(shape: Shape, dtype: torch.dtype, kernel: str) -> None:
    """Launch ``kernel`` with meta tensors, and what goes with it."""
    (cuda.launch if kernel == tuning_cuda.KERNEL else launch_select)(shape, dtype, "fwd")


TUNING = Tuning(
    {**TUNABLES, tuning_cuda.KERNEL: tuning_cuda.TUNABLE},
    kernels,
    problem,
    launch,
    dict.fromkeys((*KERNELS, tuning_cuda.KERNEL), ()),
)

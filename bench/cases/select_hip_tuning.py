"""How the selection kernels are tuned: what each choice depends on, and launching one kernel alone."""

from __future__ import annotations

from typing import Any

import torch

from iokernels.bench.case import Tuning
from iokernels.bench.cases import select_hip_cuda as cuda
from iokernels.bench.cases.hip_attention_kernels import launch_select
from iokernels.bench.cases.hip_attention_kernels import problem as triton_problem
from iokernels.bench.shape import Shape
from iokernels.ops.hip_attention import tuning_cuda
from iokernels.ops.hip_attention.select_call import MAX_HEAD_DIM
from iokernels.ops.hip_attention.tuning import BEST, BOUNDS, KERNELS, PAGES, STAGE
from iokernels.ops.hip_attention.tuning_space import TUNABLES
from iokernels.runtime.device import DeviceSpec, assume


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

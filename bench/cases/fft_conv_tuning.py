"""How the Triton kernels of fft_conv are tuned: what each choice depends on, and launching one kernel alone."""

from __future__ import annotations

import torch

from iokernels.bench.case import Tuning
from iokernels.bench.cases.fft_conv_kernels import configs, launcher
from iokernels.bench.cases.fft_conv_kernels import launch as launch_pass
from iokernels.bench.shape import Shape
from iokernels.ops.fft_conv.tuning import OUTER_KERNEL, Problem
from iokernels.ops.fft_conv.tuning_space import TUNABLES
from iokernels.runtime.device import DeviceSpec, assume

_LEAVES = {"fft_conv_fwd": (), "fft_conv_bwd": ("u", "k", "pre_gate", "post_gate", "skip"), OUTER_KERNEL: ()}


def kernels(shape: Shape) -> tuple[str, ...]:
    """Both passes; and where transforms go through memory, the first and the last step."""
    return tuple(configs(shape, torch.float16))


def problem(shape: Shape, dtype: torch.dtype, kernel: str, device: DeviceSpec) -> Problem:
    """What a call of ``shape`` asks of ``kernel``."""
    with assume(device):
        return launcher(shape, dtype).problem(kernel)


def launch(shape: Shape, dtype: torch.dtype, kernel: str) -> None:
    """Launch ``kernel`` with meta tensors."""
    launch_pass(shape, dtype, "bwd" if kernel == "fft_conv_bwd" else "fwd")


TUNING = Tuning(TUNABLES, kernels, problem, launch, _LEAVES)

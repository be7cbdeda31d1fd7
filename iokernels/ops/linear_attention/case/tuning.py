"""How the kernels of linear_attention are tuned: what each choice depends on, and launching one kernel alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from iokernels import autotune
from iokernels.autotune import Tunable
from iokernels.ops.linear_attention.cuda import tuning as tuning_cuda
from iokernels.ops.linear_attention.options import Needs
from iokernels.ops.linear_attention.refusals import MAX_CUDA_WIDTH
from iokernels.ops.linear_attention.triton.tuning import TUNABLES, Problem
from iokernels.runtime.device import DeviceSpec, assume
from iokernels.testing.case import Tuning
from iokernels.testing.case.shape import Shape

from . import compile, cuda
from .compile import configs, crossing, forward, launch_step, learns, meta_call

_STATE, _STEP = "linear_attention_state", "linear_attention_step"
_LEAVES = {
    "linear_attention_fwd": (),
    _STATE: (),
    # Kernels that take part in the gradient of decays are other problems; without such decays there is no such leaf.
    "linear_attention_bwd_dq": ("q", "log_decay"),
    "linear_attention_bwd_dk": ("k", "log_decay"),
    "linear_attention_bwd_dv": ("v", "log_decay"),
    _STEP: (),
    tuning_cuda.FORWARD: (),
    tuning_cuda.BACKWARD_Q: ("q", "log_decay"),
    tuning_cuda.BACKWARD_K: ("k", "log_decay"),
    tuning_cuda.BACKWARD_V: ("v",),
}


def kernels(shape: Shape) -> tuple[str, ...]:
    """All of both passes; that of segments' states where sequences are cut, those in CUDA C++ where they can run."""
    cut = configs(shape, torch.bfloat16)["linear_attention_fwd"].segments > 1
    found = tuple(kernel for kernel in TUNABLES if kernel != _STEP and (cut or kernel != _STATE))
    plain = not (shape.taylor or shape.normalize) and max(shape.d, shape.dv) <= MAX_CUDA_WIDTH
    return (*found, *tuning_cuda.KERNELS) if plain else found


def problem(
    shape: Shape, dtype: torch.dtype, kernel: str, device: DeviceSpec
) -> Problem | tuning_cuda.Problem:  # fmt: skip
    """What a call of ``shape`` asks of ``kernel``."""
    from iokernels.ops.linear_attention.cuda.launch import Launch as CudaLaunch
    from iokernels.ops.linear_attention.triton import launch as triton_launch

    if kernel in tuning_cuda.KERNELS:
        with assume(device):
            crosses = cuda.crossing(shape, kernel)
            return CudaLaunch(*meta_call(shape, dtype)).problem(kernel, crosses)
    return triton_launch.Launch(*meta_call(shape, dtype)).problem(kernel, device, crossing(shape, kernel))


def launch(shape: Shape, dtype: torch.dtype, kernel: str) -> None:
    """Launch ``kernel`` with meta tensors, and what its results need."""
    if kernel == tuning_cuda.FORWARD:
        cuda.launch(shape, dtype, "fwd")
    elif kernel == _STEP:
        launch_step(shape, dtype)
    elif kernel == _STATE:
        chosen = configs(shape, dtype)["linear_attention_fwd"]
        with autotune.override(linear_attention_fwd=replace(chosen, segments=max(chosen.segments, 2))):
            forward(shape, dtype)
    elif not _LEAVES[kernel]:
        forward(shape, dtype)
    else:
        wanted = _LEAVES[kernel]
        backward = cuda.backward if kernel in tuning_cuda.KERNELS else compile.backward
        backward(shape, dtype, Needs("q" in wanted, "k" in wanted, "v" in wanted, learns(shape)))


_PASSES: dict[str, Tunable[Any]] = {kernel: tunable for kernel, tunable in TUNABLES.items() if kernel != _STEP}
_PASSES |= tuning_cuda.TUNABLES

TUNING = Tuning(_PASSES, kernels, problem, launch, _LEAVES, {_STATE: "linear_attention_fwd_state"})
STEP_TUNING = Tuning({_STEP: TUNABLES[_STEP]}, lambda shape: (_STEP,), problem, launch, _LEAVES)

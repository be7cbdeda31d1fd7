"""How the kernels of fft_conv are tuned: what each choice depends on, and launching one kernel alone."""

from __future__ import annotations

import torch

from iokernels.ops.fft_conv.cuda import tuning as tuning_cuda
from iokernels.ops.fft_conv.options import reach
from iokernels.ops.fft_conv.triton.tuning import TUNABLES, Problem
from iokernels.runtime.device import DeviceSpec, assume
from iokernels.testing.case import Tuning
from iokernels.testing.case.shape import Shape

from . import cuda
from .compile import configs, launcher
from .compile import launch as launch_pass
from .compile import mode as mode_of

_LEAVES = {
    kernel: ("u", "k", "pre_gate", "post_gate", "skip") if "bwd" in kernel else ()
    for kernel in (*TUNABLES, *tuning_cuda.TUNABLES)
}


def kernels(shape: Shape) -> tuple[str, ...]:
    """Both passes of Triton, where transforms go through memory the first and the last step of those; and both passes
    in CUDA C++ where their transforms serve."""
    mode, taps = reach(shape.n, shape.nk, mode_of(shape), shape.keep, bool(shape.state))
    most = max(tuning_cuda.shared_bytes(length) for length in tuning_cuda.LENGTHS)
    served = tuning_cuda.refusal(shape.n, taps, mode, bool(shape.state), most) is None
    return (*configs(shape, torch.float16), *(tuning_cuda.TUNABLES if served else ()))


def problem(shape: Shape, dtype: torch.dtype, kernel: str, device: DeviceSpec) -> Problem | tuning_cuda.Problem:
    """What a call of ``shape`` asks of ``kernel``."""
    with assume(device):
        if kernel in tuning_cuda.TUNABLES:
            return cuda.launcher(shape, dtype).problem(kernel.removesuffix("_cuda"))
        return launcher(shape, dtype).problem(kernel)


def launch(shape: Shape, dtype: torch.dtype, kernel: str) -> None:
    """Launch ``kernel`` with meta tensors."""
    made = cuda.launch if kernel in tuning_cuda.TUNABLES else launch_pass
    made(shape, dtype, "bwd" if "bwd" in kernel else "fwd")


_FUNCTIONS = {kernel: kernel.removesuffix("_cuda") + "_kernel" for kernel in tuning_cuda.TUNABLES}

TUNING = Tuning({**TUNABLES, **tuning_cuda.TUNABLES}, kernels, problem, launch, _LEAVES, _FUNCTIONS)

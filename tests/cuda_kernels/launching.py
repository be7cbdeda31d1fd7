"""Launching a kernel of the tests on CPU tensors: natively where there is a GPU, else in the emulator."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from iokernels.runtime.cuda.kernel import Argument, CudaKernel
from iokernels.runtime.device import cuda_refusal, cxx

NATIVE = torch.cuda.is_available() and cuda_refusal(torch.device("cuda")) is None

needs_a_machine = pytest.mark.skipif(not NATIVE and cxx() is None, reason="there is no GPU, and the emulator needs g++")


def launch(
    kernel: CudaKernel, grid: int, block: int, smem: int, args: Mapping[str, Argument], *, cooperative: bool = False
) -> None:
    """``args`` has tensors on the CPU, and receives there what the kernel wrote."""
    if not NATIVE:
        return kernel.launch((grid,), block, smem, args, cooperative=cooperative)
    there = {name: _moved(value) if isinstance(value, Tensor) else value for name, value in args.items()}
    kernel.launch((grid,), block, smem, there, cooperative=cooperative)
    for name, value in args.items():
        if isinstance(value, Tensor):
            value.copy_(there[name])  # pyright: ignore[reportArgumentType]
    return None


def _moved(x: Tensor) -> Tensor:
    """``x`` on the GPU, with its strides."""
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cuda").copy_(x)

"""CUDA C++ kernels from Python: one description, compiled for the GPU by NVRTC or for the CPU by the emulator.

::

    kernel = cuda_kernel("flash_rnn/forward.cu", "flash_rnn_forward", HEAD_DIM=64, Element=torch.bfloat16)
    kernel.launch(grid=(heads * tiles,), block=256, smem=49152, args={"gates_ptr": gates, "seqlen": 1024})

A source sees its constants as ``constexpr int HEAD_DIM = 64;`` and ``using Element = bf16;`` and includes only
``csrc/common``. Where it runs is decided by the tensors among the arguments: on a GPU through CuPy, on the CPU in the
emulator of ``csrc/emulate``, under ``IOKERNELS_EMULATE=1``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor

from iokernels.runtime.errors import KernelLaunchError
from iokernels.runtime.scoped import Scoped

__all__ = ["Argument", "Constant", "CudaKernel", "Int64", "Launched", "cuda_kernel", "extents", "recorded"]

Constant: TypeAlias = "int | float | str | torch.dtype"
"""A number, or the name of a type."""


class Int64(int):
    """An argument that the kernel takes as ``i64``; a plain ``int`` is one of 32 bits."""


Argument: TypeAlias = "Tensor | int | float | tuple[int, ...] | None"
"""A pointer (None: null), ``int``, ``i64`` (:class:`Int64`), ``float``, or a structure of ``i64``, as strides are."""

ELEMENT = {
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "float",
    torch.float8_e4m3fn: "e4m3",
    torch.int8: "signed char",
    torch.int32: "int",
}
"""What a dtype is called in CUDA C++ here."""


@dataclass(frozen=True)
class CudaKernel:
    """A ``__global__`` function of a source with its constants. Nothing is compiled before the first launch.

    ``source`` is a path below ``csrc`` (or an absolute one), ``name`` that of an ``extern "C"`` function.
    """

    source: str
    name: str
    constants: tuple[tuple[str, Constant], ...] = ()

    @property
    def path(self) -> Path:
        """The source file."""
        from iokernels.csrc import ROOT

        return ROOT / self.source

    def translation_unit(self) -> str:
        """What is compiled: the constants, then the source."""
        lines = ['#include "common/numbers.cuh"']
        lines += [_declaration(name, value) for name, value in self.constants]
        return "\n".join([*lines, f'#include "{self.path if Path(self.source).is_absolute() else self.source}"', ""])

    def launch(
        self,
        grid: tuple[int, ...],
        block: int,
        smem: int,
        args: Mapping[str, Argument],
        *,
        cooperative: bool = False,
    ) -> None:
        """Run it: ``grid`` blocks of ``block`` threads with ``smem`` bytes of dynamic shared memory.

        ``args`` holds every argument by the name of the kernel's parameter, in its order. On a GPU this returns at
        once, having queued the kernel on PyTorch's current stream; the current device must be that of the tensors.
        ``cooperative`` has all blocks run at the same time, so that they may wait for one another.

        Raises:
            KernelCompileError: with the compiler's log.
            KernelLaunchError: the driver refused it, or no argument is a tensor.
            KernelFault: in the emulator, with what went wrong where.
            UnsupportedError: there is no CuPy, or no C++ compiler.
        """
        if _record.value is not None:
            _record.value.append(Launched(self, grid, block, smem, cooperative))
            return
        device = next((value.device for value in args.values() if isinstance(value, Tensor)), None)
        if device is None:
            raise KernelLaunchError(f"{self.name}: no argument is a tensor, so nothing says where to run")
        if device.type == "cuda":
            from . import nvrtc

            nvrtc.loaded(self, device).launch(grid, block, smem, args, cooperative)
        elif device.type == "cpu":
            from . import emulator

            emulator.built(self).launch(grid, block, smem, args, cooperative)
        else:
            raise KernelLaunchError(f"{self.name}: CUDA kernels run on GPUs and in the emulator, not on {device.type}")


@dataclass(frozen=True)
class Launched:
    """What one launch asked for."""

    kernel: CudaKernel
    grid: tuple[int, ...]
    block: int
    smem: int
    cooperative: bool


_record: Scoped[list[Launched] | None] = Scoped(None)


@contextmanager
def recorded() -> Iterator[list[Launched]]:
    """Inside, launches are noted in the list instead of run, whatever device their tensors are on: meta tensors will
    do. The setting belongs to the process."""
    launches: list[Launched] = []
    with _record.set(launches):
        yield launches


def extents(grid: tuple[int, ...]) -> tuple[int, int, int]:
    """The three extents of a grid that may name fewer."""
    x, y, z = (*grid, 1, 1)[:3]
    return x, y, z


@cache
def cuda_kernel(source: str, name: str, **constants: Constant) -> CudaKernel:
    """The kernel ``name`` of ``source`` with these constants; the same object for the same arguments."""
    return CudaKernel(source, name, tuple(constants.items()))


def _declaration(name: str, value: Constant) -> str:
    if isinstance(value, torch.dtype):
        return f"using {name} = {ELEMENT[value]};"
    if isinstance(value, str):
        return f"using {name} = {value};"
    if isinstance(value, bool):
        return f"constexpr bool {name} = {str(value).lower()};"
    if isinstance(value, int):
        return f"constexpr int {name} = {value};"
    return f"constexpr float {name} = {float(value)!r}f;"

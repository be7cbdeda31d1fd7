"""CUDA kernels compiled ahead of time, without a GPU: by nvcc where it is installed, else by NVRTC.

The machine code is the same kind that a call compiles; it serves to see what a kernel takes of a GPU.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from functools import cache
from pathlib import Path

from iokernels.runtime.errors import KernelCompileError, UnsupportedError

from . import artifacts, nvrtc
from .kernel import CudaKernel

__all__ = ["command", "compiler", "cubin", "refusal"]


@cache
def _nvcc() -> tuple[str, str] | None:
    """nvcc and its version, where it is installed and runs."""
    tool = shutil.which("nvcc")
    if tool is None:
        return None
    said = subprocess.run([tool, "--version"], capture_output=True, text=True, check=False).stdout
    found = re.search(r"release [\d.]+, V([\d.]+)", said)
    return (tool, found[1]) if found else None


def compiler() -> str:
    """The name and version of the compiler.

    Raises:
        UnsupportedError: there is neither nvcc nor NVRTC.
    """
    nvcc = _nvcc()
    return f"nvcc {nvcc[1]}" if nvcc else "NVRTC {}.{}".format(*nvrtc.version())


def refusal() -> str | None:
    """Why nothing can be compiled here, or None."""
    try:
        compiler()
    except UnsupportedError as error:
        return f"nvcc is not installed, and {error}"
    return None


def command(sm: int, unit: str, out: str) -> list[str] | None:
    """The call of nvcc that compiles the translation unit in the file ``unit`` for compute capability ``sm``, or None
    where there is no nvcc."""
    from iokernels.csrc import ROOT

    nvcc = _nvcc()
    if nvcc is None:
        return None
    return [nvcc[0], *nvrtc.OPTIONS, f"-arch={nvrtc.architecture(sm)}", "-cubin", f"-I{ROOT}", unit, "-o", out]


def cubin(kernel: CudaKernel, sm: int) -> Path:
    """The machine code of ``kernel`` for compute capability ``sm``, from the disk or from the compiler.

    Raises:
        KernelCompileError: with the compiler's log.
        UnsupportedError: there is neither nvcc nor NVRTC.
    """
    from iokernels.csrc import ROOT

    if _nvcc() is None:
        return nvrtc.cubin(kernel, sm)
    unit = kernel.translation_unit()
    included = artifacts.sources(kernel.path, ROOT / "common" / "numbers.cuh", root=ROOT)
    key = artifacts.key_of(unit, *nvrtc.OPTIONS, nvrtc.architecture(sm), compiler(), *included.values())

    def make(place: Path) -> None:
        source = place.with_suffix(".cu")
        source.write_text(unit)
        try:
            call = command(sm, str(source), str(place))
            assert call is not None
            done = subprocess.run(call, capture_output=True, text=True, check=False)
            if done.returncode:
                raise KernelCompileError(f"{kernel.name}: nvcc refused it:\n{(done.stderr + done.stdout).strip()}")
        finally:
            source.unlink()

    return artifacts.stored(f"cubins/{kernel.name}-{nvrtc.architecture(sm)}-{key}.cubin", make)

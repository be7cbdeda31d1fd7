"""Runs CUDA kernels on the GPU: NVRTC compiles them, CuPy's bindings of the driver load and launch them.

NVRTC is a library, so no compiler has to be installed, and it needs neither a GPU nor a header: what kernels include
lies in ``csrc/common``. Cubins are kept on disk by source, constants, options, architecture and version of NVRTC.
CuPy is imported when a kernel is first asked for.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from iokernels.runtime.device import guard
from iokernels.runtime.errors import KernelCompileError, KernelLaunchError, UnsupportedError

from . import artifacts
from .arguments import give_back, packed
from .kernel import Argument, CudaKernel, extents

__all__ = ["Loaded", "architecture", "cubin", "loaded", "version"]

OPTIONS = ("-std=c++17", "-lineinfo")

DEVICE_ALONE = "-default-device"
"""Functions without annotation, lambdas among them, are for the device: nvcc finds that out, NVRTC has to be told."""


def architecture(sm: int) -> str:
    """The target for compute capability ``sm``: with its own instructions (``a``) where a data-centre GPU has some."""
    return f"sm_{sm}a" if sm in (90, 100, 103) else f"sm_{sm}"


@cache
def _bindings() -> tuple[Any, Any]:
    """CuPy's bindings of NVRTC and of the driver. They need no GPU until something is launched."""
    try:
        cuda = importlib.import_module("cupy.cuda")
        return cuda.nvrtc, cuda.driver
    except ImportError as error:
        raise UnsupportedError(
            "CUDA kernels are compiled and launched through CuPy, and it cannot be imported "
            f'({error}): pip install "iokernels[cuda13]", or "iokernels[cuda12]" beside a PyTorch for CUDA 12'
        ) from error


def version() -> tuple[int, int]:
    """The version of NVRTC.

    Raises:
        UnsupportedError: there is no CuPy, or it finds no NVRTC.
    """
    nvrtc, _ = _bindings()
    try:
        return nvrtc.getVersion()
    except Exception as error:  # CuPy raises RuntimeError and its own errors where the library is not found
        raise UnsupportedError(
            f'CuPy finds no NVRTC ({error}): pip install "iokernels[cuda13]" brings one, or "iokernels[cuda12]"'
        ) from error


def cubin(kernel: CudaKernel, sm: int) -> Path:
    """The machine code of ``kernel`` for compute capability ``sm``, from the disk or from NVRTC. Needs no GPU.

    Raises:
        KernelCompileError: with the compiler's log.
        UnsupportedError: there is no CuPy or no NVRTC.
    """
    from iokernels.csrc import ROOT

    unit, options = kernel.translation_unit(), (*OPTIONS, DEVICE_ALONE, f"-arch={architecture(sm)}")
    included = artifacts.sources(kernel.path, ROOT / "common" / "numbers.cuh", root=ROOT)
    key = artifacts.key_of(unit, *options, str(version()), *included.values())
    name = f"cubins/{kernel.name}-{architecture(sm)}-{key}.cubin"

    def make(place: Path) -> None:
        place.write_bytes(_compile(kernel, unit, (*options, f"-I{ROOT}")))

    return artifacts.stored(name, make)


def _compile(kernel: CudaKernel, unit: str, options: tuple[str, ...]) -> bytes:
    nvrtc, _ = _bindings()
    program = nvrtc.createProgram(unit, f"{kernel.name}.cu", (), ())
    try:
        nvrtc.compileProgram(program, options)
        # CuPy 14 drops the last byte, as if it ended a string. It is a zero, and one too many is harmless.
        return nvrtc.getCUBIN(program) + b"\0"
    except nvrtc.NVRTCError as error:
        log = nvrtc.getProgramLog(program).strip()
        raise KernelCompileError(f"{kernel.name}: NVRTC refused it ({error}; {' '.join(options)}):\n{log}") from error
    finally:
        nvrtc.destroyProgram(program)


@dataclass
class Loaded:
    """A kernel in the memory of one GPU."""

    kernel: CudaKernel
    device: torch.device
    module: int
    function: int
    most_smem: int = 48 * 1024  # what a launch may take without asking

    @property
    def index(self) -> int:
        """The number of the GPU."""
        return self.device.index

    def launch(
        self,
        grid: tuple[int, ...],
        block: int,
        smem: int,
        args: Mapping[str, Argument],
        cooperative: bool,
    ) -> None:
        """As :meth:`~iokernels.runtime.cuda.kernel.CudaKernel.launch`."""
        _, driver = _bindings()
        x, y, z = extents(grid)
        frame = packed(self.kernel.name, self.index, args)
        with guard(self.device):
            _enter(driver, self.device)
            stream = torch.cuda.current_stream(self.device).cuda_stream
            given = (x, y, z, block, 1, 1, smem, stream, frame.address)
            try:
                if smem > self.most_smem:
                    driver.funcSetAttribute(self.function, driver.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, smem)
                    self.most_smem = smem
                if cooperative:
                    driver.launchCooperativeKernel(self.function, *given)
                else:
                    driver.launchKernel(self.function, *given, 0)
            except driver.CUDADriverError as error:
                raise KernelLaunchError(
                    f"{self.kernel.name}: the driver refused a {'cooperative ' if cooperative else ''}launch of "
                    f"{(x, y, z)} blocks of {block} threads with {smem} bytes of shared memory: {error}"
                ) from error
        give_back(frame)


def _enter(driver: Any, device: torch.device) -> None:
    """See that the driver has a context in this thread: a thread that has only been handed tensors has none."""
    if not driver.ctxGetCurrent():
        torch.cuda.set_device(device)


_loaded: dict[tuple[CudaKernel, int], Loaded] = {}


def loaded(kernel: CudaKernel, device: torch.device) -> Loaded:
    """The kernel on ``device``, compiled and loaded where that has not been done yet.

    Raises:
        KernelCompileError, KernelLaunchError: with the log, or the driver's error.
        UnsupportedError: there is no CuPy or no NVRTC.
    """
    index = torch.cuda.current_device() if device.index is None else device.index
    found = _loaded.get((kernel, index))
    if found is not None:
        return found
    device = torch.device("cuda", index)
    major, minor = torch.cuda.get_device_capability(device)
    image = artifacts.content(cubin(kernel, 10 * major + minor))
    _, driver = _bindings()
    with guard(device):
        _enter(driver, device)
        try:
            module = driver.moduleLoadData(image)
            function = driver.moduleGetFunction(module, kernel.name)
        except driver.CUDADriverError as error:
            raise KernelLaunchError(
                f"{kernel.name}: the driver does not load what NVRTC {'.'.join(map(str, version()))} compiled for "
                f"{architecture(10 * major + minor)}: {error}"
            ) from error
    return _loaded.setdefault((kernel, index), Loaded(kernel, device, module, function))

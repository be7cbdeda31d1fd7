"""What compiled kernels take of a GPU: registers, spills and shared memory. Needs no GPU.

Triton compiles for any target; its wheel carries ``cuobjdump``, which reads a cubin's resource usage and its machine
code. The kernels are launched through their real launchers under :func:`compiling_for`, so what is compiled is what a
call with these arguments would compile, down to the specialisation of strides.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from iokernels.runtime.cuda import ahead, artifacts
from iokernels.runtime.device import DeviceSpec, assume

_BLOCKS_SM = {86: 16, 87: 16, 89: 24, 120: 24}
"""Blocks that an SM holds at most, by compute capability (CUDA C++ Programming Guide, table of technical
specifications); 32 elsewhere."""


@dataclass(frozen=True)
class Resources:
    """One compiled kernel. ``spill_bytes`` is its stack a thread, ``shared_bytes`` its shared memory a block."""

    kernel: str
    registers: int
    spill_bytes: int
    shared_bytes: int
    num_warps: int
    cubin: bytes = field(repr=False)

    def matrix_instructions(self) -> dict[str, int]:
        """How often each matrix instruction (HGMMA, HMMA, ...) stands in the machine code."""
        found: dict[str, int] = {}
        for name in re.findall(r"\b([A-Z]+MMA)\b", _cuobjdump(self.cubin, "--dump-sass")):
            found[name] = found.get(name, 0) + 1
        return found

    def blocks_per_sm(self, spec: DeviceSpec) -> tuple[int, str]:
        """How many blocks one SM of ``spec`` holds at once, and what keeps it from holding more.

        Registers are handed to a warp in units of 256, and to the four quarters of an SM alike; the driver adds 1 KiB
        to the shared memory of every block.
        """
        a_warp = -(-max(self.registers, 1) * 32 // 256) * 256
        a_block = -(-(self.shared_bytes + 1024) // 128) * 128
        limits = {
            "registers": spec.regs_sm // a_warp // 4 * 4 // self.num_warps,
            "shared memory": spec.smem_sm // a_block,
            "threads": spec.threads_sm // (32 * self.num_warps),
            "blocks": _BLOCKS_SM.get(spec.sm, 32),
        }
        limit = min(limits, key=lambda name: limits[name])
        return limits[limit], limit


@contextmanager
def compiling_for(spec: DeviceSpec) -> Iterator[list[Resources]]:
    """Inside, Triton launches compile for ``spec`` instead of running, and the list receives what was compiled.

    Launch with meta tensors. Not under ``TRITON_INTERPRET``, whose kernels have nothing to compile.
    """
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    compiled: list[Resources] = []
    real_run: Any = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = real_run(self, *args, grid=grid, warmup=True, **kwargs)
        compiled.append(_resources(self.__name__, kernel))
        return kernel

    class Driver:
        """A device that exists on paper. Its number keeps Triton's caches of several targets apart."""

        def get_current_device(self) -> int:
            return -spec.sm

        def get_current_stream(self, _device: int) -> int:
            return 0

        def get_current_target(self) -> Any:
            return GPUTarget("cuda", spec.sm, 32)

    outer = driver._active
    driver.set_active(Driver())  # pyright: ignore[reportArgumentType]
    JITFunction.run = compile_only
    try:
        with assume(spec):
            yield compiled
    finally:
        JITFunction.run = real_run
        driver._active = outer


@contextmanager
def compiling_cuda_for(spec: DeviceSpec) -> Iterator[list[Resources]]:
    """The same for kernels in CUDA C++, which nvcc or NVRTC compiles. Also under ``TRITON_INTERPRET``.

    The list is filled when the context ends without an error.
    """
    from iokernels.runtime.cuda.kernel import recorded

    compiled: list[Resources] = []
    with assume(spec), recorded() as launches:
        yield compiled
    for launch in launches:
        code = artifacts.content(ahead.cubin(launch.kernel, spec.sm))
        found = of_cubin(code, num_warps=-(-launch.block // 32))
        # As with Triton, all shared memory is dynamic, and what the cubin declares is the toolchain's own reserve.
        compiled += [replace(one, shared_bytes=launch.smem) for one in found if one.kernel == launch.kernel.name]


def _resources(name: str, kernel: Any) -> Resources:
    (found,) = of_cubin(kernel.asm["cubin"], num_warps=kernel.metadata.num_warps)
    # All of Triton's shared memory is dynamic; what the cubin declares is the toolchain's own reserve.
    return replace(found, kernel=name, shared_bytes=kernel.metadata.shared)


def of_cubin(cubin: bytes, *, num_warps: int, dynamic_shared_bytes: int = 0) -> list[Resources]:
    """What the kernels of a cubin take, whoever compiled it: Triton, NVRTC, nvcc or ptxas.

    ``num_warps`` and ``dynamic_shared_bytes`` (beyond what the code declares) belong to a launch, so the caller states
    them. From Hopper on, what a cubin declares includes the 1 KiB that its toolchain reserves in every block.
    """
    listing = _cuobjdump(cubin, "--dump-resource-usage")
    return [
        Resources(
            kernel=name,
            registers=int(registers),
            spill_bytes=int(stack),
            shared_bytes=int(shared) + dynamic_shared_bytes,
            num_warps=num_warps,
            cubin=cubin,
        )
        for name, registers, stack, shared in re.findall(
            r"Function (\w+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+)", listing
        )
    ]


@lru_cache(maxsize=256)
def _cuobjdump(cubin: bytes, what: str) -> str:
    from triton import knobs

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        run = subprocess.run([knobs.nvidia.cuobjdump.path, what, str(path)], check=True, capture_output=True, text=True)
    return run.stdout

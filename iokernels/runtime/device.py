"""What the machine is: GPU models with their limits and peaks, and the toolchains at hand.

Peaks are the vendor's dense figures (no sparsity) and serve for rooflines and analytic defaults; a measured figure
never comes from here.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from types import MappingProxyType
from typing import Any

import torch

from .environment import switch
from .scoped import Scoped


@dataclass(frozen=True)
class DeviceSpec:
    """One GPU model.

    ``smem_block`` is the most shared memory one thread block may opt in to and ``smem_sm`` what one SM holds, in
    bytes; ``regs_sm`` counts 32-bit registers; ``dram_bandwidth`` is in bytes/s; ``matmul_peak`` and
    ``vector_peak`` in FLOP/s.
    """

    slug: str
    name: str
    sm: int
    sms: int
    smem_block: int
    smem_sm: int
    l2: int
    dram_bandwidth: float
    matmul_peak: MappingProxyType[torch.dtype, float]
    vector_peak: float
    regs_sm: int = 65536
    threads_sm: int = 2048


def _spec(slug, name, sm, sms, smem_kib, l2_mib, tb_s, half_tflops, tf32_tflops, fp32_tflops, *, threads_sm=2048):
    half, tf32, fp32 = half_tflops * 1e12, tf32_tflops * 1e12, fp32_tflops * 1e12
    return DeviceSpec(
        slug=slug,
        name=name,
        sm=sm,
        sms=sms,
        smem_block=(smem_kib - 1) * 1024,  # the driver keeps 1 KiB of every block's allowance
        smem_sm=smem_kib * 1024,
        l2=int(l2_mib * 2**20),
        dram_bandwidth=tb_s * 1e12,
        matmul_peak=MappingProxyType({torch.float16: half, torch.bfloat16: half, torch.float32: tf32}),
        vector_peak=fp32,
        threads_sm=threads_sm,
    )


KNOWN: dict[str, DeviceSpec] = {
    spec.slug: spec
    for spec in (
        #      slug         name                 sm   SMs  smem  L2   TB/s   half    tf32   fp32
        _spec("a100-sxm", "NVIDIA A100-SXM4-80GB", 80, 108, 164, 40, 2.039, 312.0, 156.0, 19.5),
        _spec("h100-sxm", "NVIDIA H100 80GB HBM3", 90, 132, 228, 50, 3.35, 989.5, 494.7, 66.9),
        _spec("h100-pcie", "NVIDIA H100 PCIe", 90, 114, 228, 50, 2.0, 756.0, 378.0, 51.2),
        _spec("h200", "NVIDIA H200", 90, 132, 228, 50, 4.8, 989.5, 494.7, 66.9),
        _spec("b200", "NVIDIA B200", 100, 148, 228, 126, 8.0, 2250.0, 1125.0, 75.0),
        _spec("l40s", "NVIDIA L40S", 89, 142, 100, 96, 0.864, 362.0, 183.0, 91.6, threads_sm=1536),
        _spec("rtx-3090", "NVIDIA GeForce RTX 3090", 86, 82, 100, 6, 0.936, 71.0, 35.5, 35.6, threads_sm=1536),
        _spec("rtx-4090", "NVIDIA GeForce RTX 4090", 89, 128, 100, 72, 1.008, 165.2, 82.6, 82.6, threads_sm=1536),
        _spec("rtx-5090", "NVIDIA GeForce RTX 5090", 120, 170, 100, 96, 1.792, 209.5, 104.8, 104.8, threads_sm=1536),
    )
}

OLDEST_SM = 80
"""Kernels need Ampere's asynchronous copies and bfloat16 matrix instructions."""


TOO_OLD = {"v100": "7.0", "t4": "7.5"}
"""Models that people ask for and that the kernels cannot serve, with their compute capability."""


def named(slug: str) -> DeviceSpec:
    """The model called ``slug`` (``h100-sxm``, ...). Needs no GPU."""
    if slug in TOO_OLD:
        raise ValueError(
            f"device: {slug} has compute capability {TOO_OLD[slug]}, and the kernels need 8.0 or newer: they are built "
            "on its asynchronous copies and bfloat16 products"
        )
    if slug not in KNOWN:
        raise ValueError(f"device: {slug!r} is not known; known are {', '.join(KNOWN)}")
    return KNOWN[slug]


@cache
def current(index: int | None = None) -> DeviceSpec | None:
    """The CUDA device ``index`` (default: the current one), or None where there is none.

    Limits are read from the driver. Peaks come from the table above by name; a model that is not in it takes those
    of the known model with the same architecture, scaled by its number of SMs.
    """
    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(torch.cuda.current_device() if index is None else index)
    sm = properties.major * 10 + properties.minor
    by_name = [spec for spec in KNOWN.values() if spec.name in properties.name]
    # The longest matching name wins: "NVIDIA H100" is part of several.
    base = max(by_name, key=lambda spec: len(spec.name), default=None) or min(
        KNOWN.values(), key=lambda spec: (abs(spec.sm - sm), abs(spec.sms - properties.multi_processor_count))
    )
    share = properties.multi_processor_count / base.sms
    return DeviceSpec(
        slug=base.slug if by_name else f"sm{sm}-{properties.multi_processor_count}sm",
        name=properties.name,
        sm=sm,
        sms=properties.multi_processor_count,
        smem_block=getattr(properties, "shared_memory_per_block_optin", base.smem_block),
        smem_sm=getattr(properties, "shared_memory_per_multiprocessor", base.smem_sm),
        l2=getattr(properties, "L2_cache_size", base.l2),
        dram_bandwidth=base.dram_bandwidth,
        matmul_peak=MappingProxyType({dtype: peak * share for dtype, peak in base.matmul_peak.items()}),
        vector_peak=base.vector_peak * share,
        threads_sm=getattr(properties, "max_threads_per_multi_processor", base.threads_sm),
    )


_assumed: Scoped[DeviceSpec | None] = Scoped(None)


@contextmanager
def assume(spec: DeviceSpec) -> Iterator[None]:
    """Choose launch parameters as on ``spec`` inside, whatever the machine has."""
    with _assumed.set(spec):
        yield


def spec_of(device: torch.device) -> DeviceSpec:
    """The model to choose launch parameters for: that of ``device``, or an H100 in the interpreter, where any do."""
    if _assumed.value is not None:
        return _assumed.value
    return (current(device.index) if device.type == "cuda" else None) or named("h100-sxm")


@cache
def has_triton() -> bool:
    """Whether Triton is installed. Does not import it."""
    return find_spec("triton") is not None


INTERPRET = switch("TRITON_INTERPRET")
"""Whether Triton kernels run in Triton's interpreter. Read once: Triton reads it when a kernel is defined."""


def interpret_triton() -> bool:
    """Run the Triton kernels of this process in Triton's interpreter, as ``TRITON_INTERPRET=1`` does from outside.

    Returns whether they run there. Once Triton was imported without it, that is too late.
    """
    global INTERPRET
    if not INTERPRET and has_triton() and "triton" not in sys.modules:
        os.environ["TRITON_INTERPRET"] = "1"
        INTERPRET = True
    return INTERPRET


def triton_refusal(device: torch.device) -> str | None:
    """Why Triton kernels cannot run on ``device``, as the end of a sentence, or None when they can.

    Dynamo asks and does not trace it: it has no cache that Dynamo would warn of, and the answer does not change.
    """
    if device.type == "meta":
        return None  # shapes are the same everywhere
    if not has_triton():
        return "Triton is not installed"
    if INTERPRET:
        return None
    if device.type == "cpu":
        return "tensors are on the CPU, where Triton kernels run only under TRITON_INTERPRET=1, set before the import"
    if device.type != "cuda":
        return f"Triton kernels here run on CUDA devices, not on {device.type}"
    if torch.version.hip is None:
        major, minor = torch.cuda.get_device_capability(device)
        if major * 10 + minor < OLDEST_SM:
            return f"the GPU has compute capability {major}.{minor}, and the kernels need 8.0 or newer"
    return None


# What torch.compiler.assume_constant_result sets; calling it would import the whole compiler with this library.
triton_refusal.__dict__["_dynamo_marked_constant"] = True


EMULATE = switch("IOKERNELS_EMULATE")
"""Whether backend ``cuda`` takes CPU tensors and runs its kernels in the emulator. Read once."""


def emulate_cuda() -> bool:
    """Run CUDA kernels on CPU tensors in the emulator from here on, as ``IOKERNELS_EMULATE=1`` does from outside.

    Returns whether they run there: not without a C++ compiler.
    """
    global EMULATE
    EMULATE = EMULATE or cxx() is not None
    return EMULATE


@cache
def cxx() -> str | None:
    """The C++ compiler that the emulator uses, ``$CXX`` or g++, if there is one."""
    return shutil.which(os.environ.get("CXX", "g++"))


@cache
def has_cupy() -> bool:
    """Whether CuPy is installed. Does not import it."""
    return find_spec("cupy") is not None


def cuda_refusal(device: torch.device) -> str | None:
    """Why CUDA C++ kernels cannot run on ``device``, as the end of a sentence, or None when they can."""
    if device.type == "meta":
        return None
    if device.type == "cpu":
        if not EMULATE:
            return "tensors are on the CPU, where CUDA kernels run only under IOKERNELS_EMULATE=1, in the emulator"
        return None if cxx() is not None else "the emulator compiles kernels with g++, and there is none"
    if device.type != "cuda":
        return f"CUDA kernels run on NVIDIA GPUs, not on {device.type}"
    if torch.version.hip is not None:
        return "CUDA kernels run on NVIDIA GPUs, and this PyTorch is built for AMD's"
    if not has_cupy():
        return 'CuPy, which compiles and launches CUDA kernels, is not installed: pip install "iokernels[cuda13]"'
    major, minor = torch.cuda.get_device_capability(device)
    if major * 10 + minor < OLDEST_SM:
        return f"the GPU has compute capability {major}.{minor}, and the kernels need 8.0 or newer"
    return None


cuda_refusal.__dict__["_dynamo_marked_constant"] = True


def kernel_refusal(x: torch.Tensor, widths: Mapping[str, Any], most: int) -> str | None:
    """:func:`triton_refusal` for ``x`` of kernels that take no float64 and hold ``widths``, by name, up to ``most``."""
    if x.dtype == torch.float64:
        return "its kernels take float16, bfloat16 and float32, not float64"
    for name, width in widths.items():
        if width > most:
            return f"{name} is {width}, and its kernels hold heads up to {most} wide"
    return triton_refusal(x.device)


def guard(device: torch.device) -> Any:
    """A context in which ``device`` is the current one; free of charge where it already is."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)

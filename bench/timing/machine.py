"""The machine that a figure was taken on: what stands in the header of every table, and the roofline."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from iokernels import __version__
from iokernels.runtime import device as devices
from iokernels.runtime.device import DeviceSpec


class NoDeviceError(RuntimeError):
    """The device that was asked for is not here."""


@dataclass(frozen=True)
class Machine:
    """One device and the versions that matter for it. ``spec`` is None for a device without a roofline."""

    device: torch.device
    name: str
    details: tuple[str, ...]
    versions: dict[str, str]
    spec: DeviceSpec | None

    def header(self) -> str:
        """One line."""
        versions = " ".join(f"{name} {version}" for name, version in self.versions.items() if version != "-")
        return f"iokernels {__version__} | {self.name} ({', '.join(self.details)}) | {versions}"

    def as_dict(self) -> dict[str, Any]:
        """The same for JSON."""
        return {
            "iokernels": __version__,
            "device": self.device.type,
            "name": self.name,
            "details": list(self.details),
            "versions": self.versions,
        }


@dataclass(frozen=True)
class Floor:
    """The least time that the peaks of a device allow, and which of them sets it: ``compute`` or ``memory``."""

    seconds: float
    bound: str


def pick_device(name: str | None) -> torch.device:
    """The device that commands run on: the GPU where there is one. Raises :class:`NoDeviceError`."""
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise NoDeviceError("there is no CUDA GPU that PyTorch can use on this machine")
    return torch.device(name, torch.cuda.current_device()) if name == "cuda" else torch.device(name)


def describe(device: torch.device) -> Machine:
    """What ``device`` is."""
    versions = {
        "torch": torch.__version__,
        "triton": version_of("triton"),
        "CUDA": torch.version.cuda or "-",
        "cupy": version_of("cupy-cuda13x", "cupy-cuda12x"),
    }
    if device.type == "cuda":
        spec = devices.current(device.index)
        assert spec is not None
        driver = nvidia_smi("driver_version")
        details = [f"sm_{spec.sm}", f"{spec.sms} SMs"]
        if clock := nvidia_smi("clocks.max.sm"):
            details.append(f"up to {clock}")
        return Machine(device, spec.name, tuple(details), versions | {"driver": driver or "-"}, spec)
    details = tuple(
        f"{count} {what}" + ("s" if count != 1 else "")
        for what, count in (("core", os.cpu_count()), ("thread", torch.get_num_threads()))
    )
    return Machine(device, cpu_name(), details, versions, None)


def version_of(*packages: str) -> str:
    """The version of the first of ``packages`` that is installed, ``"-"`` if none is. Imports nothing."""
    for package in packages:
        try:
            return metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return "-"


@cache
def cpu_name() -> str:
    """The processor's name as its maker writes it, or its architecture."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


@cache
def nvidia_smi(field: str) -> str | None:
    """One field of the first GPU that ``nvidia-smi`` lists, or None without it."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    command = [program, f"--query-gpu={field}", "--format=csv,noheader"]
    try:
        lines = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.splitlines()
    except (OSError, subprocess.SubprocessError):
        return None
    return lines[0].strip() if lines else None


def peak(spec: DeviceSpec | None, dtype: torch.dtype) -> float | None:
    """The most FLOP/s of matrix products in ``dtype``. None where it is not known: on a CPU, and for float64."""
    if spec is None or dtype not in spec.matmul_peak:
        return None
    if dtype == torch.float32 and torch.get_float32_matmul_precision() == "highest":
        return spec.vector_peak  # exact float32 products do not run on the matrix units
    return spec.matmul_peak[dtype]


def floor(spec: DeviceSpec | None, flops: int, nbytes: int, dtype: torch.dtype) -> Floor | None:
    """The roofline: the longer of computing at peak and moving the bytes at full bandwidth.

    None where no peak is known.
    """
    most = peak(spec, dtype)
    if spec is None or most is None:
        return None
    compute, memory = flops / most, nbytes / spec.dram_bandwidth
    return Floor(compute, "compute") if compute >= memory else Floor(memory, "memory")


def backend_refusal(backend: str, device: torch.device) -> str | None:
    """Why no operator can run on ``backend`` here, as the end of a sentence, or None."""
    asks = {"triton": devices.triton_refusal, "cuda": devices.cuda_refusal}.get(backend)
    return asks(device) if asks else None


def present() -> tuple[torch.device, ...]:
    """The devices of this machine, the GPU first."""
    cpu = (torch.device("cpu"),)
    return (pick_device("cuda"), *cpu) if torch.cuda.is_available() else cpu

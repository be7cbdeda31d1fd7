"""``iokernels env``: what this machine has, in the words that a bug report needs."""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import sys
from typing import Any

import torch
from rich.console import Console

import iokernels
from iokernels.autotune import tables
from iokernels.bench.report import render
from iokernels.bench.timing import machine
from iokernels.ops import CASES
from iokernels.runtime import device as devices
from iokernels.runtime.cuda import artifacts
from iokernels.testing.case import load


def run(arguments: argparse.Namespace, console: Console) -> int:
    """Print the machine."""
    found = collect()
    table = render.table("", "")
    table.show_header = False
    for section, entries in found.items():
        for name, value in entries.items():
            table.add_row(f"{section} {name}".strip(), str(value))
    console.print(table, markup=False, highlight=False)
    render.write_json(arguments.json, found)
    return 0


def collect() -> dict[str, dict[str, Any]]:
    """Everything that is printed, by section."""
    nvrtc = machine.version_of("nvidia-cuda-nvrtc", "nvidia-cuda-nvrtc-cu13", "nvidia-cuda-nvrtc-cu12")
    return {
        "": {
            "iokernels": f"{iokernels.__version__} in {os.path.dirname(iokernels.__file__)}",
            "system": f"{platform.system()} {platform.release()}, {platform.machine()}",
            "python": sys.version.split()[0],
        },
        "GPU": _gpus(),
        "CPU": {
            "name": machine.cpu_name(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
        },
        "version": {
            "torch": torch.__version__,
            "CUDA of torch": torch.version.cuda or "-",
            "triton": machine.version_of("triton"),
            "cupy": machine.version_of("cupy-cuda13x", "cupy-cuda12x"),
            "nvrtc": nvrtc,
            "C++ compiler": devices.cxx() or "-",
            "nvcc": shutil.which("nvcc") or "-",
        },
        "backend": {
            f"{backend} on {device.type}": machine.backend_refusal(backend, device) or "usable"
            for device in machine.present()
            for backend in ("reference", "torch", "triton", "cuda")
        },
        "folder": {"tables": str(tables.user()), "compiled CUDA kernels": str(artifacts.folder())},
        "tuning table": _tables(),
        "setting": {
            "Triton's interpreter": "on" if devices.INTERPRET else "off",
            "CUDA emulator": "on" if devices.EMULATE else "off",
            "float32 products": torch.get_float32_matmul_precision(),
        },
    }


def _gpus() -> dict[str, str]:
    if not torch.cuda.is_available():
        return {"": "none that PyTorch can use"}
    found = {}
    for index in range(torch.cuda.device_count()):
        spec = devices.current(index)
        assert spec is not None
        memory = torch.cuda.get_device_properties(index).total_memory
        found[str(index)] = (
            f"{spec.name}, sm_{spec.sm}, {spec.sms} SMs, {memory / 2**30:.0f} GiB, "
            f"{spec.smem_sm // 1024} KiB shared memory an SM, {spec.l2 / 2**20:.0f} MiB L2"
        )
    for name, field in (("driver", "driver_version"), ("SM clock", "clocks.sm"), ("highest SM clock", "clocks.max.sm")):
        found[name] = machine.nvidia_smi(field) or "unknown"
    return found


def _tables() -> dict[str, str]:
    """The tables of this GPU, and how many of their entries were measured with other versions."""
    spec, found = devices.current(), {}
    tunings = [load(operator).tuning for operator in CASES]
    for tunable in (one for tuning in tunings if tuning is not None for one in tuning.tunables.values()):
        for root in (tables.user(), tables.PACKAGE):
            table = tables.load(tunable, spec, root) if spec is not None else None
            if spec is not None and table is not None:
                stale = len(table.stale())
                place = "user" if root == tables.user() else "package"
                found[f"{tunable.kernel} ({place})"] = f"{len(table.entries)} entries" + (
                    f", {stale} stale" if stale else ""
                )
    return found

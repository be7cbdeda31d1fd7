"""Runs CUDA kernels on the CPU: ``csrc/emulate`` and the kernel's own source, compiled by g++ and called by ctypes.

Blocks and threads are fibers that take turns in an order that a seed determines (:func:`warp_order`). What a launch
does wrong raises :class:`~iokernels.runtime.errors.KernelFault`: an access outside the elements of its tensors or its
shared memory, a race, a barrier that not all reach, a deadlock, results that depend on the order
(``IOKERNELS_EMULATE_ORDERS``). Bytes of global memory are counted (:func:`watch`).
"""

from __future__ import annotations

import ctypes
import os
import re
import subprocess
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from iokernels.runtime import environment
from iokernels.runtime.device import cxx
from iokernels.runtime.errors import KernelCompileError, KernelFault, KernelLaunchError, UnsupportedError
from iokernels.runtime.scoped import Scoped

from . import artifacts
from .kernel import Argument, CudaKernel, Int64, extents

__all__ = ["Counted", "Emulated", "Moved", "built", "warp_order", "watch"]

FLAGS = ("-std=c++17", "-fPIC", "-shared", "-DIOKERNELS_EMULATE", "-Wall", "-Wno-unknown-pragmas")
KERNEL_FLAGS = ("-O1", "-ftrivial-auto-var-init=pattern", "-fno-math-errno", "-ffp-contract=off")
"""What nobody wrote in a register is not zero here."""
SANITIZERS = os.environ.get("IOKERNELS_EMULATE_SANITIZE", "").strip()
"""Of the kernels and of the machine: ``address,undefined``, say. The process must have the sanitizers preloaded."""


_seed = environment.number("IOKERNELS_EMULATE_SEED", 0)
_seeds = range(_seed, _seed + environment.number("IOKERNELS_EMULATE_ORDERS", 1, least=1))
"""The orders in which a launch runs, one after another. Each must leave the same bits."""
_order: Scoped[range | None] = Scoped(None)
_watched: Scoped[list[Counted] | None] = Scoped(None)
_running = threading.Lock()


@dataclass
class Moved:
    """Bytes of one argument that the threads of a launch asked for."""

    read: int = 0
    written: int = 0
    atomic: int = 0


@dataclass
class Counted:
    """One launch: its grid, and the bytes by argument."""

    name: str
    grid: tuple[int, int, int]
    arguments: dict[str, Moved] = field(default_factory=dict)


@contextmanager
def warp_order(seed: int = _seed, orders: int = 1) -> Iterator[None]:
    """Let blocks, warps and lanes take turns in the order of ``seed`` inside, then in those of the seeds after it, of
    which there are ``orders`` in all; elsewhere in as many orders as ``IOKERNELS_EMULATE_ORDERS`` says (1) from
    ``IOKERNELS_EMULATE_SEED`` (0) on. The setting belongs to the process."""
    with _order.set(range(seed, seed + orders)):
        yield


@contextmanager
def watch() -> Iterator[list[Counted]]:
    """Collect what every launch inside moved. The setting belongs to the process; the innermost one sees them."""
    counted: list[Counted] = []
    with _watched.set(counted):
        yield counted


class _Index(ctypes.Structure):
    _fields_ = [("x", ctypes.c_uint), ("y", ctypes.c_uint), ("z", ctypes.c_uint)]


class _Argument(ctypes.Structure):
    _fields_ = [
        ("kind", ctypes.c_int),
        ("count", ctypes.c_int),
        ("data", ctypes.c_void_p),
        ("extent", ctypes.c_uint64),
        ("owned", ctypes.c_void_p),
        ("name", ctypes.c_char_p),
        ("read", ctypes.c_uint64),
        ("written", ctypes.c_uint64),
        ("updated", ctypes.c_uint64),
    ]


class _Launch(ctypes.Structure):
    _fields_ = [
        ("kernel", ctypes.c_char_p),
        ("grid", _Index),
        ("block", _Index),
        ("shared_bytes", ctypes.c_uint64),
        ("seed", ctypes.c_uint64),
        ("cooperative", ctypes.c_int),
        ("arguments", ctypes.c_int),
        ("argument", ctypes.POINTER(_Argument)),
        ("report", ctypes.c_char_p),
        ("report_bytes", ctypes.c_uint64),
    ]


_POINTER, _INT32, _INT64, _FLOAT, _INT64S = range(5)
_REPORT_BYTES = 1 << 14


@dataclass(frozen=True)
class Emulated:
    """A kernel compiled for the CPU."""

    kernel: CudaKernel
    entry: Any
    parameters: tuple[str, ...]

    def launch(
        self,
        grid: tuple[int, ...],
        block: int,
        smem: int,
        args: Mapping[str, Argument],
        cooperative: bool,
    ) -> None:
        """As :meth:`~iokernels.runtime.cuda.kernel.CudaKernel.launch`."""
        name = self.kernel.name
        if tuple(args) != self.parameters:
            raise KernelLaunchError(
                f"{name}: the launch names the arguments {', '.join(args)}; the kernel's parameters are "
                f"{', '.join(self.parameters)}"
            )
        x, y, z = extents(grid)
        if min(x, y, z) < 1 or max(y, z) > 65535 or not 1 <= block <= 1024:
            raise KernelLaunchError(f"{name}: no GPU takes a grid of {grid} blocks of {block} threads")
        alive: list[Any] = []  # what the launch points into
        packed = (_Argument * len(args))(*(_pack(name, label, value, alive) for label, value in args.items()))
        report = ctypes.create_string_buffer(_REPORT_BYTES)
        launch = _Launch(
            kernel=name.encode(),
            grid=_Index(x, y, z),
            block=_Index(block, 1, 1),
            shared_bytes=smem,
            cooperative=cooperative,
            arguments=len(args),
            argument=packed,
            report=ctypes.cast(report, ctypes.c_char_p),
            report_bytes=_REPORT_BYTES,
        )
        with _running:
            self._in_every_order(launch, packed, report)
        if _watched.value is not None:
            moved = {
                label: Moved(packed[i].read, packed[i].written, packed[i].updated)
                for i, (label, value) in enumerate(args.items())
                if isinstance(value, Tensor)
            }
            _watched.value.append(Counted(name, (x, y, z), moved))

    def _in_every_order(self, launch: _Launch, arguments: ctypes.Array[_Argument], report: Any) -> None:
        """Run the launch; where several orders are asked for, each from the same memory, to leave the same bits."""
        seeds = _order.value or _seeds
        several = len(seeds) > 1
        before = _memory(arguments) if several else {}
        first: dict[int, bytes] = {}
        for seed in seeds:
            if first:
                for i, held in before.items():
                    ctypes.memmove(arguments[i].data, held, len(held))
                    arguments[i].read = arguments[i].written = arguments[i].updated = 0
            launch.seed = seed
            if self.entry(ctypes.byref(launch)):
                raise KernelFault(report.value.decode(errors="replace") + f" (in the order of seed {seed})" * several)
            left = _memory(arguments) if several else {}
            first = first or left
            for i, held in first.items():
                if left[i] != held:
                    byte = next(b for b, (one, other) in enumerate(zip(held, left[i], strict=True)) if one != other)
                    raise KernelFault(
                        f"kernel {self.kernel.name}: what it leaves in {arguments[i].name.decode()} depends on the "
                        f"order of blocks, warps and lanes: byte {byte} differs between seeds {seeds[0]} and {seed}"
                    )


def _memory(arguments: ctypes.Array[_Argument]) -> dict[int, bytes]:
    """The bytes of every tensor among the arguments, by its place."""
    return {i: ctypes.string_at(one.data, one.extent) for i, one in enumerate(arguments) if one.extent}


def _pack(kernel: str, name: str, value: Argument, alive: list[Any]) -> _Argument:
    if value is None:
        return _Argument(kind=_POINTER, name=name.encode())
    if isinstance(value, Tensor):
        if value.device.type != "cpu":
            raise KernelLaunchError(f"{kernel}: {name} is on {value.device}, and other arguments are on the CPU")
        extent = _extent(value)
        owned = _owned(value, extent) if extent != value.numel() else None
        alive.append(owned)
        return _Argument(
            kind=_POINTER,
            name=name.encode(),
            data=value.data_ptr() or None,
            extent=extent * value.element_size(),
            owned=None if owned is None else owned.data_ptr(),
        )
    if isinstance(value, float):
        kind, count, held = _FLOAT, 1, ctypes.c_float(value)
    elif isinstance(value, tuple):
        kind, count, held = _INT64S, len(value), (ctypes.c_int64 * len(value))(*value)
    elif isinstance(value, Int64):
        kind, count, held = _INT64, 1, ctypes.c_int64(value)
    else:
        if not -(2**31) <= value < 2**31:
            raise KernelLaunchError(f"{kernel}: {name} is {value}, beyond the int of 32 bits that it is passed as")
        kind, count, held = _INT32, 1, ctypes.c_int(value)
    alive.append(held)
    return _Argument(kind=kind, name=name.encode(), count=count, data=ctypes.addressof(held))


def _extent(tensor: Tensor) -> int:
    """Elements from the first to the last."""
    if not tensor.numel():
        return 0
    return 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def _owned(tensor: Tensor, extent: int) -> Tensor:
    """A byte for each byte from the first element to the last, which says whether it belongs to an element."""
    owned = torch.zeros(extent, dtype=torch.uint8)
    owned.as_strided(tensor.shape, tensor.stride()).fill_(1)
    return owned.repeat_interleave(tensor.element_size())


def built(kernel: CudaKernel) -> Emulated:
    """The kernel, compiled for the CPU where that has not been done yet.

    Raises:
        KernelCompileError: with the compiler's log.
        UnsupportedError: there is no C++ compiler.
    """
    found = _built.get(kernel)
    if found is None:
        found = _built[kernel] = _build(kernel)
    return found


_built: dict[CudaKernel, Emulated] = {}


def _build(kernel: CudaKernel) -> Emulated:
    machine = _machine()
    unit = (
        f'#include "emulate/launch.h"\n{kernel.translation_unit()}\n'
        f'extern "C" int iokernels_launch(emulate::Launch& l) {{ return emulate::launch<&{kernel.name}>(l); }}\n'
    )
    path = _compiled(f"{kernel.path.stem}-{kernel.name}", unit, [kernel.path], (*FLAGS, *KERNEL_FLAGS), [machine])
    entry = _loaded(path).iokernels_launch
    entry.argtypes, entry.restype = [ctypes.c_void_p], ctypes.c_int
    return Emulated(kernel, entry, _parameters(kernel))


@cache
def _machine() -> Path:
    """The emulated GPU, loaded so that kernels find it."""
    from iokernels.csrc import ROOT

    parts = sorted((ROOT / "emulate").glob("*.cpp"))
    unit = "".join(f'#include "emulate/{part.name}"\n' for part in parts)
    path = _compiled("machine", unit, parts, (*FLAGS, "-O2"), [])
    _loaded(path, ctypes.RTLD_GLOBAL)
    return path


def _loaded(path: Path, mode: int = ctypes.DEFAULT_MODE) -> ctypes.CDLL:
    try:
        return ctypes.CDLL(str(path), mode=mode)
    except OSError as error:  # whole, as its digest says: a folder from which nothing may be run, most likely
        raise KernelLaunchError(
            f"an emulated kernel cannot be loaded ({error}): set IOKERNELS_CACHE to a folder from which code may be run"
        ) from error


def _compiled(name: str, unit: str, files: list[Path], flags: tuple[str, ...], linked: list[Path]) -> Path:
    """The shared object of a translation unit, from the disk or from the compiler."""
    from iokernels.csrc import ROOT

    tool = cxx()
    if tool is None:
        raise UnsupportedError("CUDA kernels on the CPU are compiled by g++, and there is none (CXX names another)")
    if SANITIZERS:
        # Unoptimised: an access that an optimiser drops is one that they do not see; and it compiles sooner.
        flags = (*flags, "-O0", f"-fsanitize={SANITIZERS}", "-fno-sanitize-recover=all", "-g1")
    included = artifacts.sources(*files, *_named(unit, ROOT), root=ROOT)
    key = artifacts.key_of(unit, tool, _version(tool), *flags, *map(str, linked), *included, *included.values())

    def make(place: Path) -> None:
        command = [tool, "-x", "c++", *flags, f"-I{ROOT}", "-", "-x", "none", *map(str, linked), "-o", str(place)]
        done = subprocess.run(command, input=unit, capture_output=True, text=True, check=False)
        if done.returncode:
            raise KernelCompileError(f"{name}: {tool} refused it:\n{done.stderr.strip()}")

    return artifacts.stored(f"emulated/{name}-{key}.so", make)


def _named(unit: str, root: Path) -> list[Path]:
    return [root / name for name in re.findall(r'#include "([^"]+)"', unit)]


@cache
def _version(tool: str) -> str:
    return subprocess.run([tool, "--version"], capture_output=True, text=True, check=False).stdout


def _parameters(kernel: CudaKernel) -> tuple[str, ...]:
    """The names of the kernel's parameters, read from its source."""
    text = re.sub(r"//[^\n]*|/\*.*?\*/", "", kernel.path.read_text(), flags=re.DOTALL)
    found = re.search(rf"\b{re.escape(kernel.name)}\s*\(([^)]*)\)\s*\{{", text)
    if found is None:
        raise KernelCompileError(f"{kernel.name}: {kernel.source} has no definition of it whose parameters can be read")
    return tuple(re.findall(r"\w+", parameter)[-1] for parameter in found[1].split(",") if parameter.strip())

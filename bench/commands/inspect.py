"""``iokernels inspect``: what an operator's compiled kernels take of a GPU. Needs no GPU."""

from __future__ import annotations

import argparse
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.markup import escape

from iokernels import autotune
from iokernels.bench.report import render
from iokernels.bench.report.rows import tile_text
from iokernels.runtime import device as devices
from iokernels.runtime.cuda import ahead
from iokernels.runtime.device import DeviceSpec, named
from iokernels.testing.case import DTYPES, Case, Compilation, Pass, dtype_name, load
from iokernels.testing.case.shape import Shape, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager

    from iokernels.autotune.resources import Resources

    Compiling = Callable[[DeviceSpec], AbstractContextManager[list[Resources]]]


@dataclass(frozen=True)
class Row:
    """One kernel as it was compiled for one call. ``config`` is None where the kernel has no choice of tiles."""

    shape: Shape
    dtype: torch.dtype
    which: Pass
    config: object | None
    resources: Resources
    matrix: dict[str, int]
    blocks: int
    limit: str

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        config: Any = self.config
        return {
            "kernel": self.resources.kernel,
            "shape": str(self.shape),
            "dtype": dtype_name(self.dtype),
            "pass": self.which,
            "config": config and asdict(config),
            "warps": self.resources.num_warps,
            "registers": self.resources.registers,
            "spill_bytes": self.resources.spill_bytes,
            "shared_bytes": self.resources.shared_bytes,
            "blocks_per_sm": self.blocks,
            "limited_by": self.limit,
            "matrix": self.matrix,
        }


def run(arguments: argparse.Namespace, console: Console) -> int:
    """Compile what the arguments select and print what it takes."""
    case = load(arguments.operator)
    compilation, compiling = _toolchain(case, arguments.backend)
    if arguments.points and arguments.shape:
        raise UsageError("--points and --shape exclude each other")
    if arguments.points:
        points = list(compilation.points)
    else:
        shapes = [case.vocabulary.parse(text) for text in arguments.shape or ("",)]
        points = [(shape, DTYPES[name]) for shape in shapes for name in arguments.dtype]
    for _, dtype in points:
        if dtype not in case.implementations[arguments.backend].dtypes:
            raise UsageError(
                f"--dtype is {dtype_name(dtype)}, which the {arguments.backend} kernels of {case.operator} do not take"
            )
    if arguments.json not in (None, "-"):
        render.writable(arguments.json)
    spec = named(arguments.gpu)
    rows: list[Row] = []
    with Console(stderr=True).status(f"compiling for {spec.slug}") as status:
        for shape, dtype in points:
            for which in case.passes_of(arguments.passes):
                status.update(escape(f"compiling for {spec.slug}: {which} {dtype_name(dtype)} {shape}"))
                rows += _compile(compilation, compiling, shape, dtype, which, spec)
    _print(case.operator, rows, spec, console)
    render.write_json(
        arguments.json,
        {
            "operator": case.operator,
            "backend": arguments.backend,
            "gpu": spec.slug,
            "sm": spec.sm,
            "rows": [row.as_dict() for row in rows],
        },
    )
    return 0


def _toolchain(case: Case, backend: str) -> tuple[Compilation, Compiling]:
    """What of the operator is compiled, and how. Raises :class:`UsageError` where it cannot be."""
    from iokernels.autotune.resources import compiling_cuda_for, compiling_for

    if backend == "cuda":
        if case.cuda_compilation is None:
            raise UsageError(f"{case.operator} has no CUDA kernels to compile")
        if refusal := ahead.refusal():
            raise UsageError(refusal)
        if not devices.has_triton():
            raise UsageError("Triton is not installed, and its cuobjdump reads the machine code")
        return case.cuda_compilation, compiling_cuda_for
    if devices.INTERPRET:
        raise UsageError("TRITON_INTERPRET is set, and interpreted kernels are not compiled: unset it")
    if not devices.has_triton():
        raise UsageError("Triton is not installed, and without it there is nothing to compile")
    if case.compilation is None:
        raise UsageError(f"{case.operator} has no Triton kernels to compile")
    return case.compilation, compiling_for


def _compile(
    compilation: Compilation, compiling: Compiling, shape: Shape, dtype: torch.dtype, which: Pass, spec: DeviceSpec
) -> list[Row]:
    with autotune.watch() as configs, compiling(spec) as compiled:
        compilation.launch(shape, dtype, which)
    return [
        Row(
            shape, dtype, which, configs.get(found.kernel.removesuffix("_kernel")), found,
            found.matrix_instructions(), *found.blocks_per_sm(spec),
        )
        for found in compiled
    ]  # fmt: skip


def _print(operator: str, rows: list[Row], spec: DeviceSpec, console: Console) -> None:
    console.print(
        f"compiled for {spec.slug} (sm_{spec.sm}): {spec.regs_sm} registers and {spec.smem_sm // 1024} KiB of shared "
        f"memory an SM, {spec.smem_block // 1024} KiB a block; blocks: how many an SM holds at once",
        style="dim", highlight=False,
    )  # fmt: skip
    numbers = ("warps", "regs", "spills", "shared", "blocks")
    for shape, dtype in dict.fromkeys((row.shape, row.dtype) for row in rows):
        console.print(f"\n{operator} {escape(str(shape))} {dtype_name(dtype)}", highlight=False)
        table = render.table("kernel", "tiles", *numbers, "limit", "matrix", right=numbers)
        for row in rows:
            if (row.shape, row.dtype) != (shape, dtype):
                continue
            found = row.resources
            spills = f"[yellow]{found.spill_bytes} B[/]" if found.spill_bytes else "0 B"
            table.add_row(
                found.kernel.removeprefix(f"{operator}_").removesuffix("_kernel"),
                tile_text(row.config),
                str(found.num_warps), str(found.registers), spills, str(found.shared_bytes), str(row.blocks),
                row.limit, ", ".join(f"{count} {name}" for name, count in row.matrix.items()) or "-",
            )  # fmt: skip
        console.print(table)

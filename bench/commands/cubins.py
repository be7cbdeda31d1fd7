"""``iokernels cubins``: every CUDA kernel compiled ahead of time, and what each takes of a GPU. Needs no GPU.

What is compiled is what the real launchers ask for, at the points that between them take every branch, with the
configurations that are the defaults on one GPU of each architecture. Where nvcc is installed it compiles, under ninja,
all at once; else NVRTC does, one after the other.
"""

from __future__ import annotations

import argparse
import hashlib
import re
import shutil
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape

from iokernels.bench.report import render
from iokernels.ops import CASES
from iokernels.runtime import device as devices
from iokernels.runtime.cuda import ahead, artifacts, nvrtc
from iokernels.runtime.cuda.kernel import Constant, CudaKernel, recorded
from iokernels.runtime.device import DeviceSpec, assume, named
from iokernels.testing.case import Case, load
from iokernels.testing.case.shape import UsageError

if TYPE_CHECKING:
    from iokernels.autotune.resources import Resources

TARGETS = ("a100-sxm", "rtx-3090", "l40s", "h100-sxm", "b200", "rtx-5090")
"""One GPU of each architecture that is compiled for: sm_80, sm_86, sm_89, sm_90a, sm_100a, sm_120."""


@dataclass(frozen=True)
class Build:
    """One kernel to compile for one GPU. ``smem`` is the most that a launch of it asked for, ``known_spills`` the bytes
    a thread that the operator's page says it may keep in local memory."""

    operator: str
    kernel: CudaKernel
    spec: DeviceSpec
    block: int
    smem: int
    known_spills: int = 0

    @property
    def constants(self) -> str:
        """The constants, as text."""
        return " ".join(f"{name}={_word(value)}" for name, value in self.kernel.constants)

    @property
    def stem(self) -> str:
        """A name for its files."""
        digest = hashlib.sha256(self.kernel.translation_unit().encode()).hexdigest()[:12]
        return f"{self.kernel.name}-{nvrtc.architecture(self.spec.sm)}-{digest}"


def _word(value: Constant) -> str:
    return str(value).removeprefix("torch.") if not isinstance(value, bool) else str(int(value))


def run(arguments: argparse.Namespace, console: Console) -> int:
    """Compile, report; 1 where a kernel spills more registers than is known or does not fit on its GPU."""
    if refusal := ahead.refusal():
        raise UsageError(refusal)
    if not devices.has_triton():
        raise UsageError("Triton is not installed, and its cuobjdump reads the machine code")
    for target in (arguments.md, arguments.json if arguments.json != "-" else None):
        if target is not None:
            render.writable(target)
    cases = [case for case in map(load, arguments.operators or CASES) if case.cuda_compilation is not None]
    builds = [build for case in cases for build in wanted(case, map(named, TARGETS))]
    with Console(stderr=True).status(f"compiling {len(builds)} kernels with {ahead.compiler()}"):
        found = compiled(builds, Path(arguments.out))
    rows = [row(build, taken) for build, taken in found]
    _print(rows, console)
    if arguments.md is not None:
        Path(arguments.md).write_text(page(rows))
    render.write_json(arguments.json, {"compiler": ahead.compiler(), "rows": rows})
    return int(any(map(fault, rows)))


def fault(row: dict[str, Any]) -> str:
    """What is wrong with a compiled kernel, if anything is."""
    if row["spills"] > row["known_spills"]:
        return f"{row['spills']} B spilled"
    return "" if row["blocks"] else f"{row['shared']} B shared, too much for one block"


def _print(rows: list[dict[str, Any]], console: Console) -> None:
    """A line for every kernel and GPU, over all its constants, and one for everything that is wrong."""
    if not rows:
        console.print("no operator has CUDA kernels")
        return
    numbers = ("compiled", "registers", "shared", "blocks")
    table = render.table("kernel", "GPU", *numbers, right=numbers)
    for name, slug in dict.fromkeys((row["kernel"], row["GPU"]) for row in rows):
        these = [row for row in rows if (row["kernel"], row["GPU"]) == (name, slug)]
        spans = (_span([row[number] for row in these]) for number in numbers[1:])
        table.add_row(name, slug, str(len(these)), *spans)
    console.print(table)
    for row in filter(fault, rows):
        said = f"{row['kernel']} on {row['GPU']}: {fault(row)} ({row['constants']})"
        console.print(f"[bold red]WRONG[/] {escape(said)}", highlight=False, soft_wrap=True)


def _span(values: list[int]) -> str:
    low, high = min(values), max(values)
    return str(low) if low == high else f"{low}-{high}"


def wanted(case: Case, specs: Iterable[DeviceSpec]) -> list[Build]:
    """What the launchers of an operator ask for on each GPU, every kernel with its constants once."""
    assert case.cuda_compilation is not None
    found: dict[tuple[CudaKernel, int], Build] = {}
    for spec in specs:
        with assume(spec), recorded() as launches:
            for shape, dtype in case.cuda_compilation.points:
                for which in case.passes[-1:]:
                    case.cuda_compilation.launch(shape, dtype, which)
        for launch in launches:
            key = launch.kernel, spec.sm
            smem = max(launch.smem, found[key].smem if key in found else 0)
            known = case.cuda_compilation.spills
            found[key] = Build(case.operator, launch.kernel, spec, launch.block, smem, known)
    return list(found.values())


def compiled(builds: list[Build], folder: Path, *, by_nvcc: bool = True) -> list[tuple[Build, Resources]]:
    """Compile into ``folder`` what is not there yet, and read what each kernel takes. NVRTC, which is faster and keeps
    its results elsewhere, compiles without ``by_nvcc`` or where there is no nvcc.

    Raises:
        UsageError: a kernel does not compile, or there is no ninja beside nvcc.
    """
    from iokernels.autotune.resources import of_cubin

    if not by_nvcc or ahead.command(80, "", "") is None:
        paths = [nvrtc.cubin(build.kernel, build.spec.sm) for build in builds]
    else:
        _ninja(builds, folder)
        paths = [folder / f"{build.stem}.cubin" for build in builds]
    found = []
    for build, path in zip(builds, paths, strict=True):
        taken = of_cubin(artifacts.content(path), num_warps=-(-build.block // 32))
        # All shared memory is dynamic; what the cubin declares is the toolchain's own reserve.
        found += [(build, replace(one, shared_bytes=build.smem)) for one in taken if one.kernel == build.kernel.name]
    return found


def _ninja(builds: list[Build], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    ninja = shutil.which("ninja")
    if ninja is None:
        raise UsageError("ninja is not installed, which runs nvcc: pip install ninja")
    lines = ["ninja_required_version = 1.5"]
    for sm in sorted({build.spec.sm for build in builds}):
        call = ahead.command(sm, "$in", "$out")
        assert call is not None
        lines += [f"rule sm_{sm}", f"  command = {' '.join(call)} -MD -MF $out.d", "  depfile = $out.d", "  deps = gcc"]
    for build in {build.stem: build for build in builds}.values():
        unit = folder / f"{build.stem}.cu"
        text = build.kernel.translation_unit()
        if not unit.exists() or unit.read_text() != text:
            unit.write_text(text)
        lines.append(f"build {build.stem}.cubin: sm_{build.spec.sm} {unit.name}")
    (folder / "build.ninja").write_text("\n".join(lines) + "\n")
    done = subprocess.run([ninja, "-C", str(folder)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise UsageError(f"a kernel does not compile:\n{done.stdout.strip()}\n{done.stderr.strip()}".strip())


def row(build: Build, taken: Resources) -> dict[str, Any]:
    """What is reported of one kernel. No blocks: it does not fit."""
    return {
        "operator": build.operator,
        "kernel": build.kernel.name,
        "constants": build.constants,
        "GPU": build.spec.slug,
        "registers": taken.registers,
        "spills": taken.spill_bytes,
        "known_spills": build.known_spills,
        "shared": taken.shared_bytes,
        "warps": taken.num_warps,
        "blocks": taken.blocks_per_sm(build.spec)[0] if build.smem <= build.spec.smem_block else 0,
    }


def page(rows: list[dict[str, Any]]) -> str:
    """The report as Markdown: a line for every kernel with its constants, a column for every GPU."""
    said = {(row["operator"], row["kernel"], row["constants"]): {} for row in rows}
    for row in rows:
        cell = f"{row['registers']} r, {row['shared'] / 1024:.4g} KiB, {row['blocks']}"
        if fault(row):
            cell += f", **{fault(row)}**"
        elif row["spills"]:
            cell += f", {row['spills']} B spilled"
        said[row["operator"], row["kernel"], row["constants"]][row["GPU"]] = cell
    slugs = [slug for slug in TARGETS if any(row["GPU"] == slug for row in rows)]
    names = [f"{slug} (sm_{re.sub('^sm_', '', nvrtc.architecture(named(slug).sm))})" for slug in slugs]
    parts = [
        "# What the CUDA kernels take of a GPU",
        "Written by `make cubins`: every kernel of `csrc/`, compiled ahead of time, with the configurations that are "
        "the defaults on each GPU, at the points that between them take every branch. Registers a thread, shared "
        "memory a block, blocks that an SM holds at once; a dash where the default on that GPU is another line. "
        "Nothing here was timed.",
        f"Compiler: {ahead.compiler()}.",
    ]
    for operator in dict.fromkeys(key[0] for key in said):
        lines = [f"| kernel | constants | {' | '.join(names)} |", f"|---|---|{'---|' * len(names)}"]
        for (of, kernel, constants), cells in said.items():
            if of == operator:
                listed = " | ".join(cells.get(slug, "-") for slug in slugs)
                lines.append(f"| `{kernel}` | `{constants}` | {listed} |")
        parts += [f"## {operator}", "\n".join(lines)]
    return "\n\n".join(parts) + "\n"

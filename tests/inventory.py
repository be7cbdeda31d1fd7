"""What the library proves and what its kernels cost, so that two states of the tree can be compared.

    python tests/inventory.py --json before.json        # in one tree
    python tests/inventory.py --against before.json     # in another: what differs, and 1 where anything is worse

Worse is what is no longer there, fewer points or tests, more bytes, registers, spills or shared memory. Nothing is run
but pytest's collection; kernels are compiled, in several processes, for one GPU of each of ``TARGETS``.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from iokernels.autotune.resources import Resources, compiling_for
from iokernels.bench.commands import cubins
from iokernels.ops import CASES
from iokernels.runtime import device as devices
from iokernels.runtime.device import named
from iokernels.testing.case import dtype_name, load

ROOT = Path(__file__).resolve().parents[1]
TARGETS = ("h100-sxm", "rtx-3090")
"""sm_90 and sm_86: the wgmma instructions of one, the little shared memory of the other."""

COLLECTED = ("tests/ops", "tests/nn")
FEWER_IS_WORSE = ("points", "coverage")
"""The sections whose numbers say what is proved; those of the others say what it costs."""

Section = dict[str, Any]
"""By a line of text that names one thing: its number, its numbers by name, or a text."""


def points() -> Section:
    """How many points ``check`` has for every case, backend and dtype."""
    return {
        f"{name} {backend} {dtype_name(dtype)}": len(case.check_points())
        for name, case in ((name, load(name)) for name in CASES)
        for backend, implementation in case.implementations.items()
        if backend != "reference"
        for dtype in implementation.dtypes
    }


def options() -> Section:
    """The shape of every point of ``check``: which options it turns on."""
    return {f"{name}: {point.name}": str(point.shape) for name in CASES for point in load(name).check_points()}


def accounts() -> Section:
    """Bytes of every kernel with small tiles: what it must move, and what its tiling requests."""
    found: Section = {}
    for name, case in ((name, load(name)) for name in CASES):
        for backend, stated in (("triton", case.accounts), ("cuda", case.cuda_accounts)):
            if stated is None:
                continue
            for shape, dtype in stated.shapes:
                for kernel, account in stated.model(shape, dtype, stated.test_configs).items():
                    found[f"{name} {backend} {dtype_name(dtype)} {shape}: {kernel}"] = {
                        f"{what} {way}": getattr(getattr(account, what), way)
                        for what in ("floor", "model")
                        for way in ("read", "written")
                    }
    return found


def triton_point(job: tuple[str, str, int]) -> Section:
    """The Triton kernels of one point of a case, compiled for a GPU. A kernel that a call launches with several sets of
    constants is numbered in the order of the launches."""
    name, slug, index = job
    case, spec = load(name), named(slug)
    assert case.compilation is not None
    shape, dtype = case.compilation.points[index]
    with compiling_for(spec) as compiled:
        case.compilation.launch(shape, dtype, case.passes[-1])
    return numbered(f"{name} sm_{spec.sm} {dtype_name(dtype)} {shape}: ", compiled)


def numbered(head: str, compiled: Iterable[Resources]) -> Section:
    """Resources by kernel, those of one name numbered from the second on."""
    found: Section = {}
    seen: Counter[str] = Counter()
    for one in compiled:
        seen[one.kernel] += 1
        number = f" #{seen[one.kernel]}" if seen[one.kernel] > 1 else ""
        found[f"{head}{one.kernel}{number}"] = {
            "registers": one.registers, "spilled": one.spill_bytes, "shared": one.shared_bytes, "warps": one.num_warps
        }  # fmt: skip
    return found


def triton_resources(workers: int) -> Section:
    """What every Triton kernel takes of each of ``TARGETS``."""
    cases = [(name, found) for name in CASES if (found := load(name).compilation) is not None]
    jobs = [(name, slug, index) for name, found in cases for index in range(len(found.points)) for slug in TARGETS]
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        found = pool.map(triton_point, jobs)
        return {line: numbers for section in found for line, numbers in section.items()}


def cuda_resources(folder: Path) -> Section:
    """What ``iokernels cubins`` reports of every CUDA kernel, for ``TARGETS``."""
    cases = [case for case in map(load, CASES) if case.cuda_compilation is not None]
    builds = [build for case in cases for build in cubins.wanted(case, map(named, TARGETS))]
    found: Section = {}
    for build, taken in cubins.compiled(builds, folder):
        head = f"{build.operator} sm_{build.spec.sm} {build.constants}: "
        (line, numbers), = numbered(head, [taken]).items()  # fmt: skip
        found[line] = numbers
    return found


def collected(extra: Iterable[str]) -> list[str]:
    """The ids of the tests of operators and modules, as pytest collects them with ``extra`` arguments."""
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", *COLLECTED, *extra]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"pytest cannot collect:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return [line for line in done.stdout.splitlines() if "::" in line]


def coverage(ids: Iterable[str]) -> Section:
    """How many tests there are of each operator (or file, where it is not of one), backend and point of ``check``, as
    the parameters in an id and the name of its file say."""
    backends = {backend for name in CASES for backend in load(name).implementations}
    names = [point.name for name in CASES for point in load(name).check_points()]
    names = sorted(dict.fromkeys(names), key=len, reverse=True)
    found: Counter[str] = Counter()
    for test in ids:
        file, _, rest = test.partition("::")
        folder = Path(file).relative_to("tests")
        subject = folder.parent if folder.parent.name in CASES else folder.with_suffix("")
        inside = f"-{rest.partition('[')[2].removesuffix(']')}-"
        words = {*inside.split("-"), *folder.stem.split("_")}
        option = next((f": {name}" for name in names if f"-{name}-" in inside), "")
        found[f"{subject} {'+'.join(sorted(backends & words)) or 'all'}{option}"] += 1
    return dict(sorted(found.items()))


def differences(old: Mapping[str, Section], new: Mapping[str, Section]) -> tuple[list[str], bool]:
    """A line for everything that was added, removed or changed in the sections that both have, and whether anything is
    worse."""
    lines, worse = [], False
    for title in [title for title in new if title in old]:
        before, after = old[title], new[title]
        for line in [*before, *(line for line in after if line not in before)]:
            if line not in after:
                lines.append(f"{title}: removed {line} ({said(before[line])})")
                worse = True
            elif line not in before:
                lines.append(f"{title}: added {line} ({said(after[line])})")
            elif before[line] != after[line]:
                bad = is_worse(title, before[line], after[line])
                mark = ", WORSE" if bad else ""
                lines.append(f"{title}: changed {line} ({said(before[line])} -> {said(after[line])}{mark})")
                worse |= bad
    return lines, worse


def is_worse(title: str, before: Any, after: Any) -> bool:
    """Whether a number moved the wrong way. Texts and numbers of warps have no such way."""
    if isinstance(before, dict):
        return any(name != "warps" and is_worse(title, old, after.get(name, old)) for name, old in before.items())
    if isinstance(before, str):
        return False
    return after < before if title in FEWER_IS_WORSE else after > before


def said(value: Any) -> str:
    """A value of a section in a few words."""
    if isinstance(value, dict):
        return ", ".join(f"{name} {number}" for name, number in value.items())
    return str(value)


def summary(found: Mapping[str, Section]) -> list[str]:
    """One line for every section and case: entries, and the sum of every number."""
    lines = []
    for title, section in found.items():
        groups: dict[str, Counter[str]] = {}
        for line, value in section.items():
            group = groups.setdefault(line.split()[0].rstrip(":"), Counter())
            group["entries"] += 1
            if not isinstance(value, str):
                group.update(value if isinstance(value, dict) else {"in all": value})
        total: Counter[str] = Counter()
        for group in groups.values():
            total.update(group)
        lines += ["", f"{title}: {said(total)}", *(f"  {name}: {said(group)}" for name, group in groups.items())]
    return lines


def main() -> int:
    """Take the inventory; print it or what differs, and say by the exit status whether anything is worse."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything there")
    parser.add_argument("--against", type=Path, metavar="FILE", help="print what differs from an earlier --json")
    parser.add_argument("--without-compiling", action="store_true", help="leave compiled resources out")
    parser.add_argument("--without-collecting", action="store_true", help="leave pytest's collection out")
    parser.add_argument("--cuda", action="store_true", help="compile the CUDA C++ kernels too")
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "cubins", help="where they are compiled")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes that compile")
    parser.add_argument("pytest", nargs="*", help="arguments of pytest's collection, after --")
    given = parser.parse_args()
    if devices.INTERPRET and not given.without_compiling:
        parser.error("TRITON_INTERPRET is set, and interpreted kernels are not compiled: unset it")
    old = json.loads(given.against.read_text()) if given.against else {}
    started = time.monotonic()
    found: dict[str, Section] = {"points": points(), "options": options(), "bytes": accounts()}
    if not given.without_collecting:
        found["coverage"] = coverage(collected(given.pytest))
    if not given.without_compiling:
        found["Triton kernels"] = triton_resources(given.workers)
        if given.cuda:
            found["CUDA kernels"] = cuda_resources(given.folder)
    if given.json:
        given.json.write_text(json.dumps(found, indent=1) + "\n")
    lines, worse = differences(old, found) if given.against else (summary(found)[1:], False)
    for line in lines:
        print(line)
    if given.against:
        left_out = sorted(old.keys() ^ found.keys())
        print(f"{len(lines)} differences", *(f"{title} not compared" for title in left_out), sep="; ")
    print(f"taken in {time.monotonic() - started:.0f} s")
    return int(worse)


if __name__ == "__main__":
    sys.exit(main())

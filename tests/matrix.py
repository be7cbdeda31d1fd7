"""The suites that depend on other packages' versions, at the ends of what pyproject.toml declares.

One virtual environment for each row of ``ROWS``, under ``build/matrix``; in it the compile, integration, runtime and
compatibility tests of this tree. ``make matrix ARGS="--row torch-2.11"``
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
import venv
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SUITES = ("tests/ops/*/test_compile.py", "tests/ops/*/test_integration.py", "tests/runtime", "tests/compatibility")


@dataclass(frozen=True)
class Row:
    """The versions of one environment. CuPy before 14 is for NumPy 1, which later ones refuse."""

    torch: str
    triton: str
    numpy: str
    cupy: str = "14.2.0"


ROWS = {
    "torch-2.10": Row(torch="2.10.0", triton="3.6.0", numpy="2.3.5"),
    "torch-2.11": Row(torch="2.11.0", triton="3.6.0", numpy="2.3.5"),
    "numpy-1.26": Row(torch="2.13.0", triton="3.7.1", numpy="1.26.4", cupy="13.6.0"),
    "triton-3.6": Row(torch="2.13.0", triton="3.6.0", numpy="2.3.5"),
    "triton-3.9": Row(torch="2.13.0", triton="3.9.0", numpy="2.4.6"),
    "newest": Row(torch="2.14.1", triton="3.8.0", numpy="2.4.6"),
}

OTHERS = (
    "einops>=0.8",
    "rich>=13",
    "platformdirs>=4",
    "packaging>=23",
    "pytest>=8",
    "pytest-xdist>=3.5",
    "pytest-benchmark>=4",
    "hypothesis>=6.100",
    "matplotlib>=3.8",
    "build>=1.2",
    "setuptools>=77",
    "nvidia-cuda-nvrtc==13.0.88",
    "tomli>=2; python_version < '3.11'",
)
"""What else the tests import."""

SETTINGS = {"OMP_NUM_THREADS": "1", "IOKERNELS_EMULATE_ORDERS": "1"}
"""What the tests run under unless the environment says otherwise. In which orders a kernel's blocks and warps run is
nothing that a version of a package changes, so one is enough here; `make test` runs twenty."""


def install(row: Row, folder: Path) -> tuple[Path, str]:
    """Make the environment of a row, or take the one that is there; its Python, and what went wrong ("" if nothing)."""
    python = folder / "bin" / "python"
    ready = folder / ".ready"
    if ready.exists() and ready.read_text() == repr((row, OTHERS)):
        return python, ""
    venv.create(folder, with_pip=True, clear=True)
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    pins = (f"torch=={row.torch}", f"numpy=={row.numpy}", f"cupy-cuda13x=={row.cupy}")
    # Torch's metadata asks for one Triton exactly; a row may want another, so Triton comes last and alone.
    for command in ([*pip, *pins, *OTHERS], [*pip, "--no-deps", f"triton=={row.triton}"]):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            lines = done.stderr.strip().splitlines()
            # Warnings about indexes may follow the reason.
            reasons = [line for line in lines if line.startswith("ERROR")]
            return python, (reasons or lines or [f"pip ended with {done.returncode}"])[-1]
    ready.write_text(repr((row, OTHERS)))
    return python, ""


def tests() -> list[str]:
    """The files and folders of ``SUITES``, as pytest takes them."""
    return [str(path.relative_to(ROOT)) for suite in SUITES for path in sorted(ROOT.glob(suite))]


def counts(report: Path) -> tuple[dict[str, int], list[str]]:
    """Passed, failed and skipped of a JUnit file, and the ids of what failed."""
    found = {"passed": 0, "failed": 0, "skipped": 0}
    failing = []
    for case in ElementTree.parse(report).iter("testcase"):
        kinds = {child.tag for child in case}
        if kinds & {"failure", "error"}:
            found["failed"] += 1
            failing.append(f"{case.get('classname')}::{case.get('name')}")
        else:
            found["skipped" if "skipped" in kinds else "passed"] += 1
    return found, failing


def run(name: str, folder: Path, workers: int, rest: list[str]) -> tuple[str, list[str], bool]:
    """One row: its line of the table, what failed, and whether all is well."""
    row = ROWS[name]
    versions = f"| {name} | {row.torch} | {row.triton} | {row.numpy} |"
    python, fault = install(row, folder / name)
    if fault:
        return f"{versions} not installed: {fault} | | | |", [], False
    report = folder / f"{name}.xml"
    report.unlink(missing_ok=True)
    environment = {**SETTINGS, **os.environ, "PYTHONPATH": str(ROOT)}
    started = time.monotonic()
    command = [str(python), "-m", "pytest", "-q", "-n", str(workers), f"--junitxml={report}", *(rest or tests())]
    done = subprocess.run(command, cwd=ROOT, env=environment, check=False)
    seconds = time.monotonic() - started
    if not report.exists():
        return f"{versions} pytest ended with {done.returncode} before any test | | | |", [], False
    found, failing = counts(report)
    numbers = f" {found['passed']} | {found['failed']} | {found['skipped']} | {seconds:.0f} |"
    return versions + numbers, failing, done.returncode == 0


def main() -> int:
    """Run the rows asked for, print their table, and say by the exit status whether each passed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--row", action="append", choices=ROWS, help="one row; may be repeated (default: all)")
    parser.add_argument("--workers", type=int, default=2, help="processes of pytest at a time")
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "matrix", help="where environments are made")
    parser.add_argument("tests", nargs="*", help="files to run instead of the suites")
    given = parser.parse_args()
    results = [run(name, given.folder, given.workers, given.tests) for name in given.row or ROWS]
    print("\n| row | torch | Triton | NumPy | passed | failed | skipped | seconds |\n|---|---|---|---|---|---|---|---|")
    for line, failing, _ in results:
        print(line)
        for test in failing:
            print(f"    {test}")
    return 0 if all(well for _, _, well in results) else 1


if __name__ == "__main__":
    sys.exit(main())

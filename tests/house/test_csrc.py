"""The rules of the CUDA sources: small files, and kernels that reach the hardware only through ``common/``."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from iokernels.ops import OPERATORS

from .tree import ROOT, files

MOST_LINES, MOST_COLUMNS = 500, 120
SOURCES = files(".cu", ".cuh", ".h", ".cpp") + sorted((ROOT / "tests" / "cuda").glob("*.cu"))
INCLUDE = re.compile(r'^\s*#\s*include\s*([<"][^>"]+[>"])', re.MULTILINE)
FORBIDDEN = {
    r"\basm\b": "PTX belongs in csrc/common",
    r"\bIOKERNELS_EMULATE\b": "a kernel does not know where it runs",
    r"\b__shared__\b": "shared memory is taken from SharedMemory",
    r"\b__(shfl|ballot|ldg|ldcg|expf|cvta)\w*": "a primitive of csrc/common does it, here and in the emulator",
}


def faults(name: str, source: str) -> list[str]:
    """What goes against the rules in one file of ``csrc/<operator>``."""
    found = [f"{name}: {reason}" for pattern, reason in FORBIDDEN.items() if re.search(pattern, source)]
    for include in INCLUDE.findall(source):
        if include.startswith("<") or not re.match(r'"(common/)?\w+\.cuh"', include):
            found.append(f"{name}: includes {include}; kernels include common/ and what lies beside them")
    if not source.startswith("//"):
        found.append(f"{name}: begins with no word on what it computes")
    return found


def kernels() -> list[Path]:
    return [path for path in SOURCES if path.parent.name not in ("common", "emulate")]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_file_is_small(path: Path) -> None:
    lines = path.read_text().splitlines()
    assert len(lines) <= MOST_LINES
    untidy = [number for number, line in enumerate(lines, start=1) if len(line) > MOST_COLUMNS or line.rstrip() != line]
    assert untidy == []


@pytest.mark.parametrize("path", kernels(), ids=lambda path: str(path.relative_to(ROOT)))
def test_kernel_keeps_to_the_primitives(path: Path) -> None:
    assert faults(path.name, path.read_text()) == []


def test_every_folder_belongs_to_an_operator() -> None:
    folders = {path.name for path in (ROOT / "csrc").iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert folders - {"common", "emulate"} <= set(OPERATORS)


@pytest.mark.parametrize(
    "source",
    [
        '// x\nasm volatile("");',
        "// x\n#include <cuda_fp16.h>",
        '// x\n#include "emulate/machine.h"',
        "// x\n__shared__ float x[4];",
        "// x\ny = __shfl_sync(m, x, 0);",
        "float x;",
    ],
)
def test_fault_is_found(source: str) -> None:
    assert faults("x.cu", source) != []

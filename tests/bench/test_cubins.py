"""``iokernels cubins``: kernels compiled ahead of time and what is reported of them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from iokernels.bench import cubins
from iokernels.bench.case import Case, Compilation, load
from iokernels.bench.cases import CASES
from iokernels.bench.cli import main
from iokernels.runtime import ahead
from iokernels.runtime.device import named, spec_of
from iokernels.runtime.launch import cuda_kernel

pytestmark = pytest.mark.skipif(ahead.refusal() is not None, reason=ahead.refusal() or "")

SOURCE = str(Path(__file__).parents[1] / "csrc" / "matmul.cu")


def launch(shape: Any, dtype: torch.dtype, which: str) -> None:
    """Two warps where a GPU has little shared memory, four elsewhere; a second launch takes more of it."""
    a = torch.empty(1, dtype=dtype, device="meta")
    warps = 2 if spec_of(a.device).smem_block < 100 * 1024 else 4
    kernel = cuda_kernel(SOURCE, "matmul", Element=dtype, WARPS=warps, BLOCK_N=16, BLOCK_K=32)
    for smem in (8192, 4096):
        kernel.launch((1,), 32 * warps, smem, {"a_ptr": a})


@pytest.fixture
def case() -> Case:
    case = load("flash_attention")
    shape = case.vocabulary.shape()
    points = ((shape, torch.float16), (shape, torch.bfloat16), (shape, torch.float16))
    return replace(case, cuda_compilation=Compilation(launch, points))


def test_wanted_are_the_launches_of_each_gpu_once(case: Case) -> None:
    builds = cubins.wanted(case, [named("h100-sxm"), named("rtx-3090")])
    asked = [(build.spec.slug, build.constants, build.block, build.smem) for build in builds]
    assert asked == [
        (slug, f"Element={dtype} WARPS={warps} BLOCK_N=16 BLOCK_K=32", 32 * warps, 8192)
        for slug, warps in (("h100-sxm", 4), ("rtx-3090", 2))
        for dtype in ("float16", "bfloat16")
    ]
    assert len({build.stem for build in builds}) == 4


def test_report(case: Case, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(cubins, "load", lambda name: case)
    monkeypatch.setattr(cubins, "TARGETS", ("rtx-3090", "h100-sxm"))
    report, rows = tmp_path / "cubins.md", tmp_path / "rows.json"
    command = ["cubins", "flash_attention", "--out", str(tmp_path / "out"), "--md", str(report), "--json", str(rows)]
    assert main(command) == 0
    found = json.loads(rows.read_text())["rows"]
    assert [(row["GPU"], row["warps"], row["spills"]) for row in found] == [
        ("rtx-3090", 2, 0), ("rtx-3090", 2, 0), ("h100-sxm", 4, 0), ("h100-sxm", 4, 0),
    ]  # fmt: skip
    assert all(0 < row["registers"] <= 255 and row["shared"] >= 8192 for row in found)
    text = report.read_text()
    assert "rtx-3090 (sm_86) | h100-sxm (sm_90a)" in text
    assert f"{found[0]['registers']} r, 8 KiB" in text
    assert main(command) == 0
    assert report.read_text() == text


def test_spills_and_errors_fail(
    case: Case, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cubins, "load", lambda name: case)
    command = ["cubins", "flash_attention", "--out", str(tmp_path)]
    (build,) = cubins.wanted(case, [named("h100-sxm")])[:1]
    spilling = cubins.compiled([build], tmp_path)[0][1]
    monkeypatch.setattr(cubins, "compiled", lambda *_: [(build, replace(spilling, spill_bytes=16))])
    assert main([*command, "--md", str(tmp_path / "x.md")]) == 1
    assert "16 B spilled" in (tmp_path / "x.md").read_text()
    monkeypatch.undo()
    broken = replace(build, kernel=cuda_kernel(SOURCE, "matmul", WARPS=2))
    with pytest.raises(cubins.UsageError, match="does not compile"):
        cubins.compiled([broken], tmp_path / "broken")
    assert capsys.readouterr().out


WITH_KERNELS = [case for case in map(load, CASES) if case.cuda_compilation is not None]


@pytest.mark.parametrize("case", WITH_KERNELS, ids=lambda case: case.operator)
def test_no_kernel_spills(case: Case, tmp_path: Path) -> None:
    for build, taken in cubins.compiled(cubins.wanted(case, [named("l40s")]), tmp_path):
        assert taken.spill_bytes == 0, build

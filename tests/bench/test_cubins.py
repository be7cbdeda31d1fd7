"""``iokernels cubins``: kernels compiled ahead of time and what is reported of them."""

from __future__ import annotations

import json
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from iokernels.bench.cli import main
from iokernels.bench.commands import cubins
from iokernels.ops import CASES
from iokernels.runtime.cuda import ahead
from iokernels.runtime.cuda.kernel import cuda_kernel
from iokernels.runtime.device import named, spec_of
from iokernels.testing.case import Case, Compilation, load

pytestmark = pytest.mark.skipif(ahead.refusal() is not None, reason=ahead.refusal() or "")

SOURCE = str(Path(__file__).parents[1] / "cuda_kernels" / "matmul.cu")


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
    for worse, said in (({"spill_bytes": 16}, "16 B spilled"), ({"shared_bytes": 300_000}, "too much for one block")):
        monkeypatch.setattr(cubins, "compiled", lambda *_, worse=worse: [(build, replace(spilling, **worse))])
        assert main([*command, "--md", str(tmp_path / "x.md")]) == 1
        assert said in (tmp_path / "x.md").read_text()
        assert f"WRONG matmul on h100-sxm: {said}" in capsys.readouterr().out.replace("300000 B shared, ", "")
    monkeypatch.undo()
    broken = replace(build, kernel=cuda_kernel(SOURCE, "matmul", WARPS=2))
    with pytest.raises(cubins.UsageError, match="does not compile"):
        cubins.compiled([broken], tmp_path / "broken")


WITH_KERNELS = [case for case in map(load, CASES) if case.cuda_compilation is not None]


@pytest.mark.parametrize("case", WITH_KERNELS, ids=lambda case: case.operator)
def test_no_kernel_spills_or_is_too_large(case: Case, tmp_path: Path) -> None:
    every = cubins.wanted(case, [named("l40s")])  # the least shared memory of all
    # One of two that differ in the kind of 16-bit numbers alone.
    builds = list(
        {(build.kernel.name, build.constants.replace("bfloat16", "float16")): build for build in every}.values()
    )
    found = cubins.compiled(builds, tmp_path, by_nvcc=find_spec("cupy") is None)
    assert len(found) == len(builds)
    faults = {
        f"{build.kernel.name} {build.constants}": cubins.fault(cubins.row(build, taken)) for build, taken in found
    }
    assert {name: fault for name, fault in faults.items() if fault} == {}


def test_the_page_is_of_the_kernels_of_today() -> None:
    page = Path(__file__).parents[2] / "docs" / "guides" / "cubins.md"
    builds = [build for case in WITH_KERNELS for build in cubins.wanted(case, map(named, cubins.TARGETS))]
    lines = page.read_text().splitlines() if page.exists() else []
    listed = {tuple(line.split(" | ")[:2]) for line in lines if line.startswith("| `")}
    assert listed == {(f"| `{build.kernel.name}`", f"`{build.constants}`") for build in builds}
    assert [build for build in builds if build.smem > build.spec.smem_block] == []
    assert "**" not in "".join(lines), "a kernel spills, or is too large"

"""``bench --against git:REV``: a repository whose working tree is slower than its last commit."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from iokernels.bench.report.rows import Need, Row
from iokernels.bench.timing import revision
from iokernels.bench.timing.compare import Comparison
from iokernels.bench.timing.revision import Revision, VersionError, Worker, worktree
from iokernels.ops.flash_attention.case import CASE
from iokernels.testing.case.shape import UsageError

ROOT = Path(__file__).resolve().parents[2]
PORTABLE = "iokernels/ops/flash_attention/portable/__init__.py"
SLOWER = """

_quick_forward = forward


def forward(*arguments):
    import time

    start = time.perf_counter()
    found = _quick_forward(*arguments)
    until = time.perf_counter() + {extra} * (time.perf_counter() - start)
    while time.perf_counter() < until:
        pass
    return found
"""
"""Takes longer in proportion to what it takes: the machine may be as busy as it likes."""

pytestmark = pytest.mark.skipif(shutil.which("git") is None, reason="needs git")


def git(folder: Path, *arguments: str) -> str:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    identity = ["-c", "user.name=nobody", "-c", "user.email=nobody@localhost", "-c", "commit.gpgsign=false"]
    done = subprocess.run(
        ["git", "-C", str(folder), *identity, *arguments], capture_output=True, text=True, check=True, env=environment
    )
    return done.stdout.strip()


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package as a repository of one commit."""
    folder = tmp_path_factory.mktemp("repository")
    shutil.copy(ROOT / "pyproject.toml", folder)
    for name in ("iokernels", "autotune", "bench", "csrc"):
        shutil.copytree(ROOT / name, folder / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    git(folder, "init", "--quiet")
    git(folder, "add", "--all")
    git(folder, "commit", "--quiet", "--message", "all")
    return folder


def bench(repository: Path, out: Path, *arguments: str) -> tuple[int, dict[str, Any], str]:
    """Exit code, the row of the backend ``torch`` and what was printed."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [
        sys.executable, "-m", "iokernels", "bench", "flash_attention", "--device", "cpu", "--backend", "torch",
        "--shape", "b=1,h=2,n=256,d=32", "--seconds", "0.5", "--against", "git:HEAD", "--json", str(out), *arguments,
    ]  # fmt: skip
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=repository, timeout=120,
        env=environment | {"PYTHONPATH": str(repository), "OMP_NUM_THREADS": "1", "COLUMNS": "200"},
    )  # fmt: skip
    assert out.exists(), done.stdout + done.stderr
    rows = {row["name"]: row for row in json.loads(out.read_text())["rows"]}
    return done.returncode, rows["torch"], done.stdout + done.stderr


def test_a_slowdown_is_caught(repository: Path, tmp_path: Path) -> None:
    source = repository / PORTABLE
    clean = source.read_text()
    source.write_text(clean + SLOWER.format(extra=0.5))
    try:
        code, row, printed = bench(repository, tmp_path / "slow.json")
    finally:
        source.write_text(clean)
    assert (code, row["slower"]) == (1, True), printed
    assert row["status"] == "timed"
    assert row["against"] == "git:HEAD"
    assert 1.05 < row["time_ratio_low"] <= row["time_ratio"] <= row["time_ratio_high"]
    assert 1.2 < row["time_ratio"] < 2.0, "half as long again, as far as a busy machine lets one see"
    assert "slower by more than 5%" in printed
    assert git(repository, "worktree", "list").count("\n") == 0, "its worktree is gone"


@pytest.fixture
def compared(repository: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Comparison]:
    """Compares the repository's working tree with its last commit."""
    monkeypatch.setattr(revision, "ROOT", repository)
    need = Need(CASE.vocabulary.parse("b=1,h=2,n=256,d=32"), torch.float32, "both", 1, 1, None)

    def compare(tolerated: float) -> Comparison:
        with Revision("HEAD", "flash_attention", 0, torch.device("cpu"), tolerated) as other:
            return other.compare(Row(need, "torch", "backend", "timed"), seconds=0.3)

    return compare


def test_the_same_version_passes(compared: Callable[..., Comparison]) -> None:
    found = compared(0.4)
    assert found.ratio is not None
    assert found.low is not None
    assert found.high is not None
    assert found.low <= found.ratio <= found.high
    assert 0.6 < found.ratio < 1.4
    assert not found.slower
    assert (found.other, found.reason) == ("git:HEAD", "")


def test_a_revision_that_draws_other_inputs_is_not_compared(
    repository: Path, compared: Callable[..., Comparison]
) -> None:
    source = repository / "iokernels/ops/flash_attention/case/__init__.py"
    clean = source.read_text()
    assert "manual_seed(seed)" in clean
    source.write_text(clean.replace("manual_seed(seed)", "manual_seed(seed + 1)"))
    try:
        found = compared(0.05)
    finally:
        source.write_text(clean)
    assert (found.ratio, found.slower) == (None, False)
    assert str(found) == "git:HEAD: not compared: it draws other inputs"


def test_a_worktree_has_the_files_of_its_revision(repository: Path) -> None:
    (repository / "new.txt").touch()
    try:
        with worktree("HEAD", repository) as place:
            assert (place / "iokernels" / "bench" / "cli.py").is_file()
            assert not (place / "new.txt").exists()
    finally:
        (repository / "new.txt").unlink()
    assert not place.exists()


def test_what_is_no_revision(repository: Path, tmp_path: Path) -> None:
    for name in ("nothing-like-it", "--help", ""):
        with pytest.raises(UsageError, match=r"--against git:REV: "), worktree(name, repository):
            pass
    with pytest.raises(UsageError, match="needs a checkout"), worktree("HEAD", tmp_path):
        pass


@pytest.fixture
def worker(repository: Path) -> Any:
    made = Worker(repository)
    yield made.started()
    made.close()


def test_a_worker_tells_its_problems(worker: Worker) -> None:
    request = {
        "do": "prepare", "operator": "flash_attention", "shape": "b=1,h=1,n=8,d=8", "dtype": "float32", "pass": "bwd",
        "backend": "torch", "device": "cpu", "seed": 0, "threads": 1, "warm": 0.01,
    }  # fmt: skip
    with pytest.raises(VersionError, match="has no dimension 'zz'"):
        worker.ask(**(request | {"shape": "zz=1"}))
    with pytest.raises(VersionError, match="KeyError"):
        worker.ask(do="nothing")
    first = worker.ask(**request)
    assert set(first["digest"]) >= {"q", "k", "v", "dout", "causal"}
    assert 0.0 < worker.ask(do="sample", calls=3)["seconds"] < 10.0
    assert worker.ask(**request)["digest"] == first["digest"]
    assert worker.ask(**(request | {"seed": 1}))["digest"] != first["digest"]


def test_a_worker_holds_the_version_that_it_should(tmp_path: Path) -> None:
    """Started in a folder without the package, it finds the one that is installed, if any, and refuses it."""
    worker = Worker(tmp_path)
    try:
        with pytest.raises(VersionError, match=r"No module named 'iokernels'|iokernels comes from"):
            worker.started()
        with pytest.raises(VersionError, match="its process ended with exit code 0"):
            worker.ask(do="sample", calls=1)
    finally:
        worker.close()

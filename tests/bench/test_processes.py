"""The command line and the GPU machine's script as processes of their own."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "bench" / "on_gpu.sh"


def environment(**changes: str) -> dict[str, str]:
    """This process's environment, without the settings that the test suite made for itself."""
    kept = {name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "PYTHONPATH")}
    return kept | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | changes


@pytest.mark.without_gpu
def test_check_turns_the_interpreter_on_by_itself() -> None:
    choice = ["-k", "one query, one key", "--dtype", "bf16", "--json", "-"]
    command = [sys.executable, "-m", "iokernels", "check", "flash_attention", *choice]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=120)
    assert done.returncode == 0, done.stderr
    rows = {row["backend"]: row for row in json.loads(done.stdout)["rows"]}
    assert rows["triton"]["status"] == "ok"
    assert "no GPU: on the CPU, Triton kernels in Triton's interpreter" in done.stderr


def fake_python(folder: Path, body: str) -> dict[str, str]:
    """A program that stands in for Python, so that the script's own logic is tested in no time."""
    program = folder / "python"
    program.write_text(f"#!/bin/sh\n{body}\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    return environment(PYTHON=str(program))


def script(out: Path, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["sh", str(SCRIPT), str(out)], capture_output=True, text=True, env=env, timeout=60)


OPERATORS = """case "$*" in *CASES*) echo one two; exit 0;; *is_available*) exit 1;; esac"""


def test_the_script_runs_every_step(tmp_path: Path) -> None:
    done = script(tmp_path / "out", fake_python(tmp_path, f'{OPERATORS}\necho "ran $*"'))
    assert done.returncode == 0, done.stdout
    summary = (tmp_path / "out" / "summary.txt").read_text()
    assert done.stdout.endswith(summary)
    assert [line.split("  ")[0].split(" ")[0] for line in summary.splitlines()] == ["no", *["ok"] * 5, "total"]
    log = (tmp_path / "out" / "log.txt").read_text()
    for words in ("env", "check --quick", "bench one --suite quick", "bench two --suite quick"):
        assert f"ran -m iokernels {words}" in log
    assert "ran -m pytest -q" in log


def test_a_step_that_fails_or_hangs_stops_no_other(tmp_path: Path) -> None:
    body = f'{OPERATORS}\ncase "$*" in *"m pytest"*) sleep 60;; esac\necho "ran $*"'
    done = script(tmp_path / "out", fake_python(tmp_path, body) | {"SECONDS_TOTAL": "4"})
    assert done.returncode == 1
    summary = (tmp_path / "out" / "summary.txt").read_text().splitlines()
    assert summary[2].startswith("timeout")
    assert "tests" in summary[2]
    # The tests took all the time there was: what came after is said to have had none.
    assert summary[3].split() == ["no", "time", "check"]
    assert "4 failed" in summary[-1]


def test_a_failing_step_is_named_and_the_rest_runs(tmp_path: Path) -> None:
    body = f'{OPERATORS}\ncase "$*" in *"m iokernels check"*) echo broken; exit 1;; esac\necho "ran $*"'
    done = script(tmp_path / "out", fake_python(tmp_path, body))
    assert done.returncode == 1
    summary = (tmp_path / "out" / "summary.txt").read_text()
    assert "exit 1   check" in summary
    assert "bench two" in summary
    assert "1 failed" in summary


def test_the_script_without_a_folder() -> None:
    done = subprocess.run(["sh", str(SCRIPT)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "usage:" in done.stderr

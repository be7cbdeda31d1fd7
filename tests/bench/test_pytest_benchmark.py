"""The quick suites under pytest-benchmark, as ``pytest bench`` runs them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from iokernels.bench import test_speed
from iokernels.ops import CASES
from iokernels.testing.case import load

ROOT = Path(__file__).resolve().parents[2]


def test_every_quick_shape_is_a_case() -> None:
    asked: list[str] = []

    class Collector:
        def parametrize(self, names: tuple[str, ...], values: list[Any], ids: list[str]) -> None:
            assert [len(value) for value in values] == [len(names)] * len(ids)
            asked.extend(ids)

    test_speed.pytest_generate_tests(Collector())
    assert len(set(asked)) == len(asked)
    for operator in CASES:
        for shape in load(operator).suite("quick"):
            for which in set(load(operator).passes) - {"both"}:
                assert f"{operator}-{shape}-{which}-torch" in asked


def test_a_row_runs(tmp_path: Path) -> None:
    """One shape, in a process of its own as a user would start it."""
    out = tmp_path / "out.json"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    done = subprocess.run(
        [
            sys.executable, "-m", "pytest", "bench", "-q", "-p", "no:cacheprovider", "--benchmark-only",
            "--benchmark-max-time=0.05", "--benchmark-min-rounds=2", f"--benchmark-json={out}",
            "-k", "flash_attention and causal and not hkv and fwd",
        ],
        capture_output=True, text=True, cwd=ROOT, timeout=120, env=environment | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads(out.read_text())["benchmarks"]
    assert rows
    for row in rows:
        assert row["stats"]["median"] > 0.0
        assert 0.0 < row["extra_info"]["error"] <= 1.0
        assert row["extra_info"]["need_flops"] == 4 * 4 * 64 * (512 * 513 // 2)

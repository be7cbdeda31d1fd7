"""``tests/inventory.py``: the comparison of two trees finds what was planted, and its sections see what they should."""

from __future__ import annotations

import copy
import json
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import pytest

from iokernels.ops import CASES

from .tree import ROOT

BEFORE = {
    "points": {"flash_attention triton bf16": 35, "flash_rnn cuda fp16": 34},
    "options": {"flash_attention: causal": "n=16,causal=1"},
    "bytes": {"flash_attention triton bf16 n=16: fwd_kernel": {"floor read": 8, "model read": 16}},
    "coverage": {"ops/flash_attention triton: causal": 3},
    "Triton kernels": {"flash_attention sm_90 bf16 n=16: fwd_kernel": {"registers": 128, "spilled": 0, "warps": 8}},
}


@pytest.fixture(scope="module")
def inventory() -> Any:
    spec = spec_from_file_location("inventory_of_the_tree", ROOT / "tests" / "inventory.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_equal_trees_do_not_differ(inventory: Any) -> None:
    assert inventory.differences(BEFORE, copy.deepcopy(BEFORE)) == ([], False)


@pytest.mark.parametrize(
    ("title", "line", "value", "said", "worse"),
    [
        ("points", "flash_rnn cuda fp16", None, "points: removed flash_rnn cuda fp16 (34)", True),
        ("points", "flash_rnn cuda fp16", 33, "points: changed flash_rnn cuda fp16 (34 -> 33, WORSE)", True),
        ("points", "flash_rnn cuda fp16", 35, "points: changed flash_rnn cuda fp16 (34 -> 35)", False),
        ("points", "flash_rnn cuda fp32", 34, "points: added flash_rnn cuda fp32 (34)", False),
        ("options", "flash_attention: causal", "n=8,causal=1", "(n=16,causal=1 -> n=8,causal=1)", False),
        ("coverage", "ops/flash_attention triton: causal", 2, "(3 -> 2, WORSE)", True),
        (
            "bytes",
            "*",
            {"floor read": 8, "model read": 17},
            "model read 16 -> floor read 8, model read 17, WORSE",
            True,
        ),
        ("bytes", "*", {"floor read": 8, "model read": 15}, "model read 16 -> floor read 8, model read 15)", False),
        ("Triton kernels", "*", {"registers": 129, "spilled": 0, "warps": 8}, "warps 8, WORSE)", True),
        ("Triton kernels", "*", {"registers": 128, "spilled": 4, "warps": 8}, "warps 8, WORSE)", True),
        ("Triton kernels", "*", {"registers": 128, "spilled": 0, "warps": 16}, "warps 16)", False),
    ],
)
def test_a_planted_difference_is_found(
    inventory: Any, title: str, line: str, value: Any, said: str, worse: bool
) -> None:
    after = copy.deepcopy(BEFORE)
    line = next(iter(after[title])) if line == "*" else line
    after[title] = {name: old for name, old in after[title].items() if name != line}
    if value is not None:
        after[title][line] = value
    lines, found = inventory.differences(BEFORE, after)
    assert len(lines) == 1
    assert said in lines[0]
    assert found == worse


def test_the_command_against_a_file(
    inventory: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "before.json"
    cheap = ["inventory", "--without-compiling", "--without-collecting"]
    monkeypatch.setattr(sys, "argv", [*cheap, "--json", str(path)])
    assert inventory.main() == 0
    before = json.loads(path.read_text())
    assert {line.split()[0] for line in before["points"]} == set(CASES)
    assert {line.partition(":")[0] for line in before["options"]} == set(CASES)
    assert {line.split()[0] for line in before["bytes"]} == set(CASES)
    monkeypatch.setattr(sys, "argv", [*cheap, "--against", str(path)])
    capsys.readouterr()
    assert inventory.main() == 0
    assert capsys.readouterr().out.startswith("0 differences\n")
    before["points"]["flash_attention triton bf16"] += 1
    path.write_text(json.dumps(before))
    assert inventory.main() == 1
    assert "points: changed flash_attention triton bf16 (36 -> 35, WORSE)" in capsys.readouterr().out


def test_coverage_is_by_operator_backend_and_point(inventory: Any) -> None:
    ids = [
        "tests/ops/lean_attention/test_options.py::test_every_option[triton-torch.float16-pages of 16]",
        "tests/ops/lean_attention/test_options.py::test_every_option[triton-torch.float32-pages of 16]",
        "tests/ops/lean_attention/test_cuda.py::test_launch[4]",
        "tests/ops/lean_attention/test_errors.py::test_torch_is_named",
        "tests/ops/test_layouts.py::test_any_layout[torch-flash_rnn]",
    ]
    assert inventory.coverage(ids) == {
        "ops/lean_attention all": 1,
        "ops/lean_attention cuda": 1,
        "ops/lean_attention triton: pages of 16": 2,
        "ops/test_layouts torch": 1,
    }

"""The layout that makes one operator look like the next: its places, and who may import whom."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

import pytest

from iokernels.ops import OPERATORS

from .tree import ROOT, files, module_name

MOST_LINES = 500
BACKEND_FILE = re.compile(r"portable|cuda(_\w+)?|triton_\w+")
NAMELESS = {"utils", "common", "helpers", "misc", "util", "helper"}


def missing_places(operator: str, root: Path = ROOT) -> list[str]:
    """The places of an operator that do not exist."""
    room = f"iokernels/ops/{operator}"
    places = [f"{room}/{name}.py" for name in ("__init__", "api", "op", "reference", "portable", "tuning")]
    places += [
        f"iokernels/nn/{operator}.py",
        f"bench/cases/{operator}.py",
        f"tests/ops/test_{operator}.py",
        f"docs/ops/{operator}.md",
    ]
    if any((root / room).glob("cuda*.py")):
        places.append(f"csrc/{operator}")
    return [place for place in places if not (root / place).exists()]


def imports(module: str, source: str) -> list[tuple[str, bool]]:
    """Every name that ``source`` imports, absolute, and whether that happens when it is itself imported."""
    tree = ast.parse(source)
    lazy = {id(node) for function in ast.walk(tree) if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef))
            for node in ast.walk(function)}  # fmt: skip
    found = []
    for node in ast.walk(tree):
        eager = id(node) not in lazy
        if isinstance(node, ast.Import):
            found += [(alias.name, eager) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = module.split(".")[: -node.level] if node.level else []
            origin = ".".join([*above, *([node.module] if node.module else [])])
            found += [(f"{origin}.{alias.name}", eager) for alias in node.names]
    return found


def wrong_imports(module: str, source: str) -> list[str]:
    """The imports of one source file of the package that go against the arrows of the design."""
    parts = module.split(".")
    in_room = parts[:2] == ["iokernels", "ops"] and len(parts) > 3
    room, stem = (parts[2], parts[3]) if in_room else ("", parts[-1])
    may_judge = (in_room and stem == "api") or parts[:2] == ["iokernels", "bench"]
    wrong = []
    for name, eager in imports(module, source):
        target = name.split(".")
        if target[:2] == ["iokernels", "ops"] and len(target) > 3:
            their_room, their_stem = target[2], target[3]
            if their_stem == "reference" and not may_judge:
                wrong.append(f"{module} imports {name}: only api, bench and tests read the oracle")
            if BACKEND_FILE.fullmatch(their_stem):
                if room and their_room != room:
                    wrong.append(f"{module} imports {name}: a backend file of another room")
                elif in_room and BACKEND_FILE.fullmatch(stem) and family(stem) != family(their_stem):
                    wrong.append(f"{module} imports {name}: another backend")
                elif in_room and stem in ("api", "op") and eager:
                    wrong.append(f"{module} imports {name} when it is imported: backends load when first called")
        if in_room and target[0] == "triton" and family(stem) != "triton":
            wrong.append(f"{module} imports {name}: Triton belongs in triton_*.py")
        if in_room and target[0] == "cupy":
            wrong.append(f"{module} imports {name}: iokernels.runtime.nvrtc alone knows CuPy")
        if in_room and stem == "op" and target[0] not in ("torch", *sys.stdlib_module_names):
            own = target[:3] == ["iokernels", "ops", room] or target[:2] == ["iokernels", "runtime"]
            if not own:
                wrong.append(f"{module} imports {name}: op.py needs torch and iokernels.runtime only")
    return wrong


def family(stem: str) -> str:
    """The backend that a file belongs to."""
    return stem.partition("_")[0]


@pytest.mark.parametrize("operator", OPERATORS)
def test_operator_has_every_place(operator: str) -> None:
    assert missing_places(operator) == []


def test_every_room_is_listed() -> None:
    rooms = {path.parent.name for path in (ROOT / "iokernels" / "ops").glob("*/__init__.py")}
    assert rooms == set(OPERATORS)


def test_missing_place_is_found(tmp_path: Path) -> None:
    assert "docs/ops/flash_attention.md" in missing_places("flash_attention", tmp_path)
    (tmp_path / "iokernels/ops/flash_attention").mkdir(parents=True)
    (tmp_path / "iokernels/ops/flash_attention/cuda.py").touch()
    assert "csrc/flash_attention" in missing_places("flash_attention", tmp_path)


@pytest.mark.parametrize("path", files(".py"), ids=lambda path: str(path.relative_to(ROOT)))
def test_source_file_keeps_to_the_rules(path: Path) -> None:
    source = path.read_text()
    assert wrong_imports(module_name(path), source) == []
    lines = source.count("\n")
    assert lines <= MOST_LINES, f"{lines} lines; split it by responsibility"


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("iokernels.ops.a.portable", "from .triton_fwd import forward"),
        ("iokernels.ops.a.triton_fwd", "from . import portable"),
        ("iokernels.ops.a.triton_fwd", "def f():\n    from .cuda import forward"),
        ("iokernels.ops.a.triton_fwd", "from .reference import attend"),
        ("iokernels.nn.a", "from iokernels.ops.a.reference import attend"),
        ("iokernels.ops.a.op", "import triton.language as tl"),
        ("iokernels.ops.a.op", "from .portable import forward"),
        ("iokernels.ops.a.op", "import numpy"),
        ("iokernels.ops.a.op", "from iokernels.testing import budget"),
        ("iokernels.ops.a.tuning", "import triton"),
        ("iokernels.ops.a.cuda", "import cupy"),
        ("iokernels.ops.a.portable", "from iokernels.ops.b.portable import forward"),
        ("iokernels.ops.a.portable", "from ..b.portable import forward"),
    ],
)
def test_wrong_import_is_found(module: str, line: str) -> None:
    assert wrong_imports(module, line) != []


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("iokernels.ops.a.triton_bwd", "from .triton_fwd import scores"),
        ("iokernels.ops.a.triton_bwd", "import triton"),
        ("iokernels.ops.a.op", "def f():\n    from . import portable"),
        ("iokernels.ops.a.api", "from . import reference"),
        ("iokernels.bench.cases.a", "from iokernels.ops.a import reference"),
        ("iokernels.ops.a.portable", "from iokernels.ops.b.merge import merged"),
    ],
)
def test_right_import_is_let_be(module: str, line: str) -> None:
    assert wrong_imports(module, line) == []


def test_no_file_is_named_for_nothing() -> None:
    kept = ("iokernels", "autotune", "bench", "csrc", "tests", "docs")
    named = [path for folder in kept for path in (ROOT / folder).rglob("*") if path.is_file()]
    assert [str(path.relative_to(ROOT)) for path in named if path.stem.lower().strip("_") in NAMELESS] == []


def test_nothing_is_left_for_later() -> None:
    later = re.compile(r"\b(TODO|FIXME|XXX|HACK)\b")
    sources = files(".py", ".cu", ".cuh", ".h", ".cpp", ".sh") + sorted((ROOT / "docs").rglob("*.md"))
    assert [str(path.relative_to(ROOT)) for path in sources if later.search(path.read_text())] == []

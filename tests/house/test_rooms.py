"""The layout that makes one operator look like the next: its places, and who may import whom."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

import pytest

from iokernels.ops import CASES, OPERATORS

from .tree import PACKAGE_FOLDERS, ROOT, files, module_name

MOST_LINES = 400
MOST_ENTRIES = 12
"""Files and folders of one folder of the library."""
BACKENDS = {"portable": "torch", "triton": "triton", "cuda": "cuda"}
"""The file or folder of a room that holds a backend."""
NAMELESS = {"utils", "common", "helpers", "misc", "util", "helper"}


def missing_places(operator: str, root: Path = ROOT) -> list[str]:
    """The places of an operator that do not exist."""
    room = f"iokernels/ops/{operator}"
    files = [f"{room}/{name}.py" for name in ("__init__", "api", "op", "options", "reference", "case/__init__")]
    files += [f"tests/ops/{operator}/test_options.py", f"tests/fuzz/oracles/{operator}.py", f"docs/ops/{operator}.md"]
    places = [place for place in files if not (root / place).exists()]
    # A backend is a file until it needs to be a folder.
    for backend in ("portable", "triton"):
        if not any((root / room / name).exists() for name in (f"{backend}.py", f"{backend}/__init__.py")):
            places.append(f"{room}/{backend}")
    if (root / room / "cuda").exists() and not (root / "csrc" / operator).exists():
        places.append(f"csrc/{operator}")
    return places


def imports(module: str, source: str, *, package: bool = False) -> list[tuple[str, bool]]:
    """Every name that ``source`` imports, absolute, and whether that happens when it is itself imported."""
    tree = ast.parse(source)
    lazy = {id(node) for outer in ast.walk(tree) if _waits(outer) for node in ast.walk(outer)}
    found = []
    for node in ast.walk(tree):
        eager = id(node) not in lazy
        if isinstance(node, ast.Import):
            found += [(alias.name, eager) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = module.split(".")
            above = above[: len(above) - node.level + package] if node.level else []
            origin = ".".join([*above, *([node.module] if node.module else [])])
            found += [(f"{origin}.{alias.name}", eager) for alias in node.names]
    return found


def _waits(node: ast.AST) -> bool:
    """Whether what stands inside is imported later, or by type checkers alone."""
    if isinstance(node, ast.If):
        return isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
    return isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))


def backend_of(stem: str) -> str | None:
    """The backend that a file or folder of a room belongs to."""
    return BACKENDS.get(stem)


def wrong_imports(module: str, source: str, *, package: bool = False) -> list[str]:
    """The imports of one source file of the package that go against the arrows of the design."""
    parts = module.split(".")
    in_room = parts[:2] == ["iokernels", "ops"] and len(parts) > 3 and parts[2] != "shared"
    room, stem = (parts[2], parts[3]) if in_room else ("", parts[-1])
    case = in_room and stem == "case"
    outside = parts[:2] in (["iokernels", "bench"], ["iokernels", "testing"])
    may_judge = (in_room and stem in ("api", "select")) or case or outside
    wrong = []
    for name, eager in imports(module, source, package=package):
        target = name.split(".")
        if target[:2] == ["iokernels", "ops"] and len(target) > 3 and target[2] != "shared":
            their_room, their_stem = target[2], target[3]
            theirs = backend_of(their_stem)
            if their_stem == "reference" and not may_judge:
                wrong.append(f"{module} imports {name}: only api, cases, bench and tests read the oracle")
            if their_stem == "case" and not (case or outside):
                wrong.append(f"{module} imports {name}: only bench and tests read cases")
            # Launch parameters are read by cases and contracts; they need no compiler.
            if theirs is not None and target[4:5] != ["tuning"] and not case and not outside:
                if room and their_room != room:
                    wrong.append(f"{module} imports {name}: a backend of another room")
                elif in_room and backend_of(stem) not in (None, theirs):
                    wrong.append(f"{module} imports {name}: another backend")
                elif in_room and stem in ("api", "op") and eager:
                    wrong.append(f"{module} imports {name} when it is imported: backends load when first called")
        if in_room and target[0] == "triton" and backend_of(stem) != "triton":
            wrong.append(f"{module} imports {name}: Triton belongs in triton/")
        if in_room and parts[3:] == ["triton", "tuning"] and target[0] == "triton":
            wrong.append(f"{module} imports {name}: launch parameters are read where there is no Triton")
        if in_room and target[0] == "cupy":
            wrong.append(f"{module} imports {name}: iokernels.runtime.cuda alone knows CuPy")
        if in_room and stem == "op" and target[0] not in ("torch", *sys.stdlib_module_names):
            shared = target[:3] == ["iokernels", "ops", "shared"]
            own = target[:3] == ["iokernels", "ops", room] or target[:2] == ["iokernels", "runtime"]
            if not (own or shared):
                wrong.append(f"{module} imports {name}: op.py needs torch, iokernels.ops.shared and iokernels.runtime")
    return wrong


def is_package(path: Path) -> bool:
    """Whether a source file is an ``__init__``."""
    return path.stem == "__init__"


def arrows(paths: Iterable[Path]) -> dict[str, set[str]]:
    """Which modules of the package each module imports when it is itself imported."""
    sources = {module_name(path): path for path in paths}
    found: dict[str, set[str]] = {}
    for module, path in sources.items():
        named = [name for name, eager in imports(module, path.read_text(), package=is_package(path)) if eager]
        # ``from a import b`` names a module b, or something in a module a.
        targets = {name if name in sources else name.rpartition(".")[0] for name in named}
        found[module] = {target for target in targets if target in sources and target != module}
    return found


def circles(graph: Mapping[str, set[str]]) -> list[list[str]]:
    """The sets of modules that reach one another: Tarjan's strongly connected components of more than one module."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for target in sorted(graph.get(node, ())):
            if target not in index:
                visit(target)
                low[node] = min(low[node], low[target])
            elif target in stack:
                low[node] = min(low[node], index[target])
        if low[node] == index[node]:
            component = stack[stack.index(node) :]
            del stack[stack.index(node) :]
            if len(component) > 1:
                found.append(sorted(component))

    for node in sorted(graph):
        if node not in index:
            visit(node)
    return found


@pytest.mark.parametrize("operator", OPERATORS)
def test_operator_has_every_place(operator: str) -> None:
    assert missing_places(operator) == []


def test_every_room_is_listed() -> None:
    rooms = {path.parent.name for path in (ROOT / "iokernels" / "ops").glob("*/__init__.py")}
    assert rooms == {*OPERATORS, "shared"}


def test_every_case_is_listed() -> None:
    described = {
        module_name(path)
        for path in files(".py")
        if "case" in path.parts and re.search(r"^CASE = ", path.read_text(), re.MULTILINE)
    }
    assert described == set(CASES.values())


def test_missing_place_is_found(tmp_path: Path) -> None:
    assert "docs/ops/flash_attention.md" in missing_places("flash_attention", tmp_path)
    assert "iokernels/ops/flash_attention/triton" in missing_places("flash_attention", tmp_path)
    (tmp_path / "iokernels/ops/flash_attention/cuda").mkdir(parents=True)
    assert "csrc/flash_attention" in missing_places("flash_attention", tmp_path)


@pytest.mark.parametrize("path", files(".py"), ids=lambda path: str(path.relative_to(ROOT)))
def test_source_file_keeps_to_the_rules(path: Path) -> None:
    source = path.read_text()
    assert wrong_imports(module_name(path), source, package=is_package(path)) == []
    lines = source.count("\n")
    assert lines <= MOST_LINES, f"{lines} lines; split it by responsibility"


def test_no_module_imports_itself_through_others() -> None:
    assert circles(arrows(files(".py"))) == []


def test_a_circle_is_found() -> None:
    graph = {"a": {"b"}, "b": {"c"}, "c": {"a", "d"}, "d": {"e"}, "e": set()}
    assert circles(graph) == [["a", "b", "c"]]


def test_no_folder_is_crowded() -> None:
    crowded = {}
    for folder in PACKAGE_FOLDERS.values():
        inside = [path for path in folder.rglob("*") if path.is_dir() and "__pycache__" not in path.parts]
        for inner in [folder, *inside]:
            if any(parent.is_symlink() for parent in (inner, *inner.parents)):
                continue
            entries = [path.name for path in inner.iterdir() if path.name != "__pycache__"]
            if len(entries) > MOST_ENTRIES:
                crowded[str(inner.relative_to(ROOT))] = len(entries)
    assert crowded == {}


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("iokernels.ops.a.portable", "from .triton.forward import forward"),
        ("iokernels.ops.a.triton.forward", "from iokernels.ops.a import portable"),
        ("iokernels.ops.a.triton.forward", "def f():\n    from iokernels.ops.a.cuda.launch import forward"),
        ("iokernels.ops.a.triton.forward", "from iokernels.ops.a.reference import attend"),
        ("iokernels.nn.a", "from iokernels.ops.a.reference import attend"),
        ("iokernels.nn.a", "from iokernels.ops.a.case import CASE"),
        ("iokernels.ops.a.op", "import triton.language as tl"),
        ("iokernels.ops.a.op", "from .portable import forward"),
        ("iokernels.ops.a.op", "import numpy"),
        ("iokernels.ops.a.op", "from iokernels.testing import budget"),
        ("iokernels.ops.flash_attention.triton.tuning", "import triton"),
        ("iokernels.ops.a.cuda.launch", "import cupy"),
        ("iokernels.ops.a.portable", "from iokernels.ops.b.portable import forward"),
        ("iokernels.ops.a.portable", "from ..b.portable import forward"),
    ],
)
def test_wrong_import_is_found(module: str, line: str) -> None:
    assert wrong_imports(module, line) != []


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("iokernels.ops.a.triton.backward", "from .forward import scores"),
        ("iokernels.ops.a.triton.backward", "import triton"),
        ("iokernels.ops.a.op", "def f():\n    from . import portable"),
        ("iokernels.ops.a.op", "from iokernels.ops.shared.layout import empty_in_order_of"),
        ("iokernels.ops.a.api", "from . import reference"),
        ("iokernels.ops.a.case", "from iokernels.ops.a import reference"),
        ("iokernels.bench.commands.a", "from iokernels.ops.a import case"),
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

"""Every ``python`` block of the documentation runs, top to bottom, on the CPU, and every link leads somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from .tree import ROOT, files, module_name

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]]+\]\(([^)#\s]+)(#[^)\s]*)?\)")


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks(page: Path) -> list[tuple[int, str]]:
    """The python blocks of a page, each with the number of its first line."""
    text = page.read_text()
    return [(text.count("\n", 0, match.start(1)), match.group(1)) for match in BLOCK.finditer(text)]


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=name)
def test_code_runs(page: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    namespace: dict[str, object] = {"__name__": "page"}
    for line, code in blocks(page):
        # Blank lines before it make a traceback show the page's own line numbers.
        exec(compile("\n" * line + code, str(page), "exec"), namespace)


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page: Path) -> None:
    targets = [match.group(1) for match in LINK.finditer(page.read_text())]
    broken = [t for t in targets if "://" not in t and not (page.parent / t).exists()]
    assert broken == []


def test_the_main_pages_show_code() -> None:
    shown = {name(page) for page in PAGES if blocks(page)}
    assert {"README.md", "docs/ops/flash_attention.md"} <= shown


MODULE = re.compile(r":mod:`(\.*)([\w.]*)`")


def lost_modules(module: str, text: str, known: set[str], *, package: bool = False) -> list[str]:
    """The modules of the package that ``text`` refers to and that do not exist."""
    found = []
    for dots, name in MODULE.findall(text):
        above = module.split(".")
        above = above[: len(above) - len(dots) + package] if dots else []
        full = ".".join([*above, *([name] if name else [])])
        if full.startswith("iokernels") and full not in known:
            found.append(full)
    return found


def test_docstrings_refer_to_modules_that_exist() -> None:
    paths = files(".py")
    known = {module_name(path) for path in paths}
    lost = {
        name(path): lost
        for path in paths
        if (lost := lost_modules(module_name(path), path.read_text(), known, package=path.stem == "__init__"))
    }
    assert lost == {}


def test_a_lost_module_is_found() -> None:
    text = "see :mod:`.walk`, :mod:`.triton_walk`, :mod:`..cli` and :mod:`torch.nn`"
    assert lost_modules("iokernels.a.b", text, {"iokernels.a.walk", "iokernels.cli"}) == ["iokernels.a.triton_walk"]

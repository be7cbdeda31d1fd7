"""What pyproject.toml declares, what ``make matrix`` runs and what the documentation says was run agree."""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from .tree import ROOT

tomllib = import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PACKAGES = ("torch", "triton", "numpy")


@pytest.fixture(scope="module")
def rows() -> dict[str, tuple[str, ...]]:
    """The versions of torch, Triton and NumPy in each row of ``tests/matrix.py``."""
    name = "versions_matrix"
    spec = spec_from_file_location(name, ROOT / "tests" / "matrix.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their own module up
    spec.loader.exec_module(module)
    return {name: tuple(getattr(row, package) for package in PACKAGES) for name, row in module.ROWS.items()}


def documented() -> dict[str, tuple[str, ...]]:
    """The rows of the table in ``docs/guides/versions.md``."""
    lines = (ROOT / "docs" / "guides" / "versions.md").read_text().splitlines()
    cells = [[cell.strip(" `") for cell in line.strip("|").split("|")] for line in lines if line.startswith("| `")]
    return {name: tuple(versions) for name, *versions in (row[:4] for row in cells)}


def test_the_documentation_shows_every_row_of_the_matrix(rows: dict[str, tuple[str, ...]]) -> None:
    assert documented() == rows


@pytest.mark.parametrize("package", PACKAGES)
def test_the_matrix_runs_the_ends_of_what_is_declared(rows: dict[str, tuple[str, ...]], package: str) -> None:
    declared = {item.name: item.specifier for item in map(Requirement, PROJECT["dependencies"])}[package]
    run = sorted({Version(versions[PACKAGES.index(package)]) for versions in rows.values()})
    assert all(version in declared for version in run)
    bounds = {bound.operator: Version(bound.version) for bound in declared}
    assert run[0].release[:2] == bounds[">="].release[:2]
    if "<" in bounds:
        newest = run[-1].release
        assert bounds["<"] == Version(f"{newest[0]}.{newest[1] + 1}")


def test_the_readme_names_the_oldest_torch() -> None:
    (torch,) = [item for item in map(Requirement, PROJECT["dependencies"]) if item.name == "torch"]
    (oldest,) = [bound.version for bound in torch.specifier if bound.operator == ">="]
    assert f"PyTorch {oldest} or newer" in (ROOT / "README.md").read_text()

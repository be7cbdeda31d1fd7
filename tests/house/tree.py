"""Where things stand in the repository, for the tests of this folder."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

PACKAGE_FOLDERS = {
    "iokernels": ROOT / "iokernels",
    "iokernels.autotune": ROOT / "autotune",
    "iokernels.bench": ROOT / "bench",
    "iokernels.csrc": ROOT / "csrc",
}
"""The four folders that become the package, by the name under which they are imported."""


def files(*suffixes: str) -> list[Path]:
    """The package's own files with one of these suffixes, each once, at its real place."""
    found = []
    for folder in PACKAGE_FOLDERS.values():
        for path in sorted(folder.rglob("*")):
            through_link = any(parent.is_symlink() for parent in path.parents)
            if path.suffix in suffixes and path.is_file() and not through_link and "__pycache__" not in path.parts:
                found.append(path)
    return found


def module_name(path: Path) -> str:
    """The dotted name under which a source file of the package is imported."""
    for name, folder in PACKAGE_FOLDERS.items():
        if path.is_relative_to(folder):
            parts = path.relative_to(folder).with_suffix("").parts
            return ".".join((name, *(part for part in parts if part != "__init__")))
    raise ValueError(f"{path} is no part of the package")

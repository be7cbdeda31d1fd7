"""What lands in a user's site-packages, and what an import costs there."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import zipfile
from importlib import import_module
from pathlib import Path

import pytest

from .tree import PACKAGE_FOLDERS, ROOT, files, module_name

tomllib = import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
DATA = (".cu", ".cuh", ".h", ".cpp", ".ninja", ".json", ".toml", ".sh", ".typed")


def run(*command: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300, check=False)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A wheel of the tree, an sdist of it, and a wheel of that sdist; made offline from a copy."""
    work = tmp_path_factory.mktemp("packaging")
    copy = work / "copy"
    copy.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    for folder in sorted({path.name for path in PACKAGE_FOLDERS.values()}):
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / folder, copy / folder, symlinks=True, ignore=ignore)

    def build(kind: str, source: Path, out: str) -> Path:
        done = run(sys.executable, "-m", "build", "--no-isolation", kind, "--outdir", str(work / out), cwd=source)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "Warning" not in done.stdout + done.stderr, "setuptools warns:\n" + done.stdout + done.stderr
        (artefact,) = (work / out).iterdir()
        return artefact

    wheel, sdist = build("--wheel", copy, "wheel"), build("--sdist", copy, "sdist")
    with tarfile.open(sdist) as archive:
        archive.extractall(work / "unpacked", filter="data")
    (unpacked,) = (work / "unpacked").iterdir()
    return {"tree": wheel, "sdist": build("--wheel", unpacked, "wheel-of-sdist")}


@pytest.mark.parametrize("source", ["tree", "sdist"])
def test_wheel_holds_the_package_and_nothing_else(built: dict[str, Path], source: str) -> None:
    with zipfile.ZipFile(built[source]) as archive:
        names = set(archive.namelist())
    top_level = {name.split("/")[0] for name in names}
    assert {name for name in top_level if not name.endswith(".dist-info")} == {"iokernels"}
    expected = {installed(path) for path in files(".py", *DATA)}
    packaged = {name for name in names if name.startswith("iokernels/")}
    assert packaged == expected


def installed(path: Path) -> str:
    """Where a file of the package stands in the wheel."""
    name, folder = next((name, folder) for name, folder in PACKAGE_FOLDERS.items() if path.is_relative_to(folder))
    return "/".join((*name.split("."), *path.relative_to(folder).parts))


def test_packages_list_is_the_folders_on_disk() -> None:
    # A folder of tables bears the name of a GPU, which need not be a package's: its files are data of autotune.
    tables = ROOT / "autotune" / "tables"
    paths = [path for path in files(".py", *DATA) if not path.is_relative_to(tables)]
    holding = {module_name(path.parent / "__init__.py") for path in paths}
    assert set(PYPROJECT["tool"]["setuptools"]["packages"]) == holding


def test_package_data_covers_every_file_in_the_package() -> None:
    patterns = set(PYPROJECT["tool"]["setuptools"]["package-data"]["*"])
    assert patterns == {"py.typed", *(f"*{suffix}" for suffix in DATA if suffix != ".typed")}
    on_disk = {
        path.suffix
        for folder in PACKAGE_FOLDERS.values()
        for path in folder.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert on_disk <= {".py", *DATA}, "a kind of file that would not be installed"


@pytest.mark.parametrize("name", ["autotune", "bench", "csrc"])
def test_link_leads_to_the_top_level_folder(name: str) -> None:
    link = ROOT / "iokernels" / name
    assert link.is_symlink()
    assert link.resolve() == ROOT / name


@pytest.mark.parametrize("name", ["autotune", "bench", "csrc"])
def test_top_level_name_cannot_be_imported(name: str) -> None:
    done = run(sys.executable, "-c", f"import {name}", cwd=ROOT)
    assert done.returncode == 1
    assert f"ImportError: import iokernels.{name}" in done.stderr


IMPORT = """
import sys, time, torch
before, start = set(sys.modules), time.process_time()
import iokernels
seconds = time.process_time() - start
new = {name.partition(".")[0] for name in set(sys.modules) - before}
assert not new & {"triton", "cupy", "matplotlib", "rich", "numpy"}, new
assert not torch.cuda.is_initialized()
print(seconds)
"""


def test_import_is_cheap_and_touches_no_toolchain() -> None:
    seconds = []
    for _ in range(3):
        done = run(sys.executable, "-c", IMPORT, cwd=ROOT)
        assert done.returncode == 0, done.stderr
        seconds.append(float(done.stdout))
        if seconds[-1] <= 0.2:
            return
    pytest.fail(f"import iokernels took {seconds} s on top of torch; 0.2 s is the most it may")


def test_pins_cover_what_the_project_asks_for() -> None:
    pins = {
        line.partition("==")[0].lower().replace("_", "-")
        for line in (ROOT / "constraints" / "ci.txt").read_text().splitlines()
        if line and not line.startswith("#")
    }
    project = PYPROJECT["project"]
    asked = [
        *project["dependencies"],
        *(r for extra in ("bench", "test", "dev") for r in project["optional-dependencies"][extra]),
    ]
    names = {requirement.partition(">")[0].partition("[")[0].strip() for requirement in asked} - {"iokernels"}
    assert names <= pins

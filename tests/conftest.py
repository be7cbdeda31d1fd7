"""What every test runs under: kernels interpreted or emulated where there is no GPU, unwritten memory full of NaN, a
fixed seed, the tiles that a module asks for, and, when it fails, the command that repeats it.

| option | |
|---|---|
| `--tier quick` | one point an option, in one order (`make quick`); `full`: all tests |
| `--orders N` | orders of blocks, warps and lanes that every emulated launch runs in; else see `tests/tiers.py` |
| `--examples X` | multiplies the calls to kernels that tests draw |

| mark | |
|---|---|
| `tiles(**configs)` | the test launches kernels with these configurations (`autotune.override`) |
| `orders(n)` | in how many orders, at least, the emulated GPU runs a launch |
| `interpreted`, `gxx`, `without_gpu`, `with_gpu` | the test is skipped where that is not so |
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

# Triton reads its variable when it is first imported, so this comes before any import of iokernels.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
    os.environ.setdefault("IOKERNELS_EMULATE", "1")

from iokernels import autotune
from iokernels.autotune import tables
from iokernels.runtime import device as devices
from iokernels.runtime import environment, interpreter
from iokernels.runtime.cuda import emulator
from iokernels.testing.budget import repeated_by
from iokernels.testing.poison import poisoned_memory

from . import tiers

interpreter.install()

if "PYTEST_XDIST_WORKER" in os.environ:
    # The workers share the cores already.
    torch.set_num_threads(1)

ROOT = Path(__file__).resolve().parents[1]

CONDITIONS: dict[str, tuple[Callable[[], bool], str]] = {
    "interpreted": (lambda: devices.INTERPRET, "Triton compiles its kernels here and does not interpret them"),
    "gxx": (lambda: devices.cxx() is not None, "the emulator needs g++"),
    "without_gpu": (lambda: not torch.cuda.is_available(), "for machines without a GPU"),
    "with_gpu": (torch.cuda.is_available, "needs a GPU"),
}


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("iokernels")
    group.addoption("--tier", choices=("quick", "full"), default="full", help="quick: one point an option, one order")
    group.addoption("--examples", type=float, default=1.0, help="multiplies the calls to kernels that tests draw")
    group.addoption("--orders", type=int, help="orders of blocks, warps and lanes that an emulated launch runs in")


def pytest_configure(config: pytest.Config) -> None:
    share = 0.2 if config.getoption("tier") == "quick" else 1.0
    tiers.examples_scale = share * float(config.getoption("examples") or 1.0)
    for name, (_, reason) in CONDITIONS.items():
        config.addinivalue_line("markers", f"{name}: skipped elsewhere ({reason})")
    config.addinivalue_line("markers", "tiles(**configs): configurations that the kernels are launched with")
    config.addinivalue_line("markers", "orders(n): in how many orders the emulated GPU runs a launch")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("tier") == "quick":
        kept = tiers.thinned(items)
        config.hook.pytest_deselected(items=list(set(items).difference(kept)))
        items[:] = kept


def pytest_runtest_setup(item: pytest.Item) -> None:
    for name, (holds, reason) in CONDITIONS.items():
        if item.get_closest_marker(name) is not None and not holds():
            pytest.skip(reason)


@pytest.fixture
def device() -> str:
    """Where kernels run in this session: "cuda", or "cpu" where Triton interprets or there is no GPU."""
    return "cuda" if torch.cuda.is_available() and not interpreter.active() else "cpu"


@pytest.fixture(autouse=True)
def _surroundings(request: pytest.FixtureRequest) -> Iterator[None]:
    torch.manual_seed(0)
    orders = _orders(request.config)
    again = f'python -m pytest "{request.node.nodeid}"' + (f" --orders {orders}" if orders else "")
    with (
        poisoned_memory(),
        repeated_by(again),
        emulator.warp_order(orders=tiers.orders(request.node, orders)),
        autotune.override(**_tiles(request.node)),
    ):
        yield


def _orders(config: pytest.Config) -> int:
    """What the command line or the environment asks for, or 0."""
    quick = 1 if config.getoption("tier") == "quick" else 0
    return config.getoption("orders") or environment.number("IOKERNELS_EMULATE_ORDERS", quick, least=quick)


def _tiles(item: pytest.Item) -> dict[str, Any]:
    marker = item.get_closest_marker("tiles")
    return dict(marker.kwargs) if marker is not None else {}


@pytest.fixture
def roots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Path, Path]]:
    """The user's and the package's folder of tuning tables, both empty."""
    monkeypatch.setattr(tables, "user", lambda: tmp_path / "user")
    monkeypatch.setattr(tables, "PACKAGE", tmp_path / "package")
    autotune.forget()
    yield tables.user(), tables.PACKAGE
    autotune.forget()


@pytest.fixture(scope="session")
def compiled_apart() -> Callable[..., str]:
    """Runs ``python`` with the given arguments in a process of its own, where Triton compiles, for GPUs that need not
    be here, instead of interpreting; returns what that prints.

    Compiled kernels stay in Triton's own cache folder, whose keys are hashes of all that a kernel is made of: one that
    nobody has changed is not compiled again by another test, worker or run."""

    def run(*command: str, given: str = "") -> str:
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        environment.pop("TRITON_INTERPRET", None)
        done = subprocess.run(
            [sys.executable, *command], env=environment, input=given, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout

    return run

"""Lets ``pytest bench`` collect a folder whose package is ``iokernels.bench`` and cannot be imported as ``bench``."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path

_BENCH = Path(__file__).parent / "bench"


def pytest_collect_directory(path: Path) -> None:
    """pytest names modules after folders: where it is asked for ``bench``, give it the package itself, not a copy."""
    if path == _BENCH:
        sys.modules.setdefault("bench", import_module("iokernels.bench"))

"""Results on paper: JSON, CSV and the cells of tables."""

from __future__ import annotations

import csv
import json
import math
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from rich.table import Table

from iokernels.testing.case.shape import UsageError


def table(*columns: str, right: Iterable[str] = ()) -> Table:
    """A table in the look that all commands share. Columns named in ``right`` hold numbers."""
    made = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    numbers = set(right)
    for column in columns:
        number = column in numbers
        made.add_column(column, justify="right" if number else "left", no_wrap=number, overflow="fold")
    return made


def write_json(target: str | None, data: Any) -> None:
    """Write ``data`` to a file, or to standard output for ``-``; do nothing for None."""
    if target is None:
        return
    text = json.dumps(_finite(data), indent=2, allow_nan=False) + "\n"
    if target == "-":
        sys.stdout.write(text)
    else:
        writable(target).write_text(text)


def write_csv(target: str | None, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write one line for every row; do nothing for None."""
    if target is None:
        return
    rows = list(rows)
    with writable(target).open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]) if rows else [])
        writer.writeheader()
        writer.writerows(rows)


def writable(target: str) -> Path:
    """The path of an output file. Raises :class:`UsageError` where its folder does not exist."""
    path = Path(target)
    if not path.parent.is_dir():
        raise UsageError(f"{target} cannot be written: there is no folder {path.parent}")
    return path


def milliseconds(seconds: float) -> str:
    """Three significant digits."""
    return digits(seconds * 1e3)


def digits(number: float) -> str:
    """Three significant digits, without an exponent for large numbers."""
    return f"{number:.3g}" if abs(number) < 999.5 else f"{number:.0f}"


def amount(number: float, unit: str) -> str:
    """``274.9 GFLOP`` for ``(2.749e11, "FLOP")``."""
    for prefix, factor in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= factor:
            return f"{number / factor:.4g} {prefix}{unit}"
    return f"{number:.4g} {unit}"


def _finite(data: Any) -> Any:
    """JSON has no NaN and no infinity: they become null."""
    if isinstance(data, float) and not math.isfinite(data):
        return None
    if isinstance(data, Mapping):
        return {key: _finite(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [_finite(value) for value in data]
    return data

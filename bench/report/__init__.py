"""The whole of one ``iokernels bench``, in the words and cells that terminal, Markdown and HTML share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from iokernels.bench.report import render
from iokernels.bench.report.rows import Row, flops_unit
from iokernels.bench.timing.machine import Machine
from iokernels.testing.case import dtype_name

TEXT_COLUMNS = ("backend", "config")
"""Columns that hold words; all others hold numbers."""


class Grid(NamedTuple):
    """A table of text."""

    columns: tuple[str, ...]
    lines: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Section:
    """What was found for one need (a shape, dtype and pass): a row for every implementation."""

    rows: Sequence[Row]
    baseline: str | None
    repro: str

    @property
    def title(self) -> str:
        """Pass, dtype and shape."""
        need = self.rows[0].need
        return f"{need.which}  {dtype_name(need.dtype)}  {need.shape}"

    @property
    def need(self) -> str:
        """What any implementation has to do, and the least time that this takes."""
        need = self.rows[0].need
        floor = "none known for this device and dtype"
        if need.floor is not None:
            floor = f"{render.milliseconds(need.floor.seconds)} ms ({need.floor.bound})"
        return (
            f"need: {render.amount(need.flops, 'FLOP')}, {render.amount(need.nbytes, 'B')}; floor: {floor}"
        )  # fmt: skip

    @property
    def grid(self) -> Grid:
        """The rows that have a time. A column in which nobody has anything to say is left out."""
        timed = [row for row in self.rows if row.timing is not None]
        unit, scale = flops_unit(timed)
        cells = [_cells(row, self.baseline, unit, scale) for row in timed]
        columns = tuple(name for name in cells[0] if any(line[name] != "-" for line in cells)) if cells else ()
        return Grid(columns, tuple(tuple(line[name] for name in columns) for line in cells))

    @property
    def untimed(self) -> list[Row]:
        """The rows that have none."""
        return [row for row in self.rows if row.timing is None]

    @property
    def notes(self) -> list[str]:
        """What has to be known to read the table."""
        found = []
        need = self.rows[0].need
        reduced = next((row.checked for row in self.rows if row.checked not in (None, need.shape)), None)
        if reduced is not None:
            found.append(f"errors found at {reduced}, where the float64 reference fits")
        return found

    @property
    def compared(self) -> list[tuple[Row, str]]:
        """The rows that were compared with another version, each with what came of it."""
        return [(row, f"{row.name} against {row.versus}") for row in self.rows if row.versus is not None]


@dataclass(frozen=True)
class Report:
    """All sections of one run. ``swept`` names the dimensions that ``--sweep`` varied."""

    operator: str
    machine: Machine
    seed: int
    baseline: str | None
    swept: tuple[str, ...]
    sections: Sequence[Section]

    @property
    def rows(self) -> list[Row]:
        """The rows of all sections."""
        return [row for section in self.sections for row in section.rows]

    @property
    def wrong(self) -> bool:
        """Whether a backend returned a wrong result or broke."""
        return any(row.kind == "backend" and row.status in ("wrong", "failed") for row in self.rows)

    @property
    def slower(self) -> bool:
        """Whether a backend is slower than the version it was compared with, by more than is tolerated."""
        return any(row.versus is not None and row.versus.slower for row in self.rows)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "machine": self.machine.as_dict(),
            "operator": self.operator,
            "seed": self.seed,
            "baseline": self.baseline,
            "ok": not (self.wrong or self.slower),
            "rows": [row.as_dict() for row in self.rows],
        }


def reason(row: Row) -> str:
    """Why a row has no time."""
    return row.reason if row.reason.startswith(f"interpreter: {row.status}") else f"{row.status}: {row.reason}"


def _cells(row: Row, baseline: str | None, unit: str, scale: float) -> dict[str, str]:
    """The cells of a row by column; ``-`` where there is nothing."""
    timing = row.timing
    assert timing is not None
    assert row.tflops is not None
    assert row.gbytes is not None
    p20, p50, p80 = (render.milliseconds(value) for value in (timing.p20, timing.p50, timing.p80))
    speed = "-" if row.speedup is None else f"{row.speedup:.2f}x"
    return {
        "backend": row.name,
        "config": row.config,
        "ms (p20-p80)": f"{p50} ({p20}-{p80})" + (" graph" if timing.how == "graph" else ""),
        unit: render.digits(row.tflops * scale),
        "GB/s": render.digits(row.gbytes),
        "roof": "-" if row.roofline is None else f"{row.roofline:.0%}",
        "peak MB": "-" if row.peak_bytes is None else f"{row.peak_bytes / 1e6:.0f}",
        "error": f"ok {row.error:.2g}x",
        f"vs {baseline or 'baseline'}": "base" if row.name == baseline else speed,
    }

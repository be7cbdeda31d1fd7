"""The files that ``iokernels bench`` writes."""

from __future__ import annotations

import argparse
from pathlib import Path

from iokernels.bench.report import Report, html, markdown, plot, render

_DRAWN = ("plot", "roofline", "html")
_FILES = ("csv", "md", *_DRAWN, "json")


def possible(arguments: argparse.Namespace) -> None:
    """Raise :class:`UsageError` where a file that is asked for could not be written: before anything is timed."""
    for name in _FILES:
        target = getattr(arguments, name)
        if target is not None and not (name == "json" and target == "-"):
            render.writable(target)
            if name in _DRAWN:
                plot.require(f"--{name}")


def write(arguments: argparse.Namespace, report: Report) -> None:
    """Write what is asked for."""
    render.write_json(arguments.json, report.as_dict())
    render.write_csv(arguments.csv, [row.as_dict() for row in report.rows])
    if arguments.md is not None:
        Path(arguments.md).write_text(markdown.document(report))
    if arguments.plot is not None:
        plot.save(plot.speed(report), arguments.plot)
    if arguments.roofline is not None:
        plot.save(plot.roofline(report), arguments.roofline)
    if arguments.html is not None:
        Path(arguments.html).write_text(html.document(report), encoding="utf-8")

"""Benchmark rows as pictures. Needs matplotlib, an optional dependency."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

from iokernels.bench.report import Report
from iokernels.bench.report.rows import Row
from iokernels.testing.case.shape import UsageError

THEMES = {
    "light": {"ink": "#1f2328", "page": "#ffffff", "grid": "#d0d7de"},
    "dark": {"ink": "#e6edf3", "page": "#0d1117", "grid": "#3d444d"},
}
"""Colours of text and lines, background and grid."""


def require(option: str) -> None:
    """Raise :class:`UsageError`, naming the option, where nothing can be drawn."""
    if find_spec("matplotlib") is None:
        raise UsageError(f"{option} needs matplotlib: pip install 'iokernels[bench]'")


def speed(report: Report) -> Any:
    """A figure of speed: over the first swept dimension, or as bars where nothing was swept."""
    from iokernels.bench.report import plot_bars, plot_sweep

    if report.swept:
        return plot_sweep.figure(report, report.swept[0])
    return plot_bars.figure(report)


def roofline(report: Report) -> Any:
    """A figure of speed against arithmetic intensity, with a point for every row."""
    from iokernels.bench.report import plot_roofline

    return plot_roofline.figure(report)


@contextmanager
def theme(name: str) -> Iterator[None]:
    """Draw in the colours of a theme."""
    from matplotlib import rc_context

    colours = THEMES[name]
    ink = ("text.color", "axes.edgecolor", "axes.labelcolor", "axes.titlecolor", "xtick.color", "ytick.color")
    page = ("figure.facecolor", "axes.facecolor", "legend.facecolor", "savefig.facecolor")
    settings: Any = dict.fromkeys(ink, colours["ink"]) | dict.fromkeys(page, colours["page"])
    with rc_context(settings | {"grid.color": colours["grid"]}):
        yield


def save(figure: Any, target: str) -> None:
    """Write a figure to a file, whose suffix says the format (PNG without one)."""
    figure.savefig(target, dpi=150)


def svg(figure: Any) -> bytes:
    """A figure as SVG without its heading, for a page that has one. The same figure gives the same bytes."""
    from matplotlib import rc_context

    figure.suptitle("")
    buffer = io.BytesIO()
    with rc_context({"svg.hashsalt": "iokernels"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()


def panels(count: int, height: float) -> tuple[Any, list[Any]]:
    """A figure with ``count`` panels (at least one) of ``height`` inches, side by side where there are many."""
    from matplotlib.figure import Figure

    count = max(count, 1)
    columns = 2 if count > 3 else 1
    lines = -(-count // columns)
    made = Figure(figsize=(10 if columns == 1 else 13, 0.9 + height * lines), layout="constrained")
    axes = list(made.subplots(lines, columns, squeeze=False).flat)
    for spare in axes[count:]:
        spare.remove()
    return made, axes[:count]


def colours(rows: Sequence[Row]) -> dict[str, str]:
    """A colour for every implementation, the same in all figures of one report."""
    names = dict.fromkeys(row.name for row in rows if row.timing is not None)
    return {name: f"C{place % 10}" for place, name in enumerate(names)}

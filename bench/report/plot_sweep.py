"""Speed over one swept dimension: a line for every implementation."""

from __future__ import annotations

from typing import Any

from iokernels.bench.report import Report, plot
from iokernels.bench.report.rows import Row, flops_unit
from iokernels.testing.case import dtype_name

_HEIGHT = 3.2


def figure(report: Report, swept: str) -> Any:
    """A panel for each pass, dtype and rest of the shape; the 20th to 80th percentiles are shaded."""
    import matplotlib

    timed = [row for row in report.rows if row.timing is not None]
    colours = plot.colours(timed)
    panels: dict[str, list[Row]] = {}
    for row in timed:
        panels.setdefault(_panel_title(row, swept), []).append(row)
    made, axes = plot.panels(len(panels), _HEIGHT)
    unit, scale = flops_unit(timed)
    for axis, (title, rows) in zip(axes, panels.items(), strict=False):
        _panel(axis, rows, swept, colours, scale, matplotlib.rcParams["text.color"])
        axis.set_title(title, fontsize=8, loc="left")
        axis.set_ylabel(unit)
    made.supxlabel(swept, fontsize=10)
    made.suptitle(f"{report.operator}\n{report.machine.header()}", fontsize=9)
    return made


def _panel_title(row: Row, swept: str) -> str:
    """Everything about a need but the swept dimension, and those that follow it by default."""
    rest = ",".join(item for item in str(row.need.shape).split(",") if item.partition("=")[0] != swept)
    return f"{row.need.which} {dtype_name(row.need.dtype)} {rest}"


def _panel(axis: Any, rows: list[Row], swept: str, colours: dict[str, str], scale: float, ink: str) -> None:
    for name in dict.fromkeys(row.name for row in rows):
        line = sorted((row for row in rows if row.name == name), key=lambda row: row.need.shape[swept])
        places, middle, low, high = [], [], [], []
        for row in line:
            assert row.timing is not None
            work = row.need.flops / 1e12 * scale
            places.append(row.need.shape[swept])
            middle.append(work / row.timing.p50)
            low.append(work / row.timing.p80)
            high.append(work / row.timing.p20)
        axis.plot(places, middle, marker="o", markersize=4, color=colours[name], label=name)
        axis.fill_between(places, low, high, color=colours[name], alpha=0.2, linewidth=0)
    needs = sorted(dict.fromkeys(row.need for row in rows), key=lambda need: need.shape[swept])
    roof = [(need.shape[swept], need.flops / need.floor.seconds / 1e12 * scale) for need in needs if need.floor]
    if roof:
        axis.plot(*zip(*roof, strict=True), linestyle="--", linewidth=1, color=ink, label="roofline")
    values = [need.shape[swept] for need in needs]
    if len(values) > 2 and values[0] > 0 and values[-1] / values[0] >= 8:
        axis.set_xscale("log", base=2)
    axis.set_xticks(values, [_short(value) for value in values])
    axis.minorticks_off()
    axis.set_ylim(bottom=0)
    axis.grid(True, linewidth=0.5)
    axis.legend(fontsize=8)


def _short(value: float) -> str:
    """``4k`` for 4096, as the command line takes it."""
    for suffix, factor in (("m", 2**20), ("k", 2**10)):
        if value >= factor and value % factor == 0:
            return f"{value // factor:.0f}{suffix}"
    return f"{value:g}"

"""Speed as bars: one panel for each shape, dtype and pass."""

from __future__ import annotations

from typing import Any

from iokernels.bench.report import Report, plot
from iokernels.bench.report.rows import Row, flops_unit
from iokernels.testing.case import dtype_name


def figure(report: Report) -> Any:
    """Medians as bars, 20th to 80th percentiles as whiskers, the roofline dashed where it is known."""
    import matplotlib

    timed = [row for row in report.rows if row.timing is not None]
    colours = plot.colours(timed)
    bars = [[row for row in timed if row.need == need] for need in dict.fromkeys(row.need for row in timed)]
    made, axes = plot.panels(len(bars), 0.75 + 0.3 * max(map(len, bars), default=1))
    unit, scale = flops_unit(timed)
    for axis, panel in zip(axes, bars, strict=False):
        _panel(axis, panel, colours, scale, matplotlib.rcParams["text.color"])
    made.supxlabel(unit, fontsize=10)
    made.suptitle(f"{report.operator}\n{report.machine.header()}", fontsize=9)
    return made


def _panel(axis: Any, rows: list[Row], colours: dict[str, str], scale: float, ink: str) -> None:
    need = rows[0].need
    for place, row in enumerate(rows):
        assert row.timing is not None
        assert row.tflops is not None
        speed = row.tflops * scale
        fast, slow = (speed * row.timing.p50 / seconds for seconds in (row.timing.p20, row.timing.p80))
        axis.barh(
            place, speed, xerr=[[speed - slow], [fast - speed]], color=colours[row.name], ecolor=ink, capsize=3
        )  # fmt: skip
    if need.floor is not None:
        axis.axvline(need.flops / need.floor.seconds / 1e12 * scale, linestyle="--", color=ink, linewidth=1)
    axis.set_yticks(range(len(rows)), [row.name for row in rows])
    axis.invert_yaxis()
    axis.set_title(f"{need.which} {dtype_name(need.dtype)} {need.shape}", fontsize=8, loc="left")

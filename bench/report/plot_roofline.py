"""The roofline plot: every row at its arithmetic intensity and speed, under what the device allows."""

from __future__ import annotations

from typing import Any

from iokernels.bench.report import Report, plot
from iokernels.bench.report.rows import flops_unit
from iokernels.bench.timing import machine
from iokernels.testing.case import PASSES, dtype_name

_MARKERS: dict[str, str] = dict(zip(PASSES, "os^", strict=True))
_STYLES = ("-", "--", ":", "-.")


def figure(report: Report) -> Any:
    """Colour tells the implementation, shape of the mark the pass; a roof for each dtype where the peaks are known.

    Intensity is needed FLOPs over needed bytes: it belongs to the problem, not to the kernel.
    """
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    timed = [row for row in report.rows if row.timing is not None and row.tflops]
    colours = plot.colours(report.rows)
    ink = matplotlib.rcParams["text.color"]
    unit, scale = flops_unit(timed)
    made = Figure(figsize=(10, 5), layout="constrained")
    axis = made.subplots()
    for row in timed:
        assert row.tflops is not None
        axis.scatter(
            row.need.flops / row.need.nbytes, row.tflops * scale, s=36, alpha=0.8,
            color=colours[row.name], marker=_MARKERS[row.need.which],
        )  # fmt: skip
    axis.set_xscale("log")
    axis.set_yscale("log")
    if timed:
        _roofs(axis, report, scale, ink)
    for side in (axis.xaxis, axis.yaxis):
        side.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        side.set_minor_locator(NullLocator())
        side.set_major_formatter(FuncFormatter(lambda value, place: f"{value:g}"))
    for name, colour in colours.items():
        axis.scatter([], [], s=36, color=colour, label=name)
    for which in dict.fromkeys(row.need.which for row in timed):
        axis.scatter([], [], s=36, color=ink, marker=_MARKERS[which], label=which)
    axis.set_xlabel("arithmetic intensity: FLOPs needed for each byte needed")
    axis.set_ylabel(unit)
    axis.grid(True, which="major", linewidth=0.5)
    if timed:
        axis.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5))
    made.suptitle(f"{report.operator}\n{report.machine.header()}", fontsize=9)
    return made


def _roofs(axis: Any, report: Report, scale: float, ink: str) -> None:
    """The lower of bandwidth times intensity and peak, over the intensities that are shown."""
    spec = report.machine.spec
    if spec is None:
        return
    peaks = {dtype: machine.peak(spec, dtype) for dtype in dict.fromkeys(row.need.dtype for row in report.rows)}
    ridges = {dtype: peak / spec.dram_bandwidth for dtype, peak in peaks.items() if peak is not None}
    if not ridges:
        return
    left, right = axis.get_xlim()
    left = min(left, *(ridge / 4 for ridge in ridges.values()))
    right = max(right, *(ridge * 4 for ridge in ridges.values()))
    for style, (dtype, ridge) in zip(_STYLES, ridges.items(), strict=False):
        corners = (left, ridge, right)
        axis.plot(
            corners,
            [min(x, ridge) * spec.dram_bandwidth / 1e12 * scale for x in corners],
            linestyle=style,
            color=ink,
            linewidth=1.2,
            label=f"roof, {dtype_name(dtype)}",
        )
    axis.set_xlim(left, right)

"""The roofline plot: every row at its arithmetic intensity and speed, under what the device allows."""

from __future__ import annotations

from typing import Any

from iokernels.bench import machine, plot
from iokernels.bench.case import PASSES, dtype_name
from iokernels.bench.report import Report

_MARKERS = dict(zip(PASSES, "os^", strict=True))
_STYLES = ("-", "--", ":", "-.")


def figure(report: Report) -> Any:
    """Colour tells the implementation, shape of the mark the pass; a roof for each dtype where the peaks are known.

    Intensity is needed FLOPs over needed bytes: it belongs to the problem, not to the kernel.
    """
    import matplotlib
    from matplotlib.figure import Figure

    timed = [row for row in report.rows if row.timing is not None and row.tflops]
    colours = plot.colours(report.rows)
    ink = matplotlib.rcParams["text.color"]
    made = Figure(figsize=(9, 5), layout="constrained")
    axis = made.subplots()
    for row in timed:
        axis.scatter(
            row.need.flops / row.need.nbytes, row.tflops, s=36, alpha=0.8,
            color=colours[row.name], marker=_MARKERS[row.need.which],
        )  # fmt: skip
    axis.set_xscale("log")
    axis.set_yscale("log")
    if timed:
        _roofs(axis, report, ink)
    for name, colour in colours.items():
        axis.scatter([], [], s=36, color=colour, label=name)
    for which in dict.fromkeys(row.need.which for row in timed):
        axis.scatter([], [], s=36, color=ink, marker=_MARKERS[which], label=which)
    axis.set_xlabel("arithmetic intensity: FLOPs needed for each byte needed")
    axis.set_ylabel("TFLOP/s")
    axis.grid(True, which="major", linewidth=0.5)
    if timed:
        axis.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5))
    made.suptitle(f"{report.operator}\n{report.machine.header()}", fontsize=9)
    return made


def _roofs(axis: Any, report: Report, ink: str) -> None:
    """The lower of bandwidth times intensity and peak, over the intensities that are shown."""
    spec = report.machine.spec
    if spec is None:
        return
    dtypes = dict.fromkeys(row.need.dtype for row in report.rows)
    left, right = axis.get_xlim()
    for style, dtype in zip(_STYLES, dtypes, strict=False):
        peak = machine.peak(spec, dtype)
        if peak is None:
            continue
        ridge = peak / spec.dram_bandwidth
        left, right = min(left, ridge / 4), max(right, ridge * 4)
        corners = (left, ridge, right)
        axis.plot(
            corners, [min(x * spec.dram_bandwidth, peak) / 1e12 for x in corners],
            linestyle=style, color=ink, linewidth=1.2, label=f"roof, {dtype_name(dtype)}",
        )  # fmt: skip
    axis.set_xlim(left, right)

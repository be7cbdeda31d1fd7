"""Benchmark rows as a picture. Needs matplotlib, an optional dependency."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

from iokernels.bench.case import dtype_name
from iokernels.bench.rows import Row, flops_unit
from iokernels.bench.shape import UsageError


def require() -> None:
    """Raise :class:`UsageError` where nothing can be drawn."""
    if find_spec("matplotlib") is None:
        raise UsageError("--plot needs matplotlib: pip install 'iokernels[bench]'")


def draw(target: str, operator: str, header: str, rows: list[Row]) -> None:
    """One panel for each shape, dtype and pass: speed as bars, 20th to 80th percentile as whiskers.

    The roofline is a dashed line where it is known. Implementations keep their colour over all panels.
    """
    from matplotlib.figure import Figure

    timed = [row for row in rows if row.timing is not None]
    needs = list(dict.fromkeys(row.need for row in timed))
    names = list(dict.fromkeys(row.name for row in timed))
    bars = [[row for row in timed if row.need == need] for need in needs]
    heights = [max(len(panel), 1) for panel in bars] or [1]
    figure = Figure(figsize=(9, 1.4 + 0.75 * len(heights) + 0.32 * sum(heights)), layout="constrained")
    axes = figure.subplots(len(heights), 1, squeeze=False, height_ratios=heights, sharex=True)[:, 0]
    unit, scale = flops_unit(timed)
    for axis, panel in zip(axes, bars, strict=False):
        _panel(axis, panel, names, scale)
    axes[-1].set_xlabel(unit)
    figure.suptitle(f"{operator}\n{header}", fontsize=9)
    figure.savefig(target, dpi=150)


def _panel(axis: Any, rows: list[Row], names: list[str], scale: float) -> None:
    need = rows[0].need
    for place, row in enumerate(rows):
        assert row.timing is not None
        assert row.tflops is not None
        speed = row.tflops * scale
        fast, slow = (speed * row.timing.p50 / seconds for seconds in (row.timing.p20, row.timing.p80))
        axis.barh(
            place,
            speed,
            xerr=[[speed - slow], [fast - speed]],
            color=f"C{names.index(row.name) % 10}",
            capsize=3,
        )
    if need.floor is not None:
        axis.axvline(need.flops / need.floor.seconds / 1e12 * scale, linestyle="--", color="black", linewidth=1)
    axis.set_yticks(range(len(rows)), [row.name for row in rows])
    axis.invert_yaxis()
    axis.set_title(f"{need.which} {dtype_name(need.dtype)} {need.shape}", fontsize=8, loc="left")

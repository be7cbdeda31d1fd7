"""The table that ``iokernels bench`` prints for one shape, dtype and pass."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape

from iokernels.bench import render
from iokernels.bench.case import dtype_name
from iokernels.bench.rows import Row, flops_unit

_BAD = ("wrong", "failed")


def show(console: Console, operator: str, rows: list[Row], baseline: str | None, repro: str) -> None:
    """Print what was needed, a line for every row, and the command that repeats them."""
    need = rows[0].need
    console.print()
    console.print(f"{operator} {need.which}  {dtype_name(need.dtype)}  {need.shape}", style="bold", highlight=False)
    floor = "none known for this device and dtype"
    if need.floor is not None:
        floor = f"{render.milliseconds(need.floor.seconds)} ms ({need.floor.bound})"
    console.print(
        f"need: {render.amount(need.flops, 'FLOP')}, {render.amount(need.nbytes, 'B')}   floor: {floor}",
        highlight=False,
    )
    timed = [row for row in rows if row.timing is not None]
    unit, scale = flops_unit(timed)
    cells = [_timed(row, baseline, unit, scale) for row in timed]
    if cells:
        # A column in which nobody has anything to say (the roofline, on a CPU) is left out.
        columns = [name for name in cells[0] if any(line[name] != "-" for line in cells)]
        table = render.table(*columns, right=[name for name in columns if name not in ("backend", "config")])
        for line in cells:
            table.add_row(*(line[name] for name in columns))
        console.print(table, highlight=False)
    for row in rows:
        if row.timing is None:
            style = "bold red" if row.status in _BAD else "yellow" if row.status == "refused" else "dim"
            label = "" if row.reason.startswith(f"interpreter: {row.status}") else f"{row.status}: "
            console.print(f"{row.name}  [{style}]{label}{escape(row.reason)}[/]", highlight=False)
    reduced = next((row.checked for row in rows if row.checked not in (None, need.shape)), None)
    if reduced is not None:
        console.print(f"errors found at {reduced}, where the float64 reference fits", style="dim", highlight=False)
    console.print(f"repro: {repro}", style="dim", highlight=False, soft_wrap=True)


def _timed(row: Row, baseline: str | None, unit: str, scale: float) -> dict[str, str]:
    """The cells of a row by column; ``-`` where there is nothing."""
    timing = row.timing
    assert timing is not None
    assert row.tflops is not None
    p20, p50, p80 = (render.milliseconds(value) for value in (timing.p20, timing.p50, timing.p80))
    speed = "-" if row.speedup is None else f"{row.speedup:.2f}x"
    return {
        "backend": row.name,
        "config": escape(row.config),
        "ms (p20-p80)": f"{p50} ({p20}-{p80})" + (" graph" if timing.how == "graph" else ""),
        unit: f"{row.tflops * scale:.3g}",
        "GB/s": f"{row.gbytes:.3g}",
        "roof": "-" if row.roofline is None else f"{row.roofline:.0%}",
        "peak MB": "-" if row.peak_bytes is None else f"{row.peak_bytes / 1e6:.0f}",
        "error": f"ok {row.error:.2g}x",
        f"vs {baseline or 'baseline'}": "base" if row.name == baseline else speed,
    }

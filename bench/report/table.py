"""The table that ``iokernels bench`` prints for one shape, dtype and pass."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape

from iokernels.bench.report import TEXT_COLUMNS, Section, reason, render

_BAD = ("wrong", "failed")


def show(console: Console, operator: str, section: Section) -> None:
    """Print what was needed, a line for every row, and the command that repeats them."""
    console.print()
    console.print(f"{operator} {section.title}", style="bold", highlight=False)
    console.print(section.need, highlight=False)
    grid = section.grid
    if grid.lines:
        table = render.table(*grid.columns, right=[name for name in grid.columns if name not in TEXT_COLUMNS])
        for line in grid.lines:
            table.add_row(*map(escape, line))
        console.print(table, highlight=False)
    for row in section.untimed:
        style = "bold red" if row.status in _BAD else "yellow" if row.status == "refused" else "dim"
        console.print(f"{row.name}  [{style}]{escape(reason(row))}[/]", highlight=False)
    for row, text in section.compared:
        slower = row.versus is not None and row.versus.slower
        console.print(escape(text), style="bold red" if slower else None, highlight=False)
    for note in section.notes:
        console.print(escape(note), style="dim", highlight=False)
    console.print(f"repro: {section.repro}", style="dim", highlight=False, soft_wrap=True)

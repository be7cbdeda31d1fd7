"""A benchmark as Markdown: what goes into an issue, a pull request or ``docs/benchmarks``."""

from __future__ import annotations

from iokernels.bench.report import TEXT_COLUMNS, Report, Section, reason


def document(report: Report) -> str:
    """The machine, then a table and the command that repeats it for every need."""
    parts = [f"# {report.operator}", _plain(report.machine.header())]
    parts += [part for section in report.sections for part in _section(section)]
    return "\n\n".join(parts) + "\n"


def _section(section: Section) -> list[str]:
    parts = [f"## {_plain(section.title)}", _plain(section.need)]
    grid = section.grid
    if grid.lines:
        rule = tuple(":---" if name in TEXT_COLUMNS else "---:" for name in grid.columns)
        lines = (tuple(map(_plain, grid.columns)), rule, *(tuple(map(_plain, line)) for line in grid.lines))
        parts.append("\n".join(f"| {' | '.join(line)} |" for line in lines))
    remarks = [f"- {row.name}: {_plain(reason(row))}" for row in section.untimed]
    remarks += [f"- {_plain(text)}" for _, text in section.compared]
    remarks += [f"- {_plain(note)}" for note in section.notes]
    if remarks:
        parts.append("\n".join(remarks))
    return [*parts, f"```sh\n{section.repro}\n```"]


def _plain(text: str) -> str:
    """Text that Markdown prints as it is, also in a cell."""
    for special in ("\\", "`", "*", "_", "|", "<", "["):
        text = text.replace(special, "\\" + special)
    return " ".join(text.split())

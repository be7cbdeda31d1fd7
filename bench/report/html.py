"""A benchmark as one HTML file: no server, no network, no script. Its plots are inside, in a light and a dark form."""

from __future__ import annotations

import base64
from html import escape
from typing import Any

from iokernels.bench.report import TEXT_COLUMNS, Report, Section, plot, reason

_STYLE = """
:root { color-scheme: light dark; --line: #d0d7de; --soft: #59636e; --head: #f6f8fa; --bad: #c4162a; --page: #ffffff; }
@media (prefers-color-scheme: dark) {
  :root { --line: #3d444d; --soft: #9198a1; --head: #151b23; --bad: #ff7b72; --page: #0d1117; }
}
body { font: 15px/1.5 system-ui, sans-serif; background: var(--page); max-width: 68rem; margin: 2rem auto;
  padding: 0 1.25rem; }
h1 { font-size: 1.6rem; margin: 0 0 .25rem; }
h2 { font-size: 1.15rem; margin: 2.5rem 0 .25rem; padding-top: 1rem; border-top: 1px solid var(--line); }
h2 code { font-weight: 400; }
p { margin: .25rem 0; }
code, td, .soft { font-variant-numeric: tabular-nums; }
code { font: .9em ui-monospace, "DejaVu Sans Mono", monospace; overflow-wrap: anywhere; }
.soft { color: var(--soft); }
.bad { color: var(--bad); font-weight: 600; }
.wide { overflow-x: auto; margin: .75rem 0; }
table { border-collapse: collapse; }
th, td { padding: .3rem .8rem; border-bottom: 1px solid var(--line); white-space: nowrap; text-align: right; }
th { background: var(--head); font-weight: 600; }
.text { text-align: left; }
ul { margin: .5rem 0; padding-left: 1.2rem; }
figure { margin: 1rem 0; }
img { width: 100%; height: auto; }
pre { background: var(--head); border: 1px solid var(--line); border-radius: 6px; padding: .6rem .8rem; margin: .5rem 0;
  white-space: pre-wrap; }
"""


def document(report: Report) -> str:
    """The page: the machine, the plots, then a table and the command that repeats it for every need."""
    parts = [
        f"<h1>{escape(report.operator)}</h1>",
        f'<p class="soft">{escape(report.machine.header())}</p>',
    ]
    if any(row.timing is not None for row in report.rows):
        parts += [
            _figure(lambda: plot.speed(report), "Speed of every row; more is better"),
            _figure(lambda: plot.roofline(report), "Speed against arithmetic intensity"),
        ]
    parts += [_section(section) for section in report.sections]
    body = "\n".join(parts)
    title = escape(f"{report.operator} on {report.machine.name}")
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n"
    )


def _figure(draw: Any, caption: str) -> str:
    sources = {}
    for theme in plot.THEMES:
        with plot.theme(theme):
            picture = base64.b64encode(plot.svg(draw())).decode()
        sources[theme] = f"data:image/svg+xml;base64,{picture}"
    return (
        "<figure><picture>"
        f'<source media="(prefers-color-scheme: dark)" srcset="{sources["dark"]}">'
        f'<img src="{sources["light"]}" alt="{escape(caption)}">'
        f'</picture><figcaption class="soft">{escape(caption)}</figcaption></figure>'
    )


def _section(section: Section) -> str:
    which, dtype, shape = section.title.split()
    parts = [f"<h2>{which} {dtype} <code>{escape(shape)}</code></h2>", f'<p class="soft">{escape(section.need)}</p>']
    grid = section.grid
    if grid.lines:
        head = "".join(_cell("th", name, name) for name in grid.columns)
        lines = "\n".join(
            "<tr>" + "".join(_cell("td", name, text) for name, text in zip(grid.columns, line, strict=True)) + "</tr>"
            for line in grid.lines
        )
        table = f"<table><thead><tr>{head}</tr></thead>\n<tbody>\n{lines}\n</tbody></table>"
        parts.append(f'<div class="wide">{table}</div>')
    remarks = []
    for row in section.untimed:
        kind = "bad" if row.status in ("wrong", "failed") else "soft"
        remarks.append(f'<li>{escape(row.name)} <span class="{kind}">{escape(reason(row))}</span></li>')
    for row, text in section.compared:
        kind = ' class="bad"' if row.versus is not None and row.versus.slower else ""
        remarks.append(f"<li{kind}>{escape(text)}</li>")
    remarks += [f'<li class="soft">{escape(note)}</li>' for note in section.notes]
    if remarks:
        parts.append("<ul>" + "\n".join(remarks) + "</ul>")
    parts.append(f"<pre><code>{escape(section.repro)}</code></pre>")
    return "\n".join(parts)


def _cell(tag: str, column: str, text: str) -> str:
    kind = ' class="text"' if column in TEXT_COLUMNS else ""
    return f"<{tag}{kind}>{escape(text)}</{tag}>"

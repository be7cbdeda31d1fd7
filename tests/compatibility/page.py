"""The page that says what holds of each module and operator: its tables are what the tests run."""

from __future__ import annotations

import re
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "guides" / "torch_compatibility.md"


def cells(heading: str) -> list[tuple[str, str, str]]:
    """(row, column, what the page says) of every cell of the table under ``## heading``, without marks."""
    section = PAGE.read_text().split(f"\n## {heading}\n")[1].split("\n## ")[0]
    lines = [line.strip().strip("|") for line in section.splitlines() if line.startswith("|")]
    head, _, *rows = [[re.sub(r"[`*]", "", cell).strip() for cell in line.split("|")] for line in lines]
    assert rows, f"{PAGE.name} has no table under {heading!r}"
    assert all(len(row) == len(head) for row in rows)
    return [(row[0], column, cell) for row in rows for column, cell in zip(head[1:], row[1:], strict=True)]

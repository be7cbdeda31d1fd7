"""``iokernels list``: every operator on every backend, and whether it can run here."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from rich.console import Console

import iokernels
from iokernels.bench.report import render
from iokernels.bench.timing import machine
from iokernels.ops import CASES
from iokernels.runtime.dispatch import BACKENDS
from iokernels.testing.case import Case, dtype_name, load


def run(arguments: argparse.Namespace, console: Console) -> int:
    """Print the operators that the arguments name, or all."""
    found = [describe(load(name)) for name in arguments.operators or CASES]
    columns = ("operator", "backend", "dtypes", "widths", "passes")
    here = [str(device.type) for device in machine.present()]
    table = render.table(*columns, *(f"on this {device}" for device in here))
    for operator in found:
        for row in operator["backends"]:
            dtypes = " ".join(row["dtypes"])
            usable = ("no, see below" if row["refusals"][device] else "yes" for device in here)
            table.add_row(operator["operator"], row["backend"], dtypes, row["widths"], row["passes"], *usable)
    console.print(table, markup=False, highlight=False)
    for device in machine.present():
        for backend in BACKENDS:
            if (reason := machine.backend_refusal(backend, device)) is not None:
                console.print(f"{backend} on this {device.type}: {reason}", style="yellow", markup=False)
    for operator in found:
        console.print(f"\n{operator['operator']}", style="bold", markup=False)
        for name in ("functions", "shape", "suites", "peers", "documentation", "tests"):
            _entry(console, name, operator[name])
    render.write_json(arguments.json, found)
    return 0


def _entry(console: Console, name: str, value: Any) -> None:
    if isinstance(value, dict):
        console.print(f"  {name}:", markup=False)
        for key, text in value.items():
            console.print(f"    {key:12} {text}", markup=False, highlight=False)
    else:
        console.print(f"  {name}: {value if isinstance(value, str) else ', '.join(value)}", markup=False)


def describe(case: Case) -> dict[str, Any]:
    """What is printed of one operator."""
    devices = machine.present()
    return {
        "operator": case.operator,
        "functions": list(case.functions),
        "backends": [
            {
                "backend": name,
                "dtypes": [dtype_name(dtype) for dtype in made.dtypes],
                "widths": made.widths,
                "passes": made.passes,
                "refusals": {device.type: machine.backend_refusal(name, device) for device in devices},
            }
            for name, made in case.implementations.items()
        ],
        "shape": {dimension.name: dimension.help for dimension in case.vocabulary.dimensions},
        "suites": {name: f"{len(shapes)} shapes" for name, shapes in case.suites.items()},
        "peers": {
            name: peer if isinstance(peer, str) else "installed" for name, peer in case.peers(devices[0]).items()
        },
        "documentation": _where(f"docs/ops/{case.page}.md"),
        "tests": _where(f"tests/ops/test_{case.operator.removesuffix('_step')}.py"),
    }


def _where(path: str) -> str:
    """``path``, as long as this is a checkout: neither is part of an installed package."""
    root = Path(iokernels.__file__).parent.parent
    return path if (root / path).exists() else f"{path} of the source repository"

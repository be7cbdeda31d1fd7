"""``iokernels check``: every backend against the float64 reference, on this machine."""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from iokernels.bench.report import render
from iokernels.bench.timing import machine
from iokernels.ops import CASES
from iokernels.runtime import device as devices
from iokernels.testing.case import DTYPES, Case, Point, dtype_name, load
from iokernels.testing.case.proof import Proof, Verdict
from iokernels.testing.case.shape import UsageError

_DRAWS = {torch.float32: 4}
"""Draws of inputs that the budget of a point rests on, if not one. In a half precision the rounding of the result is
most of the budget, and no luck is involved."""


@dataclass
class Row:
    """All points of one operator, backend and dtype."""

    operator: str
    backend: str
    dtype: torch.dtype
    absent: str | None = None
    seconds: float = 0.0
    verdicts: list[tuple[Point, Verdict]] = field(default_factory=list)

    def having(self, *statuses: str) -> list[tuple[Point, Verdict]]:
        """The points with one of these outcomes."""
        return [found for found in self.verdicts if found[1].status in statuses]

    @property
    def status(self) -> str:
        """One word for the row."""
        if self.absent is not None:
            return "not here"
        if self.having("wrong", "failed"):
            return "WRONG"
        return "ok" if self.having("ok") else "refused"

    def worst(self) -> tuple[Point, Verdict] | None:
        """The proved point that came closest to its budget, or went furthest past it."""
        rated = self.having("ok", "wrong")
        # NaN compares with nothing: it counts as the largest.
        return max(rated, key=lambda found: _or_inf(found[1].ratio), default=None)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""

        def listed(*statuses: str) -> list[dict[str, Any]]:
            return [
                {"point": point.name, "shape": str(point.shape)} | asdict(verdict)
                for point, verdict in self.having(*statuses)
            ]

        worst = self.worst()
        return {
            "operator": self.operator,
            "backend": self.backend,
            "dtype": dtype_name(self.dtype),
            "status": self.status,
            "absent": self.absent,
            "points": len(self.verdicts),
            "proved": len(self.having("ok")),
            "worst": worst and {"ratio": worst[1].ratio, "tensor": worst[1].where, "point": worst[0].name},
            "wrong": listed("wrong", "failed"),
            "refused": listed("refused"),
            "seconds": self.seconds,
        }


def run(arguments: argparse.Namespace, console: Console) -> int:
    """Prove what the arguments select; 1 if anything was wrong."""
    device = machine.pick_device(arguments.device)
    if device.type == "cpu":
        devices.interpret_triton()
        devices.emulate_cuda()
    if devices.INTERPRET:
        from iokernels.runtime import interpreter

        interpreter.install()
    cases = _with_points([load(name) for name in arguments.operators or CASES], arguments)
    here = machine.describe(device)
    console.print(escape(here.header()), highlight=False)
    console.print(_where(device), style="dim", highlight=False)
    rows = list(_rows(cases, arguments, device))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the points are small: on the CPU threads would cost more than they bring
    try:
        _prove(rows, cases, arguments, device, Console(stderr=True))
    finally:
        torch.set_num_threads(threads)
    _print(rows, f" --seed {arguments.seed}" if arguments.seed else "", console)
    wrong = any(row.status == "WRONG" for row in rows)
    render.write_json(
        arguments.json, {"machine": here.as_dict(), "ok": not wrong, "rows": [row.as_dict() for row in rows]}
    )
    return int(wrong)


def _where(device: torch.device) -> str:
    if device.type == "cuda":
        return "on the GPU; an error is given as a multiple of its budget"
    triton = "in Triton's interpreter" if devices.INTERPRET else "not at all"
    cuda = "in the emulator" if devices.EMULATE else "not at all"
    lead = "" if torch.cuda.is_available() else "no GPU: "
    return (
        f"{lead}on the CPU, Triton kernels {triton}, CUDA kernels {cuda}; an error is given as a multiple of its budget"
    )


def _rows(cases: list[Case], arguments: argparse.Namespace, device: torch.device) -> Iterator[Row]:
    for case in cases:
        for backend in arguments.backend or [name for name in case.implementations if name != "reference"]:
            if backend not in case.implementations:
                raise UsageError(
                    f"{case.operator} has no backend {backend!r}; it has {', '.join(case.implementations)}"
                )
            dtypes = case.implementations[backend].dtypes
            for dtype in [DTYPES[name] for name in arguments.dtype] if arguments.dtype else dtypes:
                yield Row(case.operator, backend, dtype, machine.backend_refusal(backend, device))


def _points(case: Case, arguments: argparse.Namespace) -> list[Point]:
    wanted = (arguments.option or "").lower()
    points = [point for point in case.check_points() if point.quick or not arguments.quick]
    found = [point for point in points if point.name.lower() == wanted] or [
        point for point in points if wanted in point.name.lower()
    ]
    return found


def _with_points(cases: list[Case], arguments: argparse.Namespace) -> list[Case]:
    """Those of the cases that have such points. Raises :class:`UsageError` where none has."""
    found = [case for case in cases if _points(case, arguments)]
    if not found:
        told = (
            f"{case.operator} has no point named like {arguments.option!r}; "
            f"it has: {', '.join(point.name for point in case.check_points())}"
            for case in cases
        )
        raise UsageError("; ".join(told))
    return found


def _prove(
    rows: list[Row], cases: list[Case], arguments: argparse.Namespace, device: torch.device, console: Console
) -> None:
    """Fill in the rows. The truth for one point and dtype is computed once for all backends."""
    jobs = []
    for case in cases:
        points = _points(case, arguments)
        mine = [row for row in rows if row.operator == case.operator and row.absent is None]
        for dtype in dict.fromkeys(row.dtype for row in mine):
            jobs += [(case, point, dtype, [row for row in mine if row.dtype == dtype]) for point in points]
    with Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
        console=console, transient=True,
    ) as progress:  # fmt: skip
        task = progress.add_task("", total=sum(len(row) for *_, row in jobs))
        for case, point, dtype, mine in jobs:
            try:
                proof: Proof | Exception = Proof(
                    case, point.shape, dtype, device, arguments.seed, draws=_DRAWS.get(dtype, 1)
                )
            except Exception as error:  # without a truth nothing is proved: said of this point, not of all
                proof = error
            for row in mine:
                progress.update(task, description=escape(f"{row.backend} {dtype_name(dtype)} {point.name}"))
                start = time.perf_counter()
                if isinstance(proof, Exception):
                    verdict = Verdict("failed", reason=f"the reference: {type(proof).__name__}: {proof}")
                else:
                    verdict = proof.judge(
                        lambda inputs, row=row, case=case: case.run(inputs, row.backend),
                        gradients_too=case.differentiates(row.backend),
                    )
                row.verdicts.append((point, verdict))
                row.seconds += time.perf_counter() - start
                progress.advance(task)


_STYLES = {"ok": "green", "WRONG": "bold red", "refused": "yellow", "not here": "dim"}


_NAMED = 4
"""Points listed for one reason."""


def _again(row: Row, point: Point) -> str:
    choice = f"--backend {row.backend} --dtype {dtype_name(row.dtype)}"
    return f'iokernels check {row.operator} {choice} -k "{point.name}"'


def _print(rows: list[Row], seed: str, console: Console) -> None:
    numbers = ("points", "worst error", "seconds")
    table = render.table("operator", "backend", "dtype", *numbers[:2], "verdict", numbers[2], "", right=numbers)
    for row in rows:
        worst, refused = row.worst(), len(row.having("refused"))
        note = f"{refused} refused" if refused else ""
        table.add_row(
            row.operator, row.backend, dtype_name(row.dtype),
            f"{len(row.having('ok'))}/{len(row.verdicts)}" if row.verdicts else "-",
            f"{worst[1].ratio:.2f}x" if worst else "-",
            f"[{_STYLES[row.status]}]{row.status}[/]", f"{row.seconds:.1f}" if row.verdicts else "-", note,
        )  # fmt: skip
    console.print(table)
    for backend, absent in dict.fromkeys((row.backend, row.absent) for row in rows if row.absent is not None):
        console.print(f"[dim]not here[/] {backend}: {escape(absent)}", highlight=False)
    for status, style in (("failed", "bold red"), ("wrong", "bold red"), ("refused", "yellow")):
        by_reason: dict[str, list[tuple[Row, Point]]] = {}
        for row in rows:
            for point, verdict in row.having(status):
                by_reason.setdefault(verdict.reason, []).append((row, point))
        for reason, found in by_reason.items():
            names = [f"{row.backend} {dtype_name(row.dtype)} {point.name}" for row, point in found]
            rest = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
            listed = "; ".join(names[:_NAMED]) + rest
            console.print(f"[{style}]{status}[/] {escape(listed)}: {escape(reason)}", highlight=False)
            if status != "refused":
                console.print(f"  again: {_again(*found[0])}{seed}", highlight=False, markup=False)
                console.print(f"  shape: {found[0][1].shape}", highlight=False, markup=False)
    proved = sum(len(row.having("ok")) for row in rows)
    wrong = sum(len(row.having("wrong", "failed")) for row in rows)
    console.print(f"{proved} proved, {wrong} wrong", style="bold red" if wrong else "bold green", highlight=False)


def _or_inf(ratio: float | None) -> float:
    return float("inf") if ratio is None or ratio != ratio else ratio

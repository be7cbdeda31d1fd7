"""``iokernels bench``: an operator's backends beside everything else that could be called, on the same inputs."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial

import torch
from rich.console import Console
from rich.markup import escape

from iokernels import autotune
from iokernels.bench.report import Report, Section, outputs
from iokernels.bench.report import table as rows_table
from iokernels.bench.report.rows import Need, Row, against, config_text
from iokernels.bench.timing import contenders, machine, sweep
from iokernels.bench.timing.compare import Comparison, Saved
from iokernels.bench.timing.contenders import Contender
from iokernels.bench.timing.machine import Machine
from iokernels.bench.timing.measure import Clock, clock_for, measure
from iokernels.bench.timing.passes import pass_call
from iokernels.bench.timing.revision import Revision
from iokernels.runtime.errors import UnsupportedError
from iokernels.testing.case import DTYPES, Case, Pass, dtype_name, load
from iokernels.testing.case.proof import Verdict
from iokernels.testing.case.shape import Shape, UsageError

TOLERATED = 0.05
"""What ``--fail-over`` is unless told otherwise."""

Compare = Callable[[Row], Comparison]
"""Compares a timed backend with another version of itself."""


def run(arguments: argparse.Namespace, console: Console) -> int:
    """Time what the arguments select; 1 if a backend was wrong, or slower than the version it is compared with."""
    device = machine.pick_device(arguments.device)
    case = load(arguments.operator)
    sweeps = tuple(sweep.parse(text, case.vocabulary) for text in arguments.sweep or ())
    shapes = _shapes(case, arguments, sweeps, device)
    dtypes = [DTYPES[name] for name in arguments.dtype or (("bf16",) if device.type == "cuda" else ("fp32",))]
    if not arguments.seconds > 0:
        raise UsageError(f"--seconds is {arguments.seconds}; it must be more than 0")
    among = contenders.contenders(case, device, arguments.backend)
    baseline = contenders.baseline(among, arguments.baseline)
    outputs.possible(arguments)
    here = machine.describe(device)
    sections: list[Section] = []
    clock = clock_for(device)
    with ExitStack() as opened:
        compare = _other_version(arguments, here, opened)
        console.print(escape(here.header()), highlight=False)
        if here.spec is None:
            lead = "" if torch.cuda.is_available() else "no GPU: "
            console.print(f"{lead}timed on the CPU, whose roofline is not known", style="dim")
        status = opened.enter_context(console.status(""))
        for shape in shapes:
            for dtype in dtypes:
                status.update(f"checking {shape} {dtype_name(dtype)}")
                checked, verdicts = contenders.prove(case, shape, dtype, device, among, arguments.seed)
                for which in case.passes_of(arguments.passes):
                    status.update(f"timing {shape} {dtype_name(dtype)} {which}")
                    need = _need(case, shape, dtype, which, here)
                    rows = against(_time(case, need, among, verdicts, checked, arguments, clock, device), baseline)
                    if compare is not None:
                        status.update(f"comparing {shape} {dtype_name(dtype)} {which} with {arguments.against}")
                        rows = [_compared(row, compare) for row in rows]
                    section = Section(rows, baseline, _repro(case, need, arguments))
                    sections.append(section)
                    rows_table.show(console, case.operator, section)
    swept = tuple(one.name for one in sweeps)
    report = Report(case.operator, here, arguments.seed, baseline, swept, sections)
    outputs.write(arguments, report)
    if compare is not None and not any(row.versus is not None and row.versus.ratio is not None for row in report.rows):
        raise UsageError(f"--against: nothing could be compared with {arguments.against}")
    return int(report.wrong or report.slower)


def _shapes(
    case: Case, arguments: argparse.Namespace, sweeps: Sequence[sweep.Sweep], device: torch.device
) -> tuple[Shape, ...]:
    if arguments.suite and (arguments.shape or sweeps):
        other = "--shape" if arguments.shape else "--sweep"
        raise UsageError(f"{other} and --suite exclude each other")
    if sweeps:
        return sweep.shapes(case.vocabulary, arguments.shape or ("",), sweeps)
    if arguments.shape:
        return tuple(case.vocabulary.parse(text) for text in arguments.shape)
    return case.suite(arguments.suite or (case.usual_suite if device.type == "cuda" else "quick"))


def _other_version(arguments: argparse.Namespace, here: Machine, opened: ExitStack) -> Compare | None:
    """What ``--against`` names, ready to compare rows with; whatever it needs lives as long as ``opened``."""
    if arguments.against is None:
        if arguments.fail_over is not None:
            raise UsageError("--fail-over needs --against")
        return None
    tolerated = TOLERATED if arguments.fail_over is None else arguments.fail_over
    kind, _, revision = arguments.against.partition(":")
    if kind == "git":
        other = opened.enter_context(
            Revision(revision, arguments.operator, arguments.seed, here.device, tolerated)
        )  # fmt: skip
        return partial(other.compare, seconds=arguments.seconds)
    saved = Saved(arguments.against, arguments.operator, arguments.seed, here, tolerated)
    return lambda row: saved.compare(row.as_dict())


def _compared(row: Row, compare: Compare) -> Row:
    return replace(row, versus=compare(row)) if row.kind == "backend" and row.timing is not None else row


def _need(case: Case, shape: Shape, dtype: torch.dtype, which: Pass, here: Machine) -> Need:
    flops, nbytes = case.flops(shape, which), case.floor_bytes(shape, dtype, which)
    return Need(shape, dtype, which, flops, nbytes, machine.floor(here.spec, flops, nbytes, dtype))


def _time(
    case: Case, need: Need, among: Sequence[Contender], verdicts: dict[str, Verdict], checked: Shape,
    arguments: argparse.Namespace, clock: Clock, device: torch.device,
) -> list[Row]:  # fmt: skip
    """A row for every contender; a time for those whose result was right."""
    inputs = case.make_inputs(need.shape, need.dtype, device, arguments.seed)
    rows, calls = [], {}
    for contender in among:
        row = Row(need, contender.name, contender.kind, contender.status, contender.reason)
        if contender.prepare is not None:
            verdict = verdicts[contender.name]
            row = replace(
                row, status=verdict.status, reason=verdict.reason, error=verdict.ratio,
                checked=checked if verdict.ratio is not None else None,
            )  # fmt: skip
            if verdict.status == "ok":
                try:
                    # At full size it may still fail: for want of memory, say.
                    call = pass_call(inputs, contender.prepare(inputs), need.which)
                    with autotune.watch() as configs:
                        call()
                    row = replace(
                        row, status="timed", config=config_text(case.operator, configs),
                        peak_bytes=clock.peak_bytes(call),
                    )  # fmt: skip
                except UnsupportedError as error:
                    row = replace(row, status="refused", reason=str(error))
                except Exception as error:  # told in its row; the others are still timed
                    text = str(error).strip().partition("\n")[0]
                    row = replace(row, status="failed", reason=f"{type(error).__name__}: {text}")
                else:
                    calls[contender.name] = call
        rows.append(row)
    # A backward pass alone runs on the stream of its forward pass, which no capture contains.
    timings = measure(calls, clock, seconds=arguments.seconds, capturable=need.which != "bwd")
    return [replace(row, timing=timings[row.name]) if row.name in timings else row for row in rows]


def _repro(case: Case, need: Need, arguments: argparse.Namespace) -> str:
    parts = [
        f"iokernels bench {case.operator} --shape {need.shape}",
        f"--dtype {dtype_name(need.dtype)} --pass {need.which} --seed {arguments.seed}",
    ]
    if arguments.backend:
        parts.append(f"--backend {','.join(arguments.backend)}")
    if arguments.device:
        parts.append(f"--device {arguments.device}")
    if arguments.baseline:
        parts.append(f"--baseline {arguments.baseline}")
    if arguments.against:
        parts.append(f"--against {arguments.against}")
    if arguments.fail_over is not None:
        parts.append(f"--fail-over {arguments.fail_over:.4g}")
    return " ".join(parts)

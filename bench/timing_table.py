"""``iokernels bench``: an operator's backends beside everything else that could be called, on the same inputs."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from rich.console import Console
from rich.markup import escape

from iokernels import autotune
from iokernels.bench import machine, render, rows_table
from iokernels.bench.case import DTYPES, Case, Inputs, Outputs, Pass, Prepare, dtype_name, load
from iokernels.bench.machine import Machine
from iokernels.bench.measure import Call, Clock, clock_for, measure
from iokernels.bench.proof import Proof, Verdict
from iokernels.bench.rows import Need, Row, against, config_text
from iokernels.bench.shape import Shape, UsageError
from iokernels.runtime import device as devices
from iokernels.runtime.errors import UnsupportedError

_CPU_REFERENCE_BYTES = 2**30
"""On a CPU the float64 reference may take this much: more would take minutes."""


@dataclass(frozen=True)
class Contender:
    """A row to be: a backend or a peer, or the reason why it has no time."""

    name: str
    kind: str
    prepare: Prepare | None = None
    status: str = ""
    reason: str = ""


def run(arguments: argparse.Namespace, console: Console) -> int:
    """Time what the arguments select; 1 if a backend was wrong."""
    device = machine.pick_device(arguments.device)
    case = load(arguments.operator)
    shapes = _shapes(case, arguments, device)
    dtypes = [DTYPES[name] for name in arguments.dtype or (("bf16",) if device.type == "cuda" else ("fp32",))]
    if not arguments.seconds > 0:
        raise UsageError(f"--seconds is {arguments.seconds}; it must be more than 0")
    contenders = _contenders(case, arguments, device)
    baseline = _baseline(contenders, arguments.baseline)
    for target in (arguments.csv, arguments.plot, arguments.json if arguments.json != "-" else None):
        if target is not None:
            render.writable(target)
    if arguments.plot is not None:
        from iokernels.bench import plot

        plot.require()
    here = machine.describe(device)
    console.print(escape(here.header()), highlight=False)
    if here.spec is None:
        lead = "" if torch.cuda.is_available() else "no GPU: "
        console.print(f"{lead}timed on the CPU, whose roofline is not known", style="dim")
    rows: list[Row] = []
    clock = clock_for(device)
    with console.status("") as status:
        for shape in shapes:
            for dtype in dtypes:
                status.update(f"checking {shape} {dtype_name(dtype)}")
                checked, verdicts = _check(case, shape, dtype, device, contenders, arguments.seed)
                for which in arguments.passes:
                    status.update(f"timing {shape} {dtype_name(dtype)} {which}")
                    need = _need(case, shape, dtype, which, here)
                    found = _time(case, need, contenders, verdicts, checked, arguments, clock, device)
                    found = against(found, baseline)
                    rows += found
                    rows_table.show(console, case.operator, found, baseline, _repro(case, need, arguments))
    flat = [row.as_dict() for row in rows]
    wrong = any(row.kind == "backend" and row.status in ("wrong", "failed") for row in rows)
    report = {"machine": here.as_dict(), "operator": case.operator, "seed": arguments.seed, "baseline": baseline}
    render.write_json(arguments.json, report | {"ok": not wrong, "rows": flat})
    render.write_csv(arguments.csv, flat)
    if arguments.plot is not None:
        from iokernels.bench import plot

        plot.draw(arguments.plot, case.operator, here.header(), rows)
    return int(wrong)


def _shapes(case: Case, arguments: argparse.Namespace, device: torch.device) -> tuple[Shape, ...]:
    if arguments.shape and arguments.suite:
        raise UsageError("--shape and --suite exclude each other")
    if arguments.shape:
        return tuple(case.vocabulary.parse(text) for text in arguments.shape)
    return case.suite(arguments.suite or ("train" if device.type == "cuda" else "quick"))


def _contenders(case: Case, arguments: argparse.Namespace, device: torch.device) -> list[Contender]:
    found = []
    for name in arguments.backend or [name for name in case.implementations if name != "reference"]:
        if name not in case.implementations:
            raise UsageError(f"{case.operator} has no backend {name!r}; it has {', '.join(case.implementations)}")
        refusal = machine.backend_refusal(name, device)
        if refusal is not None:
            found.append(Contender(name, "backend", None, "refused", refusal))
        elif name == "triton" and devices.INTERPRET:
            found.append(Contender(name, "backend", None, "not timed", "interpreter: not timed"))
        else:
            found.append(Contender(name, "backend", partial(_backend, case, name)))
    for name, peer in case.peers(device).items():
        if isinstance(peer, str):
            found.append(Contender(name, "peer", None, "missing", peer))
        else:
            found.append(Contender(name, "peer", peer))
    return found


def _backend(case: Case, backend: str, inputs: Inputs) -> Callable[[], Outputs]:
    return partial(case.run, inputs, backend)


def _baseline(contenders: list[Contender], named: str | None) -> str | None:
    names = [contender.name for contender in contenders]
    if named is not None and named not in names:
        raise UsageError(f"--baseline is {named!r}; the rows are {', '.join(names)}")
    peers = [contender.name for contender in contenders if contender.kind == "peer" and contender.prepare is not None]
    return named or next(iter(peers), None)


def _check(
    case: Case, shape: Shape, dtype: torch.dtype, device: torch.device, contenders: list[Contender], seed: int
) -> tuple[Shape, dict[str, Verdict]]:
    """Prove every contender, at ``shape`` or at a smaller one whose float64 reference can be computed here."""
    limit = torch.cuda.mem_get_info(device)[0] // 4 if device.type == "cuda" else _CPU_REFERENCE_BYTES
    checked = case.within(shape, limit)
    proof = Proof(case, checked, dtype, device, seed)
    found = {}
    for contender in contenders:
        if contender.prepare is not None:
            found[contender.name] = proof.judge(lambda inputs, prepare=contender.prepare: prepare(inputs)())
    return checked, found


def _need(case: Case, shape: Shape, dtype: torch.dtype, which: Pass, here: Machine) -> Need:
    flops, nbytes = case.flops(shape, which), case.floor_bytes(shape, dtype, which)
    return Need(shape, dtype, which, flops, nbytes, machine.floor(here.spec, flops, nbytes, dtype))


def _time(
    case: Case, need: Need, contenders: list[Contender], verdicts: dict[str, Verdict], checked: Shape,
    arguments: argparse.Namespace, clock: Clock, device: torch.device,
) -> list[Row]:  # fmt: skip
    """A row for every contender; a time for those whose result was right."""
    inputs = case.make_inputs(need.shape, need.dtype, device, arguments.seed)
    rows, calls = [], {}
    for contender in contenders:
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


def pass_call(inputs: Inputs, forward: Callable[[], Outputs], which: Pass) -> Call:
    """One pass as a call without arguments. A backward pass keeps its forward pass's graph and repeats on it."""
    leaves = [x for x in inputs.tensors.values() if x.requires_grad]

    def backward(outputs: Outputs, *, keep: bool) -> tuple[torch.Tensor, ...]:
        used = [name for name in inputs.output_gradients if name in outputs]
        return torch.autograd.grad(
            [outputs[name] for name in used],
            leaves,
            [inputs.output_gradients[name] for name in used],
            allow_unused=True,
            retain_graph=keep,
        )

    if which == "fwd":
        return torch.no_grad()(forward)
    if which == "both":
        return lambda: backward(forward(), keep=False)
    outputs = forward()
    return lambda: backward(outputs, keep=True)


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
    return " ".join(parts)

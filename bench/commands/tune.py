"""``iokernels tune``: measure launch parameters on this GPU, or show without one what would be tried."""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from iokernels import autotune
from iokernels.autotune import tables
from iokernels.autotune.search import compiling, find_fastest, shortlist
from iokernels.autotune.tunable import Tunable
from iokernels.bench.commands import tune_table
from iokernels.bench.commands.tune_job import Job, compile_job, pack
from iokernels.bench.commands.tune_table import Plan, Tuned
from iokernels.bench.report import render
from iokernels.bench.timing import machine
from iokernels.bench.timing.machine import NoDeviceError
from iokernels.bench.timing.measure import Call, Clock, clock_for
from iokernels.runtime import device as devices
from iokernels.runtime.device import DeviceSpec
from iokernels.testing.case import DTYPES, Case, Tuning, dtype_name, load
from iokernels.testing.case.proof import Proof, Verdict
from iokernels.testing.case.shape import Shape, UsageError

_REFERENCE_BYTES = 2**32
"""The float64 reference that proves a winner may take this much of the GPU."""
_TOP = (4, 16)
"""Candidates a kernel besides the default: in a dry run, and timed."""


@dataclass(frozen=True)
class Item:
    """One kernel at one shape."""

    case: Case
    shape: Shape
    dtype: torch.dtype
    kernel: str
    tunable: Tunable[Any]
    problem: Any

    @property
    def key(self) -> dict[str, Any]:
        """What tables know it by."""
        return self.tunable.key(self.problem)


def run(arguments: argparse.Namespace, console: Console) -> int:
    """Tune, or plan."""
    case = load(arguments.operator)
    if case.tuning is None:
        raise UsageError(f"{case.operator} has no kernels whose launch parameters can be tuned")
    spec = _device(arguments)
    if arguments.json not in (None, "-"):
        render.writable(arguments.json)
    items = _items(case, case.tuning, arguments, spec)
    if any(item.tunable.backend == "triton" for item in items):
        if devices.INTERPRET:
            raise UsageError("TRITON_INTERPRET is set, and interpreted kernels have no speed to tune: unset it")
        if not devices.has_triton():
            raise UsageError("Triton is not installed; without it, --backend cuda tunes the kernels in CUDA C++ alone")
    top = _TOP[not arguments.dry_run] if arguments.top is None else arguments.top
    if arguments.dry_run:
        with _progress() as progress:
            plans = _plans(items, spec, top, progress)
        tune_table.print_plans(plans, spec, console)
        found: list[dict[str, Any]] = [plan.as_dict() for plan in plans]
        failed = 0
    else:
        tuned, failed = _tune(items, spec, top, arguments, console)
        found = [one.as_dict() for one in tuned]
    render.write_json(arguments.json, {"operator": case.operator, "gpu": spec.slug, "rows": found})
    return int(failed > 0)


def _device(arguments: argparse.Namespace) -> DeviceSpec:
    """The GPU to tune for. Raises :class:`NoDeviceError` where it has to be here and is not."""
    here = devices.current()
    if arguments.dry_run:
        return devices.named(arguments.gpu) if arguments.gpu else here or devices.named("h100-sxm")
    if here is None:
        raise NoDeviceError("there is no CUDA GPU to time kernels on; --dry-run shows without one what would be tried")
    if arguments.gpu not in (None, here.slug):
        raise NoDeviceError(f"the GPU here is {here.slug}, not {arguments.gpu}, and only what is here can be timed")
    return here


def _root(place: str) -> Path:
    """Where results are written. Raises :class:`UsageError` for the package where it is not a checkout."""
    if place == "user":
        return tables.user()
    if not (tables.PACKAGE.parent.parent / "pyproject.toml").is_file():
        raise UsageError("--write package is for a checkout of the project; an installed package is not written to")
    return tables.PACKAGE


def _items(case: Case, tuning: Tuning, arguments: argparse.Namespace, spec: DeviceSpec) -> list[Item]:
    """Every kernel of every shape, each problem once."""
    if arguments.shape and arguments.suite:
        raise UsageError("--shape and --suite exclude each other")
    if arguments.shape or (arguments.dry_run and not arguments.suite):
        shapes = tuple(case.vocabulary.parse(text) for text in arguments.shape or ("",))
    else:
        shapes = case.suite(arguments.suite or case.usual_suite)
    able = {name: one for name, one in tuning.tunables.items() if arguments.backend in (None, one.backend)}
    if not able:
        raise UsageError(f"--backend: {case.operator} has no kernels of backend {arguments.backend!r} to tune")
    if arguments.kernel is not None and arguments.kernel not in able:
        raise UsageError(f"--kernel: {case.operator} has {', '.join(able)}, not {arguments.kernel!r}")
    found: dict[Any, Item] = {}
    for dtype in [DTYPES[name] for name in arguments.dtype]:
        takers = {name for name, one in case.implementations.items() if dtype in one.dtypes}
        if not any(tunable.backend in takers for tunable in able.values()):
            raise UsageError(f"--dtype: the kernels of {case.operator} do not take {dtype_name(dtype)}")
        for shape in shapes:
            for kernel in tuning.kernels(shape):
                tunable = tuning.tunables[kernel]
                if kernel in able and arguments.kernel in (None, kernel) and tunable.backend in takers:
                    problem = tuning.problem(shape, dtype, kernel, spec)
                    found.setdefault((kernel, problem), Item(case, shape, dtype, kernel, tunable, problem))
    return list(found.values())


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
        console=Console(stderr=True), transient=True,
    )  # fmt: skip


def _plans(items: list[Item], spec: DeviceSpec, top: int, progress: Progress) -> list[Plan]:
    """Rank, and compile the first few."""
    moved = [bytes_moved(item, spec) for item in items]
    chosen = [
        shortlist(item.tunable, item.problem, spec, top, nbytes) for item, nbytes in zip(items, moved, strict=True)
    ]
    jobs = [
        Job(item.case.operator, str(item.shape), dtype_name(item.dtype), item.kernel, config, pack(spec))
        for item, configs in zip(items, chosen, strict=True)
        for config in configs
    ]
    compiled: dict[int, Any] = {}
    task = progress.add_task("compiling", total=len(jobs))
    with compiling(jobs, compile_job, os.cpu_count() or 1) as done:
        for position, outcome in done:
            compiled[position] = outcome
            progress.update(task, advance=1, description=escape(f"compiling {jobs[position].kernel}"))
    progress.remove_task(task)
    in_order = iter([compiled[position] for position in range(len(jobs))])
    plans = []
    for item, configs, nbytes in zip(items, chosen, moved, strict=True):
        funnel = item.tunable.space.explain(item.problem, spec)
        each = [None if nbytes is None else nbytes(config) for config in configs]
        made = [next(in_order) for _ in configs]
        plans.append(Plan(item.kernel, item.shape, item.dtype, funnel, configs, each, made))
    return plans


def bytes_moved(item: Item, spec: DeviceSpec) -> Callable[[Any], int] | None:
    """The bytes that the kernels of this one's pass request with a configuration of it, by the operator's own account;
    None where that does not ask for this kernel's configuration. The other kernels have the ones they would have."""
    accounts = item.case.cuda_accounts if item.tunable.backend == "cuda" else item.case.accounts
    if accounts is None:
        return None
    with devices.assume(spec):
        chosen = accounts.configs(item.shape, item.dtype)
    if item.kernel not in chosen:
        return None
    which = "bwd" if _leaves(item) else "fwd"

    def nbytes(config: Any) -> int:
        with devices.assume(spec):
            made = accounts.model(item.shape, item.dtype, {**chosen, item.kernel: config})
        return sum(account.model.total for account in made.values() if account.which == which)

    return nbytes


def wanted(items: list[Item], spec: DeviceSpec, root: Path, *, stale: bool, again: bool) -> list[Item]:
    """The items that are still to be tuned: all that have no entry or a stale one, with ``stale`` only the latter, with
    ``again`` all."""
    found = []
    for item in items:
        table = tables.load(item.tunable, spec, root)
        entry = next((one for one in table.entries if one.key == item.key), None) if table else None
        old = table is not None and entry in table.stale()
        if again or old or (entry is None and not stale):
            found.append(item)
    return found


def _tune(
    items: list[Item], spec: DeviceSpec, top: int, arguments: argparse.Namespace, console: Console
) -> tuple[list[Tuned], int]:
    """Time what has no entry yet, and count what failed. Each result is on disk before the next begins."""
    device = machine.pick_device("cuda")
    console.print(escape(machine.describe(device).header()), highlight=False)
    root = _root(arguments.write)
    todo = wanted(items, spec, root, stale=arguments.stale, again=arguments.again)
    if len(todo) < len(items):
        done = f"{len(items) - len(todo)} of {len(items)} are done already, in {root}"
        console.print(done, style="dim", highlight=False)
    clock, ends = clock_for(device), time.monotonic() + arguments.budget
    found: list[Tuned] = []
    failed = 0
    try:
        with _progress() as progress:
            bar = progress.add_task("", total=len(todo))
            for position, item in enumerate(todo):
                left = len(todo) - position
                progress.update(bar, description=escape(f"{item.kernel} {item.shape}"))
                (plan,) = _plans([item], spec, top, progress)
                seconds = (ends - time.monotonic()) / left
                if seconds <= 0:
                    console.print(f"the budget is spent: {left} are left for the next run", style="yellow")
                    break
                try:
                    found.append(tune_item(item, spec, plan, device, clock, seconds, root))
                except RuntimeError as error:  # said of this kernel and shape; the others are tuned
                    failed += 1
                    console.print(f"[bold red]failed[/] {escape(f'{item.kernel} {item.shape}: {error}')}")
                progress.advance(bar)
    finally:
        if found:
            tune_table.print_tuned(found, console)
            console.print(f"written to {root}", style="dim", highlight=False)
    return found, failed


def tune_item(
    item: Item, spec: DeviceSpec, plan: Plan, device: torch.device, clock: Clock, seconds: float, root: Path
) -> Tuned:
    """Time the candidates that compiled, for about ``seconds``, prove the winner, and save it."""
    if isinstance(plan.compiled[0], str):
        raise RuntimeError(f"the default {plan.configs[0]} does not compile: {plan.compiled[0]}")
    configs = [config for config, made in zip(plan.configs, plan.compiled, strict=True) if not isinstance(made, str)]
    launch = _launch(item, device)

    def call_with(config: Any) -> Call:
        def call() -> Any:
            with autotune.override(**{item.kernel: config}):
                return launch()

        return call

    start = time.monotonic()
    forward = not _leaves(item)
    winner = find_fastest(
        configs, call_with, _prover(item, device), clock, seconds=seconds, capturable=forward
    )  # fmt: skip
    made = plan.compiled[plan.configs.index(winner.config)]
    facts = {"ms": round(winner.timing.p50 * 1e3, 6), "gain": round(winner.gain, 4)}
    if not isinstance(made, str):
        facts |= {"registers": made.registers, "shared_bytes": made.shared_bytes, "spill_bytes": made.spill_bytes}
    entry = tables.Entry(item.key, asdict(winner.config), facts)
    tables.save(item.tunable, spec, root, [entry])
    autotune.forget()
    return Tuned(item.kernel, item.shape, item.dtype, winner, plan.configs[0], time.monotonic() - start)


def _leaves(item: Item) -> tuple[str, ...]:
    assert item.case.tuning is not None
    return item.case.tuning.leaves[item.kernel]


def _launch(item: Item, device: torch.device) -> Call:
    """A call of the public function that launches the kernel: its forward pass, or the part of the backward pass that
    yields the kernel's gradients."""
    inputs = item.case.make_inputs(item.shape, item.dtype, device, 0)
    leaves = [name for name in _leaves(item) if name in inputs.tensors]
    for name, x in inputs.tensors.items():
        x.requires_grad_(name in leaves)
    outputs = item.case.run(inputs, item.tunable.backend)
    if not leaves:
        return lambda: item.case.run(inputs, item.tunable.backend)
    used = [name for name in inputs.output_gradients if name in outputs]
    gradients = [inputs.output_gradients[name] for name in used]
    return lambda: torch.autograd.grad(
        [outputs[name] for name in used], [inputs.tensors[name] for name in leaves], gradients, retain_graph=True
    )


def _prover(item: Item, device: torch.device) -> Callable[[Any], Verdict]:
    """Holds a configuration against the reference; the truth is computed when it is first asked for."""
    proofs: list[Proof] = []

    def prove(config: Any) -> Verdict:
        if not proofs:
            shape = item.case.within(item.shape, _REFERENCE_BYTES)
            proofs.append(Proof(item.case, shape, item.dtype, device))
        with autotune.override(**{item.kernel: config}):
            backend = item.tunable.backend
            return proofs[0].judge(
                lambda inputs: item.case.run(inputs, backend), gradients_too=item.case.differentiates(backend)
            )

    return prove

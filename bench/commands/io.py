"""``iokernels io``: the bytes that an operator's kernels move, per shape: least, modelled and counted."""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape

from iokernels.bench.commands.io_rows import PASSES, Counted, Row
from iokernels.bench.report import render
from iokernels.bench.report.rows import tile_text
from iokernels.runtime import device as devices
from iokernels.runtime.device import DeviceSpec, assume, named
from iokernels.runtime.errors import UnsupportedError
from iokernels.testing.case import DTYPES, Case, dtype_name, load
from iokernels.testing.case.accounts import Configs
from iokernels.testing.case.count import count
from iokernels.testing.case.shape import Shape, UsageError

COUNTED_BYTES = 48 * 2**20
"""Kernels that request more than this are counted on a smaller shape: the interpreter moves some MB a second."""


def run(arguments: argparse.Namespace, console: Console) -> int:
    """Print the accounts that the arguments select; 1 if a count was not its model."""
    case = load(arguments.operator)
    backend = arguments.backend
    if backend == "cuda":
        case = replace(case, accounts=case.cuda_accounts)
    if case.accounts is None:
        raise UsageError(f"{case.operator} has no {backend} kernels, and so no accounts")
    if arguments.shape and arguments.suite:
        raise UsageError("--shape and --suite exclude each other")
    texts = arguments.shape or ()
    shapes = tuple(map(case.vocabulary.parse, texts)) or case.suite(arguments.suite or "quick")
    dtypes = [DTYPES[name] for name in arguments.dtype]
    for dtype in dtypes:
        if dtype not in case.implementations[backend].dtypes:
            raise UsageError(
                f"--dtype is {dtype_name(dtype)}, which the {backend} kernels of {case.operator} do not take"
            )
    for target in (arguments.plot, arguments.json if arguments.json != "-" else None):
        if target is not None:
            render.writable(target)
    if arguments.plot is not None:
        from iokernels.bench.report import plot

        plot.require("--plot")
        if case.accounts.on_chip is None:
            raise UsageError(f"--plot: the case of {case.operator} does not say how bytes depend on on-chip memory")
    counting = devices.emulate_cuda() if backend == "cuda" else devices.interpret_triton()
    spec = named(arguments.gpu)
    rows, refused = [], []
    with Console(stderr=True).status("counting bytes on the CPU"):
        for shape in shapes:
            for dtype in dtypes:
                try:
                    rows.append(_row(case, backend, shape, dtype, spec, counting))
                except UnsupportedError as reason:
                    refused.append(f"{shape} {dtype_name(dtype)}: {reason}")
    if not rows:
        raise UsageError(refused[0])
    for line in refused:
        console.print(escape(line), style="dim", highlight=False)
    _print(case, backend, rows, spec, counting, console)
    if arguments.plot is not None:
        from iokernels.bench.report import plot_io

        plot_io.draw(arguments.plot, case, rows, spec)
    wrong = any(row.counted is not None and row.counted.wrong() for row in rows)
    render.write_json(
        arguments.json,
        {
            "operator": case.operator, "backend": backend, "gpu": spec.slug, "ok": not wrong,
            "naive": case.accounts.naive,
            "rows": [row.as_dict() for row in rows],
        },
    )  # fmt: skip
    return int(wrong)


def _row(
    case: Case, backend: str, shape: Shape, dtype: torch.dtype, spec: DeviceSpec, counting: bool
) -> Row:  # fmt: skip
    accounts = case.accounts
    assert accounts is not None
    with assume(spec):
        configs = accounts.configs(shape, dtype)
    whole: list[Any] = [which for which in PASSES if which in case.passes]
    on_chip = accounts.on_chip and accounts.on_chip.nbytes(shape, dtype, configs)
    return Row(
        shape=shape,
        dtype=dtype,
        configs=configs,
        kernels=accounts.model(shape, dtype, configs),
        floors={which: case.floor_bytes(shape, dtype, which) for which in whole},
        naive={which: accounts.naive_bytes(shape, dtype, which) for which in whole},
        counted=_count(case, backend, shape, dtype, configs) if counting else None,
        on_chip=on_chip,
        bound=accounts.on_chip and accounts.on_chip.lower_bound(shape, dtype, on_chip or 0),
    )


def _count(case: Case, backend: str, shape: Shape, dtype: torch.dtype, configs: Configs) -> Counted:
    """Count on ``shape``, or on the first smaller one that the interpreter can do."""
    assert case.accounts is not None
    model = case.accounts.model(shape, dtype, configs)
    while sum(account.model.total for account in model.values()) > COUNTED_BYTES:
        smaller = case.smaller(shape)
        if smaller == shape:
            break
        shape, model = smaller, case.accounts.model(smaller, dtype, configs)
    return Counted(shape, count(case, shape, dtype, configs, 0, backend), model)


def _print(case: Case, backend: str, rows: list[Row], spec: DeviceSpec, counting: bool, console: Console) -> None:
    console.print(f"bytes that thread blocks request from global memory, with the tiles of {spec.slug}", style="dim")
    numbers = ("floor", "model", "of floor", "count", "naive", "of model")
    for row in rows:
        console.print(f"\n{case.operator} {escape(str(row.shape))} {dtype_name(row.dtype)}", highlight=False)
        table = render.table("kernel", "tiles", *numbers, right=numbers)
        for kernel, account in row.kernels.items():
            table.add_row(
                kernel.removeprefix(f"{case.operator}_").removesuffix("_kernel"),
                tile_text(row.configs.get(kernel.removesuffix("_kernel"))),
                _size(account.floor.total), _size(account.model.total),
                _times(account.model.total, account.floor.total), _verdict(row.counted, kernel), "", "",
            )  # fmt: skip
        for which in row.floors:
            floor, model, naive = row.floors[which], row.modelled(which), row.naive[which]
            table.add_row(
                f"[bold]whole {which}[/]", "", _size(floor), _size(model), _times(model, floor), "", _size(naive),
                _times(naive, model),
            )  # fmt: skip
        console.print(table)
        _print_notes(case, row, console)
    console.print(f"\nnaive: {case.accounts.naive if case.accounts else ''}.", style="dim", highlight=False)
    if not counting:
        why = "Triton is not installed, or was imported without its interpreter"
        if backend == "cuda":
            why = "there is no g++, which the emulator needs"
        console.print(f"not counted: {why}", style="dim")


def _print_notes(case: Case, row: Row, console: Console) -> None:
    counted = row.counted
    if counted is not None:
        where = "" if counted.shape == row.shape else f" at {counted.shape}, smaller for the interpreter's sake"
        wrong = counted.wrong()
        if not wrong:
            console.print(f"counted{where}: every kernel as its model", style="green", highlight=False)
        for kernel in wrong:
            model = counted.model[kernel].model if kernel in counted.model else None
            console.print(
                f"WRONG{where}: {kernel}: counted {counted.counts.get(kernel)}, model {model}",
                style="bold red", highlight=False,
            )  # fmt: skip
    if row.bound is not None and row.on_chip is not None:
        console.print(
            f"lower bound (an order, without its constant): {row.bound.formula} = {_size(row.bound.nbytes)} "
            f"for M = {_size(row.on_chip)} in a block; {row.bound.source}",
            style="dim", highlight=False,
        )  # fmt: skip


def _verdict(counted: Counted | None, kernel: str) -> str:
    if counted is None:
        return "-"
    if kernel in counted.wrong():
        return "[bold red]WRONG[/]"
    return _size(counted.counts[kernel].total) if kernel in counted.counts else "0 B"


def _size(nbytes: float) -> str:
    return render.amount(nbytes, "B")


def _times(number: float, of: float) -> str:
    return f"{number / of:.2f}x" if of else "-"

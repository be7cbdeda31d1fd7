"""Bytes against on-chip memory as a picture. Needs matplotlib, an optional dependency."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from iokernels.runtime.device import DeviceSpec
from iokernels.testing.case import Case, dtype_name
from iokernels.testing.case.accounts import Account, OnChip
from iokernels.testing.case.shape import Shape

if TYPE_CHECKING:
    from iokernels.bench.commands.io_rows import Row


def draw(target: str, case: Case, rows: list[Row], spec: DeviceSpec) -> None:
    """One panel for each shape and dtype, of the forward pass: the model with the best tiles for M bytes on chip, the
    tiles that ``spec`` would take, the floor, the naive formula, and the lower bound as a slope without a constant."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 1.0 + 3.4 * len(rows)), layout="constrained")
    axes = figure.subplots(len(rows), 1, squeeze=False)[:, 0]
    for axis, row in zip(axes, rows, strict=True):
        _panel(axis, case, row, spec)
    figure.suptitle(f"{case.operator}: bytes requested by the forward pass against on-chip memory", fontsize=10)
    figure.savefig(target, dpi=150)


def best_tilings(case: Case, shape: Shape, dtype: torch.dtype) -> list[tuple[int, int]]:
    """(on-chip bytes M, the fewest bytes that any tiling within M moves), M rising and the bytes falling."""
    assert case.accounts is not None
    assert case.accounts.on_chip is not None
    on_chip: OnChip = case.accounts.on_chip
    points = sorted(
        (on_chip.nbytes(shape, dtype, tiling), _forward(case.accounts.model(shape, dtype, tiling)))
        for tiling in on_chip.tilings(shape, dtype)
    )
    best: list[tuple[int, int]] = []
    for held, moved in points:
        if not best or moved < best[-1][1]:
            best.append((held, moved))
    return best


def _forward(kernels: Mapping[str, Account]) -> int:
    return sum(account.model.total for account in kernels.values() if account.which == "fwd")


def _panel(axis: Any, case: Case, row: Row, spec: DeviceSpec) -> None:
    assert case.accounts is not None
    assert case.accounts.on_chip is not None
    best = best_tilings(case, row.shape, row.dtype)
    held, moved = zip(*best, strict=True)
    axis.step(held, moved, where="post", marker=".", color="C0", label="model, best tiles within M")
    # From below the smallest tiles, so that both regimes of the bound are seen.
    memory = [int(held[0] / 8 * (8 * held[-1] / held[0]) ** (step / 99)) for step in range(100)]
    bound = [case.accounts.on_chip.lower_bound(row.shape, row.dtype, nbytes).nbytes for nbytes in memory]
    axis.plot(memory, bound, "--", color="C3", label="lower bound (order, no constant)")
    axis.axhline(row.naive["fwd"], color="C1", label="naive formula")
    axis.axhline(row.floors["fwd"], color="C2", label="floor: inputs and outputs once")
    axis.plot([row.on_chip], [row.modelled("fwd")], "*", markersize=12, color="C0", label=f"tiles on {spec.slug}")
    axis.axvline(spec.smem_block, linestyle=":", color="grey", label=f"shared memory of a block, {spec.slug}")
    axis.set(xscale="log", yscale="log", xlabel="M: on-chip bytes of a block", ylabel="bytes")
    axis.set_title(f"{dtype_name(row.dtype)} {row.shape}", fontsize=8, loc="left")
    axis.legend(fontsize=7)

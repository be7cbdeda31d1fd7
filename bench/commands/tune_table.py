"""What ``iokernels tune`` prints: the funnel of a dry run, and the winners of a run."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.markup import escape

from iokernels.autotune.search import Winner
from iokernels.autotune.space import Funnel
from iokernels.bench.report import render
from iokernels.bench.report.rows import config_text
from iokernels.runtime.device import DeviceSpec
from iokernels.testing.case import dtype_name
from iokernels.testing.case.shape import Shape

if TYPE_CHECKING:
    from iokernels.autotune.resources import Resources


@dataclass(frozen=True)
class Plan:
    """The funnel of one kernel at one shape. The first of ``configs`` is the default; ``nbytes`` are the bytes that
    ranked them, and ``compiled`` is what the compiler made of each, or its error."""

    kernel: str
    shape: Shape
    dtype: torch.dtype
    funnel: Funnel
    configs: list[Any]
    nbytes: list[int | None]
    compiled: list[Resources | str]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "kernel": self.kernel,
            "shape": str(self.shape),
            "dtype": dtype_name(self.dtype),
            "funnel": asdict(self.funnel),
            "candidates": [
                {"config": asdict(config), "default": position == 0, "bytes": moved} | _resources(made)
                for position, (config, moved, made) in enumerate(
                    zip(self.configs, self.nbytes, self.compiled, strict=True)
                )
            ],
        }


def _resources(made: Resources | str) -> dict[str, Any]:
    if isinstance(made, str):
        return {"error": made}
    return {"registers": made.registers, "spill_bytes": made.spill_bytes, "shared_bytes": made.shared_bytes}


@dataclass(frozen=True)
class Tuned:
    """The outcome for one kernel at one shape."""

    kernel: str
    shape: Shape
    dtype: torch.dtype
    winner: Winner[Any]
    default: Any
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "kernel": self.kernel,
            "shape": str(self.shape),
            "dtype": dtype_name(self.dtype),
            "config": asdict(self.winner.config),
            "ms": self.winner.timing.p50 * 1e3,
            "gain": self.winner.gain,
            "faults": [{"config": asdict(config), "reason": why} for config, why in self.winner.faults.items()],
            "seconds": self.seconds,
        }


def _tiles(config: Any) -> str:
    return config_text("", {"": config})


def print_plans(plans: list[Plan], spec: DeviceSpec, console: Console) -> None:
    """One funnel after another."""
    console.print(
        f"what tuning would try on {spec.slug} (sm_{spec.sm}), and the bytes that a pass requests with it: fewest "
        "first, then what is nearest to the default; nothing is timed",
        style="dim", highlight=False,
    )  # fmt: skip
    for plan in plans:
        console.print(f"\n[bold]{plan.kernel}[/] {escape(str(plan.shape))} {dtype_name(plan.dtype)}", highlight=False)
        good = [made for made in plan.compiled if not isinstance(made, str)]
        spilling = sum(made.spill_bytes > 0 for made in good)
        console.print(
            f"{plan.funnel} -> compiled {len(good)}, the first by bytes and the default, {spilling} spill",
            highlight=False,
        )
        numbers = ("bytes", "regs", "spills", "shared", "blocks")
        table = render.table("tiles", *numbers, "limit", "", right=numbers)
        rows = sorted(range(len(plan.configs)), key=lambda position: plan.nbytes[position] or 0)
        for position in rows:
            made, note = plan.compiled[position], "default" if position == 0 else ""
            moved = plan.nbytes[position]
            shown = "-" if moved is None else render.amount(moved, "B")
            if isinstance(made, str):
                table.add_row(_tiles(plan.configs[position]), shown, *"----", "-", escape(f"{note} {made}".strip()))
                continue
            spills = f"[yellow]{made.spill_bytes} B[/]" if made.spill_bytes else "0 B"
            blocks, limit = made.blocks_per_sm(spec)
            table.add_row(
                _tiles(plan.configs[position]), shown, str(made.registers), spills, str(made.shared_bytes),
                str(blocks), limit, note,
            )  # fmt: skip
        console.print(table)


def print_tuned(found: list[Tuned], console: Console) -> None:
    """A line for each kernel and shape, then what went wrong with candidates."""
    numbers = ("ms", "vs default")
    table = render.table("kernel", "shape", "dtype", "tiles", *numbers, "", right=numbers)
    for one in found:
        same = one.winner.config == one.default
        table.add_row(
            one.kernel, escape(str(one.shape)), dtype_name(one.dtype), _tiles(one.winner.config),
            render.milliseconds(one.winner.timing.p50), f"{one.winner.gain:.2f}x", "default" if same else "",
        )  # fmt: skip
    console.print(table)
    for one in found:
        for config, why in one.winner.faults.items():
            console.print(f"[yellow]out[/] {one.kernel} {_tiles(config)}: {escape(why)}", highlight=False)

"""One line of a benchmark: what ran, how long it took, how right it was."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, is_dataclass, replace
from typing import Any

import torch

from iokernels.bench.timing.compare import Comparison
from iokernels.bench.timing.machine import Floor
from iokernels.bench.timing.measure import Timing
from iokernels.testing.case import Pass, dtype_name
from iokernels.testing.case.shape import Shape


@dataclass(frozen=True)
class Need:
    """What a shape and a pass ask of any implementation. ``floor`` is None without a roofline."""

    shape: Shape
    dtype: torch.dtype
    which: Pass
    flops: int
    nbytes: int
    floor: Floor | None


@dataclass(frozen=True)
class Row:
    """One implementation on one need.

    ``kind`` is ``backend`` or ``peer``. ``status`` is ``timed``, or why there is no time: ``wrong``, ``failed``,
    ``refused``, ``missing`` or ``not timed``, with ``reason``. ``error`` is the worst error of outputs and gradients as
    a multiple of its budget, found at ``checked``.
    """

    need: Need
    name: str
    kind: str
    status: str
    reason: str = ""
    config: str = "-"
    timing: Timing | None = None
    peak_bytes: int | None = None
    error: float | None = None
    checked: Shape | None = None
    speedup: float | None = None
    """How many times faster than the baseline."""
    versus: Comparison | None = None
    """How it compares with another version (``--against``)."""

    @property
    def tflops(self) -> float | None:
        """Useful floating-point operations, in TFLOP/s."""
        return None if self.timing is None else self.need.flops / self.timing.p50 / 1e12

    @property
    def gbytes(self) -> float | None:
        """Bytes that had to be moved, in GB/s. What the kernel moves beyond them does not count."""
        return None if self.timing is None else self.need.nbytes / self.timing.p50 / 1e9

    @property
    def roofline(self) -> float | None:
        """Share of the roofline, from 0 to 1."""
        if self.timing is None or self.need.floor is None:
            return None
        return self.need.floor.seconds / self.timing.p50

    def as_dict(self) -> dict[str, Any]:
        """Flat, for JSON and CSV. Times in milliseconds."""
        timing, floor = self.timing, self.need.floor
        return {
            "shape": str(self.need.shape),
            "dtype": dtype_name(self.need.dtype),
            "pass": self.need.which,
            "name": self.name,
            "kind": self.kind,
            "status": self.status,
            "reason": self.reason,
            "config": self.config,
            "ms": timing and timing.p50 * 1e3,
            "ms_p20": timing and timing.p20 * 1e3,
            "ms_p80": timing and timing.p80 * 1e3,
            "samples": timing and timing.samples,
            "how": timing and timing.how,
            "tflops": self.tflops,
            "gbytes_per_s": self.gbytes,
            "roofline": self.roofline,
            "peak_bytes": self.peak_bytes,
            "error": self.error,
            "checked_at": self.checked and str(self.checked),
            "speedup": self.speedup,
            "need_flops": self.need.flops,
            "need_bytes": self.need.nbytes,
            "floor_ms": floor and floor.seconds * 1e3,
            "floor_bound": floor and floor.bound,
            "against": self.versus and self.versus.other,
            "time_ratio": self.versus and self.versus.ratio,
            "time_ratio_low": self.versus and self.versus.low,
            "time_ratio_high": self.versus and self.versus.high,
            "slower": self.versus and self.versus.slower,
        }


def against(rows: list[Row], baseline: str | None) -> list[Row]:
    """The rows of one need, each with its speed relative to ``baseline``."""
    base = next((row.timing.p50 for row in rows if row.name == baseline and row.timing is not None), None)
    if base is None:
        return rows
    return [row if row.timing is None else replace(row, speedup=base / row.timing.p50) for row in rows]


def flops_unit(rows: list[Row]) -> tuple[str, float]:
    """The unit that fits the fastest of ``rows``, and how many of it make a TFLOP/s."""
    return ("TFLOP/s", 1.0) if max((row.tflops or 0.0 for row in rows), default=1.0) >= 1.0 else ("GFLOP/s", 1e3)


def config_text(operator: str, configs: Mapping[str, object]) -> str:
    """Launch parameters of the kernels of one call: ``128x64 w8 s3``, after the kernel's name if there are several."""
    short = {name.removeprefix(f"{operator}_"): _parameters(config) for name, config in configs.items()}
    if len(short) == 1:
        return next(iter(short.values()))
    return "; ".join(f"{name} {text}" for name, text in short.items()) or "-"


def tile_text(config: Any) -> str:
    """The block sizes of a configuration, ``128x64``; ``-`` without one."""
    values = asdict(config) if is_dataclass(config) and not isinstance(config, type) else {}
    return "x".join(str(value) for name, value in values.items() if name.startswith("block_")) or "-"


def _parameters(config: Any) -> str:
    values = asdict(config) if is_dataclass(config) and not isinstance(config, type) else {"config": config}
    tile = "x".join(str(value) for name, value in values.items() if name.startswith("block_"))
    rest = [
        f"{_LETTERS.get(name, f'{name}=')}{value}" for name, value in values.items() if not name.startswith("block_")
    ]
    return " ".join(filter(None, (tile, *rest)))


_LETTERS = {"num_warps": "w", "num_stages": "s"}

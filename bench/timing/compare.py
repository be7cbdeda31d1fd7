"""Is this version slower than another one? The arithmetic of ``bench --against``, and results from a file.

Against a revision both versions are timed in turn, and every round gives one ratio of times: ours over theirs. Their
median is reported with a 95 % confidence interval from order statistics, which assumes nothing of their distribution.
Against a file the ratio is that of the medians, and the interval spans the 20th to 80th percentiles of both.
Slower means that the whole interval lies beyond what is tolerated.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from iokernels.bench.timing.machine import Machine
from iokernels.testing.case.shape import UsageError


@dataclass(frozen=True)
class Comparison:
    """How many times as long a row takes as it does in ``other``, and the interval that this ratio lies in.

    Without a ratio, ``reason`` says why there is none.
    """

    other: str
    tolerated: float
    ratio: float | None = None
    low: float | None = None
    high: float | None = None
    rounds: int | None = None
    reason: str = ""

    @property
    def slower(self) -> bool:
        """Whether the time grew by more than the tolerated share, beyond noise."""
        return self.low is not None and self.low > 1.0 + self.tolerated

    def __str__(self) -> str:
        if self.ratio is None or self.low is None or self.high is None:
            return f"{self.other}: {self.reason}"
        basis = f"{self.rounds} rounds" if self.rounds is not None else "20th to 80th percentiles"
        found = f"{self.other}: time {_percent(self.ratio)} ({_percent(self.low)} to {_percent(self.high)}, {basis})"
        return f"{found}: slower by more than {self.tolerated * 100:.3g}%" if self.slower else found


def _percent(ratio: float) -> str:
    return f"{(ratio - 1.0) * 100.0:+.1f}%"


def median_interval(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float, float]:
    """The median with the ends of its confidence interval around it: ``(low, median, high)``.

    The ends are the k-th smallest and the k-th largest value. The true median lies outside them with a probability of
    twice the binomial tail below k, whatever the distribution is. With fewer than six values no interval of two values
    is that sure, and the ends are the extremes.
    """
    ordered = sorted(values)
    count, tail, k = len(ordered), 0.0, 0
    while True:
        tail += 2.0 * math.comb(count, k) / 2.0**count
        if tail > 1.0 - confidence:
            break
        k += 1
    k = max(k, 1)
    return ordered[k - 1], float(np.median(ordered)), ordered[-k]


def interleaved(
    ours: Callable[[], float], theirs: Callable[[], float], rounds: int, *, other: str, tolerated: float
) -> Comparison:
    """Compare two samplers (seconds) over rounds in which each is sampled once, and goes first in turn."""
    ratios = []
    for turn in range(rounds):
        if turn % 2:
            their_time = theirs()
            our_time = ours()
        else:
            our_time = ours()
            their_time = theirs()
        ratios.append(our_time / their_time)
    low, ratio, high = median_interval(ratios)
    return Comparison(other, tolerated, ratio, low, high, rounds)


class Saved:
    """The rows of a JSON file that ``bench --json`` wrote on this machine. Raises :class:`UsageError`."""

    def __init__(self, path: str, operator: str, seed: int, here: Machine, tolerated: float) -> None:
        self.label = Path(path).name
        self._tolerated = tolerated
        try:
            report = json.loads(Path(path).read_text())
            there, rows = report["machine"], report["rows"]
            found = {"operator": report["operator"], "seed": report["seed"]}
            self._rows = {(row["shape"], row["dtype"], row["pass"], row["name"]): row for row in rows}
        except OSError as error:
            raise UsageError(f"--against: {path} cannot be read: {error.strerror}") from None
        except (ValueError, LookupError, TypeError):
            raise UsageError(f"--against: {path} is not a file that `iokernels bench --json` wrote") from None
        for what, value in (("operator", operator), ("seed", seed)):
            if found[what] != value:
                raise UsageError(f"--against: {path} has the {what} {found[what]}, and this run has {value}")
        if _identity(there) != _identity(here.as_dict()):
            raise UsageError(
                f"--against: {path} was measured on another machine: {_identity(there)}; this is "
                f"{_identity(here.as_dict())}"
            )

    def compare(self, row: dict[str, Any]) -> Comparison:
        """The comparison of one timed row, as :meth:`Row.as_dict` gives it."""
        theirs = self._rows.get((row["shape"], row["dtype"], row["pass"], row["name"]))
        if theirs is None or not theirs["ms"]:
            return Comparison(self.label, self._tolerated, reason="not compared: it has no time for this row")
        return Comparison(
            self.label,
            self._tolerated,
            ratio=row["ms"] / theirs["ms"],
            low=row["ms_p20"] / theirs["ms_p80"],
            high=row["ms_p80"] / theirs["ms_p20"],
        )


def _identity(machine: dict[str, Any]) -> str:
    return f"{machine.get('name')} ({', '.join(machine.get('details', ()))})"

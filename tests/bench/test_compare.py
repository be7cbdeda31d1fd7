"""Whether a version is slower than another: the arithmetic, on clocks that are made up."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from iokernels.bench.cli import main
from iokernels.bench.timing import machine
from iokernels.bench.timing.compare import Comparison, Saved, interleaved, median_interval
from iokernels.testing.case.shape import UsageError


def clock(*times: float) -> Callable[[], float]:
    """A sampler that gives these times over and over."""
    return itertools.cycle(times).__next__


def compared(ours: Callable[[], float], theirs: Callable[[], float], tolerated: float = 0.05) -> Comparison:
    return interleaved(ours, theirs, 21, other="git:main", tolerated=tolerated)


def test_a_fifth_more_time_is_a_fifth_slower() -> None:
    found = compared(clock(1.2), clock(1.0))
    assert (found.ratio, found.low, found.high, found.rounds) == (1.2, 1.2, 1.2, 21)
    assert found.slower
    assert str(found) == "git:main: time +20.0% (+20.0% to +20.0%, 21 rounds): slower by more than 5%"
    assert not compared(clock(1.2), clock(1.0), tolerated=0.25).slower
    assert not compared(clock(1.0), clock(1.2)).slower
    assert not compared(clock(1.0), clock(1.0), tolerated=0.0).slower


def test_a_fifth_more_time_is_seen_through_noise() -> None:
    """Every sample is disturbed by up to a tenth, and the machine slows down to a half meanwhile."""
    noise = np.random.default_rng(0)
    drift = itertools.count()

    def noisy(seconds: float) -> Callable[[], float]:
        return lambda: seconds * (1.0 + noise.uniform(0.0, 0.1)) * (1.0 + next(drift) / 42)

    found = compared(noisy(1.2), noisy(1.0))
    assert found.slower
    assert found.ratio == pytest.approx(1.2, rel=0.05)
    assert not compared(noisy(1.0), noisy(1.0)).slower


def test_noise_alone_is_not_slower() -> None:
    assert not compared(clock(1.0, 3.0), clock(1.0)).slower, "half of the rounds are no slower"


def test_who_goes_first_alternates() -> None:
    order: list[str] = []

    def sampler(name: str) -> Callable[[], float]:
        return lambda: order.append(name) or 1.0  # type: ignore[func-returns-value]

    interleaved(sampler("ours"), sampler("theirs"), 3, other="x", tolerated=0.0)
    assert order == ["ours", "theirs", "theirs", "ours", "ours", "theirs"]


@pytest.mark.parametrize(("count", "k"), [(1, 1), (5, 1), (6, 1), (9, 2), (12, 3), (20, 6), (101, 41)])
def test_interval_of_the_median(count: int, k: int) -> None:
    """The ranks of the tables of the sign test at 95 %."""
    values = [float(value) for value in range(1, count + 1)]
    assert median_interval(values[::-1]) == (k, (count + 1) / 2, count + 1 - k)


def test_interval_holds_the_median_as_often_as_it_says() -> None:
    draws = np.random.default_rng(0).exponential(size=(2000, 21))
    held = [low <= np.log(2.0) <= high for low, _, high in map(median_interval, draws.tolist())]
    assert 0.95 <= np.mean(held) <= 0.99


HERE = machine.describe(torch.device("cpu"))
ROW = {"shape": "n=8", "dtype": "fp32", "pass": "fwd", "name": "torch", "ms": 1.0, "ms_p20": 0.9, "ms_p80": 1.1}


def saved(folder: Path, **changes: Any) -> str:
    report = {"machine": HERE.as_dict(), "operator": "op", "seed": 0, "rows": [ROW]} | changes
    target = folder / "r.json"
    target.write_text(json.dumps(report))
    return str(target)


def test_against_a_file(tmp_path: Path) -> None:
    other = Saved(saved(tmp_path), "op", 0, HERE, 0.05)
    found = other.compare(ROW | {"ms": 1.5, "ms_p20": 1.32, "ms_p80": 1.62})
    assert (found.ratio, found.low, found.high) == pytest.approx((1.5, 1.2, 1.8))
    assert found.slower
    assert not other.compare(ROW).slower
    assert not other.compare(ROW | {"ms": 1.2, "ms_p20": 1.1, "ms_p80": 1.3}).slower, "within both spreads"
    absent = other.compare(ROW | {"shape": "n=9"})
    assert (absent.ratio, absent.slower) == (None, False)
    assert str(absent) == "r.json: not compared: it has no time for this row"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"machine": HERE.as_dict() | {"name": "NVIDIA T4"}}, r"measured on another machine: NVIDIA T4 \("),
        ({"machine": HERE.as_dict() | {"details": ["96 cores"]}}, r"\(96 cores\); this is "),
        ({"operator": "other"}, "has the operator other, and this run has op"),
        ({"seed": 7}, "has the seed 7"),
        ({"rows": [{}]}, "is not a file that"),
        ({"rows": None}, "is not a file that"),
    ],
)
def test_files_that_cannot_be_compared_with(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Saved(saved(tmp_path, **changes), "op", 0, HERE, 0.05)


BENCH = ["bench", "flash_attention", "--device", "cpu", "--backend", "torch", "--seconds", "0.02"]


def test_the_command_against_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The saved times are divided by a thousand: whatever the machine does meanwhile, this run is slower."""
    target = tmp_path / "r.json"
    shape = ["--shape", "b=1,h=2,n=64,d=16"]
    assert main([*BENCH, *shape, "--json", str(target)]) == 0
    report = json.loads(target.read_text())
    for row in report["rows"]:
        row |= {name: row[name] / 1000.0 for name in ("ms", "ms_p20", "ms_p80") if row[name]}
    target.write_text(json.dumps(report))
    found = tmp_path / "found.json"
    assert main([*BENCH, *shape, "--against", str(target), "--json", str(found)]) == 1
    compared = json.loads(found.read_text())
    rows = {row["name"]: row for row in compared["rows"]}
    assert not compared["ok"]
    assert rows["torch"]["slower"]
    assert rows["torch"]["time_ratio"] > 2.0
    assert rows["torch"]["against"] == "r.json"
    assert rows["sdpa"]["against"] is None, "a peer that became slower is not our fault"
    assert "slower by more than 5%" in " ".join(capsys.readouterr().out.split())
    for row in report["rows"]:
        row |= {name: row[name] * 1e6 for name in ("ms", "ms_p20", "ms_p80") if row[name]}
    target.write_text(json.dumps(report))
    assert main([*BENCH, *shape, "--against", str(target)]) == 0
    assert main([*BENCH, "--shape", "b=1,h=2,n=65,d=16", "--against", str(target)]) == 2
    assert "nothing could be compared with" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--fail-over", "5%"], "--fail-over needs --against"),
        (["--against", "none.json"], "none.json cannot be read"),
        (["--against", "git:no-such-revision"], "--against git:REV: "),
    ],
)
def test_usage_errors(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*BENCH, *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("text", ["", "%", "five", "5", "100%", "nan"])
def test_shares_that_are_none(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([*BENCH, "--against", "r.json", "--fail-over", text])
    assert "is not a share such as 5% or 0.05" in capsys.readouterr().err

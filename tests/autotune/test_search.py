"""The race and the choice of a winner, on a clock that we set."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pytest
import torch

from iokernels.autotune import measure
from iokernels.autotune.measure import beats, race
from iokernels.autotune.search import compiling, find_fastest, ranked, shortlist
from iokernels.bench.timing.measure import Timing
from iokernels.runtime.device import named
from iokernels.testing.case.proof import Verdict

H100 = named("h100-sxm")


class FakeClock:
    """A call returns the seconds it takes; every second or so one sample is ``jitter`` times as long."""

    def __init__(self, jitter: float = 1.0) -> None:
        self.jitter = jitter
        self.samples = 0

    def sampler(self, call: Callable[[], Any], *, capturable: bool) -> tuple[Callable[[], float], str]:
        def sample() -> float:
            self.samples += 1
            return call() * (self.jitter if self.samples % 2 else 1.0)

        return sample, "fake"

    def peak_bytes(self, call: Callable[[], Any]) -> int | None:
        return None


class Config(NamedTuple):
    seconds: float


def search(
    costs: Sequence[float], wrong: Sequence[float] = (), broken: Sequence[float] = (), jitter: float = 1.0
) -> tuple[Any, list[float]]:
    """The winner of configurations that take ``costs``, the first by default; and those that were proved."""
    proved: list[float] = []

    def call_with(config: Config) -> Callable[[], float]:
        def call() -> float:
            if config.seconds in broken:
                raise RuntimeError("out of resource: shared memory\nand more")
            return config.seconds

        return call

    def prove(config: Config) -> Verdict:
        proved.append(config.seconds)
        return (
            Verdict("wrong", 3.0, "out", "the error of out is 3 times")
            if config.seconds in wrong
            else Verdict("ok", 0.5)
        )

    return find_fastest([Config(c) for c in costs], call_with, prove, FakeClock(jitter), seconds=1.0), proved


def test_the_fastest_wins_and_is_proved() -> None:
    winner, proved = search([4e-3, 3e-3, 2e-3, 5e-3, 6e-3, 7e-3])
    assert winner.config.seconds == 2e-3
    assert winner.gain == pytest.approx(2.0)
    assert winner.timing.p50 == 2e-3
    assert winner.faults == {}
    assert proved == [2e-3]


def test_the_default_stays_unless_it_is_beaten_by_more_than_noise() -> None:
    winner, proved = search([1e-3, 0.98e-3, 2e-3, 3e-3])
    assert (winner.config.seconds, winner.gain, proved) == (1e-3, 1.0, [])
    assert search([1e-3, 0.96e-3])[0].config.seconds == 0.96e-3
    # The same lead drowns where samples scatter by half.
    assert search([1e-3, 0.96e-3], jitter=1.5)[0].config.seconds == 1e-3


def test_a_wrong_result_does_not_win() -> None:
    winner, proved = search([4e-3, 1e-3, 2e-3], wrong=[1e-3])
    assert winner.config.seconds == 2e-3
    assert proved == [1e-3, 2e-3]
    assert winner.faults == {Config(1e-3): "the error of out is 3 times"}


def test_what_does_not_run_drops_out() -> None:
    winner, _ = search([4e-3, 1e-3, 2e-3], broken=[1e-3])
    assert winner.config.seconds == 2e-3
    assert winner.faults == {Config(1e-3): "RuntimeError: out of resource: shared memory"}


def test_a_default_that_does_not_run_is_an_error() -> None:
    with pytest.raises(RuntimeError, match=re.escape("the default Config(seconds=0.004) does not run: RuntimeError")):
        search([4e-3, 1e-3], broken=[4e-3])


def test_an_interruption_is_not_swallowed() -> None:
    def interrupted() -> float:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        find_fastest([1, 2], lambda config: interrupted, lambda config: Verdict("ok"), FakeClock(), seconds=1.0)


def test_the_slower_half_drops_out_and_the_incumbent_stays() -> None:
    heats: list[int] = []
    calls = {str(i): lambda i=i: (16 - i) * 1e-3 for i in range(16)}
    found = race(calls, "0", FakeClock(), seconds=1.0, on_heat=heats.append)
    assert heats == [9, 5, 3]
    assert list(found) == ["15", "14", "0"]


def test_more_seconds_buy_more_samples() -> None:
    def samples(seconds: float) -> int:
        clock = FakeClock()
        race({str(i): lambda i=i: (i + 1) * 1e-2 for i in range(8)}, "0", clock, seconds=seconds)
        return clock.samples

    assert samples(30.0) > 2 * samples(1.0)


def test_beating() -> None:
    def timing(p20: float, p50: float, p80: float) -> Timing:
        return Timing(p20, p50, p80, 5, "fake")

    incumbent = timing(0.98, 1.0, 1.05)
    assert beats(timing(0.9, 0.92, 0.95), incumbent)
    assert not beats(timing(0.9, 0.98, 0.99), incumbent)
    assert not beats(timing(0.5, 0.9, 1.5), incumbent)


def test_no_race_while_a_graph_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="while a CUDA graph is captured"):
        race({"0": lambda: 1.0}, "0", FakeClock(), seconds=1.0)


def test_what_moves_fewer_bytes_is_ranked_first_and_then_what_is_near_the_default(
    tunable: Any, make_problem: Any, make_config: Any
) -> None:
    def tiles(width: int, nbytes: Callable[[Any], int] | None) -> list[tuple[int, int]]:
        return [(one.tile, one.warps) for one in ranked(tunable, make_problem(width=width), H100, nbytes)]

    near = [(16, 4), (16, 8), (32, 4), (32, 8)]
    assert tiles(32, None) == tiles(32, lambda config: 7) == near
    assert tiles(32, lambda config: 1024 // config.tile) == near[2:] + near[:2]
    assert tiles(64, lambda config: min(config.tile, 32)) == [*near, (64, 4), (64, 8)]


def test_the_short_list_starts_with_the_default(tunable: Any, make_problem: Any, make_config: Any) -> None:
    def chosen(top: int) -> list[Any]:
        return shortlist(tunable, make_problem(), H100, top, lambda config: 1024 // config.tile)

    assert chosen(2) == [make_config(16, 4), make_config(64, 4), make_config(64, 8)]
    assert chosen(0) == [make_config(16, 4)]
    assert len(chosen(99)) == len(set(chosen(99))) == 6


def test_jobs_are_done_in_other_processes_and_errors_come_back() -> None:
    # math.isqrt stands for a compilation: importable, and it raises for a negative number.
    import math

    with compiling([9, -1, 16], math.isqrt, workers=2) as done:  # pyright: ignore[reportArgumentType]
        found = dict(done)
    assert found[0] == 3
    assert found[2] == 4
    assert found[1] == "ValueError: isqrt() argument must be nonnegative"

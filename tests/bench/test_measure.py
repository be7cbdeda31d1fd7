"""The timing protocol on a clock that we set."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from iokernels.bench.timing.measure import Call, CpuClock, clock_for, measure


class FakeClock:
    """Calls return what they cost. Remembers their order."""

    def __init__(self) -> None:
        self.order: list[float] = []
        self.capturable: list[bool] = []

    def sampler(self, call: Call, *, capturable: bool) -> tuple[Callable[[], float], str]:
        self.capturable.append(capturable)

        def sample() -> float:
            cost = call()
            self.order.append(cost)
            return cost

        return sample, "fake"

    def peak_bytes(self, call: Call) -> int | None:
        return 7


def test_median_and_percentiles() -> None:
    costs = iter([9.0, 9.0] + [float(i) for i in range(1, 102)])
    found = measure({"a": lambda: next(costs)}, FakeClock(), seconds=45.0)["a"]
    # Warm-up took two samples, and 45 s make five rounds of the last one's 9 s.
    assert (found.samples, found.how) == (5, "fake")
    assert (found.p20, found.p50, found.p80) == (pytest.approx(1.8), 3.0, pytest.approx(4.2))


def test_rounds_are_interleaved_and_turn() -> None:
    clock = FakeClock()
    found = measure({"a": lambda: 0.1, "b": lambda: 0.2, "c": lambda: 0.3}, clock, seconds=1.0)
    assert {name: timing.p50 for name, timing in found.items()} == {"a": 0.1, "b": 0.2, "c": 0.3}
    rounds = found["a"].samples
    assert rounds == 5
    timed = clock.order[-3 * rounds :]
    assert timed[:6] == [0.1, 0.2, 0.3, 0.2, 0.3, 0.1]


@pytest.mark.parametrize(("cost", "rounds"), [(100.0, 5), (1e-9, 100), (0.02, 25)])
def test_time_spent_decides_the_number_of_rounds(cost: float, rounds: int) -> None:
    assert measure({"a": lambda: cost}, FakeClock(), seconds=0.5)["a"].samples == rounds


def test_a_slow_call_does_not_leave_the_fast_one_cold() -> None:
    """Warm-up belongs to each call: a fast one is repeated until it has settled."""
    clock = FakeClock()
    measure({"fast": lambda: 1e-3, "slow": lambda: 10.0}, clock, seconds=0.5)
    assert clock.order[:101].count(1e-3) >= 100


def test_nothing_to_time() -> None:
    assert measure({}, FakeClock()) == {}


def test_the_caller_decides_what_may_be_captured() -> None:
    clock = FakeClock()
    measure({"a": lambda: 1.0}, clock, capturable=False)
    assert clock.capturable == [False]


def test_the_cpu_clock_times_the_call() -> None:
    clock = clock_for(torch.device("cpu"))
    assert isinstance(clock, CpuClock)
    sample, how = clock.sampler(lambda: torch.ones(1), capturable=True)
    assert 0.0 < sample() < 10.0
    assert how == "wall"
    assert clock.peak_bytes(lambda: None) is None


@pytest.mark.with_gpu
def test_the_gpu_clock() -> None:
    device = torch.device("cuda")
    clock = clock_for(device)
    x = torch.ones(2**20, device=device)
    sample, how = clock.sampler(lambda: x + 1, capturable=True)
    assert how == "graph"
    assert 0.0 < sample() < 1e-3
    assert clock.sampler(lambda: x + 1, capturable=False)[1] == "events"
    # .item() synchronises, which a capture forbids: such a call is timed by events.
    assert clock.sampler(lambda: x[0].item(), capturable=True)[1] == "events"
    assert clock.peak_bytes(lambda: x + 1) == 4 * 2**20

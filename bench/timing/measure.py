"""How long does a call take? The protocol of every figure that this library prints.

All calls are warmed up first and then timed in rounds, one sample of each call a round and in turning order, so that a
machine that slows down slows all of them. The median and the 20th and 80th percentiles are reported.

On a GPU a sample is what CUDA events measure on the stream: the L2 cache is overwritten before it, and the stream is
kept busy while the host catches up, so that the time is the kernels' and not Python's. Calls under 100 us are
replayed from a CUDA graph where they can be captured. On a CPU a sample is wall time, with whatever the caches hold.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

Call = Callable[[], Any]

SHORT = 100e-6
"""Calls under this many seconds are replayed from a CUDA graph."""
_ROUNDS = (5, 100)
"""Fewest and most rounds."""


@dataclass(frozen=True)
class Timing:
    """Seconds of one call, and how they were taken: ``wall``, ``events`` or ``graph``."""

    p20: float
    p50: float
    p80: float
    samples: int
    how: str


class Clock(Protocol):
    """Times calls on one kind of device."""

    def sampler(self, call: Call, *, capturable: bool) -> tuple[Callable[[], float], str]:
        """A function that runs ``call`` once and returns its seconds, and how it takes them.

        ``capturable`` says that a CUDA graph may hold the call.
        """
        ...

    def peak_bytes(self, call: Call) -> int | None:
        """The most memory that one call holds beyond what was allocated before it, or None where nobody counts."""
        ...


class CpuClock:
    """Wall time."""

    def sampler(self, call: Call, *, capturable: bool) -> tuple[Callable[[], float], str]:
        """See :class:`Clock`."""

        def sample() -> float:
            start = time.perf_counter()
            call()
            return time.perf_counter() - start

        return sample, "wall"

    def peak_bytes(self, call: Call) -> int | None:
        """None: PyTorch does not count memory on the CPU."""
        return None


class CudaClock:
    """CUDA events on the current stream, with a cold L2 cache."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        l2 = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 64 * 2**20)
        self._flush = torch.empty(2 * l2, dtype=torch.uint8, device=device)

    def sampler(self, call: Call, *, capturable: bool) -> tuple[Callable[[], float], str]:
        """See :class:`Clock`."""
        sample = self._events(call)
        sample()  # the first call compiles
        if capturable and min(sample() for _ in range(3)) < SHORT:
            replay = _captured(call)
            if replay is not None:
                return self._events(replay), "graph"
        return sample, "events"

    def peak_bytes(self, call: Call) -> int | None:
        """What the caching allocator counted."""
        torch.cuda.synchronize(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        call()
        torch.cuda.synchronize(self.device)
        return torch.cuda.max_memory_allocated(self.device) - before

    def _events(self, call: Call) -> Callable[[], float]:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

        def sample() -> float:
            torch.cuda._sleep(1_000_000)  # clock cycles, about half a millisecond: the host gets ahead
            self._flush.zero_()
            start.record()
            call()
            end.record()
            end.synchronize()
            return start.elapsed_time(end) / 1e3

        return sample


def _captured(call: Call) -> Call | None:
    """Replay of ``call`` from a CUDA graph, or None where it cannot be captured."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.stream(stream):
            for _ in range(3):
                call()
        torch.cuda.current_stream().wait_stream(stream)
        with torch.cuda.graph(graph):
            call()
    except RuntimeError:
        torch.cuda.synchronize()
        return None
    return graph.replay


def clock_for(device: torch.device) -> Clock:
    """The clock of a device."""
    return CudaClock(device) if device.type == "cuda" else CpuClock()


def measure(
    calls: Mapping[str, Call],
    clock: Clock,
    *,
    seconds: float = 0.5,
    capturable: bool = True,
    on_sample: Callable[[], None] | None = None,
) -> dict[str, Timing]:
    """Time ``calls`` against one another, about ``seconds`` for each. ``on_sample`` is called after every round."""
    if not calls:
        return {}
    samplers = {name: clock.sampler(call, capturable=capturable) for name, call in calls.items()}
    last = {name: warm(sample, seconds / 5) for name, (sample, _) in samplers.items()}
    fewest, most = _ROUNDS
    rounds = int(min(max(seconds * len(calls) / max(sum(last.values()), 1e-9), fewest), most))
    names = list(samplers)
    taken: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            taken[name].append(samplers[name][0]())
        if on_sample is not None:
            on_sample()
    found = {}
    for name, samples in taken.items():
        p20, p50, p80 = (float(value) for value in np.percentile(samples, (20, 50, 80)))
        found[name] = Timing(p20, p50, p80, len(samples), samplers[name][1])
    return found


def warm(sample: Callable[[], float], seconds: float) -> float:
    """Run until caches, clocks and compilers have settled; the seconds of the last sample."""
    spent = last = sample()
    for _ in range(_ROUNDS[1]):
        last = sample()
        spent += last
        if spent >= seconds:
            break
    return last

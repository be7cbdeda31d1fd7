"""Search for a kernel's fastest configuration: rank by bytes, compile the first few, time them, prove the winner."""

from __future__ import annotations

import math
import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from iokernels.runtime.device import DeviceSpec

from .measure import beats, race
from .tunable import Tunable

if TYPE_CHECKING:
    from iokernels.bench.timing.measure import Call, Clock, Timing
    from iokernels.testing.case.proof import Verdict

    from .resources import Resources

C = TypeVar("C")
J = TypeVar("J")


@dataclass(frozen=True)
class Winner(Generic[C]):
    """What a search found. ``gain`` is how many times faster than the default it ran beside it; 1 for the default
    itself. ``faults`` says what was wrong with candidates that ran into errors or returned wrong results."""

    config: C
    timing: Timing
    gain: float
    faults: dict[C, str] = field(default_factory=dict)


def ranked(tunable: Tunable[C], problem: Any, device: DeviceSpec, nbytes: Callable[[C], int] | None = None) -> list[C]:
    """Every configuration that fits, those first that move the fewest bytes of memory, by ``nbytes(config)``.

    Of those that move as many, or where nothing is known of bytes, the ones nearest to the default come first: by the
    logarithms of all numbers, summed up, so that to double one weighs as much as to halve it. What is still alike stays
    in the order of the axes.
    """
    default = tunable.default(problem)
    names = [axis.name for axis in tunable.space.axes]

    def rank(config: C) -> tuple[int, float]:
        steps = (math.log2((1 + getattr(config, name)) / (1 + getattr(default, name))) for name in names)
        return 0 if nbytes is None else nbytes(config), sum(map(abs, steps))

    return sorted(tunable.space.candidates(problem, device), key=rank)


def shortlist(
    tunable: Tunable[C], problem: Any, device: DeviceSpec, top: int, nbytes: Callable[[C], int] | None = None
) -> list[C]:
    """The default, and the first ``top`` configurations of :func:`ranked`."""
    return list(dict.fromkeys((tunable.default(problem), *ranked(tunable, problem, device, nbytes)[:top])))


@contextmanager
def compiling(
    jobs: Sequence[J], compile_one: Callable[[J], Resources], workers: int
) -> Iterator[Iterator[tuple[int, Resources | str]]]:
    """Compile in a pool of processes; gives (position, resources or the error's first line) as each one is done.

    ``compile_one`` has to be importable, and jobs picklable. Triton keeps what it compiled in its cache on disk, so a
    second search over the same kernel reads it back. Leaving the context early drops what was not begun.
    """
    pool = ProcessPoolExecutor(max(1, min(workers, len(jobs))), mp_context=multiprocessing.get_context("spawn"))
    futures = {pool.submit(compile_one, job): position for position, job in enumerate(jobs)}
    try:
        yield ((futures[done], _outcome(done)) for done in as_completed(futures))
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _outcome(done: Future[Resources]) -> Resources | str:
    error = done.exception()
    return done.result() if error is None else _sentence(error)


def _sentence(error: BaseException) -> str:
    """One line of an error, whatever it is."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def find_fastest(
    configs: Sequence[C],
    call_with: Callable[[C], Call],
    prove: Callable[[C], Verdict],
    clock: Clock,
    *,
    seconds: float,
    capturable: bool = True,
) -> Winner[C]:
    """The fastest of ``configs`` that returns right results; the first of them is the default and holds unless another
    beats it by more than noise.

    ``call_with(config)`` is a call that launches with it. A candidate that raises drops out. Raises ``RuntimeError``
    where the default itself fails, and while a CUDA graph is captured.
    """
    default, faults = configs[0], {}
    calls: dict[C, Call] = {}
    for config in configs:
        call = call_with(config)
        try:
            call()
        except Exception as error:  # too many resources, or anything else: this one is out, the others run
            if config is default:
                raise RuntimeError(f"the default {default} does not run: {_sentence(error)}") from error
            faults[config] = _sentence(error)
        else:
            calls[config] = call
    names = {str(position): config for position, config in enumerate(calls)}
    timings = race(
        {name: calls[config] for name, config in names.items()}, "0", clock, seconds=seconds, capturable=capturable
    )
    incumbent = timings["0"]
    for name, timing in timings.items():
        if name == "0" or not beats(timing, incumbent):
            continue
        verdict = prove(names[name])
        if verdict.status == "ok":
            return Winner(names[name], timing, incumbent.p50 / timing.p50, faults)
        faults[names[name]] = verdict.reason or str(verdict)
    return Winner(default, incumbent, 1.0, faults)

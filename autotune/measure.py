"""Which of several launches is fastest? Successive halving over the protocol of :mod:`iokernels.bench.timing.measure`.

Every heat times its candidates interleaved, round by round, with a cold L2 cache and short kernels replayed from a CUDA
graph. The slower half drops out; the incumbent stays in every heat, so that what beats it beats it side by side.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from iokernels.bench.timing.measure import Call, Clock, Timing

NOISE = 0.03
"""A challenger that is faster by less than this share has not won."""


def race(
    calls: Mapping[str, Call],
    incumbent: str,
    clock: Clock,
    *,
    seconds: float,
    capturable: bool = True,
    on_heat: Callable[[int], None] | None = None,
) -> dict[str, Timing]:
    """Times of the calls of the last heat, fastest first, the incumbent among them; about ``seconds`` in all.

    ``on_heat`` is told how many are left. Raises ``RuntimeError`` while a CUDA graph is captured.
    """
    from iokernels.bench.timing.measure import measure

    refuse_capture()
    standing = dict(calls)
    heats = max(1, math.ceil(math.log2(max(len(calls), 1))))
    while True:
        share = seconds / heats / len(standing)
        timings = measure(standing, clock, seconds=share, capturable=capturable)
        ranked = sorted(timings, key=lambda name: timings[name].p50)
        if len(ranked) <= 3:
            return {name: timings[name] for name in ranked}
        kept = ranked[: len(ranked) // 2]
        standing = {name: calls[name] for name in dict.fromkeys((*kept, incumbent))}
        if on_heat is not None:
            on_heat(len(standing))


def beats(challenger: Timing, incumbent: Timing) -> bool:
    """Whether the difference is more than noise: of the medians, and of the bulk of the samples."""
    return challenger.p50 < incumbent.p50 * (1.0 - NOISE) and challenger.p80 < incumbent.p20


def refuse_capture() -> None:
    """Raise where timing would be recorded into a CUDA graph."""
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("tuning cannot run while a CUDA graph is captured: tune first, then capture")

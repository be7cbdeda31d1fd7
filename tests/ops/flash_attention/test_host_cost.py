"""What a public call of flash_attention costs the host: checks, dispatch, operator boundary, autograd; no kernel.

The aim is 10 us without and 18 us with gradients on a quiet machine. Other processes disturb a clock, so the shortest
of many short rounds counts, and the bounds leave room: in time, or in calls of the bare operator on the same machine.
"""

from __future__ import annotations

from collections.abc import Callable
from timeit import repeat
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from iokernels import flash_attention
from iokernels.ops.flash_attention import op
from iokernels.ops.flash_attention.options import Options

# Bound at import, before a test's memory is poisoned: filling it would be most of the cost.
allocate = torch.empty_like

AIM = {"no grad": 10e-6, "grad": 18e-6}


@pytest.fixture
def inputs(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Small q, k, v, and a backend that only allocates its results."""
    q, k, v = (torch.randn(2, 4, 8, 16) for _ in range(3))
    out, lse = torch.empty(2, 4, 8, 16), torch.empty(2, 4, 8)
    trivial = SimpleNamespace(forward=lambda *_: (allocate(out), allocate(lse)))
    monkeypatch.setattr(op, "_backend", lambda name: trivial)
    return [q, k, v]


def bare_call(inputs: list[Tensor]) -> Callable[[], Any]:
    """The line to compare with: the operator with its arguments ready."""
    operator = torch.ops.iokernels.flash_attention_fwd.default
    options = tuple(Options(scale=0.25))
    return lambda: operator(*inputs, "torch", *options)


def shortest(call: Callable[[], Any]) -> float:
    """Seconds of one call."""
    return min(repeat(call, number=20, repeat=400)) / 20


def test_bare_operator(benchmark: Any, inputs: list[Tensor]) -> None:
    benchmark(bare_call(inputs))
    assert shortest(bare_call(inputs)) < 3 * AIM["no grad"]


@pytest.mark.parametrize(("mode", "bare_calls"), [("no grad", 4), ("grad", 8)])
def test_public_call(benchmark: Any, inputs: list[Tensor], mode: str, bare_calls: int) -> None:
    bound = max(3 * AIM[mode], bare_calls * shortest(bare_call(inputs)))
    for x in inputs:
        x.requires_grad_(mode == "grad")
    assert flash_attention(*inputs).requires_grad == (mode == "grad")
    benchmark(lambda: flash_attention(*inputs))
    assert shortest(lambda: flash_attention(*inputs)) < bound

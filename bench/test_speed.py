"""The quick suites under pytest-benchmark: ``pytest bench --benchmark-only``.

Nothing collects this file unless it is asked for. Times are those of :mod:`iokernels.bench.timing.passes`, on the
device that the command line would pick; its protocol (rounds in turn, a cold cache on a GPU) is that of
``iokernels bench``, and pytest-benchmark's own is used here, whose histories and comparisons it serves.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch

from iokernels.bench.timing import contenders, machine
from iokernels.bench.timing.contenders import Contender
from iokernels.bench.timing.passes import pass_call
from iokernels.ops import CASES
from iokernels.testing.case import Pass, dtype_name, load
from iokernels.testing.case.proof import Verdict
from iokernels.testing.case.shape import Shape

_SEED = 0


def pytest_generate_tests(metafunc: Any) -> None:
    """Every operator's quick shapes, forward and backward, on each backend and peer that this machine has."""
    device = machine.pick_device(None)
    asked = [
        (operator, shape, which, contender)
        for operator in CASES
        for shape in load(operator).suite("quick")
        for which in ("fwd", "bwd")
        if which in load(operator).passes
        for contender in contenders.contenders(load(operator), device)
        if contender.prepare is not None
    ]
    names = [f"{operator}-{shape}-{which}-{contender.name}" for operator, shape, which, contender in asked]
    metafunc.parametrize(("operator", "shape", "which", "contender"), asked, ids=names)


def test_speed(benchmark: Any, operator: str, shape: Shape, which: Pass, contender: Contender) -> None:
    """Prove the result once for a shape, then time it. A peer that computes something else is skipped."""
    import pytest

    case, device = load(operator), machine.pick_device(None)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    verdict = _verdicts(operator, shape, dtype, device)[contender.name]
    if contender.kind == "peer" and verdict.status != "ok":
        pytest.skip(verdict.reason or str(verdict))
    assert verdict.status == "ok", verdict.reason or str(verdict)
    assert contender.prepare is not None
    inputs = case.make_inputs(shape, dtype, device, _SEED)
    call = pass_call(inputs, contender.prepare(inputs), which)
    benchmark.group = f"{operator} {which} {dtype_name(dtype)} {shape}"
    benchmark.extra_info.update(
        need_flops=case.flops(shape, which),
        need_bytes=case.floor_bytes(shape, dtype, which),
        error=verdict.ratio,
        machine=machine.describe(device).header(),
    )
    benchmark(partial(_finished, call) if device.type == "cuda" else call)


def _finished(call: Callable[[], Any]) -> None:
    """One call until the GPU is done with it."""
    call()
    torch.cuda.synchronize()


@cache
def _verdicts(operator: str, shape: Shape, dtype: torch.dtype, device: torch.device) -> dict[str, Verdict]:
    case = load(operator)
    return contenders.prove(case, shape, dtype, device, contenders.contenders(case, device), _SEED)[1]

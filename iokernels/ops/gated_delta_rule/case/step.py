"""gated_delta_rule_step: inputs, costs and the points that prove it."""

from __future__ import annotations

from typing import Any

import torch

from iokernels.ops.gated_delta_rule.api import MAX_HEAD_DIM, gated_delta_rule_step
from iokernels.ops.shared.layout import state_dtype
from iokernels.testing.case import Case, Implementation, Inputs, Outputs, Pass, Point
from iokernels.testing.case.shape import Shape

from . import HALVES, drawn, limit
from .compile import STEP_COMPILATION, STEP_TUNING
from .shapes import STEP_VOCABULARY
from .traffic import STEP_ACCOUNTS, TILES, step_account


def make_inputs(shape: Shape, dtype: torch.dtype, device: torch.device, seed: int) -> Inputs:
    """As those of gated_delta_rule, and a state."""
    tensors, (_, normal) = drawn(shape, dtype, device, seed)
    tensors["state"] = normal(shape.b, shape.h, shape.d, shape.dv).to(state_dtype(dtype))
    return Inputs(shape, {name: x.detach() for name, x in tensors.items()}, {}, {}, seed)


def run(inputs: Inputs, backend: str) -> Outputs:
    """The public function, on a copy of the state."""
    given: dict[str, Any] = dict(inputs.tensors)
    state = given.pop("state").clone()
    out = gated_delta_rule_step(**given, state=state, backend=backend)
    return {"out": out, "state": state}


def flops(shape: Shape, which: Pass) -> int:
    """Decay, two products of the state with a vector and one outer product a token."""
    return 7 * shape.b * shape.h * shape.n * shape.d * shape.dv


def floor_bytes(shape: Shape, dtype: torch.dtype, which: Pass) -> int:
    """The state read and written once, the tokens' tensors once."""
    return sum(step_account(shape, dtype, TILES)["gated_delta_rule_step_kernel"].floor)


def _point(name: str, *, quick: bool = False, **given: float) -> Point:
    return Point(name, STEP_VOCABULARY.shape(**({"b": 2, "h": 4, "n": 1, "d": 32} | given)), quick)


def check_points() -> tuple[Point, ...]:
    """Every option."""
    return (
        _point("one token", quick=True),
        _point("a few tokens", n=3),
        _point("the delta rule", decay=0),
        _point("a decay for each head", decay=2, n=2),
        _point("shared keys, v wider, strong decay", hk=2, d=20, dv=40, n=2, gate=20.0, quick=True),
    )


CASE = Case(
    operator="gated_delta_rule_step",
    functions=("gated_delta_rule_step",),
    vocabulary=STEP_VOCABULARY,
    implementations={
        "reference": Implementation((*HALVES, torch.float32, torch.float64), "any", "fwd"),
        "torch": Implementation((*HALVES, torch.float32, torch.float64), "any", "fwd"),
        "triton": Implementation((*HALVES, torch.float32), f"1-{MAX_HEAD_DIM}", "fwd"),
    },
    suites={
        "quick": (STEP_VOCABULARY.parse("b=4,h=8,n=1,d=64"),),
        "decode": tuple(STEP_VOCABULARY.parse(f"b={b},h=32,n=1,d=128") for b in (1, 16, 64)),
    },
    make_inputs=make_inputs,
    run=run,
    flops=flops,
    floor_bytes=floor_bytes,
    reference_bytes=lambda shape: 4 * 8 * shape.b * shape.h * shape.d * shape.dv,
    smaller=lambda shape: shape.replace(b=shape.b // 2) if shape.b > 1 else shape,
    check_points=check_points,
    accounts=STEP_ACCOUNTS,
    compilation=STEP_COMPILATION,
    tuning=STEP_TUNING,
    passes=("fwd",),
    limit=limit,
    documented="gated_delta_rule",
)

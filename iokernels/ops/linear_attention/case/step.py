"""linear_attention_step: inputs, costs and the points that prove it."""

from __future__ import annotations

import torch

from iokernels.ops.linear_attention.api import linear_attention_step
from iokernels.ops.linear_attention.refusals import MAX_WIDTH
from iokernels.testing.case import Case, Implementation, Inputs, Outputs, Pass, Point
from iokernels.testing.case.shape import Shape

from . import HALVES, drawn, drawn_state, limit, options_of
from .accounts import STEP_ACCOUNTS, state_bytes
from .compile import STEP_COMPILATION
from .shapes import STEP_VOCABULARY
from .tuning import STEP_TUNING


def make_inputs(shape: Shape, dtype: torch.dtype, device: torch.device, seed: int) -> Inputs:
    """As those of linear_attention, and a state."""
    tensors, _, normal = drawn(shape, dtype, device, seed)
    tensors["state"] = drawn_state(shape, normal, dtype)
    return Inputs(shape, {name: x.detach() for name, x in tensors.items()}, options_of(shape), {}, seed)


def run(inputs: Inputs, backend: str) -> Outputs:
    """The public function, on a copy of the state."""
    given = {**inputs.tensors, **inputs.options}
    state = given.pop("state").clone()
    out = linear_attention_step(**given, state=state, backend=backend)
    return {"out": out, "state": state}


def flops(shape: Shape, which: Pass) -> int:
    """Decay, one outer product and one product of the state with a vector a token."""
    return 5 * shape.n * state_bytes(shape, 1)


def floor_bytes(shape: Shape, dtype: torch.dtype, which: Pass) -> int:
    """The state read and written once, the tokens' tensors once."""
    rows = shape.b * shape.n
    decay = 4 * (0, rows * shape.h, shape.h)[shape.decay]
    return 2 * state_bytes(shape) + 2 * dtype.itemsize * rows * (shape.hk * shape.d + shape.h * shape.dv) + decay


def _point(name: str, *, quick: bool = False, **given: float) -> Point:
    return Point(name, STEP_VOCABULARY.shape(**({"b": 2, "h": 4, "n": 1, "d": 32} | given)), quick)


def check_points() -> tuple[Point, ...]:
    """Every option."""
    return (
        _point("one token", quick=True),
        _point("a few tokens", b=1, h=3, n=3),
        _point("no decay", decay=0),
        _point("a decay for each token", decay=1, n=2),
        _point("shared keys, v wider, strong decay", hk=2, d=20, dv=40, n=2, gate=20.0, decay=1, quick=True),
        _point("normalised", normalize=1, n=2),
        _point("Taylor map, normalised (BASED)", taylor=1, normalize=1, d=16, dv=20, decay=0, n=2, quick=True),
        _point("tensors [b, n, h, d]", bnhd=1, n=2),
    )


CASE = Case(
    operator="linear_attention_step",
    functions=("linear_attention_step",),
    vocabulary=STEP_VOCABULARY,
    implementations={
        "reference": Implementation((*HALVES, torch.float32, torch.float64), "any", "fwd"),
        "torch": Implementation((*HALVES, torch.float32, torch.float64), "any", "fwd"),
        "triton": Implementation((*HALVES, torch.float32), f"1-{MAX_WIDTH}", "fwd"),
    },
    suites={
        "quick": (STEP_VOCABULARY.parse("b=4,h=8,n=1,d=64"),),
        "decode": (
            *(STEP_VOCABULARY.parse(f"b={b},h=32,n=1,d=128") for b in (1, 16, 64)),
            STEP_VOCABULARY.parse("b=16,h=16,n=1,d=16,dv=64,decay=0,taylor=1,normalize=1"),
        ),
    },
    make_inputs=make_inputs,
    run=run,
    flops=flops,
    floor_bytes=floor_bytes,
    reference_bytes=lambda shape: 4 * state_bytes(shape, 8),
    smaller=lambda shape: shape.replace(b=shape.b // 2) if shape.b > 1 else shape,
    check_points=check_points,
    accounts=STEP_ACCOUNTS,
    compilation=STEP_COMPILATION,
    tuning=STEP_TUNING,
    passes=("fwd",),
    limit=limit,
    documented="linear_attention",
)

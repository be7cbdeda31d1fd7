"""The bytes of linear_attention: the least that any kernel moves, and those of the formula in separate steps."""

from __future__ import annotations

from typing import Literal

import torch

from iokernels.ops.linear_attention.options import columns, features
from iokernels.ops.linear_attention.triton.tuning import Config
from iokernels.testing.case.accounts import Account, Accounts, Configs
from iokernels.testing.case.shape import Shape

from . import compile as kernels
from . import traffic
from .shapes import STEP_VOCABULARY, VOCABULARY, lengths

_NUMBER = 4  # bytes of a state's element, and of a log decay


def state_bytes(shape: Shape, number: int = _NUMBER) -> int:
    """The states of all sequences, once."""
    rows, width = features(shape.d, bool(shape.taylor)), columns(shape.dv, bool(shape.normalize))
    return number * len(lengths(shape)) * shape.h * rows * width


def floor_bytes(shape: Shape, dtype: torch.dtype, which: str) -> int:
    """Each input read once, each output written once; the final state counts, and so does the initial one if any."""
    rows, size = sum(lengths(shape)), dtype.itemsize
    number = 8 if dtype == torch.float64 else _NUMBER
    decay = number * (0, rows * shape.h, shape.h)[shape.decay]
    inputs = size * rows * (2 * shape.hk * shape.d + shape.h * shape.dv)
    out = size * rows * shape.h * shape.dv
    state = state_bytes(shape, number)
    forward = inputs + decay + out + state * (1 + shape.state)
    # Backward reads the inputs again and the gradient of out (and out, where it was divided), and writes gradients.
    backward = 2 * inputs + decay * (1 + shape.learn) + out * (1 + shape.normalize) + 3 * state * shape.state
    return {"fwd": forward, "bwd": backward, "both": forward + backward}[which]


NAIVE = (
    "the cheaper of two forms. Quadratic: the weights q k^T are written, read and decayed, written and read with v; "
    "backward they are read twice more, and their gradient written, decayed and read twice. Recurrent: every token "
    "reads and writes the float32 state; backward that of every token, which was kept, is read, and its gradient read "
    "and written"
)


def naive_bytes(shape: Shape, dtype: torch.dtype, which: Literal["fwd", "bwd"]) -> int:
    """The bytes of :data:`NAIVE`, and the inputs and outputs once."""
    weights = dtype.itemsize * shape.h * sum(n * n for n in lengths(shape))
    states = sum(lengths(shape)) * state_bytes(shape) // max(len(lengths(shape)), 1)
    extra = min(4 * weights, 2 * states) if which == "fwd" else min(7 * weights, 3 * states)
    return extra + floor_bytes(shape, dtype, which)


def problem(shape: Shape, dtype: torch.dtype) -> traffic.Problem:
    """The call as the byte model takes it."""
    packed = bool(shape.get("packed"))
    return traffic.Problem(
        lengths=tuple(lengths(shape)),
        heads=shape.h,
        key_heads=shape.hk,
        key_width=shape.d,
        value_width=shape.dv,
        itemsize=dtype.itemsize,
        decay_form=("none", "token", "head")[shape.decay],
        decay=_NUMBER,
        crossing=kernels.learns(shape),
        packed=packed,
        total=sum(lengths(shape)) if packed else 0,
        normalize=bool(shape.normalize),
        taylor=bool(shape.taylor),
        initial_state=bool(shape.get("state")),
        dstate=bool(shape.get("state")),
    )


def accounts(shape: Shape, dtype: torch.dtype, configs: Configs) -> dict[str, Account]:
    """Every kernel that one forward and backward pass launches, by name."""
    return traffic.accounts(problem(shape, dtype), configs)


def step_accounts(shape: Shape, dtype: torch.dtype, configs: Configs) -> dict[str, Account]:
    """The kernel of the step."""
    if not shape.b * shape.n:
        return {}
    return {"linear_attention_step_kernel": traffic.step(problem(shape, dtype), configs[_STEP])}


_STEP = "linear_attention_step"
_TILES = {
    # Chunks, columns, warps, stages, segments: small, so that short calls take several blocks, and are cut.
    "linear_attention_fwd": Config(16, 16, 4, 1, segments=2),
    "linear_attention_bwd_dq": Config(16, 16, 4, 1, segments=2),
    "linear_attention_bwd_dk": Config(16, 16, 4, 1),
    "linear_attention_bwd_dv": Config(32, 16, 4, 1),
    "linear_attention_state": Config(16, 16, 4, 1),
    _STEP: Config(1, 16, 4, 1),
}
_SHAPES = (
    ("b=1,h=2,n=40,d=24,dv=20,learn=0", torch.bfloat16),
    ("b=1,h=1,n=20,d=16,decay=0", torch.float32),
    ("b=1,h=2,hk=1,n=40,d=20,dv=24,decay=1,state=1", torch.float16),
    ("b=2,h=1,n=33,d=20", torch.float32),
    ("b=1,h=1,n=40,d=24,dv=20,decay=1,normalize=1,state=1,bnhd=1", torch.bfloat16),
    ("b=4,h=2,hk=1,n=20,d=20,dv=16,decay=1,packed=1,empty=1,state=1", torch.float16),
    ("b=3,h=1,n=20,d=16,packed=1,normalize=1", torch.float16),
    ("b=1,h=1,n=20,d=10,dv=20,decay=0,taylor=1,normalize=1", torch.bfloat16),
    ("b=1,h=2,hk=1,n=20,d=8,dv=20,decay=1,taylor=1,normalize=1,state=1", torch.float32),
    ("b=1,h=2,n=1,d=24", torch.bfloat16),
)

ACCOUNTS = Accounts(
    model=accounts,
    configs=kernels.configs,
    naive_bytes=naive_bytes,
    naive=NAIVE,
    shapes=tuple((VOCABULARY.parse(text), dtype) for text, dtype in _SHAPES),
    test_configs=_TILES,
)


def step_naive_bytes(shape: Shape, dtype: torch.dtype, which: Literal["fwd", "bwd"]) -> int:
    """Decay, outer product and product one after the other, and the inputs and outputs once."""
    once = traffic.step(problem(shape, dtype), _TILES[_STEP]).floor.total
    return 5 * shape.n * state_bytes(shape) + once


STEP_ACCOUNTS = Accounts(
    model=step_accounts,
    configs=kernels.configs,
    naive_bytes=step_naive_bytes,
    naive="decay the state, add the outer product, read it with q: five passes over the state a token",
    shapes=tuple(
        (STEP_VOCABULARY.parse(text), dtype)
        for text, dtype in (
            ("b=2,h=4,hk=2,n=1,d=24,dv=40", torch.bfloat16),
            ("b=1,h=2,n=3,d=32,dv=16,decay=1,normalize=1", torch.float32),
            ("b=2,h=2,n=2,d=12,dv=20,decay=0,taylor=1,normalize=1", torch.float16),
        )
    ),
    test_configs=_TILES,
)

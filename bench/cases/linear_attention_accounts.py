"""The bytes of linear_attention: the least that any kernel moves, and those of the formula in separate steps."""

from __future__ import annotations

from typing import Literal

import torch

from iokernels.bench.accounts import Accounts
from iokernels.bench.cases.linear_attention_shapes import lengths
from iokernels.bench.shape import Shape
from iokernels.ops.linear_attention.options import columns, features

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


ACCOUNTS: Accounts | None = None
STEP_ACCOUNTS: Accounts | None = None

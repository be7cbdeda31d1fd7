"""The bytes of flash_rnn: the least that any kernel moves, those of this room's, and those of a loop over steps."""

from __future__ import annotations

from typing import Literal

import torch

from iokernels.ops.flash_rnn.cells import CELLS
from iokernels.ops.flash_rnn.triton.tuning import KERNELS, Config
from iokernels.testing.case.accounts import Account, Accounts, Configs
from iokernels.testing.case.shape import Shape

from . import traffic as model
from .compile import configs
from .shapes import VOCABULARY, cell_of, lengths

_STATE = 4  # bytes of an element of a state


def problem_of(shape: Shape, dtype: torch.dtype) -> model.Problem:
    """The problem of a forward and a backward pass."""
    return model.Problem(
        cell=cell_of(shape),
        lengths=tuple(lengths(shape)),
        steps=shape.n,
        heads=shape.h,
        width=shape.d,
        itemsize=dtype.itemsize,
        bias=bool(shape.bias),
        initial=bool(shape.state),
        dstate=bool(shape.state),
        dinitial=bool(shape.state),
        ragged=bool(shape.lengths),
        recompute=bool(shape.recompute),
        cut=bool(shape.cut),
    )


def accounts(shape: Shape, dtype: torch.dtype, configs: Configs) -> dict[str, Account]:
    """The account of every kernel."""
    return model.accounts(problem_of(shape, dtype), configs)


def _sizes(shape: Shape, dtype: torch.dtype) -> tuple[int, int, int, int]:
    """Bytes of one gate of all steps, of all recurrent matrices, of all biases, and of all states at one time."""
    kind, size = CELLS[cell_of(shape)], dtype.itemsize
    row = shape.h * shape.d * size
    number = 8 if dtype == torch.float64 else _STATE
    states = len(kind.states) * shape.b * shape.h * shape.d * number
    return sum(lengths(shape)) * row, kind.gates * shape.d * row, shape.bias * kind.gates * row, states


def floor_bytes(shape: Shape, dtype: torch.dtype, which: str) -> int:
    """Each input read once, each output written once; the final state counts, and so does the initial one if any."""
    kind = CELLS[cell_of(shape)]
    gate, matrices, biases, states = _sizes(shape, dtype)
    ragged = shape.lengths * shape.b * 4
    forward = (kind.gates + 1) * gate + matrices + biases + states * (1 + shape.state) + ragged
    # Backward reads the inputs, h and its gradient, and writes the gradients of the inputs.
    backward = 2 * (kind.gates * gate + matrices + biases) + 2 * gate + 3 * states * shape.state + ragged
    return {"fwd": forward, "bwd": backward, "both": forward + backward}[which]


NAIVE = (
    "a loop over steps, as autograd sees it. Forward each step reads R, b and h and writes the recurrent part, reads "
    "it and its gates and writes their sum, reads that and the float32 states and writes the next ones, and h. "
    "Backward each step reads its gates, states and the gradients of states, writes the gradients of its gates, reads "
    "them and R for the gradient of h, and them and h for that of R, which is read, added to and written at every "
    "step, as is b's"
)


def naive_bytes(shape: Shape, dtype: torch.dtype, which: Literal["fwd", "bwd"]) -> int:
    """The bytes of :data:`NAIVE`."""
    gates = CELLS[cell_of(shape)].gates
    gate, matrices, biases, states = _sizes(shape, dtype)
    steps = max(lengths(shape), default=0)
    if which == "fwd":
        return steps * (matrices + biases + 2 * states) + gate * (1 + 5 * gates + 1)
    return steps * (4 * matrices + 3 * biases + 4 * states) + gate * (4 * gates + 2)


# Every cell, with blocks of 16 sequences: one and a half of them, and rows of steps that straddle blocks.
_SHAPES = (
    ("b=18,n=4,h=2,d=16", torch.bfloat16),
    ("b=3,n=7,h=1,d=24,cell=1,state=1,nb=1", torch.float16),
    ("b=2,n=5,h=2,d=16,cell=2,bias=0,cut=1", torch.float32),
    ("b=18,n=5,h=1,d=16,cell=3,state=1,lengths=1,empty=1", torch.bfloat16),
    ("b=3,n=9,h=1,d=16,cell=1,recompute=1,lengths=1", torch.float16),
)

ACCOUNTS = Accounts(
    model=accounts,
    configs=configs,
    naive_bytes=naive_bytes,
    naive=NAIVE,
    shapes=tuple((VOCABULARY.parse(text), dtype) for text, dtype in _SHAPES),
    test_configs=dict.fromkeys(KERNELS, Config(block=16, num_warps=4, num_stages=1)),
)

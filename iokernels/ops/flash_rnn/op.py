"""``flash_rnn`` as ``torch.library`` operators with an ``autograd.Function`` outside.

One forward and one backward operator serve the backends ``torch``, ``triton`` and ``cuda``. This file imports torch
alone; the backend's module is imported when it first runs.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from iokernels.runtime.registration import lazily
from iokernels.runtime.registration.differentiable import differentiable

from .cells import CELLS
from .options import (
    Forward,
    Gradients,
    Needs,
    Options,
    empty_gates,
    empty_history,
    empty_out,
    empty_state,
    empty_values,
)

_backend = lazily(__package__, torch=".portable", triton=".triton.launch", cuda=".cuda.launch")


def _forward(
    gates: Tensor, recurrent: Tensor, bias: Tensor | None, keep: bool, backend: str, options: Options
) -> tuple[Tensor, ...]:
    return tuple(_backend(backend).forward(gates, recurrent, bias, keep, options))


def _fake(
    gates: Tensor, recurrent: Tensor, bias: Tensor | None, keep: bool, backend: str, options: Options
) -> tuple[Tensor, ...]:
    cell = options.kind()
    return (
        empty_out(gates),
        empty_state(gates, cell),
        empty_values(gates, cell, keep and not options.recompute_gates, gates_outside=backend == "torch"),
        empty_history(gates, cell, keep),
    )


def _backward(*given: Any) -> Gradients:
    dout, dstate, gates, recurrent, bias, out, values, history, needs, backend, options = given
    saved = Forward(out, out, values, history)
    return _backend(backend).backward(dout, dstate, gates, recurrent, bias, saved, options, needs)


forward_op, backward_op, exported_op, run = differentiable(
    "flash_rnn",
    "Tensor gates, Tensor recurrent, Tensor? bias, bool keep",
    "Tensor out, Tensor state, Tensor values, Tensor history",
    gradients="Tensor dout, Tensor? dstate",
    saved="Tensor? gates, Tensor recurrent, Tensor? bias, Tensor out, Tensor values, Tensor history",
    options=Options,
    needs=Needs,
    forward=_forward,
    fake=_fake,
    backward=_backward,
    empty={"gates": lambda given: empty_gates(given.out, CELLS[given.cell])},
    outside="Tensor gates, Tensor recurrent, Tensor? bias",
    # The values stand for the gates, which then need not live on.
    keep=lambda wanted, options, gates, *saved: (gates if options.recompute_gates else None, *saved),
)
"""``run(gates, recurrent, bias, backend, options)`` returns (out, final states), differentiable where an input wants a
gradient."""

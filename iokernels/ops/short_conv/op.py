"""``short_conv`` as ``torch.library`` operators with an ``autograd.Function`` outside.

One forward and one backward operator serve dense and packed inputs and the backends ``torch`` and ``triton``; the step
writes its state. This file imports torch alone; the backend's module is imported when it first runs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from iokernels.runtime.registration import lazily, register
from iokernels.runtime.registration.differentiable import differentiable

from .options import ShortGradients, ShortNeeds, ShortOptions, empty_rows, empty_state, out_length

_backend = lazily(__package__, torch=".portable", triton=".triton.launch")


def _forward(x: Tensor, weight: Tensor, backend: str, options: ShortOptions) -> tuple[Tensor, Tensor]:
    return _backend(backend).forward(x, weight, options)


def _fake(x: Tensor, weight: Tensor, backend: str, options: ShortOptions) -> tuple[Tensor, Tensor]:
    width = weight.shape[1]
    return empty_rows(x, out_length(x.shape[2], width, options)), empty_state(x, width, options)


def _backward(
    dout: Tensor | None, dfinal: Tensor | None, x: Tensor, weight: Tensor, needs: ShortNeeds, backend: str,
    options: ShortOptions,
) -> ShortGradients:  # fmt: skip
    if not options.return_state:
        dfinal = None  # of the empty tensor that stands for no state
        if dout is None:
            dout = torch.zeros_like(_fake(x, weight, backend, options)[0])
    return _backend(backend).backward(dout, dfinal, x, weight, options, needs)


def _step(
    x: Tensor, weight: Tensor, state: Tensor, bias: Tensor | None, state_indices: Tensor | None, silu: bool,
    backend: str,
) -> Tensor:  # fmt: skip
    return _backend(backend).step(x, weight, state, bias, state_indices, silu)


forward_op, backward_op, _, convolve = differentiable(
    "short_conv",
    "Tensor x, Tensor weight",
    "Tensor out, Tensor final_state",
    gradients="Tensor? dout, Tensor? dfinal",
    saved="Tensor x, Tensor weight",
    options=ShortOptions,
    needs=ShortNeeds,
    forward=_forward,
    fake=_fake,
    backward=_backward,
    empty={
        "x": lambda given: empty_rows(given.x, given.x.shape[2]),
        "initial_state": lambda given: torch.empty_like(given.initial_state),
    },
)
"""``convolve(x, weight, backend, options)`` returns (out, final state), differentiable where an input wants a
gradient."""

step_op = register(
    "short_conv_step",
    "Tensor x, Tensor weight, Tensor(a!) state, Tensor? bias, Tensor? state_indices, bool silu, str backend",
    "Tensor",
    impl=_step,
    fake=lambda x, *rest: x.new_empty(x.shape),
)

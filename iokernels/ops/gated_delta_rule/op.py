"""``gated_delta_rule`` as ``torch.library`` operators with an ``autograd.Function`` outside.

One forward and one backward operator serve dense and packed inputs and the backends ``torch`` and ``triton``; a third
is the step, which changes its state. This file imports torch alone; the backend's module is imported when it first
runs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from iokernels.ops.shared.layout import EMPTY_IN_ORDER, empty_in_order_of
from iokernels.runtime.registration import lazily, register
from iokernels.runtime.registration.differentiable import differentiable

from .options import DeltaOptions, Gradients, Needs, empty_inverses, empty_state

_backend = lazily(__package__, torch=".portable", triton=".triton.launch")


def _forward(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, backend: str, options: DeltaOptions) -> tuple[Tensor, ...]:
    return _backend(backend).forward(q, k, v, beta, options)


def _fake(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, backend: str, options: DeltaOptions) -> tuple[Tensor, ...]:
    return empty_in_order_of(v, v.shape[3]), empty_state(q, v, options), empty_inverses(q, v, backend)


def _backward(*given: Any) -> Gradients:
    dout, dfinal, q, k, v, beta, inverses, _, backend, options = given
    return _backend(backend).backward(dout, dfinal, q, k, v, beta, inverses, options)


def _step(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, state: Tensor, log_decay: Tensor | None, scale: float, backend: str
) -> Tensor:
    return _backend(backend).step(q, k, v, beta, state, log_decay, scale)


forward_op, backward_op, _, gated_delta_rule = differentiable(
    "gated_delta_rule",
    "Tensor q, Tensor k, Tensor v, Tensor beta",
    "Tensor out, Tensor final_state, Tensor inverses",
    gradients="Tensor dout, Tensor? dfinal_state",
    saved="Tensor q, Tensor k, Tensor v, Tensor beta, Tensor inverses",
    options=DeltaOptions,
    needs=Needs,
    forward=_forward,
    fake=_fake,
    backward=_backward,
    empty={
        **EMPTY_IN_ORDER,
        "beta": lambda given: torch.empty_like(given.beta),
        "log_decay": lambda given: torch.empty_like(given.log_decay),
    },
    like="v",
    distinct=("k", "v", "log_decay"),
)
"""``gated_delta_rule(q, k, v, beta, backend, options)`` returns (out, final state), differentiable where an
input wants a gradient."""

step_op = register(
    "gated_delta_rule_step",
    "Tensor q, Tensor k, Tensor v, Tensor beta, Tensor(a!) state, Tensor? log_decay, float scale, str backend",
    "Tensor",
    impl=_step,
    fake=lambda q, k, v, *rest: empty_in_order_of(v, v.shape[3]),
)

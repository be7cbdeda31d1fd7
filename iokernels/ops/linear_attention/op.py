"""``linear_attention`` as ``torch.library`` operators with an ``autograd.Function`` outside.

One forward, one backward and one step operator serve dense and packed inputs and the backends ``torch`` and
``triton``; ``cuda`` has no step. This file imports torch alone; the backend's module is imported when it first runs.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from iokernels.ops.shared.layout import EMPTY_IN_ORDER, empty_in_order_of
from iokernels.runtime.registration import lazily, register
from iokernels.runtime.registration.differentiable import differentiable

from .options import Gradients, Needs, Options, empty_denominator, empty_state

_backend = lazily(__package__, torch=".portable", triton=".triton.launch", cuda=".cuda.launch")


def _forward(q: Tensor, k: Tensor, v: Tensor, backend: str, options: Options) -> tuple[Tensor, Tensor, Tensor]:
    return _backend(backend).forward(q, k, v, options)


def _fake(q: Tensor, k: Tensor, v: Tensor, backend: str, options: Options) -> tuple[Tensor, Tensor, Tensor]:
    return empty_in_order_of(v, v.shape[3]), empty_state(q, v, options), empty_denominator(v, options)


def _backward(*given: Any) -> Gradients:
    dout, dstate, q, k, v, out, state, denominator, needs, backend, options = given
    return _backend(backend).backward(dout, dstate, q, k, v, out, state, denominator, options, needs)


_LOG_DECAY = Needs._fields.index("log_decay")


def _keep(
    wanted: tuple[bool, ...], options: Options, gives_state: bool, q: Tensor, k: Tensor, v: Tensor, out: Tensor,
    state: Tensor, denominator: Tensor,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """The backward pass recomputes the rest: out serves the division, the final state the gradient of decays. Who gets
    the state may change it in place, so the backward pass keeps one of its own."""
    kept = None
    if wanted[_LOG_DECAY]:
        kept = state.clone() if gives_state else state
    return q, k, v, out if options.normalize else None, kept, denominator


forward_op, backward_op, _, attend = differentiable(
    "linear_attention",
    "Tensor q, Tensor k, Tensor v",
    "Tensor out, Tensor state, Tensor denominator",
    gradients="Tensor dout, Tensor? dstate",
    saved="Tensor q, Tensor k, Tensor v, Tensor? out, Tensor? state, Tensor denominator",
    options=Options,
    needs=Needs,
    forward=_forward,
    fake=_fake,
    backward=_backward,
    empty=EMPTY_IN_ORDER,
    like="v",
    distinct=("k", "v"),
    outside="Tensor q, Tensor k, Tensor v, bool gives_state",
    keep=_keep,
)
"""``attend(q, k, v, gives_state, backend, options)`` returns (out, final state), differentiable where an input wants a
gradient; ``gives_state`` says whether the caller hands the state on."""


def _step(
    q: Tensor, k: Tensor, v: Tensor, state: Tensor, backend: str, log_decay: Tensor | None, scale: float, taylor: bool,
    normalize: bool,
) -> Tensor:  # fmt: skip
    return _backend(backend).step(q, k, v, state, Options(log_decay, None, None, scale, taylor, normalize))


step_op = register(
    "linear_attention_step",
    "Tensor q, Tensor k, Tensor v, Tensor(a!) state, str backend, Tensor? log_decay, float scale, bool taylor, "
    "bool normalize",
    "Tensor",
    impl=_step,
    fake=lambda q, k, v, *rest: empty_in_order_of(v, v.shape[3]),
)


def step(q: Tensor, k: Tensor, v: Tensor, state: Tensor, backend: str, options: Options) -> Tensor:
    """Run the step operator, which updates ``state``. Returns out."""
    log_decay, _, _, scale, taylor, normalize = options
    return step_op(q, k, v, state, backend, log_decay, scale, taylor, normalize)

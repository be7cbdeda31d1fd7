"""``linear_attention`` as ``torch.library`` operators with an ``autograd.Function`` outside.

One forward, one backward and one step operator serve dense and packed inputs and the backends ``torch`` and
``triton``; ``cuda`` has no step. This file imports torch alone; the backend's module is imported when it first runs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from iokernels.ops.shared.layout import empty_in_order_of
from iokernels.runtime.registration import lazily, register
from iokernels.runtime.registration.once import differentiable_once

from .options import OPTIONS_SCHEMA, TENSOR_OPTIONS, Needs, Options, empty_denominator, empty_state

_backend = lazily(__package__, torch=".portable", triton=".triton.launch", cuda=".cuda.launch")


def _forward(q: Tensor, k: Tensor, v: Tensor, backend: str, *options: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _backend(backend).forward(q, k, v, Options(*options))


def _forward_fake(q: Tensor, k: Tensor, v: Tensor, backend: str, *options: Any) -> tuple[Tensor, Tensor, Tensor]:
    opts = Options(*options)
    return empty_in_order_of(v, v.shape[3]), empty_state(q, v, opts), empty_denominator(v, opts)


def _backward(
    dout: Tensor, dstate: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor | None, state: Tensor | None,
    denominator: Tensor, needs: list[bool], backend: str, *options: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    grads = _backend(backend).backward(
        dout, dstate, q, k, v, out, state, denominator, Options(*options), Needs(*needs)
    )  # fmt: skip
    # An operator returns tensors only: an empty one stands for a gradient that nobody needs.
    return tuple(q.new_empty(0) if grad is None else grad for grad in grads)


def _backward_fake(
    dout: Tensor, dstate: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor | None, state: Tensor | None,
    denominator: Tensor, needs: list[bool], backend: str, *options: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    need, opts = Needs(*needs), Options(*options)
    decay, initial = opts.log_decay, opts.initial_state
    return (
        *(
            empty_in_order_of(x, x.shape[3]) if needed else q.new_empty(0)
            for x, needed in zip((q, k, v), need[:3], strict=True)
        ),
        decay.new_empty(decay.shape) if need.log_decay and decay is not None else q.new_empty(0),
        initial.new_empty(initial.shape) if need.initial_state and initial is not None else q.new_empty(0),
    )


def _step(q: Tensor, k: Tensor, v: Tensor, state: Tensor, backend: str, *options: Any) -> Tensor:
    return _backend(backend).step(
        q, k, v, state, Options(None, None, None, *options[1:])._replace(log_decay=options[0])
    )


def _step_fake(q: Tensor, k: Tensor, v: Tensor, state: Tensor, backend: str, *options: Any) -> Tensor:
    return empty_in_order_of(v, v.shape[3])


forward_op = register(
    f"linear_attention_fwd(Tensor q, Tensor k, Tensor v, str backend, {OPTIONS_SCHEMA}) "
    "-> (Tensor out, Tensor state, Tensor denominator)",
    impl=_forward,
    fake=_forward_fake,
)

backward_op = register(
    "linear_attention_bwd(Tensor dout, Tensor? dstate, Tensor q, Tensor k, Tensor v, Tensor? out, Tensor? state, "
    f"Tensor denominator, bool[] needs, str backend, {OPTIONS_SCHEMA}) "
    "-> (Tensor dq, Tensor dk, Tensor dv, Tensor dlog_decay, Tensor dinitial_state)",
    impl=_backward,
    fake=_backward_fake,
)

step_op = register(
    "linear_attention_step(Tensor q, Tensor k, Tensor v, Tensor(a!) state, str backend, Tensor? log_decay, "
    "float scale, bool taylor, bool normalize) -> Tensor",
    impl=_step,
    fake=_step_fake,
)


class _LinearAttention(torch.autograd.Function):
    """Calls the first two operators above.

    log_decay and initial_state stand twice among the arguments, because autograd does not look into ``options``; all of
    it as one argument, because each costs a call half a microsecond.
    """

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, initial_state: Tensor | None, backend: str,
        options: Options, gives_state: bool,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        options = Options(log_decay, initial_state, *options[2:])
        out, state, denominator = forward_op(q, k, v, backend, *options)
        # The backward pass recomputes the rest: out serves the division, the final state the gradient of decays. Who
        # gets the state may change it in place, so the backward pass keeps one of its own.
        kept = None
        if ctx.needs_input_grad[3]:
            kept = state.clone() if gives_state else state
        ctx.save_for_backward(
            q, k, v, out if options.normalize else None, kept, denominator, *options[:TENSOR_OPTIONS]
        )  # fmt: skip
        ctx.backend = backend
        ctx.numbers = options[TENSOR_OPTIONS:]
        ctx.set_materialize_grads(False)  # dstate stays None in the common case that nobody uses the state
        return out, state

    @staticmethod
    @differentiable_once("linear_attention")
    def backward(ctx: Any, dout: Tensor | None, dstate: Tensor | None) -> tuple[Any, ...]:
        q, k, v, out, state, denominator, *tensors = ctx.saved_tensors
        if dout is None:
            dout = torch.zeros_like(v)
        needs = Needs(*ctx.needs_input_grad[:5])
        grads = backward_op(
            dout, dstate, q, k, v, out, state, denominator, list(needs), ctx.backend, *tensors, *ctx.numbers
        )  # fmt: skip
        return *(grad if need else None for grad, need in zip(grads, needs, strict=True)), None, None, None


def attend(
    q: Tensor, k: Tensor, v: Tensor, backend: str, options: Options, gives_state: bool = True
) -> tuple[Tensor, Tensor]:
    """Run the operator, differentiably where an input wants a gradient. Returns (out, final state); ``gives_state``
    says whether the caller hands the state on."""
    if torch.compiler.is_exporting():
        return exported_op(q, k, v, gives_state, backend, *options)
    return _differentiable(q, k, v, gives_state, backend, options)


def _differentiable(
    q: Tensor, k: Tensor, v: Tensor, gives_state: bool, backend: str, options: Options
) -> tuple[Tensor, Tensor]:
    if torch.is_grad_enabled() and any(
        x is not None and x.requires_grad for x in (q, k, v, options.log_decay, options.initial_state)
    ):
        if torch.compiler.is_compiling():
            # Views, because Dynamo refuses a Function that gets one tensor twice.
            k, v = k.view_as(k), v.view_as(v)
        return _LinearAttention.apply(q, k, v, options.log_decay, options.initial_state, backend, options, gives_state)
    out, state, _ = forward_op(q, k, v, backend, *options)
    return out, state


exported_op = register(
    f"linear_attention(Tensor q, Tensor k, Tensor v, bool gives_state, str backend, {OPTIONS_SCHEMA}) "
    "-> (Tensor out, Tensor state)",
    impl=lambda q, k, v, gives_state, *rest: _forward(q, k, v, *rest)[:2],
    fake=lambda q, k, v, gives_state, *rest: _forward_fake(q, k, v, *rest)[:2],
    gradient=lambda q, k, v, gives_state, backend, *options: _differentiable(
        q, k, v, gives_state, backend, Options(*options)
    ),
)


def step(q: Tensor, k: Tensor, v: Tensor, state: Tensor, backend: str, options: Options) -> Tensor:
    """Run the step operator, which updates ``state``. Returns out."""
    return step_op(q, k, v, state, backend, options.log_decay, *options[TENSOR_OPTIONS:])

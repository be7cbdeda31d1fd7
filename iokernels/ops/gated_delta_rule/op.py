"""``gated_delta_rule`` as ``torch.library`` operators with an ``autograd.Function`` outside.

One forward and one backward operator serve dense and packed inputs and the backends ``torch`` and ``triton``; a third
is the step, which changes its state. This file imports torch alone; the backend's module is imported when it first
runs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from iokernels.ops.shared.layout import empty_in_order_of
from iokernels.runtime.registration import lazily, register
from iokernels.runtime.registration.once import differentiable_once

from .options import OPTIONS_SCHEMA, DeltaOptions, Needs, empty_inverses, empty_state

_backend = lazily(__package__, torch=".portable", triton=".triton.launch")


def _forward(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, backend: str, *options: Any) -> tuple[Tensor, ...]:
    return _backend(backend).forward(q, k, v, beta, DeltaOptions(*options))


def _forward_fake(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, backend: str, *options: Any) -> tuple[Tensor, ...]:
    return empty_in_order_of(v, v.shape[3]), empty_state(q, v, DeltaOptions(*options)), empty_inverses(q, v, backend)


def _backward(
    dout: Tensor, dfinal: Tensor | None, q: Tensor, k: Tensor, v: Tensor, beta: Tensor, inverses: Tensor,
    needs: list[bool], backend: str, *options: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    grads = _backend(backend).backward(dout, dfinal, q, k, v, beta, inverses, DeltaOptions(*options))
    # An operator returns tensors only: an empty one stands for a gradient that nobody needs.
    return tuple(x if x is not None and need else q.new_empty(0) for x, need in zip(grads, needs, strict=True))


def _backward_fake(
    dout: Tensor, dfinal: Tensor | None, q: Tensor, k: Tensor, v: Tensor, beta: Tensor, inverses: Tensor,
    needs: list[bool], backend: str, *options: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    need, opts = Needs(*needs), DeltaOptions(*options)
    return (
        empty_in_order_of(q, q.shape[3]) if need.q else q.new_empty(0),
        empty_in_order_of(k, k.shape[3]) if need.k else q.new_empty(0),
        empty_in_order_of(v, v.shape[3]) if need.v else q.new_empty(0),
        torch.empty_like(beta) if need.beta else q.new_empty(0),
        torch.empty_like(opts.log_decay) if need.log_decay and opts.log_decay is not None else q.new_empty(0),
        empty_state(q, v, opts) if need.initial_state and opts.initial_state is not None else q.new_empty(0),
    )


def _step(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, state: Tensor, log_decay: Tensor | None, scale: float, backend: str
) -> Tensor:
    return _backend(backend).step(q, k, v, beta, state, log_decay, scale)


def _step_fake(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, state: Tensor, log_decay: Tensor | None, scale: float, backend: str
) -> Tensor:
    return empty_in_order_of(v, v.shape[3])


forward_op = register(
    f"gated_delta_rule_fwd(Tensor q, Tensor k, Tensor v, Tensor beta, str backend, {OPTIONS_SCHEMA}) "
    "-> (Tensor out, Tensor final_state, Tensor inverses)",
    impl=_forward,
    fake=_forward_fake,
)

backward_op = register(
    "gated_delta_rule_bwd(Tensor dout, Tensor? dfinal_state, Tensor q, Tensor k, Tensor v, Tensor beta, "
    f"Tensor inverses, bool[] needs, str backend, {OPTIONS_SCHEMA}) "
    "-> (Tensor dq, Tensor dk, Tensor dv, Tensor dbeta, Tensor dlog_decay, Tensor dinitial_state)",
    impl=_backward,
    fake=_backward_fake,
)

step_op = register(
    "gated_delta_rule_step(Tensor q, Tensor k, Tensor v, Tensor beta, Tensor(a!) state, Tensor? log_decay, "
    "float scale, str backend) -> Tensor",
    impl=_step,
    fake=_step_fake,
)


class _GatedDeltaRule(torch.autograd.Function):
    """Calls the first two operators above."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor | None,
        initial_state: Tensor | None, cu_seqlens: Tensor | None, scale: float, backend: str,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        tensors = (log_decay, initial_state, cu_seqlens)
        out, final, inverses = forward_op(q, k, v, beta, backend, *tensors, scale)
        ctx.save_for_backward(q, k, v, beta, inverses, *tensors)
        ctx.scale, ctx.backend = scale, backend
        ctx.set_materialize_grads(False)  # the final state's gradient stays None in the common case that nobody uses it
        return out, final

    @staticmethod
    @differentiable_once("gated_delta_rule")
    def backward(ctx: Any, dout: Tensor | None, dfinal: Tensor | None) -> tuple[Any, ...]:
        q, k, v, beta, inverses, *tensors = ctx.saved_tensors
        if dout is None:
            dout = torch.zeros_like(v)
        needs = list(ctx.needs_input_grad[:6])
        grads = backward_op(dout, dfinal, q, k, v, beta, inverses, needs, ctx.backend, *tensors, ctx.scale)
        return *(grad if need else None for grad, need in zip(grads, needs, strict=True)), None, None, None


def gated_delta_rule(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, backend: str, options: DeltaOptions
) -> tuple[Tensor, Tensor]:
    """Run the operator, differentiably where an input wants a gradient. Returns (out, final state)."""
    run = exported_op if torch.compiler.is_exporting() else _differentiable
    return run(q, k, v, beta, backend, *options)


def _differentiable(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, backend: str, *options: Any
) -> tuple[Tensor, Tensor]:
    log_decay, initial_state, cu_seqlens, scale = options
    leaves = (q, k, v, beta, log_decay, initial_state)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in leaves):
        if torch.compiler.is_compiling():
            # Views, because Dynamo refuses a Function that gets one tensor twice.
            k, v = k.view_as(k), v.view_as(v)
            log_decay = None if log_decay is None else log_decay.view_as(log_decay)
        return _GatedDeltaRule.apply(q, k, v, beta, log_decay, initial_state, cu_seqlens, scale, backend)
    return forward_op(q, k, v, beta, backend, *options)[:2]


exported_op = register(
    f"gated_delta_rule(Tensor q, Tensor k, Tensor v, Tensor beta, str backend, {OPTIONS_SCHEMA}) "
    "-> (Tensor out, Tensor final_state)",
    impl=lambda *given: _forward(*given)[:2],
    fake=lambda *given: _forward_fake(*given)[:2],
    gradient=_differentiable,
)

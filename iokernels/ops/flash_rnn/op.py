"""``flash_rnn`` as ``torch.library`` operators with an ``autograd.Function`` outside.

One forward and one backward operator serve the backends ``torch``, ``triton`` and ``cuda``. This file imports torch
alone; the backend's module is imported when it first runs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from iokernels.runtime.registration import lazily, register
from iokernels.runtime.registration.once import differentiable_once

from .options import (
    OPTIONS_SCHEMA,
    TENSOR_OPTIONS,
    Forward,
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
    gates: Tensor, recurrent: Tensor, bias: Tensor | None, keep: bool, backend: str, *options: Any
) -> tuple[Tensor, ...]:
    return tuple(_backend(backend).forward(gates, recurrent, bias, keep, Options(*options)))


def _forward_fake(
    gates: Tensor, recurrent: Tensor, bias: Tensor | None, keep: bool, backend: str, *options: Any
) -> tuple[Tensor, ...]:
    opts = Options(*options)
    cell = opts.kind()
    return (
        empty_out(gates),
        empty_state(gates, cell),
        empty_values(gates, cell, keep and not opts.recompute_gates, gates_outside=backend == "torch"),
        empty_history(gates, cell, keep),
    )


def _backward(
    dout: Tensor, dstate: Tensor | None, gates: Tensor | None, recurrent: Tensor, bias: Tensor | None, out: Tensor,
    values: Tensor, history: Tensor, needs: list[bool], backend: str, *options: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    saved = Forward(out, out, values, history)
    grads = _backend(backend).backward(
        dout, dstate, gates, recurrent, bias, saved, Options(*options), Needs(*needs)
    )  # fmt: skip
    # An operator returns tensors only: an empty one stands for a gradient that nobody needs.
    return tuple(out.new_empty(0) if grad is None else grad for grad in grads)


def _backward_fake(
    dout: Tensor, dstate: Tensor | None, gates: Tensor | None, recurrent: Tensor, bias: Tensor | None, out: Tensor,
    values: Tensor, history: Tensor, needs: list[bool], backend: str, *options: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    need, opts = Needs(*needs), Options(*options)
    initial = opts.initial_state
    return (
        empty_gates(out, opts.kind()) if need.gates else out.new_empty(0),
        recurrent.new_empty(recurrent.shape) if need.recurrent else out.new_empty(0),
        bias.new_empty(bias.shape) if need.bias and bias is not None else out.new_empty(0),
        initial.new_empty(initial.shape) if need.initial_state and initial is not None else out.new_empty(0),
    )


forward_op = register(
    f"flash_rnn_fwd(Tensor gates, Tensor recurrent, Tensor? bias, bool keep, str backend, {OPTIONS_SCHEMA}) "
    "-> (Tensor out, Tensor state, Tensor values, Tensor history)",
    impl=_forward,
    fake=_forward_fake,
)

backward_op = register(
    "flash_rnn_bwd(Tensor dout, Tensor? dstate, Tensor? gates, Tensor recurrent, Tensor? bias, Tensor out, "
    f"Tensor values, Tensor history, bool[] needs, str backend, {OPTIONS_SCHEMA}) "
    "-> (Tensor dgates, Tensor drecurrent, Tensor dbias, Tensor dinitial_state)",
    impl=_backward,
    fake=_backward_fake,
)


class _FlashRnn(torch.autograd.Function):
    """Calls the two operators above.

    initial_state stands twice among the arguments, because autograd does not look into ``options``.
    """

    @staticmethod
    def forward(
        ctx: Any, gates: Tensor, recurrent: Tensor, bias: Tensor | None, initial_state: Tensor | None, backend: str,
        options: Options,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        options = Options(initial_state, *options[1:])
        out, state, values, history = forward_op(gates, recurrent, bias, True, backend, *options)
        # The values stand for the gates, which then need not live on.
        kept = gates if options.recompute_gates else None
        ctx.save_for_backward(kept, recurrent, bias, out, values, history, *options[:TENSOR_OPTIONS])
        ctx.backend = backend
        ctx.rest = options[TENSOR_OPTIONS:]
        ctx.set_materialize_grads(False)  # dstate stays None in the common case that nobody uses the state
        return out, state

    @staticmethod
    @differentiable_once("flash_rnn")
    def backward(ctx: Any, dout: Tensor | None, dstate: Tensor | None) -> tuple[Any, ...]:
        gates, recurrent, bias, out, values, history, *tensors = ctx.saved_tensors
        if dout is None:
            dout = torch.zeros_like(out)
        needs = Needs(*ctx.needs_input_grad[:4])
        grads = backward_op(
            dout, dstate, gates, recurrent, bias, out, values, history, list(needs), ctx.backend, *tensors, *ctx.rest
        )  # fmt: skip
        return *(grad if need else None for grad, need in zip(grads, needs, strict=True)), None, None


def run(gates: Tensor, recurrent: Tensor, bias: Tensor | None, backend: str, options: Options) -> tuple[Tensor, Tensor]:
    """Run the operator, differentiably where an input wants a gradient. Returns (out, final states)."""
    if torch.compiler.is_exporting():
        return exported_op(gates, recurrent, bias, backend, *options)
    return _differentiable(gates, recurrent, bias, backend, options)


def _differentiable(
    gates: Tensor, recurrent: Tensor, bias: Tensor | None, backend: str, options: Options
) -> tuple[Tensor, Tensor]:
    if torch.is_grad_enabled() and any(
        x is not None and x.requires_grad for x in (gates, recurrent, bias, options.initial_state)
    ):
        return _FlashRnn.apply(gates, recurrent, bias, options.initial_state, backend, options)
    out, state, _, _ = forward_op(gates, recurrent, bias, False, backend, *options)
    return out, state


exported_op = register(
    f"flash_rnn(Tensor gates, Tensor recurrent, Tensor? bias, str backend, {OPTIONS_SCHEMA}) "
    "-> (Tensor out, Tensor state)",
    impl=lambda gates, recurrent, bias, *rest: _forward(gates, recurrent, bias, False, *rest)[:2],
    fake=lambda gates, recurrent, bias, *rest: _forward_fake(gates, recurrent, bias, False, *rest)[:2],
    gradient=lambda gates, recurrent, bias, backend, *options: _differentiable(
        gates, recurrent, bias, backend, Options(*options)
    ),
)

"""``short_conv`` as ``torch.library`` operators with an ``autograd.Function`` outside.

One forward and one backward operator serve dense and packed inputs and the backends ``torch`` and ``triton``; the step
writes its state. This file imports torch alone; the backend's module is imported when it first runs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from iokernels.runtime.registration import lazily, register
from iokernels.runtime.registration.once import differentiable_once

from .options import OPTIONS_SCHEMA, TENSOR_OPTIONS, ShortNeeds, ShortOptions, empty_rows, empty_state, out_length

_backend = lazily(__package__, torch=".portable", triton=".triton.launch")


def _forward(x: Tensor, weight: Tensor, backend: str, *options: Any) -> tuple[Tensor, Tensor]:
    return _backend(backend).forward(x, weight, ShortOptions(*options))


def _forward_fake(x: Tensor, weight: Tensor, backend: str, *options: Any) -> tuple[Tensor, Tensor]:
    opts, width = ShortOptions(*options), weight.shape[1]
    return empty_rows(x, out_length(x.shape[2], width, opts)), empty_state(x, width, opts)


def _backward(
    dout: Tensor | None, dfinal: Tensor | None, x: Tensor, weight: Tensor, needs: list[bool], backend: str,
    *options: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    grads = _backend(backend).backward(dout, dfinal, x, weight, ShortOptions(*options), ShortNeeds(*needs))
    # An operator returns tensors only: an empty one stands for a gradient that nobody needs.
    return tuple(x.new_empty(0) if grad is None else grad for grad in grads)


def _backward_fake(
    dout: Tensor | None, dfinal: Tensor | None, x: Tensor, weight: Tensor, needs: list[bool], backend: str,
    *options: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    need, opts = ShortNeeds(*needs), ShortOptions(*options)
    bias, state = opts.bias, opts.initial_state
    return (
        empty_rows(x, x.shape[2]) if need.x else x.new_empty(0),
        weight.new_empty(weight.shape) if need.weight else x.new_empty(0),
        bias.new_empty(bias.shape) if need.bias and bias is not None else x.new_empty(0),
        torch.empty_like(state) if need.initial_state and state is not None else x.new_empty(0),
    )


def _step(
    x: Tensor, weight: Tensor, state: Tensor, bias: Tensor | None, state_indices: Tensor | None, silu: bool,
    backend: str,
) -> Tensor:  # fmt: skip
    return _backend(backend).step(x, weight, state, bias, state_indices, silu)


def _step_fake(
    x: Tensor, weight: Tensor, state: Tensor, bias: Tensor | None, state_indices: Tensor | None, silu: bool,
    backend: str,
) -> Tensor:  # fmt: skip
    return x.new_empty(x.shape)


forward_op = register(
    f"short_conv_fwd(Tensor x, Tensor weight, str backend, {OPTIONS_SCHEMA}) -> (Tensor out, Tensor final_state)",
    impl=_forward,
    fake=_forward_fake,
)

backward_op = register(
    "short_conv_bwd(Tensor? dout, Tensor? dfinal, Tensor x, Tensor weight, bool[] needs, str backend, "
    f"{OPTIONS_SCHEMA}) -> (Tensor dx, Tensor dweight, Tensor dbias, Tensor dinitial_state)",
    impl=_backward,
    fake=_backward_fake,
)

step_op = register(
    "short_conv_step(Tensor x, Tensor weight, Tensor(a!) state, Tensor? bias, Tensor? state_indices, bool silu, "
    "str backend) -> Tensor",
    impl=_step,
    fake=_step_fake,
)


class _ShortConv(torch.autograd.Function):
    """Calls the two operators above. bias and initial_state stand twice among the arguments, because autograd does not
    look into ``options``."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, initial_state: Tensor | None, backend: str,
        options: ShortOptions,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        options = ShortOptions(bias, initial_state, *options[2:])
        out, final_state = forward_op(x, weight, backend, *options)
        ctx.save_for_backward(x, weight, *options[:TENSOR_OPTIONS])
        ctx.backend = backend
        ctx.numbers = options[TENSOR_OPTIONS:]
        ctx.set_materialize_grads(False)
        return out, final_state

    @staticmethod
    @differentiable_once("short_conv")
    def backward(ctx: Any, dout: Tensor | None, dfinal: Tensor | None) -> tuple[Any, ...]:
        x, weight, *tensors = ctx.saved_tensors
        needs = list(ctx.needs_input_grad[:4])
        if not ctx.numbers[-1]:
            dfinal = None  # of the empty tensor that stands for no state
        if dout is None and dfinal is None:
            return None, None, None, None, None, None
        grads = backward_op(dout, dfinal, x, weight, needs, ctx.backend, *tensors, *ctx.numbers)
        return *(grad if need else None for grad, need in zip(grads, needs, strict=True)), None, None


def convolve(x: Tensor, weight: Tensor, backend: str, options: ShortOptions) -> tuple[Tensor, Tensor]:
    """Run the operator, differentiably where an input wants a gradient. Returns (out, final state)."""
    run = exported_op if torch.compiler.is_exporting() else _differentiable
    return run(x, weight, backend, *options)


def _differentiable(x: Tensor, weight: Tensor, backend: str, *numbers: Any) -> tuple[Tensor, Tensor]:
    options = ShortOptions(*numbers)
    tensors = (x, weight, options.bias, options.initial_state)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        return _ShortConv.apply(*tensors, backend, options)  # pyright: ignore[reportReturnType]
    return forward_op(x, weight, backend, *options)


exported_op = register(
    f"short_conv(Tensor x, Tensor weight, str backend, {OPTIONS_SCHEMA}) -> (Tensor out, Tensor final_state)",
    impl=_forward,
    fake=_forward_fake,
    gradient=_differentiable,
)

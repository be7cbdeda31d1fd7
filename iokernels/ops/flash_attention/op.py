"""``flash_attention`` as ``torch.library`` operators with an ``autograd.Function`` outside.

One forward and one backward operator serve dense and packed inputs and the backends ``torch``, ``triton`` and ``cuda``.
This file imports torch alone; the backend's module is imported when it first runs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from iokernels.ops.shared.layout import empty_in_order_of
from iokernels.runtime.registration import lazily, register
from iokernels.runtime.registration.once import differentiable_once

from .options import OPTIONS_SCHEMA, TENSOR_OPTIONS, Needs, Options, empty_out, empty_statistics, lse_and_tail

_backend = lazily(__package__, torch=".portable", triton=".triton.launch", cuda=".cuda.launch")


def _forward(q: Tensor, k: Tensor, v: Tensor, backend: str, *options: Any) -> tuple[Tensor, Tensor]:
    return _backend(backend).forward(q, k, v, Options(*options))


def _forward_fake(q: Tensor, k: Tensor, v: Tensor, backend: str, *options: Any) -> tuple[Tensor, Tensor]:
    return empty_out(q, v), empty_statistics(q, Options(*options))


def _backward(
    dout: Tensor, dstatistics: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, statistics: Tensor,
    needs: list[bool], backend: str, *options: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    grads = _backend(backend).backward(dout, dstatistics, q, k, v, out, statistics, Options(*options), Needs(*needs))
    # An operator returns tensors only: an empty one stands for a gradient that nobody needs.
    return tuple(q.new_empty(0) if grad is None else grad for grad in grads)


def _backward_fake(
    dout: Tensor, dstatistics: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, statistics: Tensor,
    needs: list[bool], backend: str, *options: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    need, opts = Needs(*needs), Options(*options)
    return (
        empty_in_order_of(q, q.shape[3]) if need.q else q.new_empty(0),
        empty_in_order_of(k, k.shape[3]) if need.k else q.new_empty(0),
        empty_in_order_of(v, v.shape[3]) if need.v else q.new_empty(0),
        opts.bias.new_empty(opts.bias.shape) if need.bias and opts.bias is not None else q.new_empty(0),
        opts.sinks.new_empty(opts.sinks.shape) if need.sinks and opts.sinks is not None else q.new_empty(0),
    )


_FORWARD_SCHEMA = f"(Tensor q, Tensor k, Tensor v, str backend, {OPTIONS_SCHEMA}) -> (Tensor out, Tensor statistics)"

forward_op = register(f"flash_attention_fwd{_FORWARD_SCHEMA}", impl=_forward, fake=_forward_fake)

backward_op = register(
    "flash_attention_bwd(Tensor dout, Tensor? dstatistics, Tensor q, Tensor k, Tensor v, Tensor out, "
    f"Tensor statistics, bool[] needs, str backend, {OPTIONS_SCHEMA}) "
    "-> (Tensor dq, Tensor dk, Tensor dv, Tensor dbias, Tensor dsinks)",
    impl=_backward,
    fake=_backward_fake,
)


class _FlashAttention(torch.autograd.Function):
    """Calls the two operators above.

    bias and sinks stand twice among the arguments, because autograd does not look into ``options``; all of it as one
    argument, because each costs a call half a microsecond.
    """

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, sinks: Tensor | None, backend: str,
        options: Options,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        options = Options(bias, sinks, *options[2:])
        out, statistics = forward_op(q, k, v, backend, *options)
        ctx.save_for_backward(q, k, v, out, statistics, *options[:TENSOR_OPTIONS])
        ctx.backend = backend
        ctx.numbers = options[TENSOR_OPTIONS:]
        ctx.set_materialize_grads(False)  # it stays None in the common case that nobody uses the LSE
        return out, statistics

    @staticmethod
    @differentiable_once("flash_attention")
    def backward(ctx: Any, dout: Tensor | None, dstatistics: Tensor | None) -> tuple[Any, ...]:
        q, k, v, out, statistics, *tensors = ctx.saved_tensors
        if dout is None:
            dout = torch.zeros_like(out)
        needs = Needs(*ctx.needs_input_grad[:5])
        grads = backward_op(
            dout, dstatistics, q, k, v, out, statistics, list(needs), ctx.backend, *tensors, *ctx.numbers
        )
        return *(grad if need else None for grad, need in zip(grads, needs, strict=True)), None, None


def attend(q: Tensor, k: Tensor, v: Tensor, backend: str, options: Options) -> tuple[Tensor, Tensor]:
    """Run the operator, differentiably where an input wants a gradient. Returns (out, lse)."""
    if torch.compiler.is_exporting():
        out, statistics = exported_op(q, k, v, backend, *options)
    else:
        out, statistics = _differentiable(q, k, v, backend, options)
    return out, lse_and_tail(statistics)[0]


def _differentiable(q: Tensor, k: Tensor, v: Tensor, backend: str, options: Options) -> tuple[Tensor, Tensor]:
    if torch.is_grad_enabled() and (
        q.requires_grad
        or k.requires_grad
        or v.requires_grad
        or (options.bias is not None and options.bias.requires_grad)
        or (options.sinks is not None and options.sinks.requires_grad)
    ):
        if torch.compiler.is_compiling():
            k, v, options = _distinct(k, v, options)
        return _FlashAttention.apply(q, k, v, options.bias, options.sinks, backend, options)
    return forward_op(q, k, v, backend, *options)


exported_op = register(
    f"flash_attention{_FORWARD_SCHEMA}",
    impl=_forward,
    fake=_forward_fake,
    gradient=lambda q, k, v, backend, *options: _differentiable(q, k, v, backend, Options(*options)),
)


def _distinct(k: Tensor, v: Tensor, options: Options) -> tuple[Tensor, Tensor, Options]:
    """Views, because Dynamo refuses a Function that gets one tensor twice: self-attention of ``x, x, x``, or the same
    offsets for queries and keys."""
    if options.cu_seqlens_k is not None:
        options = options._replace(cu_seqlens_k=options.cu_seqlens_k.view_as(options.cu_seqlens_k))
    return k.view_as(k), v.view_as(v), options

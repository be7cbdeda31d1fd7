"""``block_sparse_attention`` as ``torch.library`` operators with an ``autograd.Function`` outside.

The operators take the tensors and numbers of an index one by one (:class:`.sparse_options.Options`), and serve the
backends ``torch`` and ``triton``, whose modules are imported when they first run.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from iokernels.ops.shared.layout import empty_in_order_of
from iokernels.runtime.registration import lazily, register
from iokernels.runtime.registration.once import differentiable_once

from .options import OPTIONS_SCHEMA, TENSOR_OPTIONS, Options, empty_lse
from .values import check_values

_backend = lazily(__package__, torch=".portable", triton=".triton.launch")


def _forward(q: Tensor, k: Tensor, v: Tensor, backend: str, *options: Any) -> tuple[Tensor, Tensor]:
    asked = Options(*options)
    check_values(q, k, asked)
    return _backend(backend).forward(q, k, v, asked)


def _forward_fake(q: Tensor, k: Tensor, v: Tensor, backend: str, *options: Any) -> tuple[Tensor, Tensor]:
    return empty_in_order_of(q, v.shape[3]), empty_lse(q)


def _backward(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    needs: list[bool], backend: str, *options: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    grads = _backend(backend).backward(dout, dlse, q, k, v, out, lse, Options(*options), tuple(needs))
    # An operator returns tensors only: an empty one stands for a gradient that nobody needs.
    return tuple(q.new_empty(0) if grad is None else grad for grad in grads)


def _backward_fake(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    needs: list[bool], backend: str, *options: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    return tuple(
        empty_in_order_of(x, x.shape[3]) if need else q.new_empty(0) for x, need in zip((q, k, v), needs, strict=True)
    )


_FORWARD_SCHEMA = f"(Tensor q, Tensor k, Tensor v, str backend, {OPTIONS_SCHEMA}) -> (Tensor out, Tensor lse)"

forward_op = register(f"block_sparse_attention_fwd{_FORWARD_SCHEMA}", impl=_forward, fake=_forward_fake)

backward_op = register(
    "block_sparse_attention_bwd(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    f"bool[] needs, str backend, {OPTIONS_SCHEMA}) -> (Tensor dq, Tensor dk, Tensor dv)",
    impl=_backward,
    fake=_backward_fake,
)


class _BlockSparseAttention(torch.autograd.Function):
    """Calls the two operators above. The index is a constant."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, backend: str, options: Options
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        out, lse = forward_op(q, k, v, backend, *options)
        ctx.save_for_backward(q, k, v, out, lse, *options[:TENSOR_OPTIONS])
        ctx.backend = backend
        ctx.numbers = options[TENSOR_OPTIONS:]
        ctx.set_materialize_grads(False)  # dlse stays None in the common case that nobody uses the LSE
        return out, lse

    @staticmethod
    @differentiable_once("block_sparse_attention")
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Any, ...]:
        q, k, v, out, lse, *tensors = ctx.saved_tensors
        if dout is None:
            dout = torch.zeros_like(out)
        needs = ctx.needs_input_grad[:3]
        grads = backward_op(dout, dlse, q, k, v, out, lse, list(needs), ctx.backend, *tensors, *ctx.numbers)
        return *(grad if need else None for grad, need in zip(grads, needs, strict=True)), None, None


def attend(q: Tensor, k: Tensor, v: Tensor, backend: str, options: Options) -> tuple[Tensor, Tensor]:
    """Run the operator, differentiably where an input wants a gradient. Returns (out, lse)."""
    if torch.compiler.is_exporting():
        return exported_op(q, k, v, backend, *options)
    return _differentiable(q, k, v, backend, options)


def _differentiable(q: Tensor, k: Tensor, v: Tensor, backend: str, options: Options) -> tuple[Tensor, Tensor]:
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        if torch.compiler.is_compiling():
            # Views, because Dynamo refuses a Function that gets one tensor twice.
            k, v = k.view_as(k), v.view_as(v)
        return _BlockSparseAttention.apply(q, k, v, backend, options)
    return forward_op(q, k, v, backend, *options)


exported_op = register(
    f"block_sparse_attention{_FORWARD_SCHEMA}",
    impl=_forward,
    fake=_forward_fake,
    gradient=lambda q, k, v, backend, *options: _differentiable(q, k, v, backend, Options(*options)),
)

"""``fft_conv`` as ``torch.library`` operators with an ``autograd.Function`` outside.

One forward and one backward operator serve the backends ``torch``, ``triton`` and ``cuda``. This file imports torch
alone; the backend's module is imported when it first runs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from iokernels.runtime.registration import lazily, register
from iokernels.runtime.registration.once import differentiable_once

from .options import OPTIONS_SCHEMA, TENSOR_OPTIONS, Needs, Options, without_empty_state

backend_module = lazily(__package__, torch=".portable", triton=".triton.launch", cuda=".cuda.launch")
"""The module of a backend: ``forward``, ``backward`` and ``transform``."""


def _forward(u: Tensor, k: Tensor, transform: list[Tensor], backend: str, *options: Any) -> Tensor:
    return backend_module(backend).forward(u, k, transform, without_empty_state(Options(*options)))


def _forward_fake(u: Tensor, k: Tensor, transform: list[Tensor], backend: str, *options: Any) -> Tensor:
    return u.new_empty(u.shape)


def _backward(
    dy: Tensor, u: Tensor, k: Tensor, transform: list[Tensor], needs: list[bool], backend: str, *options: Any
) -> tuple[Tensor, ...]:
    opts = without_empty_state(Options(*options))
    grads = backend_module(backend).backward(dy, u, k, transform, opts, Needs(*needs))
    if needs[-1] and grads.initial_state is None:  # of a filter of one tap, which has no past
        past = options[TENSOR_OPTIONS - 1]
        grads = grads._replace(initial_state=past.new_empty(past.shape))
    # An operator returns tensors only: an empty one stands for a gradient that nobody needs.
    return tuple(u.new_empty(0) if grad is None else grad for grad in grads)


def _backward_fake(
    dy: Tensor, u: Tensor, k: Tensor, transform: list[Tensor], needs: list[bool], backend: str, *options: Any
) -> tuple[Tensor, ...]:
    sources = (u, k, *options[:TENSOR_OPTIONS])
    return tuple(
        x.new_empty(x.shape) if need and x is not None else u.new_empty(0)
        for x, need in zip(sources, needs, strict=True)
    )


forward_op = register(
    f"fft_conv_fwd(Tensor u, Tensor k, Tensor[] transform, str backend, {OPTIONS_SCHEMA}) -> Tensor",
    impl=_forward,
    fake=_forward_fake,
)

backward_op = register(
    f"fft_conv_bwd(Tensor dy, Tensor u, Tensor k, Tensor[] transform, bool[] needs, str backend, {OPTIONS_SCHEMA}) "
    "-> (Tensor du, Tensor dk, Tensor dpre_gate, Tensor dpost_gate, Tensor dskip, Tensor dinitial_state)",
    impl=_backward,
    fake=_backward_fake,
)


class _FFTConv(torch.autograd.Function):
    """Calls the two operators above. Nothing is kept of the forward pass but its inputs."""

    @staticmethod
    def forward(
        ctx: Any, u: Tensor, k: Tensor, pre_gate: Tensor | None, post_gate: Tensor | None, skip: Tensor | None,
        initial_state: Tensor | None, transform: list[Tensor], backend: str, others: tuple[Any, ...],
    ) -> Tensor:  # fmt: skip
        tensors = (pre_gate, post_gate, skip, initial_state)
        ctx.save_for_backward(u, k, *tensors, *transform)
        ctx.backend, ctx.others = backend, others
        return forward_op(u, k, transform, backend, *tensors, *others)

    @staticmethod
    @differentiable_once("fft_conv")
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        u, k, *rest = ctx.saved_tensors
        tensors, transform = rest[:TENSOR_OPTIONS], rest[TENSOR_OPTIONS:]
        needs = Needs(*ctx.needs_input_grad[: 2 + TENSOR_OPTIONS])
        grads = backward_op(dy, u, k, transform, list(needs), ctx.backend, *tensors, *ctx.others)
        return *(grad if need else None for grad, need in zip(grads, needs, strict=True)), None, None, None


def convolve(u: Tensor, k: Tensor, transform: list[Tensor], backend: str, options: Options) -> Tensor:
    """Run the operator, differentiably where an input wants a gradient. Returns y ``[B, H, N]``."""
    run = exported_op if torch.compiler.is_exporting() else _differentiable
    return run(u, k, transform, backend, *options)


def _differentiable(u: Tensor, k: Tensor, transform: list[Tensor], backend: str, *options: Any) -> Tensor:
    tensors = options[:TENSOR_OPTIONS]
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (u, k, *tensors)):
        if torch.compiler.is_compiling():
            # Views, because Dynamo refuses a Function that gets one tensor twice: a gate that is u itself, say.
            tensors = tuple(None if x is None else x.view_as(x) for x in tensors)
        return _FFTConv.apply(u, k, *tensors, transform, backend, options[TENSOR_OPTIONS:])
    return forward_op(u, k, transform, backend, *options)


exported_op = register(
    f"fft_conv(Tensor u, Tensor k, Tensor[] transform, str backend, {OPTIONS_SCHEMA}) -> Tensor",
    impl=_forward,
    fake=_forward_fake,
    gradient=_differentiable,
)

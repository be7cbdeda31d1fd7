"""``fft_conv`` as ``torch.library`` operators with an ``autograd.Function`` outside.

One forward and one backward operator serve the backends ``torch``, ``triton`` and ``cuda``. Nothing is kept of the
forward pass but its inputs. This file imports torch alone; the backend's module is imported when it first runs.
"""

from __future__ import annotations

from torch import Tensor

from iokernels.runtime.registration import lazily
from iokernels.runtime.registration.differentiable import differentiable

from .options import Gradients, Needs, Options, without_empty_state

backend_module = lazily(__package__, torch=".portable", triton=".triton.launch", cuda=".cuda.launch")
"""The module of a backend: ``forward``, ``backward`` and ``transform``."""


def _forward(u: Tensor, k: Tensor, transform: list[Tensor], backend: str, options: Options) -> Tensor:
    return backend_module(backend).forward(u, k, transform, without_empty_state(options))


def _backward(
    dy: Tensor, u: Tensor, k: Tensor, transform: list[Tensor], needs: Needs, backend: str, options: Options
) -> Gradients:
    grads = backend_module(backend).backward(dy, u, k, transform, without_empty_state(options), needs)
    past = options.initial_state
    if needs.initial_state and grads.initial_state is None and past is not None:  # of a filter of one tap, without past
        grads = grads._replace(initial_state=past.new_empty(past.shape))
    return grads


forward_op, backward_op, _, convolve = differentiable(
    "fft_conv",
    "Tensor u, Tensor k, Tensor[] transform",
    "Tensor",
    gradients="Tensor dy",
    saved="Tensor u, Tensor k, Tensor[] transform",
    options=Options,
    needs=Needs,
    forward=_forward,
    fake=lambda u, k, transform, backend, options: u.new_empty(u.shape),
    backward=_backward,
    like="u",
    distinct=("pre_gate", "post_gate", "skip", "initial_state"),
)
"""``convolve(u, k, transform, backend, options)`` returns y ``[B, H, N]``, differentiable where an input wants a
gradient."""

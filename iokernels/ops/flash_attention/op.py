"""``flash_attention`` as ``torch.library`` operators with an ``autograd.Function`` outside.

One forward and one backward operator serve dense and packed inputs and the backends ``torch``, ``triton`` and ``cuda``.
This file imports torch alone; the backend's module is imported when it first runs.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from iokernels.ops.shared.layout import EMPTY_IN_ORDER
from iokernels.runtime.registration import lazily
from iokernels.runtime.registration.differentiable import differentiable

from .options import Gradients, Needs, Options, empty_out, empty_statistics, lse_and_tail

_backend = lazily(__package__, torch=".portable", triton=".triton.launch", cuda=".cuda.launch")


def _forward(q: Tensor, k: Tensor, v: Tensor, backend: str, options: Options) -> tuple[Tensor, Tensor]:
    return _backend(backend).forward(q, k, v, options)


def _backward(*given: Any) -> Gradients:
    dout, dstatistics, q, k, v, out, statistics, needs, backend, options = given
    return _backend(backend).backward(dout, dstatistics, q, k, v, out, statistics, options, needs)


forward_op, backward_op, exported_op, _run = differentiable(
    "flash_attention",
    "Tensor q, Tensor k, Tensor v",
    "Tensor out, Tensor statistics",
    gradients="Tensor dout, Tensor? dstatistics",
    saved="Tensor q, Tensor k, Tensor v, Tensor out, Tensor statistics",
    options=Options,
    needs=Needs,
    forward=_forward,
    fake=lambda q, k, v, backend, options: (empty_out(q, v), empty_statistics(q, options)),
    backward=_backward,
    empty=EMPTY_IN_ORDER,
    # x, x, x in self-attention, or the same offsets of queries and keys.
    distinct=("k", "v", "cu_seqlens_k"),
)


def attend(q: Tensor, k: Tensor, v: Tensor, backend: str, options: Options) -> tuple[Tensor, Tensor]:
    """Run the operator, differentiably where an input wants a gradient. Returns (out, lse)."""
    out, statistics = _run(q, k, v, backend, options)
    return out, lse_and_tail(statistics)[0]

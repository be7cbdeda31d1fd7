"""``block_sparse_attention`` as ``torch.library`` operators with an ``autograd.Function`` outside.

The operators take the tensors and numbers of an index one by one (:class:`.options.Options`), and serve the backends
``torch`` and ``triton``, whose modules are imported when they first run. The index is a constant.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from iokernels.ops.shared.layout import EMPTY_IN_ORDER, empty_in_order_of
from iokernels.runtime.registration import lazily
from iokernels.runtime.registration.differentiable import differentiable

from .options import Gradients, Needs, Options, empty_lse
from .values import check_values

_backend = lazily(__package__, torch=".portable", triton=".triton.launch")


def _forward(q: Tensor, k: Tensor, v: Tensor, backend: str, options: Options) -> tuple[Tensor, Tensor]:
    check_values(q, k, options)
    return _backend(backend).forward(q, k, v, options)


def _backward(*given: Any) -> Gradients:
    dout, dlse, q, k, v, out, lse, needs, backend, options = given
    return _backend(backend).backward(dout, dlse, q, k, v, out, lse, options, needs)


forward_op, backward_op, _, attend = differentiable(
    "block_sparse_attention",
    "Tensor q, Tensor k, Tensor v",
    "Tensor out, Tensor lse",
    gradients="Tensor dout, Tensor? dlse",
    saved="Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse",
    options=Options,
    needs=Needs,
    forward=_forward,
    fake=lambda q, k, v, backend, options: (empty_in_order_of(q, v.shape[3]), empty_lse(q)),
    backward=_backward,
    empty=EMPTY_IN_ORDER,
    distinct=("k", "v"),
)
"""``attend(q, k, v, backend, options)`` returns (out, lse), differentiable where an input wants a gradient."""

"""In what precision a reference computes: float32 at least, so that it can judge kernels in half precision.

The references are written in the dtype of the tensors that they are given. :func:`lifted` gives them float32 for
float16 and bfloat16, and each rounds its results once. A proof also wants to know what the formula loses when every
operation rounds to half precision, for a multiple of that is the error that a kernel may make: inside :func:`eagerly`
nothing is lifted.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any, TypeVar

import torch
from torch import Tensor

from iokernels.runtime.scoped import Scoped

_Tuple = TypeVar("_Tuple", bound=tuple[Any, ...])

_HALF = (torch.float16, torch.bfloat16)

_lifts: Scoped[bool] = Scoped(True)  # asked anew in every call: no plan may remember it


def eagerly() -> AbstractContextManager[None]:
    """Inside, the references run as PyTorch runs a formula, in the dtype of their inputs: a setting of the process.

    Those of linear attention, of the delta rule, of the selectors and of ``append_kv`` run in float32 all the same: it
    belongs to what they define.
    """
    return _lifts.set(False)


def lifted(arguments: _Tuple) -> _Tuple:
    """The arguments of a reference with every tensor in half precision as float32, in tuples inside too.

    Once at the beginning, before anything is sliced or repeated: a gradient is then summed in float32 and rounded once.
    """
    return _lifted(arguments) if _lifts.value else arguments


def _lifted(x: Any) -> Any:
    if isinstance(x, Tensor):
        return x.float() if x.dtype in _HALF else x
    if isinstance(x, tuple):
        fields = [_lifted(y) for y in x]
        return type(x)(*fields) if hasattr(x, "_fields") else tuple(fields)
    return x


def recomputes_weights(dtype: torch.dtype) -> bool:
    """Whether softmax, in ``dtype``, makes its weights ``exp(s - lse)`` of a rounded log-sum-exp: eagerly in float32.

    In exact arithmetic it is the same, and every backward pass of a kernel does so. Its rounding grows with the logits:
    a budget without it would hold kernels to what none can reach, and an oracle with it would lose log of the number of
    keys beside a mask of -1e9. In half precision the log-sum-exp itself would be too coarse.
    """
    return not _lifts.value and dtype == torch.float32


def at_least_single(dtype: torch.dtype) -> torch.dtype:
    """float32, but float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32

"""The backends that the tests of an operator with kernels in both languages run on, and the dtypes that each takes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from iokernels.runtime.device import cuda_refusal

_REFUSAL = cuda_refusal(torch.device("cuda" if torch.cuda.is_available() else "cpu"))

needs_cuda = pytest.mark.skipif(_REFUSAL is not None, reason=_REFUSAL or "")
"""For tests of the backend ``cuda``: skipped where neither a GPU nor the emulator runs it."""

CUDA = pytest.param("cuda", marks=needs_cuda)
BACKENDS = ("torch", "triton", CUDA)
HALF_AND_SINGLE = (torch.float16, torch.bfloat16, torch.float32)


def runs(*dtypes: torch.dtype) -> list[Any]:
    """Parameters ``backend, dtype``: every backend with those of the dtypes of q that it takes."""
    found: list[Any] = [(backend, dtype) for backend in ("torch", "triton") for dtype in dtypes]
    return found + [pytest.param("cuda", dtype, marks=CUDA.marks) for dtype in dtypes if dtype.itemsize == 2]


def usual(backend: str) -> torch.dtype:
    """The widest dtype of q that a backend has kernels for."""
    return torch.float16 if backend == "cuda" else torch.float32

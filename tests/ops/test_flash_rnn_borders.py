"""flash_rnn at its borders: gates of any size in 16 bits, layouts of any kind, sizes of 0, meta tensors, exported
programs, results that are changed in place."""

from __future__ import annotations

import pytest
import torch

from iokernels.runtime import device as devices

from .backends import CUDA
from .flash_rnn_calls import draw, prove

KERNELS = ["torch"] + (["triton"] if devices.INTERPRET or torch.cuda.is_available() else []) + [CUDA]


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("scale", [1.0, 10.0, 100.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", KERNELS)
def test_gates_of_any_size_keep_their_gradients(
    backend: str, dtype: torch.dtype, scale: float, recompute: bool
) -> None:
    """What a backward pass needs of an exponential gate loses nothing on the way to it."""
    prove(draw("slstm", 2, 7, 2, 8, dtype=dtype, scale=scale), "slstm", backend, recompute_gates=recompute)


@pytest.mark.parametrize("cell", ["lstm", "gru", "elman"])
@pytest.mark.parametrize(("backend", "dtype"), [("torch", torch.bfloat16), ("torch", torch.float16)])
def test_so_do_those_that_saturate(cell: str, backend: str, dtype: torch.dtype) -> None:
    for scale in (10.0, 30.0):
        for recompute in (False, True):
            prove(draw(cell, 3, 19, 2, 8, dtype=dtype, scale=scale), cell, backend, recompute_gates=recompute)

"""What the launchers of kernels in CUDA C++ say of tensors, whatever the operator."""

from __future__ import annotations

from torch import Tensor


def in_sixteens(x: Tensor) -> bool:
    """Whether every row of ``x`` is whole units of 16 bytes, at addresses that are too, so that kernels copy units."""
    *outer, last = zip(x.shape, x.stride(), strict=True)
    unit = 16 // x.element_size()
    if last[0] % unit or last[1] != 1:
        return False
    return x.data_ptr() % 16 == 0 and all(size <= 1 or stride % unit == 0 for size, stride in outer)

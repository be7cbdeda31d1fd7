"""Which calls of linear attention the kernels do not take, and why."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from iokernels.runtime import device as devices
from iokernels.runtime.contracts import short

MAX_WIDTH = 256
"""Widest K and V that the Triton kernels take."""
MAX_CUDA_WIDTH = 128
"""Widest K and V of those in CUDA C++, where the state of 16 columns takes half as many registers of a thread."""
MAX_TAYLOR_WIDTH = 32
"""Widest K of theirs with the Taylor map: the state has 1 + K + K^2 rows, and a block holds some columns of it."""


def triton_refusal(q: Tensor, sizes: dict[str, Any], taylor: bool) -> str | None:
    """Why the Triton kernels cannot run a call, as the end of a sentence, or None when they can."""
    if q.dtype == torch.float64:
        return "its kernels take float16, bfloat16 and float32, not float64"
    for name in ("K", "V"):
        if sizes[name] > MAX_WIDTH:
            return f"{name} is {sizes[name]}, and its kernels hold widths up to {MAX_WIDTH}"
    if taylor and sizes["K"] > MAX_TAYLOR_WIDTH:
        return f"K is {sizes['K']}, and with the Taylor map its kernels hold widths up to {MAX_TAYLOR_WIDTH}"
    return devices.triton_refusal(q.device)


def cuda_refusal(q: Tensor, sizes: dict[str, Any], taylor: bool, normalize: bool) -> str | None:
    """Why the kernels in CUDA C++ cannot run a call, as the end of a sentence, or None when it can."""
    if q.dtype not in (torch.float16, torch.bfloat16):
        return f"its kernels take float16 and bfloat16, not {short(q.dtype)}"
    if taylor:
        return "its kernels have no feature map"
    if normalize:
        return "its kernels have no normaliser"
    for name in ("K", "V"):
        if sizes[name] > MAX_CUDA_WIDTH:
            return f"{name} is {sizes[name]}, and its kernels hold widths up to {MAX_CUDA_WIDTH}"
    return devices.cuda_refusal(q.device)

"""The Triton kernels of linear_attention without data: which configurations a call takes, and compiling them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from iokernels.ops.linear_attention.options import Needs, Options, empty_denominator, empty_state
from iokernels.ops.linear_attention.tuning import KERNELS

Pass = Literal["fwd", "bwd", "both", "step"]


@dataclass(frozen=True)
class Call:
    """One call. ``decay`` counts dimensions of log_decay: 0 for none, 1 a head, 3 a token; the last wants a gradient.
    ``packed`` puts all tokens into one row of ``batch`` sequences."""

    batch: int
    heads: int
    key_heads: int
    length: int
    key_width: int
    value_width: int
    decay: int = 1
    taylor: bool = False
    normalize: bool = False
    state: bool = False
    packed: bool = False
    bnhd: bool = True


def meta_call(call: Call, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Options]:
    """q, k, v and the options of a call, as meta tensors."""

    def empty(*size: int, of: torch.dtype = dtype) -> Tensor:
        return torch.empty(size, dtype=of, device="meta")

    batch, rows = (1, call.batch * call.length) if call.packed else (call.batch, call.length)

    def heads(count: int, width: int) -> Tensor:
        if call.bnhd or call.packed:
            return empty(batch, rows, count, width).transpose(1, 2)
        return empty(batch, count, rows, width)

    q, k = (heads(call.key_heads, call.key_width) for _ in range(2))
    v = heads(call.heads, call.value_width)
    decay = None
    if call.decay:
        decay = empty(call.heads, of=torch.float32)
        if call.decay == 3:
            decay = empty(batch, rows, call.heads, of=torch.float32).transpose(1, 2)
    options = Options(
        log_decay=decay,
        cu_seqlens=empty(call.batch + 1, of=torch.int32) if call.packed else None,
        scale=call.key_width**-0.5,
        taylor=call.taylor,
        normalize=call.normalize,
    )
    if call.state:
        options = options._replace(initial_state=empty_state(q, v, options))
    return q, k, v, options


def configs(call: Call, dtype: torch.dtype) -> dict[str, Any]:
    """The configuration that each kernel would be launched with."""
    from iokernels.ops.linear_attention import triton_launch

    launch = triton_launch.Launch(*meta_call(call, dtype))
    return {kernel: launch.config(kernel, call.decay == 3 and "_bwd_" in kernel) for kernel in KERNELS}


def launch(call: Call, dtype: torch.dtype, which: Pass) -> None:
    """Launch the kernels of a pass with meta tensors."""
    from iokernels.ops.linear_attention import triton_launch

    q, k, v, options = meta_call(call, dtype)
    state = empty_state(q, v, options)
    if which == "step":
        token = slice(0, 1)
        decay = options.log_decay
        decay = decay[:, :, token] if decay is not None and decay.dim() == 3 else decay
        new = options._replace(log_decay=decay, initial_state=None)
        triton_launch.step(q[:, :, token], k[:, :, token], v[:, :, token], state, new)
        return
    if which != "bwd":
        triton_launch.forward(q, k, v, options)
    if which != "fwd":
        needs = Needs(True, True, True, call.decay == 3, call.state)
        triton_launch.backward(
            torch.empty_like(v), state if call.state else None, q, k, v, v if call.normalize else None, state,
            empty_denominator(v, options), options, needs,
        )  # fmt: skip


POINTS: tuple[tuple[Call, torch.dtype], ...] = (
    (Call(4, 32, 32, 4096, 64, 64), torch.bfloat16),
    (Call(4, 32, 32, 4096, 128, 128), torch.bfloat16),
    (Call(1, 8, 8, 16384, 128, 128, decay=3, state=True), torch.bfloat16),
    (Call(8, 16, 4, 512, 64, 64, decay=3, packed=True), torch.float16),
    (Call(1, 4, 1, 4096, 100, 200, decay=3, normalize=True, state=True), torch.float16),
    (Call(4, 32, 32, 2048, 256, 256), torch.bfloat16),
    (Call(4, 16, 16, 2048, 16, 64, decay=0, taylor=True, normalize=True), torch.bfloat16),
    (Call(1, 4, 4, 4096, 24, 64, decay=3, taylor=True, normalize=True, state=True), torch.bfloat16),
    (Call(4, 32, 32, 2048, 64, 64), torch.float32),
    (Call(4, 32, 32, 2048, 256, 256, decay=3), torch.float32),
    (Call(1, 4, 4, 2048, 16, 64, decay=3, taylor=True, normalize=True), torch.float32),
)
"""Calls that together compile every branch of every kernel: whole and cut, dense and packed, with and without all."""

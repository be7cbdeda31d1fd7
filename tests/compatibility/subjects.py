"""The modules and functions that the page on PyTorch compatibility has a row for: how each is made and called."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import iokernels as io
from iokernels import nn as ionn

WIDTH, LENGTH, BATCH = 16, 12, 2


def by_rows(batch: int, length: int) -> tuple[int, ...]:
    return (batch, length, WIDTH)


def by_channels(batch: int, length: int) -> tuple[int, ...]:
    return (batch, WIDTH, length)


@dataclass(frozen=True)
class Module:
    """A module with its usual arguments, the shape of its input, and its result among what it returns."""

    make: Callable[..., nn.Module]
    shape: Callable[[int, int], tuple[int, ...]] = by_rows
    call: Callable[[nn.Module, Tensor], Tensor] = lambda module, x: module(x)
    stateful: bool = False

    def input(self, batch: int = BATCH, length: int = LENGTH, **made: Any) -> Tensor:
        return torch.randn(self.shape(batch, length), **made)


def first(module: nn.Module, x: Tensor) -> Tensor:
    return module(x)[0]


def attend(module: nn.Module, x: Tensor) -> Tensor:
    return module(x, x, x, need_weights=False)[0]


MODULES: dict[str, Module] = {
    "FlashAttention": Module(
        lambda **m: ionn.FlashAttention(WIDTH, 2, causal=True, batch_first=True, **m), call=attend
    ),
    "DecodeAttention": Module(lambda **m: ionn.DecodeAttention(WIDTH, 2, rotary=8, max_positions=64, **m)),
    "HiPAttention": Module(
        lambda **m: ionn.HiPAttention(WIDTH, 2, rotary=8, max_positions=64, budget=8, sink=2, window=4, **m)
    ),
    "LightningAttention": Module(lambda **m: ionn.LightningAttention(WIDTH, 2, **m), stateful=True),
    "Retention": Module(lambda **m: ionn.Retention(WIDTH, 2, **m), stateful=True),
    "BasedAttention": Module(lambda **m: ionn.BasedAttention(WIDTH, 2, feature_dim=4, window=4, **m), stateful=True),
    "GatedDeltaNet": Module(lambda **m: ionn.GatedDeltaNet(WIDTH, 2, **m), stateful=True),
    "LSTM": Module(lambda **m: ionn.LSTM(WIDTH, WIDTH, batch_first=True, **m), call=first),
    "LSTM, 2 heads": Module(lambda **m: ionn.LSTM(WIDTH, WIDTH, batch_first=True, num_heads=2, **m), call=first),
    "GRU": Module(lambda **m: ionn.GRU(WIDTH, WIDTH, batch_first=True, **m), call=first),
    "RNN": Module(lambda **m: ionn.RNN(WIDTH, WIDTH, batch_first=True, **m), call=first),
    "SLSTM": Module(lambda **m: ionn.SLSTM(WIDTH, 2, **m), stateful=True),
    "FFTConv": Module(lambda **m: ionn.FFTConv(WIDTH, 32, **m), shape=by_channels),
    "LongConv": Module(lambda **m: ionn.LongConv(WIDTH, 32, **m)),
    "ShortConv1d": Module(lambda **m: ionn.ShortConv1d(WIDTH, 4, **m), shape=by_channels),
    "HyenaOperator": Module(lambda **m: ionn.HyenaOperator(WIDTH, 32, filter_options={"hidden": 8}, **m)),
}


@dataclass(frozen=True)
class Operator:
    """A function of tensors: how they are drawn, the call by a backend, and whether it has gradients."""

    draw: Callable[..., tuple[Tensor, ...]]
    call: Callable[..., Tensor]
    trains: bool = True


def randn(*shapes: tuple[int, ...]) -> Callable[..., tuple[Tensor, ...]]:
    """Draws of the shapes, whose ``B`` and ``N`` are filled in."""

    def draw(batch: int = BATCH, length: int = LENGTH, **made: Any) -> tuple[Tensor, ...]:
        fill = {"B": batch, "N": length}
        return tuple(torch.randn(tuple(fill.get(d, d) for d in shape), **made) for shape in shapes)  # type: ignore[misc]

    return draw


B: Any = "B"
N: Any = "N"
QKV = ((B, 2, N, 8),) * 3


def _packed(backend: str | None, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    rows = q.shape[0]
    ends = torch.tensor([0, rows // 3, rows], dtype=torch.int32, device=q.device)
    return io.flash_attention_varlen(
        q,
        k,
        v,
        cu_seqlens_q=ends,
        cu_seqlens_k=ends,
        max_seqlen_q=rows,
        max_seqlen_k=rows,
        causal=True,
        backend=backend,
    )


def _rows(batch: int = BATCH, length: int = LENGTH, **made: Any) -> tuple[Tensor, ...]:
    q, k, v = torch.randn(3, batch * length, 2, 8, **made)
    return q, k, v


def _decode(backend: str | None, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    lengths = torch.full((q.shape[0],), k.shape[2], dtype=torch.int32, device=q.device)
    return io.lean_attention(q, k, v, cache_seqlens=lengths, backend=backend)


def _blocks(backend: str | None, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    index = io.select_window(q.detach(), k.detach(), window=4, sink=2, block_q=16, block_k=8)
    return io.block_sparse_attention(q, k, v, index, backend=backend)


OPERATORS: dict[str, Operator] = {
    "flash_attention": Operator(randn(*QKV), lambda b, q, k, v: io.flash_attention(q, k, v, causal=True, backend=b)),
    "flash_attention_varlen": Operator(_rows, _packed),
    "scaled_dot_product_attention": Operator(
        randn(*QKV), lambda b, q, k, v: io.scaled_dot_product_attention(q, k, v, is_causal=True)
    ),
    "lean_attention": Operator(randn((B, 2, 1, 8), *QKV[1:]), _decode, trains=False),
    "hip_attention": Operator(
        randn(*QKV), lambda b, q, k, v: io.hip_attention(q, k, v, budget=8, sink=2, window=4, backend=b)
    ),
    "block_sparse_attention": Operator(randn(*QKV), _blocks),
    "linear_attention": Operator(
        randn(*QKV),
        lambda b, q, k, v: io.linear_attention(q, k, v, log_decay=-io.alibi_slopes(2).to(q.device), backend=b),
    ),
    "gated_delta_rule": Operator(
        randn(*QKV, (B, 2, N)),
        lambda b, q, k, v, beta: io.gated_delta_rule(q, k / 4, v, beta.sigmoid(), backend=b),
    ),
    "fft_conv": Operator(randn((B, 3, N), (3, 8)), lambda b, u, k: io.fft_conv(u, k, backend=b)),
    "short_conv": Operator(randn((B, 3, N), (3, 4)), lambda b, x, w: io.short_conv(x, w, backend=b)),
    "flash_rnn": Operator(
        randn((B, N, 4, 2, 4), (4, 2, 4, 4), (4, 2, 4)),
        lambda b, gates, r, bias: io.flash_rnn(gates, r, bias, cell="lstm", backend=b),
    ),
}

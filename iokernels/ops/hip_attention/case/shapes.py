"""The words that describe a call of hip_attention or of a selector, and its inputs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from iokernels.ops.hip_attention.options import HEADS
from iokernels.testing.case import Inputs
from iokernels.testing.case.shape import Dimension, Shape, UsageError, Vocabulary

_DIMENSIONS = (
    Dimension("b", 1, "sequences", always=True),
    Dimension("h", 32, "query heads", least=1, always=True),
    Dimension("hkv", "h", "key and value heads; divides h", least=1, always=True),
    Dimension("n", 16384, "queries of a sequence", least=1, always=True),
    Dimension("nk", "n", "keys of a sequence", least=1),
    Dimension("d", 128, "width of q and k", least=1, always=True),
    Dimension("budget", 2048, "keys that are selected for a block of queries", least=16, always=True),
    Dimension("sink", 256, "first keys that every row sees"),
    Dimension("window", 1024, "latest keys that a row sees"),
    Dimension("causal", 1, "1: row i sees the keys up to i + nk - n", most=1),
    Dimension("heads", 0, "who shares a list; 0: the heads of a key head, 1: all, 2: nobody", most=2),
    Dimension("bq", 64, "query rows that share a list: 16, 32, 64 or 128"),
    Dimension("bnhd", 0, "1: tensors stored as [b, n, h, d], passed as transposed views", most=1),
    Dimension("gain", 2.0, "factor of q: more makes the attention peaked"),
)

VOCABULARY = Vocabulary(
    "hip_attention",
    (
        *_DIMENSIONS,
        Dimension("dv", "d", "width of v", least=1),
        Dimension("lse", 0, "1: the log-sum-exp is returned", most=1),
    ),
)

SELECT = Vocabulary(
    "select_hip",
    (*_DIMENSIONS, Dimension("quest", 0, "1: select_quest with pages of 16, its bounds computed", most=1)),
)


def options(shape: Shape) -> dict[str, Any]:
    """The keyword arguments of a call."""
    return {
        "budget": shape.budget,
        "sink": shape.sink,
        "window": shape.window,
        "causal": bool(shape.causal),
        "heads": HEADS[shape.heads],
        "block_q": shape.bq,
    }


def drawn(shape: Shape, dtype: torch.dtype, device: torch.device, seed: int, value_dim: int = 0) -> Inputs:
    """Normal values; every four rows of a query head are alike.

    So the mean of neighbours, which is what the search sees, is the same number in every precision, and a comparison
    of two backends compares their search and not their rounding.
    """
    if shape.h % shape.hkv:
        raise UsageError(f"shape: hkv={shape.hkv} does not divide h={shape.h}")
    generator = torch.Generator(device).manual_seed(seed)

    def heads(count: int, rows: int, width: int) -> Tensor:
        if shape.bnhd:
            return torch.randn(shape.b, rows, count, width, generator=generator, device=device).transpose(1, 2)
        return torch.randn(shape.b, count, rows, width, generator=generator, device=device)

    q = heads(shape.h, -(-shape.n // 4), shape.d) * shape.gain
    q = q.transpose(1, 2).repeat_interleave(4, 1)[:, : shape.n].transpose(1, 2)
    tensors = {"q": q if shape.bnhd else q.contiguous(), "k": heads(shape.hkv, shape.nk, shape.d)}
    if value_dim:
        tensors["v"] = heads(shape.hkv, shape.nk, value_dim)
    return Inputs(shape, {name: x.to(dtype) for name, x in tensors.items()}, options(shape), {}, seed)


def chunk_searches(shape: Shape) -> int:
    """How many chunks of eight keys a call has for all its blocks of queries: what the reference loops over."""
    return shape.b * shape.h * -(-shape.n // shape.bq) * -(-shape.nk // 8)


def smaller(shape: Shape) -> Shape:
    """One sequence, then one group of heads, then half the rows and keys."""
    if shape.b > 1:
        return shape.replace(b=1)
    if shape.hkv > 1:
        return shape.replace(h=shape.h // shape.hkv, hkv=1)
    if shape.nk > 128:
        names = ("n", "nk", "budget", "sink", "window")
        return shape.replace(**{name: max(shape[name] // 2, 16 if name == "budget" else 1) for name in names})
    return shape

"""Calls of block_sparse_attention."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import iokernels

from ..case import Case
from ..draw import HALVES, Draw
from ..oracles import block_sparse_attention as oracle
from .caches import pages, poisoned, unread

BACKENDS = {"torch": 62, "triton": 24, "reference": 14}
_INDEX = ("indices", "counts", "block_q", "block_k", "sink", "window", "q_len", "kv_len")


def draw(d: Draw) -> Case:
    backend = d.backend(BACKENDS)
    dtype = d.dtype(backend)
    d.magnitude(dtype)
    slow = backend == "triton"
    batch, kv_heads = d.pick((0, 1, 1, 2, 3)), d.pick((1, 1, 2, 3))
    heads = kv_heads * d.pick((1, 1, 2, 3))
    cached = d.chance(0.4)
    most = 60 if slow else 110
    rows = d.pick((1, 1, 2, 5, 16)) if cached else d.size(most, (16, 32, 64))
    keys = d.size(most, (8, 16, 32, 64, 128))
    width = d.size(24 if slow else 48, (16, 32), least=1)
    wide = width if d.chance(0.6) else d.size(32, (16,), least=1)
    a: dict[str, Any] = {"backend": backend}
    a["q"] = d.floats("q", (batch, heads, rows, width), dtype)
    _keys(d, a, (batch, kv_heads, keys), (width, wide), dtype, cached)
    index_args(d, a, batch, d.pick((1, kv_heads, heads)), rows, keys)
    if d.chance(0.3):
        a["causal"] = False
    if d.chance(0.35):
        a["scale"] = d.pick((1.0, 0.5, 0.0, -1.0, -0.2, 2))
    a["return_lse"] = True
    differentiable = backend == "reference" or not cached
    wanted = tuple(n for n in "qkv" if d.chance(0.85)) if differentiable and d.chance(0.6) else ()
    if not wanted and d.chance(0.1):
        d.spoil_a_row("q", a["q"])
    return Case(
        "block_sparse_attention", run, oracle.sparse, a, d.notes, dtype,
        {"out": dtype, "lse": torch.float64 if dtype == torch.float64 else torch.float32},
        wanted, single=("lse",) if dtype in HALVES else (),
    )  # fmt: skip


def run(args: dict[str, Any]) -> dict[str, Tensor]:
    args = dict(args)
    index = iokernels.BlockIndex(**{name: args.pop(name) for name in _INDEX})
    out, lse = iokernels.block_sparse_attention(index=index, **args)
    return {"out": out, "lse": lse}


def index_args(d: Draw, a: dict[str, Any], batch: int, lists: int, rows: int, keys: int) -> None:
    """The fields of a BlockIndex: lists of blocks, ascending and unique, with nonsense behind their counts."""
    a["q_len"], a["kv_len"] = rows, keys
    a["block_k"] = d.pick((8, 8, 16, 32, 64, 128))
    small = [size for size in (16, 32, 48, 64, 128) if rows > size]
    a["block_q"] = d.pick(small) if small and d.chance(0.8) else max(rows, d.pick((1, 16, 64, 200)))
    blocks = 1 if a["block_q"] >= rows else -(-rows // a["block_q"])
    there = -(-keys // a["block_k"])
    slots = d.pick((0, 1, there, there + 2, 3))
    counts = torch.zeros(batch, lists, blocks, dtype=torch.int32)
    indices = torch.full((batch, lists, blocks, slots), d.pick((-1, 2**31 - 1, 10**8, 0)), dtype=torch.int32)
    for b in range(batch):
        for h in range(lists):
            for m in range(blocks):
                count = -1 if d.chance(0.15) else d.random.randint(0, min(slots, there))
                counts[b, h, m] = count
                listed = sorted(d.random.sample(range(there), max(count, 0)))
                indices[b, h, m, : max(count, 0)] = torch.tensor(listed, dtype=torch.int32)
    a["indices"] = d.laid_out("indices", indices, but=("expanded",))
    a["counts"] = d.laid_out("counts", counts, but=("expanded",))
    for name in ("indices", "counts"):
        d.notes[name] += f" {a[name].tolist()}" if a[name].numel() <= 40 else ""
    for name in ("sink", "window"):
        a[name] = d.pick((0, 0, 1, 5, keys, d.size(40), 2**31 - 1))
        if d.chance(0.3):
            a[name] = d.ints(name, [d.pick((0, 1, 5, d.size(40))) for _ in range(lists)])


def _keys(
    d: Draw, a: dict[str, Any], sizes: tuple[int, int, int], widths: tuple[int, int], dtype: torch.dtype, cached: bool
) -> None:
    batch, heads, keys = sizes
    lengths = [keys] * batch
    first, places = batch, keys
    if cached and d.chance(0.7):
        lengths = [d.pick((0, 1, keys, d.size(keys))) for _ in range(batch)]
        lengths = [min(length, keys) for length in lengths]
        a["cache_seqlens"] = d.ints("cache_seqlens", lengths)
    if cached and d.chance(0.7):
        first, places = pages(d, a, batch, max(keys, 1), lengths)
    elif cached and "cache_seqlens" not in a:
        a["cache_seqlens"] = d.ints("cache_seqlens", lengths)
    for name, width in (("k", widths[0]), ("v", widths[1])):
        x = d.floats(name, (first, heads, places, width), dtype)
        if cached and 0 not in x.stride():
            x.copy_(poisoned(x, unread(x, a.get("block_table"), lengths)))
            d.notes[name] += ", NaN where no length reaches"
        a[name] = x

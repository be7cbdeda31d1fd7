"""Calls of lean_attention."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import iokernels

from ..case import Case
from ..draw import HALVES, Draw
from ..oracles import lean_attention as oracle
from .caches import QUANTISED, pages, poisoned, unread, values

BACKENDS = {"torch": 60, "triton": 18, "cuda": 10, "reference": 12}


def draw(d: Draw) -> Case:
    backend = d.backend(BACKENDS)
    dtype = d.dtype(backend)
    d.magnitude(dtype)
    slow = backend in ("triton", "cuda")
    batch = d.pick((0, 1, 1, 2, 3, 5))
    kv_heads = d.pick((1, 1, 2, 3))
    heads = kv_heads * d.pick((1, 1, 2, 3, 5))
    rows = d.pick((1, 1, 1, 1, 2, 3, 4, 7, 16))
    capacity = d.size(80 if slow else 200, (16, 32, 64, 128))
    width = d.size(24 if slow else 72, (16, 64), least=1)
    wide = width if d.chance(0.6) else d.size(40, (16, 32), least=1)
    lengths = [d.pick((0, 1, capacity, d.size(capacity), d.size(capacity))) for _ in range(batch)]
    alike = d.chance(0.15)
    lengths = [min(lengths[0] if alike else length, capacity) for length in lengths]
    a: dict[str, Any] = {"backend": backend}
    a["q"] = d.floats("q", (batch, heads, rows, width), dtype)
    first, places = batch, capacity
    if d.chance(0.45):
        first, places = pages(d, a, batch, capacity, lengths)
    cache_dtype = d.pick((dtype, dtype, dtype, *QUANTISED))
    exact_scales = _caches(d, a, (first, kv_heads, places), (width, wide), cache_dtype, lengths)
    a["cache_seqlens"] = d.ints("cache_seqlens", lengths, but=() if alike else ("expanded",))
    if not exact_scales and d.chance(0.25):
        prefix = d.size(40, (16, 32))
        for name, columns in (("k_prefix", width), ("v_prefix", wide)):
            a[name] = d.laid_out(name, values(d, (kv_heads, prefix, columns), cache_dtype))
    _options(d, a, heads, dtype)
    a["return_lse"] = True
    wanted = ("q",) if backend == "reference" and d.chance(0.4) else ()
    if not wanted and d.chance(0.08):
        d.spoil_a_row("q", a["q"])

    def run(args: dict[str, Any]) -> dict[str, Tensor]:
        out, lse = iokernels.lean_attention(**args)
        return {"out": out, "lse": lse}

    return Case(
        "lean_attention", run, oracle.lean, a, d.notes, dtype,
        {"out": dtype, "lse": torch.float64 if dtype == torch.float64 else torch.float32},
        wanted, single=("lse",) if dtype in HALVES else (),
    )  # fmt: skip


def _caches(
    d: Draw, a: dict[str, Any], places: tuple[int, ...], widths: tuple[int, int], dtype: torch.dtype, lengths: list[int]
) -> bool:
    """Caches with nonsense where no length reaches, and their scales; whether those are for each key."""
    table = a.get("block_table")
    shape = (*places, widths[0])
    free = unread(torch.empty(shape, device="meta"), table, lengths)
    for name, width in (("k_cache", widths[0]), ("v_cache", widths[1])):
        cache = poisoned(values(d, (*places, width), dtype), free)
        a[name] = d.laid_out(name, cache, but=("expanded", "negated", "conjugated") if dtype in QUANTISED else
                             ("expanded",))  # fmt: skip
    kind = d.pick(("", "heads", "keys")) if dtype not in QUANTISED else d.pick(("heads", "keys"))
    for name in ("k_scale", "v_scale") if kind else ():
        if d.chance(0.2) and dtype not in QUANTISED:
            continue
        scale = d.uniform(*places) if kind == "keys" else d.uniform(places[1])
        scale = (scale + 0.1) * (0.02 if dtype == torch.int8 else 1.0)
        scale = poisoned(scale.float(), free) if kind == "keys" else scale.float()
        a[name] = d.laid_out(name, scale, but=("expanded",))
    return kind == "keys"


def _options(d: Draw, a: dict[str, Any], heads: int, dtype: torch.dtype) -> None:
    if d.chance(0.4):
        a["causal"] = d.chance(0.5)
    if d.chance(0.3):
        a["window"] = tuple(d.pick((-1, 0, 1, 7, d.size(80), 2**31, 2**40)) for _ in range(2))
    if d.chance(0.35):
        a["scale"] = d.pick((1.0, 0.5, 0.0, -1.0, -0.2, 2, 1e-3))
    if d.chance(0.2):
        a["softcap"] = d.pick((1.0, 30.0, 50, 0.5))
    if d.chance(0.3):
        a["sinks"] = d.laid_out("sinks", (d.normal(heads) * 3).to(d.pick((dtype, torch.float32))))
    if d.chance(0.2):
        a["batch_invariant"] = True
    elif d.chance(0.4):
        a["schedule"] = d.pick(("lean", "split"))

"""Calls of append_kv."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import iokernels

from ..case import Case, Results, Wrong
from ..draw import Draw
from ..limits import UNIT
from ..oracles import append_kv as oracle
from .caches import QUANTISED, pages, values

BACKENDS = {"torch": 60, "triton": 28, "reference": 12}
_HALF_ULP = {**UNIT, torch.float8_e4m3fn: 2.0**-4, torch.int8: 0.0}
_SMALLEST = {
    torch.float16: 2.0**-25, torch.bfloat16: 2.0**-134, torch.float32: 2.0**-150, torch.float64: 0.0,
    torch.float8_e4m3fn: 2.0**-10, torch.int8: 0.5,
}  # fmt: skip
"""Half of the distance between the numbers around 0."""


def draw(d: Draw) -> Case:
    backend = d.backend(BACKENDS)
    dtype = d.dtype(backend)
    d.magnitude(dtype)
    batch, heads = d.pick((0, 1, 1, 2, 3)), d.pick((1, 1, 2, 3))
    new, capacity = d.size(9), d.size(40, (8, 16, 32), least=1)
    new = min(new, capacity)
    width = d.size(40, (16, 32), least=1)
    wide = width if d.chance(0.6) else d.size(24, (16,), least=1)
    counts = [d.random.randint(0, new) if d.chance(0.5) else new for _ in range(batch)]
    lengths = [d.random.randint(0, capacity - count) for count in counts]
    a: dict[str, Any] = {"backend": backend}
    for name, columns in (("k_new", width), ("v_new", wide)):
        a[name] = d.floats(name, (batch, heads, new, columns), dtype)
    kinds = [t for t in (torch.float16, torch.bfloat16, torch.float32, torch.float64) if t.itemsize < 8
             or backend != "triton"]  # fmt: skip
    cache_dtype = d.pick((dtype, dtype, *QUANTISED, d.pick(kinds)))
    first, places = batch, capacity
    if d.chance(0.45):
        ends = [length + count for length, count in zip(lengths, counts, strict=True)]
        first, places = pages(d, a, batch, capacity, ends)
    but = ("expanded", "negated", "conjugated") if cache_dtype in QUANTISED else ("expanded",)
    for name, columns in (("k_cache", width), ("v_cache", wide)):
        a[name] = d.laid_out(name, values(d, (first, heads, places, columns), cache_dtype), but=but)
    a["cache_seqlens"] = d.ints("cache_seqlens", lengths)
    if counts != [new] * batch or d.chance(0.2):
        a["new_seqlens"] = d.ints("new_seqlens", counts)
    _rotary(d, a, width, lengths, counts, capacity)
    writes = _scales(d, a, (first, heads, places), cache_dtype)

    def run(args: dict[str, Any]) -> dict[str, Tensor]:
        args = dict(args)
        if "cos" in args:
            args["rotary"] = (args.pop("cos"), args.pop("sin"))
        iokernels.append_kv(**args)
        return {name: args[name].clone() for name in writes if args[name] is not None}

    def check(got: Results, expected: Results) -> None:
        for name in got:
            if name.endswith("scale"):
                _close(name, got[name].double(), expected[name], 2.0**-23, 2.0**-100)
                continue
            _close(
                name, got[name].double(), expected[name], _HALF_ULP[cache_dtype] * 1.01 + 2.0**-23,
                _SMALLEST[cache_dtype] * 1.01, expected[f"_{name[0]}_written"][..., None],
            )  # fmt: skip

    return Case("append_kv", run, oracle.append, a, d.notes, dtype, {}, writes=tuple(writes), check=check)


def _rotary(d: Draw, a: dict[str, Any], width: int, lengths: list[int], counts: list[int], capacity: int) -> None:
    if width < 2 or d.chance(0.4):
        return
    half = d.random.randint(1, width // 2)
    rows = capacity + d.size(20)
    angles = d.uniform(rows, half) * 7
    of = d.pick((torch.float32, torch.float32, torch.float16, torch.bfloat16))
    a["cos"], a["sin"] = (d.laid_out(n, x.to(of)) for n, x in (("cos", angles.cos()), ("sin", angles.sin())))
    a["interleaved"] = d.chance(0.5)
    if d.chance(0.4):
        starts = [d.random.randint(0, rows - count) if count else d.pick((0, 5)) for count in counts]
        a["positions"] = d.ints("positions", starts)


def _scales(d: Draw, a: dict[str, Any], places: tuple[int, ...], dtype: torch.dtype) -> list[str]:
    """Scales of heads, or for each key, which are written; the names of what the call writes."""
    writes = ["k_cache", "v_cache"]
    kind = d.pick(("heads", "keys", "keys", "")) if dtype in QUANTISED else d.pick(("", "", "heads"))
    for name in ("k_scale", "v_scale") if kind else ():
        if d.chance(0.15):
            continue
        if kind == "keys":
            a[name] = d.laid_out(name, d.uniform(*places).float(), but=("expanded",))
            writes.append(name)
        else:
            a[name] = d.laid_out(name, (d.uniform(places[1]) + 0.1).float())
    return writes


def _close(name: str, got: Tensor, expected: Tensor, relative: float, least: float, new: Tensor | None = None) -> None:
    limit = relative * expected.abs() + least
    if expected.numel():
        limit = limit + 2.0**-22 * expected.abs().amax(-1, keepdim=True).nan_to_num(0.0)  # what a rotation cancels
    if new is not None:
        limit = torch.where(new, limit, 0.0)
    wrong = ~(((got - expected).abs() <= limit) | (got.isnan() & expected.isnan()) | (got == expected))
    if bool(wrong.any()):
        at = tuple(int(i) for i in torch.unravel_index(wrong.int().argmax(), wrong.shape))
        raise Wrong(f"{name} at {at}: got {got[at].item():.9g}, expected {expected[at].item():.9g}")

"""Calls of short_conv and short_conv_step."""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

import iokernels

from ..case import Case
from ..draw import Draw
from ..oracles import short_conv as oracle

BACKENDS = {"torch": 62, "triton": 26, "reference": 12}
PROMISED = {torch.float16: 1.5e-3, torch.bfloat16: 3e-3, torch.float32: 2e-6}


def draw(d: Draw) -> Case:
    backend = d.backend(BACKENDS)
    dtype = d.dtype(backend)
    d.magnitude(dtype)
    form = d.weighed({"dense": 5, "packed": 3, "step": 2})
    slow = backend == "triton"
    batch, heads = d.pick((0, 1, 1, 2, 3)), d.size(20 if slow else 70, (8, 16, 32, 64), least=1)
    width = d.pick((1, 2, 3, 4, 4, 4, 5, 8, 9, d.size(40, (16, 32), least=1)))
    a: dict[str, Any] = {"backend": backend}
    a["weight"] = d.laid_out("weight", d.normal(heads, width).to(d.pick((dtype, torch.float32))))
    if d.chance(0.5):
        a["bias"] = d.laid_out("bias", d.normal(heads).to(d.pick((dtype, torch.float32))))
    if d.chance(0.5):
        a["activation"] = d.pick(("silu", "swish"))
    if form == "step":
        return _step_case(d, a, (batch, heads, width), dtype)
    most = 60 if slow else 200
    if form == "packed":
        lengths = [d.size(most, (1, width, 16, 64)) for _ in range(batch)]
        total = sum(lengths) + (d.size(5) if d.chance(0.3) else 0)
        a["x"] = d.floats("x", (total, heads), dtype)
        a["cu_seqlens"] = d.ints("cu_seqlens", [0, *accumulate(lengths)])
        left = d.random.randint(0, width - 1)
        padding = d.pick(("causal", "causal", "causal", "same", (left, width - 1 - left)))
    else:
        n = d.size(most, (1, width, 16, 64, 128))
        a["x"] = d.floats("x", (batch, heads, n), dtype)
        padding = _padding(d, n, width)
    if padding != "causal" or d.chance(0.3):
        a["padding"] = padding
    if padding == "causal":
        if d.chance(0.4):
            past = d.normal(batch, heads, width - 1).to(dtype)
            a["initial_state"] = d.laid_out("initial_state", past)
        if d.chance(0.5):
            a["return_state"] = True
    names = ("x", "weight", "bias", "initial_state")
    wanted = () if d.chance(0.35) else tuple(n for n in names if a.get(n) is not None and d.chance(0.85))
    dtypes = {"out": dtype} | ({"final_state": dtype} if a.get("return_state") else {})

    def expected(args: dict[str, Any]) -> dict[str, Tensor]:
        found = oracle.convolved(args)
        return {name: found[name] for name in dtypes}

    return Case(
        "short_conv", _whole, expected, a, d.notes, dtype, dtypes, wanted, rms=PROMISED, exact=("final_state",)
    )  # fmt: skip


def _padding(d: Draw, n: int, width: int) -> Any:
    """Any padding that leaves at least no row."""
    sides = (d.random.randint(0, width - 1), d.random.randint(0, width - 1))
    options: list[Any] = ["causal", "causal", "causal", "same"]
    options += ["valid"] if n >= width - 1 else []
    options += [sides] if n + sum(sides) >= width - 1 else []
    options += [sides[0]] if n + 2 * sides[0] >= width - 1 else []
    return d.pick(options)


def _whole(args: dict[str, Any]) -> dict[str, Tensor]:
    found = iokernels.short_conv(**args)
    return {"out": found[0], "final_state": found[1]} if isinstance(found, tuple) else {"out": found}


def _step_case(d: Draw, a: dict[str, Any], sizes: tuple[int, int, int], dtype: torch.dtype) -> Case:
    batch, heads, width = sizes
    a["x"] = d.floats("x", (batch, heads), dtype)
    rows = batch
    if d.chance(0.4):
        rows = batch + d.size(3)
        chosen = d.random.sample(range(rows), batch)
        a["state_indices"] = d.ints("state_indices", [-d.pick((1, 5)) if d.chance(0.2) else row for row in chosen])
    past = d.normal(rows, heads, width - 1).to(dtype)
    a["state"] = d.laid_out("state", past, but=("expanded",))
    return Case(
        "short_conv", _step, oracle.stepped, a, d.notes, dtype, {"out": dtype}, rms=PROMISED, writes=("state",),
        exact=("state",),
    )  # fmt: skip


def _step(args: dict[str, Any]) -> dict[str, Tensor]:
    out = iokernels.short_conv_step(**args)
    return {"out": out, "state": args["state"].clone()}

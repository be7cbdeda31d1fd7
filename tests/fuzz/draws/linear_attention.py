"""Calls of linear_attention, lightning_attention and linear_attention_step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import iokernels

from ..case import Case
from ..draw import Draw
from ..oracles import linear_attention as oracle
from .recurrences import decays, state, tokens, wanted

BACKENDS = {"torch": 60, "triton": 20, "cuda": 8, "reference": 12}


def draw(d: Draw) -> Case:
    backend = d.backend(BACKENDS)
    dtype = d.dtype(backend)
    d.magnitude(dtype)
    form = d.weighed({"dense": 5, "packed": 3, "step": 0 if backend == "cuda" else 2})
    slow = backend in ("triton", "cuda")
    key_heads = d.pick((1, 1, 2, 3))
    sizes = {
        "B": d.pick((0, 1, 1, 2, 3)), "Hk": key_heads, "H": key_heads * d.pick((1, 1, 2, 3)),
        "K": d.size(20 if slow else 40, (16, 32), least=1), "V": d.size(20 if slow else 40, (16, 32), least=1),
    }  # fmt: skip
    a: dict[str, Any] = {"backend": backend}
    taylor = backend != "cuda" and d.chance(0.25)
    if taylor:
        a["feature_map"], sizes["K"] = "taylor", min(sizes["K"], 6)
    if backend != "cuda" and d.chance(0.25):
        a["normalize"] = True
    if dtype == torch.float16 and d.values in ("outlier", "constant"):
        d.values = "normal"  # states and products past 65,504 have no place in float16
    tokens(d, a, sizes, dtype, form, 50 if slow else 140)
    if a.get("normalize") and not taylor:  # weights that are positive: a sum of others may be anything near 0
        for name in ("q", "k"):
            a[name] = d.laid_out(name, a[name].abs(), f"{d.values}, positive")
    decays(d, a, sizes, dtype, form)
    if d.chance(0.4):
        a["scale"] = d.pick((1.0, 0.5, 0.0, -1.0, 2))
    rows = 1 + sizes["K"] + sizes["K"] ** 2 if taylor else sizes["K"]
    shape = (sizes["B"], sizes["H"], rows, sizes["V"] + bool(a.get("normalize")))
    if form == "step":
        state(d, a, "state", shape, dtype, but=("offset", "padded", "strided", "heads_last", "permuted", "turned",
                                                "expanded", "negated", "conjugated"))  # fmt: skip
    elif d.chance(0.4):
        state(d, a, "initial_state", shape, dtype)
    of_state = torch.float64 if dtype == torch.float64 else torch.float32
    return Case(
        "linear_attention", _step if form == "step" else _whole, oracle.linear, a, d.notes, dtype,
        {"out": dtype, "state": of_state}, wanted(d, a, form, ("q", "k", "v", "log_decay", "initial_state")),
        writes=("state",) if form == "step" else (), cancels=("log_decay",),
        factors=("q", "k", "v", "initial_state", "state", "scale"),
    )  # fmt: skip


def _whole(args: dict[str, Any]) -> dict[str, Tensor]:
    out, last = iokernels.linear_attention(**args, return_state=True)
    return {"out": out, "state": last}


def _step(args: dict[str, Any]) -> dict[str, Tensor]:
    out = iokernels.linear_attention_step(**args)
    return {"out": out, "state": args["state"].clone()}

"""Calls of gated_delta_rule and gated_delta_rule_step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import iokernels

from ..case import Case
from ..draw import Draw
from ..oracles import gated_delta_rule as oracle
from .recurrences import decays, per_token, state, tokens, wanted

BACKENDS = {"torch": 62, "triton": 24, "reference": 14}


def draw(d: Draw) -> Case:
    backend = d.backend(BACKENDS)
    dtype = d.dtype(backend)
    d.magnitude(dtype)
    if d.values in ("large", "outlier"):
        d.values = "normal"  # keys longer than 1 make the state grow without bound
    form = d.weighed({"dense": 5, "packed": 3, "step": 2})
    slow = backend == "triton"
    key_heads = d.pick((1, 1, 2, 3))
    sizes = {
        "B": d.pick((0, 1, 1, 2, 3)), "Hk": key_heads, "H": key_heads * d.pick((1, 1, 2, 3)),
        "K": d.size(20 if slow else 40, (16, 32), least=1), "V": d.size(20 if slow else 40, (16, 32), least=1),
    }  # fmt: skip
    a: dict[str, Any] = {"backend": backend}
    tokens(d, a, sizes, dtype, form, 50 if slow else 140)
    if d.values in ("normal", "constant", "zeros"):
        unit = torch.nn.functional.normalize(a["k"].double(), dim=-1)
        a["k"] = d.laid_out("k", unit.to(dtype), "of length 1")
    beta = d.uniform(*per_token(sizes, form)) * d.pick((0.1, 1.0, 2.0))
    a["beta"] = d.laid_out("beta", beta.to(d.pick((dtype, torch.float32))))
    decays(d, a, sizes, dtype, form)
    if d.chance(0.4):
        a["scale"] = d.pick((1.0, 0.5, 0.0, -1.0, 2))
    shape = (sizes["B"], sizes["H"], sizes["K"], sizes["V"])
    if form == "step":
        state(d, a, "state", shape, dtype, but=("expanded",))
    elif d.chance(0.4):
        state(d, a, "initial_state", shape, dtype)
    of_state = torch.float64 if dtype == torch.float64 else torch.float32
    return Case(
        "gated_delta_rule", _step if form == "step" else _whole, oracle.delta, a, d.notes, dtype,
        {"out": dtype, "state": of_state}, wanted(d, a, form, ("q", "k", "v", "beta", "log_decay", "initial_state")),
        writes=("state",) if form == "step" else (), cancels=("log_decay",),
        least=2.0**-64,
        slack=3.0,  # a chunk is the inverse of a triangular matrix, which may be far larger than what it gives
    )  # fmt: skip


def _whole(args: dict[str, Any]) -> dict[str, Tensor]:
    out, last = iokernels.gated_delta_rule(**args, return_state=True)
    return {"out": out, "state": last}


def _step(args: dict[str, Any]) -> dict[str, Tensor]:
    out = iokernels.gated_delta_rule_step(**args)
    return {"out": out, "state": args["state"].clone()}

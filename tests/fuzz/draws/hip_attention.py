"""Calls of hip_attention, select_exact and select_window, as far as they are functions of what they are given."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import iokernels

from ..case import Case, Results, Wrong
from ..draw import HALVES, Draw
from ..oracles import hip_attention as oracle
from .block_sparse_attention import index_args

BACKENDS = {"torch": 66, "triton": 18, "reference": 16}
_INDEX = ("indices", "counts", "block_q", "block_k", "sink", "window", "q_len", "kv_len")


def draw(d: Draw) -> Case:
    backend = d.backend(BACKENDS)
    kind = d.weighed({"whole": 3, "listed": 2, "window": 2, "exact": 4})
    if kind == "exact" and backend == "triton":
        kind = "whole"  # select_exact has no kernel
    dtype = d.dtype(backend)
    d.magnitude(dtype)
    slow = backend == "triton"
    batch, kv_heads = d.pick((0, 1, 1, 2)), d.pick((1, 1, 2, 3))
    most = 60 if slow else 110
    keys = d.size(most, (8, 16, 32, 64, 128), least=1)
    rows = min(d.pick((1, 2, 16, keys, d.size(most, (16, 32, 64)))), keys) if d.chance(0.8) else d.size(most)
    sizes = (batch, kv_heads * d.pick((1, 1, 2, 3)), kv_heads, rows, keys)
    width = d.size(24 if slow else 40, (16, 32), least=1)
    a: dict[str, Any] = {"backend": backend}
    a["q"] = d.floats("q", (batch, sizes[1], rows, width), dtype)
    a["k"] = d.floats("k", (batch, kv_heads, keys, width), dtype)
    if d.chance(0.3):
        a["causal"] = False
    if kind == "exact":
        return _exact(d, a, dtype)
    a["v"] = d.floats("v", (batch, kv_heads, keys, d.size(32, (16,), least=1)), dtype)
    if d.chance(0.3):
        a["scale"] = d.pick((1.0, 0.5, 2, 1e-3))
    a["return_lse"] = True
    if kind == "whole":
        _room_for_all(d, a, keys)
    elif kind == "window":
        a["block_q"], a["sink"], a["window"] = d.pick((16, 32, 64, 128)), d.size(30), d.size(40)
    else:
        index_args(d, a, batch, d.pick((1, kv_heads, sizes[1])), rows, keys)
    wanted = tuple(n for n in "qkv" if d.chance(0.85)) if d.chance(0.6) else ()
    return Case(
        "hip_attention", {"whole": _whole, "window": _window, "listed": _listed}[kind],
        oracle.whole if kind == "whole" else oracle.listed, a, d.notes, dtype,
        {"out": dtype, "lse": torch.float64 if dtype == torch.float64 else torch.float32},
        wanted, single=("lse",) if dtype in HALVES else (),
    )  # fmt: skip


def _whole(args: dict[str, Any]) -> dict[str, Tensor]:
    out, lse = iokernels.hip_attention(**args)
    return {"out": out, "lse": lse}


def _window(args: dict[str, Any]) -> dict[str, Tensor]:
    args = dict(args)
    fields = {name: args.pop(name) for name in ("block_q", "sink", "window")}
    return _whole({**args, "selection": iokernels.select_window(args["q"], args["k"], **fields)})


def _listed(args: dict[str, Any]) -> dict[str, Tensor]:
    args = dict(args)
    index = iokernels.BlockIndex(**{name: args.pop(name) for name in _INDEX})
    return _whole({**args, "selection": index})


def _room_for_all(d: Draw, a: dict[str, Any], keys: int) -> None:
    """Budget, sink and window that hold every key together: the call is dense attention."""
    cuts = sorted(d.random.randint(0, keys) for _ in range(2))
    a["budget"], a["sink"], a["window"] = cuts[0], cuts[1] - cuts[0], keys - cuts[1]
    if a.get("causal") is False:
        a["budget"] += a["window"]
    for name in ("budget", "sink", "window"):
        a[name] += d.pick((0, 0, 0, 1, 100))
    a["budget"] = max(a["budget"], 8)  # a block of keys


def _exact(d: Draw, a: dict[str, Any], dtype: torch.dtype) -> Case:
    """Which blocks are best is a matter of the logits alone, but for those that are equal to a rounding."""
    a["block_k"], a["block_q"] = d.pick((8, 8, 16, 32)), d.pick((16, 32, 64, 128))
    a["budget"] = a["block_k"] * d.pick((1, 2, 3, 20)) + d.pick((0, 0, 3))
    a["sink"], a["window"] = d.pick((0, 1, d.size(30))), d.pick((0, 1, d.size(40)))
    a["heads"] = d.pick(("kv", "kv", "all", "query"))
    a.setdefault("causal", True)

    def run(args: dict[str, Any]) -> dict[str, Tensor]:
        index = iokernels.select_exact(**args)
        return {"indices": index.indices, "counts": index.counts}

    def check(got: Results, expected: Results) -> None:
        best = expected["_best"]
        slots = a["budget"] // a["block_k"]
        rounding = 1e-5 if dtype != torch.float64 else 1e-12
        for place in torch.cartesian_prod(*(torch.arange(n) for n in best.shape[:3])).tolist() if best.numel() else ():
            at = tuple(place)
            scores, count = best[at], int(got["counts"][at])
            may = int((scores > float("-inf")).sum())
            if count != min(slots, may):
                raise Wrong(f"counts at {at}: got {count}, expected {min(slots, may)}")
            listed = got["indices"][at][:count].tolist()
            if listed != sorted(set(listed)):
                raise Wrong(f"indices at {at}: {listed} does not ascend")
            worst = min((float(scores[block]) for block in listed), default=float("inf"))
            left = [float(s) for block, s in enumerate(scores.tolist()) if block not in listed]
            slack = rounding * float(scores[scores.isfinite()].abs().max()) if may else 0.0
            if left and max(left) > worst + slack * 8:
                raise Wrong(f"indices at {at}: {listed} leaves out a block of {max(left)} and lists one of {worst}")

    return Case("hip_attention", run, oracle.exact_scores, a, d.notes, dtype, {}, check=check)

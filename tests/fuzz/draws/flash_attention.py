"""Calls of flash_attention and flash_attention_varlen."""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

import iokernels

from ..case import Case
from ..draw import HALVES, Draw
from ..oracles import flash_attention as oracle

BACKENDS = {"torch": 60, "triton": 20, "cuda": 8, "reference": 12}
_OPTIONS = ("mask", "bias", "alibi_slopes", "sinks", "dropout_p")


def draw(d: Draw) -> Case:
    backend = d.backend(BACKENDS)
    dtype = d.dtype(backend)
    d.magnitude(dtype)
    slow = backend in ("triton", "cuda")
    heads_kv = d.pick((1, 1, 2, 3))
    sizes = {
        "B": d.pick((1, 1, 2, 3, 0)) if d.chance(0.3) else d.pick((1, 2)),
        "Hkv": heads_kv, "Hq": heads_kv * d.pick((1, 1, 2, 3)),
        "D": d.size(24 if slow else 72, (16, 64), least=1), "Dv": 0,
    }  # fmt: skip
    sizes["Dv"] = sizes["D"] if d.chance(0.6) else d.size(40, (16, 32), least=1)
    a: dict[str, Any] = {"backend": backend}
    packed = d.chance(0.3)
    if packed:
        _packed_tensors(d, a, sizes, dtype, 40 if slow else 90)
    else:
        most = 70 if slow else 150
        sizes["Nq"] = d.size(most, (16, 32, 64, 128))
        sizes["Nk"] = sizes["Nq"] if d.chance(0.4) else d.size(most, (16, 32, 64, 128))
        for name, heads, rows, width in (("q", "Hq", "Nq", "D"), ("k", "Hkv", "Nk", "D"), ("v", "Hkv", "Nk", "Dv")):
            shape = (sizes["B"], sizes[heads], sizes[rows], sizes[width])
            a[name] = d.floats(name, shape, dtype)
    _options(d, a, sizes, backend, dtype)
    gradients = _gradients(d, a)
    hidden = _poison(d, a, sizes, packed) if not gradients else False
    a["return_lse"] = True
    call = iokernels.flash_attention_varlen if packed else iokernels.flash_attention

    def run(args: dict[str, Any]) -> dict[str, Tensor]:
        out, lse = call(**args)
        return {"out": out, "lse": lse}

    case = Case(
        "flash_attention", run, oracle.packed if packed else oracle.dense, a, d.notes, dtype,
        {"out": dtype, "lse": torch.float64 if dtype == torch.float64 else torch.float32},
        gradients, still=("bias",), single=("lse",) if dtype in HALVES else (),
    )  # fmt: skip
    if a.get("dropout_p"):
        _with_dropout(d, case, sizes)
    if hidden:
        d.notes["v"] += ", NaN where nothing is seen"
    return case


def _packed_tensors(d: Draw, a: dict[str, Any], sizes: dict[str, int], dtype: torch.dtype, most: int) -> None:
    lengths = [[d.size(most, (16, 32, 64)) for _ in range(sizes["B"])] for _ in range(2)]
    if d.chance(0.5):
        lengths[1] = lengths[0]
    totals = [sum(x) + (d.size(5) if d.chance(0.2) else 0) for x in lengths]
    a["q"] = d.floats("q", (totals[0], sizes["Hq"], sizes["D"]), dtype)
    a["k"] = d.floats("k", (totals[1], sizes["Hkv"], sizes["D"]), dtype)
    a["v"] = d.floats("v", (totals[1], sizes["Hkv"], sizes["Dv"]), dtype)
    for name, size, of in (("cu_seqlens_q", "Nq", lengths[0]), ("cu_seqlens_k", "Nk", lengths[1])):
        a[name] = d.ints(name, [0, *accumulate(of)])
        sizes[size] = max(of, default=0) + (d.size(4) if d.chance(0.2) else 0)
    a["max_seqlen_q"], a["max_seqlen_k"] = sizes["Nq"], sizes["Nk"]


def _options(d: Draw, a: dict[str, Any], sizes: dict[str, int], backend: str, dtype: torch.dtype) -> None:
    a["causal"] = d.chance(0.5)
    if d.chance(0.3):
        a["window"] = tuple(d.pick((-1, 0, 1, 7, d.size(80), 2**31, 2**40)) for _ in range(2))
    if d.chance(0.35):
        a["scale"] = d.pick((1.0, 0.5, 0.0, -1.0, -0.2, 2, 1e-3))
    if d.chance(0.2):
        a["softcap"] = d.pick((1.0, 30.0, 50, 0.5))
    if backend == "cuda" or d.chance(0.4):
        return
    full = [sizes["B"], sizes["Hq"], sizes["Nq"], sizes["Nk"]]
    if d.chance(0.4):
        mask = d.uniform(*_broadcast(d, full)) > d.pick((0.1, 0.5, 0.95))
        a["mask"] = d.laid_out("mask", mask)
    if d.chance(0.45):
        a["bias"] = _bias(d, _broadcast(d, full), dtype, backend)
    if d.chance(0.25):
        shape = (sizes["Hq"],) if d.chance(0.5) else (d.pick((1, sizes["B"])), sizes["Hq"])
        a["alibi_slopes"] = d.laid_out("alibi_slopes", d.uniform(*shape).float(), but=("expanded",))
    if d.chance(0.3):
        sinks = d.normal(sizes["Hq"]) * d.pick((1.0, 5.0))
        a["sinks"] = d.laid_out("sinks", sinks.to(d.pick((dtype, torch.float32))))
    if d.chance(0.15) and "cu_seqlens_q" not in a:
        a["dropout_p"] = d.pick((0.1, 0.5, 0.9))


def _broadcast(d: Draw, full: list[int]) -> list[int]:
    """A shape that broadcasts to ``full``: ones, and leading dimensions left out."""
    shape = [1 if d.chance(0.35) else size for size in full]
    return shape[d.pick((0, 0, 0, 1, 2)) :]


def _bias(d: Draw, shape: list[int], dtype: torch.dtype, backend: str) -> Tensor:
    """Numbers, or what people pad with: large negative ones, -inf, in single keys or whole rows."""
    bias = d.normal(*shape)
    kind = d.pick(("normal", "normal", "-1e9", "-inf", "-1e4", "lowest"))
    of = d.pick((dtype, torch.float32)) if kind != "-1e9" or dtype != torch.float16 else torch.float32
    if kind != "normal":
        low = torch.finfo(of).min if kind == "lowest" else float(kind)
        hidden = d.uniform(*shape) < 0.4
        if d.chance(0.5) and len(shape) >= 2:  # whole rows
            hidden = hidden | (d.uniform(*shape[:-1], 1) < 0.3)
        bias = torch.where(hidden, torch.tensor(low, dtype=torch.float64), bias * d.pick((0.0, 1.0)))
    return d.laid_out("bias", bias.to(of), kind)


def _gradients(d: Draw, a: dict[str, Any]) -> tuple[str, ...]:
    if d.chance(0.35):
        return ()
    return tuple(name for name in ("q", "k", "v", "bias", "sinks") if a.get(name) is not None and d.chance(0.85))


def _poison(d: Draw, a: dict[str, Any], sizes: dict[str, int], packed: bool) -> bool:
    """NaN in a row of q, which that row alone shows, or in packed rows of no sequence."""
    if packed:
        rest = [a[name].shape[0] - int(a[f"cu_seqlens_{name}"][-1]) for name in ("q", "k")]
        for name, extra in zip("qkv", (rest[0], rest[1], rest[1]), strict=True):
            if extra and d.chance(0.5) and 0 not in a[name].stride():
                a[name][-extra:] = float("nan")
        return any(rest)
    if d.chance(0.12) and not a.get("dropout_p"):
        d.spoil_a_row("q", a["q"])
    return False


def _with_dropout(d: Draw, case: Case, sizes: dict[str, int]) -> None:
    """Which weights survive is seen in the call itself, with unit vectors as values, and must repeat with the seed."""
    case.seed = d.random.getrandbits(30)
    a = case.args
    keys = sizes["Nk"]
    units = torch.eye(keys, dtype=a["k"].dtype).expand(sizes["B"], sizes["Hkv"], keys, keys)
    if not keys:
        return
    torch.manual_seed(case.seed)
    with torch.no_grad():
        weights = case.run({**a, "v": units})["out"]
    # Survivors weigh 1 / (1 - p) as much, the others nothing.
    factors = (weights > 0.0).double() / (1.0 - a["dropout_p"])
    inner = case.oracle

    def with_factors(args: dict[str, Any]) -> dict[str, Tensor]:
        return inner({**args, "kept": factors.to(args["q"].dtype)})

    case.oracle = with_factors

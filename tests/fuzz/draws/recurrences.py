"""What linear_attention and gated_delta_rule are drawn alike: packed sequences, decays, states."""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from ..draw import Draw


def tokens(d: Draw, a: dict[str, Any], sizes: dict[str, int], dtype: torch.dtype, form: str, most: int) -> None:
    """q, k and v of a ``form``: dense, packed or a step. Sets B and N in ``sizes``."""
    if form == "packed":
        lengths = [d.size(most, (16, 32, 64)) for _ in range(sizes["B"])]
        total = sum(lengths) + (d.size(5) if d.chance(0.3) else 0)
        a["cu_seqlens"] = d.ints("cu_seqlens", [0, *accumulate(lengths)])
        lead = {name: (total, sizes[name]) for name in ("Hk", "H")}
        sizes["N"] = total
    else:
        sizes["N"] = d.pick((1, 1, 1, 2, 3, 0)) if form == "step" else d.size(most, (16, 32, 64, 128))
        lead = {name: (sizes["B"], sizes[name], sizes["N"]) for name in ("Hk", "H")}
    for name, heads, width in (("q", "Hk", "K"), ("k", "Hk", "K"), ("v", "H", "V")):
        a[name] = d.floats(name, (*lead[heads], sizes[width]), dtype)


def per_token(sizes: dict[str, int], form: str) -> tuple[int, ...]:
    """The shape of what is a number for each token and head."""
    return (sizes["N"], sizes["H"]) if form == "packed" else (sizes["B"], sizes["H"], sizes["N"])


def decays(d: Draw, a: dict[str, Any], sizes: dict[str, int], dtype: torch.dtype, form: str) -> None:
    """None, one a head or one a token: weak, strong, in turns, with resets of minus infinity."""
    kind = d.pick(("", "", "head", "token", "token", "token"))
    if not kind:
        return
    shape = (sizes["H"],) if kind == "head" else per_token(sizes, form)
    decay = -d.uniform(*shape) * d.pick((0.05, 0.5, 5.0))
    strength = d.pick(("", "", "0", "-30", "-110", "-1000", "-inf"))
    if strength:
        decay = torch.where(d.uniform(*shape) < d.pick((0.1, 0.5)), float(strength), decay)
    of = d.pick((dtype, torch.float32, torch.float32))
    a["log_decay"] = d.laid_out("log_decay", decay.to(of), f"some {strength}" if strength else "")


def state(d: Draw, a: dict[str, Any], name: str, shape: tuple[int, ...], dtype: torch.dtype, **layouts: Any) -> None:
    of = torch.float64 if dtype == torch.float64 else torch.float32
    a[name] = d.laid_out(name, (d.normal(*shape) * d.pick((0.0, 0.3, 1.0))).to(of), **layouts)


def wanted(d: Draw, a: dict[str, Any], form: str, names: tuple[str, ...]) -> tuple[str, ...]:
    if form == "step" or d.chance(0.4):
        return ()
    return tuple(name for name in names if isinstance(a.get(name), Tensor) and d.chance(0.85))

"""Calls of flash_rnn, every cell."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import iokernels

from ..case import Case
from ..draw import Draw
from ..oracles import flash_rnn as oracle
from ..oracles.flash_rnn import GATES, STATES

BACKENDS = {"torch": 62, "triton": 16, "cuda": 10, "reference": 12}
PROMISED = {torch.float16: 3e-3, torch.bfloat16: 1e-2, torch.float32: 1e-5}


def draw(d: Draw) -> Case:
    backend = d.backend(BACKENDS)
    weights = {torch.float16: 1, torch.bfloat16: 1, torch.float32: 1} if backend == "cuda" else None
    dtype = d.dtype(backend, weights)
    d.magnitude(dtype)
    cell = d.pick(("lstm", "gru", "elman", "slstm", "slstm"))
    slow = backend in ("triton", "cuda")
    batch, steps = d.pick((0, 1, 1, 2, 3, 5)), d.size(12 if slow else 50, (8, 16, 32))
    heads, width = d.pick((1, 1, 2, 3)), d.size(20 if slow else 40, (16, 32), least=1)
    count, names = GATES[cell], STATES[cell]
    a: dict[str, Any] = {"cell": cell, "backend": backend}
    strength = d.pick((1.0, 1.0, 1.0, 10.0, 100.0)) if d.values == "normal" else 1.0
    a["gates"] = d.floats("gates", (batch, steps, count, heads, width), dtype, scale=strength)
    d.notes["gates"] += f" of scale {strength}"
    recurrent = d.normal(count, heads, width, width) * width**-0.5 * d.pick((0.3, 1.0))
    a["recurrent"] = d.laid_out("recurrent", recurrent.to(dtype))
    if d.chance(0.7):
        a["bias"] = d.laid_out("bias", d.normal(count, heads, width).to(dtype))
    if d.chance(0.5):
        a["initial_state"] = _state(d, cell, (batch, heads, width), dtype)
    if d.chance(0.35):
        a["lengths"] = d.ints("lengths", [d.pick((0, steps, d.size(steps))) for _ in range(batch)])
    if d.chance(0.1):
        a["recurrent_clip"] = d.pick((0.1, 1.0, 3))
    if d.chance(0.1):
        a["recurrent_cut"] = True
    if d.chance(0.3):
        a["recompute_gates"] = True
    tensors = ("gates", "recurrent", "bias", "initial_state")
    wanted = () if d.chance(0.35) else tuple(n for n in tensors if a.get(n) is not None and d.chance(0.85))
    of_state = torch.float64 if dtype == torch.float64 else torch.float32

    def run(args: dict[str, Any]) -> dict[str, Tensor]:
        h, state = iokernels.flash_rnn(**args, return_state=True)
        return {"h": h, **{f"state {name}": state[i] for i, name in enumerate(names)}}

    results = {"h": dtype, **{f"state {name}": of_state for name in names}}
    return Case(
        "flash_rnn", run, oracle.run, a, d.notes, dtype, results, wanted, rms=PROMISED, whole=tuple(results),
        constant=("state m",),
    )  # fmt: skip


def _state(d: Draw, cell: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """States that a call could have left: sLSTM's n is above 0, or 0 with a c of 0 and any m."""
    state = d.normal(len(STATES[cell]), *shape) * 0.5
    if cell == "slstm":
        state[2] = d.uniform(*shape) + 0.1
        if d.chance(0.4):
            nothing = d.uniform(*shape) < 0.5
            state[1][nothing] = state[2][nothing] = 0.0
    of = torch.float64 if dtype == torch.float64 else torch.float32
    return d.laid_out("initial_state", state.to(of))

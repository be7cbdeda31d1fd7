"""flash_rnn from the equations of docs/ops/flash_rnn.md: step by step, every cell written out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..jitter import Jitter

STATES = {"lstm": ("h", "c"), "gru": ("h",), "elman": ("h",), "slstm": ("h", "c", "n", "m")}
GATES = {"lstm": 4, "gru": 3, "elman": 1, "slstm": 4}


def _lstm(x: Tensor, s: Tensor, states: list[Tensor], jitter: Jitter) -> list[Tensor]:
    i, f, z, o = (x + s).unbind(1)
    c = _sigmoid(f, jitter) * states[1] + _sigmoid(i, jitter) * _tanh(z, jitter)
    return [_sigmoid(o, jitter) * _tanh(c, jitter), c]


def _gru(x: Tensor, s: Tensor, states: list[Tensor], jitter: Jitter) -> list[Tensor]:
    r, z = _sigmoid((x + s)[:, 0], jitter), _sigmoid((x + s)[:, 1], jitter)
    n = _tanh(x[:, 2] + r * s[:, 2], jitter)
    return [z * states[0] + (1 - z) * n]


def _elman(x: Tensor, s: Tensor, states: list[Tensor], jitter: Jitter) -> list[Tensor]:
    return [_tanh((x + s)[:, 0], jitter)]


def _slstm(x: Tensor, s: Tensor, states: list[Tensor], jitter: Jitter) -> list[Tensor]:
    i, f, z, o = (x + s).unbind(1)
    _, c, n, m = states
    kept = torch.nn.functional.logsigmoid(f) + torch.where(n == 0, 0.0, m.detach())  # m is a constant
    kept = torch.where(n == 0, float("-inf"), kept)
    peak = torch.maximum(kept, i).detach()
    put, keep = torch.exp(i - peak), torch.where(n == 0, 0.0, torch.exp(torch.where(n == 0, 0.0, kept - peak)))
    c, n = keep * c + put * _tanh(z, jitter), keep * n + put
    return [_sigmoid(o, jitter) * c / n, c, n, peak]


def _tanh(x: Tensor, jitter: Jitter) -> Tensor:
    return jitter.active(x, torch.tanh(x))


def _sigmoid(x: Tensor, jitter: Jitter) -> Tensor:
    return jitter.active(x, torch.sigmoid(x))


_CELLS: dict[str, Callable[[Tensor, Tensor, list[Tensor], Jitter], list[Tensor]]] = {
    "lstm": _lstm, "gru": _gru, "elman": _elman, "slstm": _slstm,
}  # fmt: skip


def run(a: dict[str, Any]) -> dict[str, Tensor]:
    """h ``[B, N, H, D]`` and every state ``[B, H, D]`` after the last step of each sequence."""
    gates, recurrent, cell = a["gates"], a["recurrent"], a["cell"]
    batch, steps, _, heads, width = gates.shape
    names = STATES[cell]
    initial = a.get("initial_state")
    states = [gates.new_zeros(batch, heads, width) if initial is None else initial[s] for s in range(len(names))]
    lengths = torch.full((batch,), steps) if a.get("lengths") is None else a["lengths"]
    outs = []
    for t in range(steps):
        reading = _limited(a["jitter"](states[0]), a)
        s = torch.einsum("ghoi,bhi->bgho", recurrent, reading)
        if a.get("bias") is not None:
            s = s + a["bias"]
        new = _CELLS[cell](gates[:, t], s, states, a["jitter"])
        runs = (t < lengths)[:, None, None]
        states = [torch.where(runs, x, old) for x, old in zip(new, states, strict=True)]
        outs.append(torch.where(runs, new[0], 0.0))
    found = {"h": torch.stack(outs, dim=1) if outs else gates.new_zeros(batch, 0, heads, width)}
    return {**found, **{f"state {name}": x for name, x in zip(names, states, strict=True)}}


def _limited(h: Tensor, a: dict[str, Any]) -> Tensor:
    """h as the recurrent matrices see it: what comes back through them is cut, or clamped."""
    if a.get("recurrent_cut"):
        return h.detach()
    clip = a.get("recurrent_clip")
    if clip is None or not h.requires_grad:
        return h
    h = h * 1.0
    h.register_hook(lambda gradient: gradient.clamp(-clip, clip))
    return h

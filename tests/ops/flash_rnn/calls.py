"""Calls of flash_rnn for its tests: inputs, results with their gradients, and the proof against float64."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from iokernels import flash_rnn
from iokernels.ops.flash_rnn.cells import CELLS
from iokernels.testing.budget import check_relative_rms
from iokernels.testing.inputs import poisoned_view

LIMITS = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 1e-2, torch.float64: 1e-12}
"""Relative RMS error allowed, over a whole tensor."""


def draw(
    cell: str, batch: int, steps: int, heads: int, width: int, *, dtype: torch.dtype = torch.float32,
    scale: float = 1.0, state: bool = True, time_first: bool = False, seed: int = 0,
) -> dict[str, Any]:  # fmt: skip
    """gates, recurrent, bias and initial_state, with NaN around every tensor."""
    generator = torch.Generator().manual_seed(seed)
    kind = CELLS[cell]

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator)

    gates = scale * normal(batch, steps, kind.gates, heads, width)
    initial = normal(len(kind.states), batch, heads, width)
    if cell == "slstm":
        initial[2] = 1.0 + initial[2].abs()
        initial[2, 0] = initial[1, 0] = 0.0  # nothing stored yet
    if time_first:
        gates = poisoned_view(gates.transpose(0, 1).to(dtype)).transpose(0, 1)
    found = {
        "gates": gates if time_first else poisoned_view(gates.to(dtype), "padded"),
        "recurrent": poisoned_view((normal(kind.gates, heads, width, width) / width**0.5).to(dtype)),
        "bias": poisoned_view((0.3 * normal(kind.gates, heads, width)).to(dtype)),
    }
    if state:
        found["initial_state"] = poisoned_view(initial.to(torch.float64 if dtype == torch.float64 else torch.float32))
    return found


def results(tensors: dict[str, Any], cell: str, *, as_dtype: torch.dtype | None = None, **options: Any) -> Any:
    """h, the final state and all gradients by name, for output gradients that depend on the shapes alone."""
    leaves = {
        name: (x if as_dtype is None else x.detach().to(as_dtype)).detach().requires_grad_()
        for name, x in tensors.items()
    }
    h, state = flash_rnn(**leaves, cell=cell, return_state=True, **options)
    generator = torch.Generator().manual_seed(1)
    dtype = next(iter(tensors.values())).dtype
    dh = torch.randn(h.shape, generator=generator).to(dtype).to(h.dtype)
    dstate = torch.randn(state.shape, generator=generator).to(state.dtype)
    grads = torch.autograd.grad([h, state], list(leaves.values()), [dh, dstate], allow_unused=True)
    found = {f"d{name}": x for name, x in zip(leaves, grads, strict=True) if x is not None}
    return {"h": h.detach(), "state": state.detach(), **found}


def prove(tensors: dict[str, Any], cell: str, backend: str, **options: Any) -> None:
    """Hold a backend to the float64 reference: h, states, and all gradients."""
    actual = results(tensors, cell, backend=backend, **options)
    expected = results(tensors, cell, backend="reference", as_dtype=torch.float64, **options)
    # Where no path leads to an input the reference has no gradient, and a kernel zeros.
    for name in actual.keys() - expected.keys():
        assert not actual[name].any(), name
    limit = LIMITS[tensors["gates"].dtype]
    for name in expected:
        if expected[name].numel():
            check_relative_rms(
                actual[name], expected[name], limit=limit, what=f"{cell} {name}", dim=tuple(range(expected[name].dim()))
            )

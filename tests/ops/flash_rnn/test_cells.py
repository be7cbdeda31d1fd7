"""Adding a cell: its equations in PyTorch and in Triton are all that the backends need."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from iokernels.ops.flash_rnn.cells import CELLS, SIGMOID, TANH, Cell, States
from iokernels.runtime import device as devices

from .calls import draw, prove

TRITON = devices.INTERPRET or torch.cuda.is_available()
if TRITON:
    import triton
    import triton.language as tl  # noqa: F401 (the interpreter patches it where a kernel's file has it)

    from iokernels.ops.flash_rnn.triton import cells as triton_cells
    from iokernels.ops.flash_rnn.triton.cells import sigmoid, tanh

    @triton.jit
    def leaky_forward(values, states):
        f, n = sigmoid(values[0]), tanh(values[1])
        return (states[0] + f * (n - states[0]),)

    @triton.jit
    def leaky_backward(values, previous, states, dstates):
        f, n = sigmoid(values[0]), tanh(values[1])
        dh = dstates[0]
        return (dh * (n - previous[0]) * f * (1.0 - f), dh * f * (1.0 - n * n)), (dh * (1.0 - f),)


def forward(values: Sequence[Tensor], states: States, into: Sequence[Tensor | None]) -> States:
    """``h = (1 - f) h + f n``: a GRU without a reset gate."""
    f, n = values
    return (torch.lerp(states[0], n, f, out=into[0]),)


def factors(values: Sequence[Tensor], previous: States, states: States) -> tuple[States, States]:
    f, n = values
    return (n - previous[0], f), (1 - f,)


def backward(slopes: States, factors: States, dstates: States, dvalues: States) -> tuple[Tensor | None, ...]:
    for slope, dvalue in zip(slopes, dvalues, strict=True):
        torch.mul(dstates[0], slope, out=dvalue)
    return (dstates[0] * factors[0],)


@pytest.mark.parametrize("backend", ["torch"] + ["triton"] * TRITON)
def test_a_fifth_cell(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CELLS, "leaky", Cell(2, ("h",), (SIGMOID, TANH), forward, factors, backward, reads_h=True))
    if backend == "triton":
        monkeypatch.setitem(triton_cells.FORWARD, "leaky", leaky_forward)
        monkeypatch.setitem(triton_cells.BACKWARD, "leaky", leaky_backward)
    lengths = torch.tensor([6, 2, 0], dtype=torch.int32)
    prove(draw("leaky", 3, 6, 2, 8), "leaky", backend, lengths=lengths)


@pytest.mark.skipif(not TRITON, reason="compares with Triton's cells")
def test_every_cell_stands_in_both_places() -> None:
    assert CELLS.keys() == triton_cells.FORWARD.keys() == triton_cells.BACKWARD.keys()

"""flash_rnn against the float64 loop: h, states and all gradients, for every cell, backend, dtype and option."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from iokernels import flash_rnn
from iokernels.ops.flash_rnn.cells import CELLS
from iokernels.runtime import device as devices

from ..backends import CUDA
from .calls import draw, prove, results

KERNELS = ["torch"] + (["triton"] if devices.INTERPRET or torch.cuda.is_available() else []) + [CUDA]


def of(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "lengths": {"lengths": of(1, 19, 0)},
    "clip": {"recurrent_clip": 0.2},
    "cut": {"recurrent_cut": True},
    "recompute": {"recompute_gates": True},
    "all": {"lengths": of(7, 0, 18), "recurrent_clip": 0.3, "recompute_gates": True},
}


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("backend", KERNELS)
def test_every_option(backend: str, cell: str, name: str) -> None:
    tensors = draw(cell, 3, 19, 2, 8, time_first=name in ("plain", "all"))
    if name in ("clip", "cut"):
        del tensors["bias"]
    if name == "lengths":
        # Whatever stands behind the end of a sequence does not matter.
        gates = tensors["gates"].clone()
        clean = {**tensors, "gates": gates.clone()}
        gates[0, 1:] = gates[2] = float("nan")
        actual = results({**tensors, "gates": gates}, cell, backend=backend, **OPTIONS[name])
        for key, expected in results(clean, cell, backend=backend, **OPTIONS[name]).items():
            torch.testing.assert_close(actual[key], expected, rtol=0, atol=0)
        tensors = clean
    prove(tensors, cell, backend, **OPTIONS[name])


@pytest.mark.parametrize(
    ("cell", "batch", "heads", "width", "dtype"),
    [
        ("lstm", 17, 1, 16, torch.bfloat16),
        ("lstm", 3, 4, 24, torch.float16),
        ("slstm", 1, 12, 32, torch.bfloat16),
        ("gru", 8, 1, 64, torch.float16),
        ("slstm", 3, 1, 64, torch.float32),
        ("lstm", 1, 1, 96, torch.bfloat16),
        ("gru", 1, 4, 128, torch.bfloat16),
        ("elman", 3, 1, 128, torch.float16),
    ],
)
@pytest.mark.parametrize("backend", KERNELS)
def test_widths_heads_batches(backend: str, cell: str, batch: int, heads: int, width: int, dtype: torch.dtype) -> None:
    prove(draw(cell, batch, 5, heads, width, dtype=dtype, state=batch > 1), cell, backend)


@pytest.mark.parametrize("cell", ["lstm", "slstm"])
def test_heads_wider_than_the_kernels_take(cell: str) -> None:
    prove(draw(cell, 2, 5, 1, 256, dtype=torch.bfloat16), cell, "torch")


@pytest.mark.parametrize(
    ("cell", "dtype"),
    [(cell, torch.float32) for cell in CELLS]
    + [("lstm", torch.bfloat16), ("slstm", torch.bfloat16), ("gru", torch.float16)],
)
def test_a_thousand_steps(cell: str, dtype: torch.dtype) -> None:
    prove(draw(cell, 2, 1024, 1, 16, dtype=dtype), cell, "torch")


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("cell", CELLS)
def test_large_inputs(cell: str, backend: str) -> None:
    """Gates of +-60 saturate; sLSTM's exponential gates would overflow without their stabiliser."""
    tensors = draw(cell, 3, 12, 2, 8, state=False)
    tensors["gates"] = 60.0 * torch.randn(tensors["gates"].shape).sign() + tensors["gates"]
    found = results(tensors, cell, backend=backend)
    assert all(x.isfinite().all() for x in found.values())
    prove(tensors, cell, backend)


@pytest.mark.parametrize("backend", ["reference", *KERNELS])
@pytest.mark.parametrize("cell", CELLS)
def test_two_calls_continue_one_another(cell: str, backend: str) -> None:
    tensors = draw(cell, 2, 9, 2, 8, dtype=torch.bfloat16)
    whole, state = flash_rnn(**tensors, cell=cell, return_state=True, backend=backend)
    gates, initial = tensors.pop("gates"), tensors.pop("initial_state")
    first, middle = flash_rnn(
        gates[:, :4], **tensors, initial_state=initial, cell=cell, return_state=True, backend=backend
    )
    last, final = flash_rnn(
        gates[:, 4:], **tensors, initial_state=middle, cell=cell, return_state=True, backend=backend
    )
    torch.testing.assert_close(torch.cat([first, last], 1), whole, rtol=0, atol=0)
    torch.testing.assert_close(final, state, rtol=0, atol=0)


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize(("batch", "steps"), [(0, 3), (2, 0)])
def test_nothing_to_do(batch: int, steps: int, backend: str) -> None:
    tensors = draw("lstm", batch, steps, 2, 8)
    found = results(tensors, "lstm", backend=backend)
    assert found["h"].shape == (batch, steps, 2, 8)
    torch.testing.assert_close(found["state"], tensors["initial_state"])
    assert not found["drecurrent"].any()


@pytest.mark.parametrize(("cell", "module"), [("lstm", torch.nn.LSTM), ("gru", torch.nn.GRU), ("elman", torch.nn.RNN)])
@pytest.mark.parametrize("backend", ["reference", *KERNELS])
def test_one_head_is_the_network_of_torch(backend: str, cell: str, module: Any) -> None:
    network = module(5, 8, batch_first=True)
    x = torch.randn(3, 11, 5)
    kind = CELLS[cell]
    initial = torch.randn(len(kind.states), 3, 8)
    hx = tuple(initial[:, None].unbind(0)) if cell == "lstm" else initial
    expected, last = network(x, hx)
    gates = (x @ network.weight_ih_l0.T + network.bias_ih_l0).view(3, 11, kind.gates, 1, 8)
    recurrent = network.weight_hh_l0.view(kind.gates, 1, 8, 8)
    h, state = flash_rnn(
        gates, recurrent, network.bias_hh_l0.view(kind.gates, 1, 8), cell=cell,
        initial_state=initial[:, :, None], return_state=True, backend=backend,
    )  # fmt: skip
    torch.testing.assert_close(h.squeeze(2), expected, rtol=1e-4, atol=1e-5)
    last = torch.cat(last) if cell == "lstm" else last
    torch.testing.assert_close(state.squeeze(2), last, rtol=1e-4, atol=1e-5)
    weights = list(network.parameters())
    upstream = torch.randn_like(expected)
    actual = torch.autograd.grad(h.squeeze(2), weights, upstream)
    for found, wanted in zip(actual, torch.autograd.grad(expected, weights, upstream), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4)


def test_slstm_is_its_formula_without_stabiliser() -> None:
    """c and n as sums of exponentials, which small gates allow."""
    tensors = draw("slstm", 2, 6, 2, 4, dtype=torch.float64, state=False)
    h = c = n = torch.zeros(2, 2, 4, dtype=torch.float64)
    outs = []
    for x in tensors["gates"].unbind(1):
        s = torch.einsum("ghoi,bhi->bgho", tensors["recurrent"], h) + tensors["bias"]
        i, f, z, o = (x + s).unbind(1)
        c, n = f.sigmoid() * c + i.exp() * z.tanh(), f.sigmoid() * n + i.exp()
        h = o.sigmoid() * c / n
        outs.append(h)
    for backend in ("reference", "torch"):
        actual = flash_rnn(**tensors, cell="slstm", backend=backend)
        torch.testing.assert_close(actual, torch.stack(outs, 1))


@pytest.mark.parametrize("cell", CELLS)
def test_gradcheck(cell: str) -> None:
    tensors = draw(cell, 2, 4, 2, 3, dtype=torch.float64)
    if cell == "slstm":
        # The stabiliser counts as a constant, which is exact for h: given, and without a gradient of its own.
        initial = tensors["initial_state"].abs() + 0.5
        tensors["initial_state"] = initial[:3].clone()

    def call(gates: Tensor, recurrent: Tensor, bias: Tensor, state: Tensor) -> tuple[Tensor, ...]:
        if cell == "slstm":
            state = torch.cat([state, initial[3:]])
        h, state = flash_rnn(
            gates, recurrent, bias, cell=cell, initial_state=state, return_state=True, lengths=of(4, 2), backend="torch"
        )
        return (h,) if cell == "slstm" else (h, state)

    torch.autograd.gradcheck(call, tuple(x.detach().clone().requires_grad_() for x in tensors.values()))


@pytest.mark.parametrize("needed", ["gates", "recurrent", "bias", "initial_state"])
@pytest.mark.parametrize("backend", KERNELS)
def test_a_gradient_alone_is_the_same(backend: str, needed: str) -> None:
    tensors = draw("gru", 2, 5, 2, 8)
    expected = results(tensors, "gru", backend=backend)
    leaves = {name: x.detach().requires_grad_(name == needed) for name, x in tensors.items()}
    h, state = flash_rnn(**leaves, cell="gru", return_state=True, backend=backend)
    generator = torch.Generator().manual_seed(1)
    dh, dstate = (torch.randn(x.shape, generator=generator) for x in (h, state))
    (actual,) = torch.autograd.grad([h, state], [leaves[needed]], [dh, dstate])
    torch.testing.assert_close(actual, expected[f"d{needed}"], rtol=0, atol=0)
    (h_alone,) = torch.autograd.grad(flash_rnn(**leaves, cell="gru", backend=backend), [leaves[needed]], dh)
    assert not torch.equal(h_alone, actual)

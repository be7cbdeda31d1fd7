"""flash_rnn at its borders: gates of any size in 16 bits, layouts of any kind, sizes of 0, meta tensors, exported
programs, results that are changed in place."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from iokernels import flash_rnn
from iokernels.ops.flash_rnn.cells import CELLS
from iokernels.ops.flash_rnn.op import backward_op, forward_op
from iokernels.ops.flash_rnn.options import Options
from iokernels.runtime import device as devices

from ..backends import CUDA
from .calls import draw, prove, results

KERNELS = ["torch"] + (["triton"] if devices.INTERPRET or torch.cuda.is_available() else []) + [CUDA]


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("scale", [1.0, 10.0, 100.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", KERNELS)
def test_gates_of_any_size_keep_their_gradients(
    backend: str, dtype: torch.dtype, scale: float, recompute: bool
) -> None:
    """What a backward pass needs of an exponential gate loses nothing on the way to it."""
    prove(draw("slstm", 2, 7, 2, 8, dtype=dtype, scale=scale), "slstm", backend, recompute_gates=recompute)


@pytest.mark.parametrize("cell", ["lstm", "gru", "elman"])
@pytest.mark.parametrize(("backend", "dtype"), [("torch", torch.bfloat16), ("torch", torch.float16)])
def test_so_do_those_that_saturate(cell: str, backend: str, dtype: torch.dtype) -> None:
    for scale in (10.0, 30.0):
        for recompute in (False, True):
            prove(draw(cell, 3, 19, 2, 8, dtype=dtype, scale=scale), cell, backend, recompute_gates=recompute)


def of(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def layouts(x: Tensor) -> Iterator[Tensor]:
    """Tensors equal to x: dimensions turned around, gaps between neighbours, a start that is not aligned, negated and
    imaginary views."""
    order = tuple(reversed(range(x.dim())))
    yield x.permute(order).contiguous().permute(order)
    between = torch.full_like(x, 99 if x.dtype == torch.int32 else torch.nan)
    yield torch.stack([x, between], -1)[..., 0]
    yield torch.cat([x.new_full((3,), 7), x.flatten()])[3:].view(x.shape)
    yield torch.ops.aten._neg_view(-x)
    if x.dtype == torch.float32:
        yield torch.complex(torch.zeros_like(x), -x).conj().imag


@pytest.mark.parametrize("cell", ["gru", "slstm"])
@pytest.mark.parametrize("backend", KERNELS)
def test_a_layout_changes_nothing(backend: str, cell: str) -> None:
    tensors = {name: x.contiguous() for name, x in draw(cell, 3, 4, 2, 8).items()}
    lengths = of(4, 2, 0)
    expected = results(tensors, cell, backend=backend, lengths=lengths)
    for turned in zip(*map(layouts, tensors.values()), strict=True):
        call = dict(zip(tensors, turned, strict=True))
        for name, found in results(call, cell, backend=backend, lengths=lengths).items():
            torch.testing.assert_close(found, expected[name], rtol=1e-5, atol=1e-6)
    for steps in layouts(lengths):
        assert torch.equal(flash_rnn(**tensors, cell=cell, backend=backend, lengths=steps), expected["h"])


@pytest.mark.parametrize("backend", KERNELS)
def test_elements_that_share_memory(backend: str) -> None:
    """An expanded dimension of any argument is as its copies."""
    tensors = draw("lstm", 2, 3, 2, 8)
    for dim in range(4):
        shared = {name: x.narrow(dim % x.dim(), 0, 1).expand_as(x) for name, x in tensors.items()}
        copies = {name: x.contiguous() for name, x in shared.items()}
        found = results(shared, "lstm", backend=backend, lengths=of(2).expand(2))
        expected = results(copies, "lstm", backend=backend, lengths=of(2, 2))
        for name in found:
            torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", KERNELS)
def test_gradients_that_come_back_in_any_layout(backend: str) -> None:
    leaves = {name: x.detach().requires_grad_() for name, x in draw("slstm", 3, 4, 2, 8).items()}
    found = flash_rnn(**leaves, cell="slstm", return_state=True, backend=backend)
    given = [torch.randn(x.shape) for x in found]

    def back(*upstream: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(found, list(leaves.values()), list(upstream), retain_graph=True)

    one = torch.ones(())
    cases = [(list(upstream), given) for upstream in zip(*map(layouts, given), strict=True)]
    cases.append(([one.expand_as(x) for x in found], [torch.ones_like(x) for x in found]))
    for upstream, plain in cases:
        for actual, expected in zip(back(*upstream), back(*plain), strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", [None, "reference", "torch", "triton"])
@pytest.mark.parametrize("cell", ["gru", "slstm"])
def test_meta_tensors_have_shapes(cell: str, backend: str | None) -> None:
    concrete = draw(cell, 3, 4, 2, 8, dtype=torch.bfloat16)
    expected = results(concrete, cell, lengths=of(4, 2, 0))
    meta = {name: x.to("meta").requires_grad_() for name, x in concrete.items()}
    h, state = flash_rnn(**meta, cell=cell, return_state=True, lengths=of(4, 2, 0).to("meta"), backend=backend)
    grads = torch.autograd.grad(h.sum() + state.sum(), list(meta.values()))
    found = {"h": h, "state": state, **{f"d{name}": grad for name, grad in zip(meta, grads, strict=True)}}
    assert {name: (x.shape, x.dtype, x.is_meta) for name, x in found.items()} == {
        name: (x.shape, x.dtype, True) for name, x in expected.items()
    }


@pytest.mark.parametrize("backend", ["reference", *KERNELS])
@pytest.mark.parametrize("cell", CELLS)
def test_sequences_without_a_step(cell: str, backend: str) -> None:
    """h is 0, the states are those that were given, to the bit, and so are their gradients."""
    tensors = draw(cell, 2, 3, 2, 8)
    found = results(tensors, cell, backend=backend, lengths=of(0, 0))
    assert torch.equal(found["state"], tensors["initial_state"])
    upstream = torch.randn(found["h"].shape, generator=(generator := torch.Generator().manual_seed(1)))
    dstate = torch.randn(found["state"].shape, generator=generator)
    assert upstream.any()
    if cell == "slstm":
        dstate[3] = found["dinitial_state"][3]  # m is a constant: what came for it may stop or pass
    assert torch.equal(found["dinitial_state"], dstate)
    for name in ("h", "dgates", "drecurrent", "dbias"):
        assert name not in found or not found[name].any()


@pytest.mark.parametrize("time_first", [False, True])
@pytest.mark.parametrize("backend", KERNELS)
def test_results_may_be_changed_in_place(backend: str, time_first: bool) -> None:
    """The states always; h, which the backward pass reads, where there will be none, and else never in silence."""
    tensors = draw("lstm", 2, 3, 2, 8, time_first=time_first)
    leaves = {name: x.detach().requires_grad_() for name, x in tensors.items()}
    h, state = flash_rnn(**leaves, return_state=True, backend=backend)
    expected = torch.autograd.grad(h.sum(), list(leaves.values()), retain_graph=True)
    with torch.no_grad():
        state.zero_()
    for one, other in zip(
        torch.autograd.grad(h.sum(), list(leaves.values()), retain_graph=True), expected, strict=True
    ):
        assert torch.equal(one, other)
    h += 1.0
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        h.sum().backward()
    plain = flash_rnn(**tensors, backend=backend)
    assert torch.equal(flash_rnn(**tensors, backend=backend).add_(1.0), plain + 1.0)


def test_numbers_of_numpy() -> None:
    tensors = draw("lstm", 2, 3, 2, 8)
    expected = flash_rnn(**tensors, recurrent_cut=True, return_state=True)
    found = flash_rnn(**tensors, recurrent_cut=np.True_, recompute_gates=np.False_, return_state=np.True_)  # pyright: ignore[reportArgumentType]
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("backend", KERNELS)
def test_lengths_that_no_host_has_seen_are_clamped(backend: str) -> None:
    """On a GPU the public function does not read them; the kernels hold them between 0 and N."""
    tensors = draw("gru", 3, 4, 2, 8)

    def run(lengths: Tensor) -> list[Tensor]:
        options = Options(tensors["initial_state"], lengths, "gru")
        arguments = tensors["gates"], tensors["recurrent"], tensors["bias"]
        out, state, values, history = forward_op(*arguments, True, backend, *options)
        needs = [True, True, True, True]
        kept = None, *arguments[1:], out, values, history, needs, backend
        return [out, state, *backward_op(torch.ones_like(out), state, *kept, *options)]

    for found, expected in zip(run(of(9, -3, 2)), run(of(4, 0, 2)), strict=True):
        assert torch.equal(found, expected)

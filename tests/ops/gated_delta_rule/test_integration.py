"""gated_delta_rule under torch.library's checks and torch.compile, and no byte outside its tensors."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from iokernels import autotune
from iokernels.ops.gated_delta_rule import gated_delta_rule, gated_delta_rule_step
from iokernels.ops.gated_delta_rule.case import CASE, traffic
from iokernels.ops.gated_delta_rule.op import backward_op, forward_op, step_op
from iokernels.ops.gated_delta_rule.options import DeltaOptions
from iokernels.ops.gated_delta_rule.triton import launch as triton_launch
from iokernels.ops.gated_delta_rule.triton.tuning import Config
from iokernels.testing import inputs
from iokernels.testing.tracer import trace

CHECKS = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")


def drawn(text: str, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    made = CASE.make_inputs(CASE.vocabulary.parse(text), dtype, torch.device("cpu"), 0)
    return {**{name: x.detach() for name, x in made.tensors.items()}, **made.options}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_operators_are_what_they_say(backend: str, packed: bool) -> None:
    given = drawn(f"b=2,h=2,hk=1,n=5,d=16,state=1,packed={int(packed)}")
    q, k, v, beta, decay = (given[name] for name in ("q", "k", "v", "beta", "log_decay"))
    if packed:
        q, k, v, beta, decay = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v, beta, decay))
    options = (decay, given["initial_state"], given.get("cu_seqlens"), 0.25)
    torch.library.opcheck(forward_op, (q, k, v, beta, backend, *options), test_utils=CHECKS)
    out, final, inverses = forward_op(q, k, v, beta, backend, *options)
    for needs in ([True] * 6,) if backend == "triton" else ([True] * 6, [False, True, False, True, False, False]):
        arguments = (out, final, q, k, v, beta, inverses, needs, backend, *options)
        torch.library.opcheck(backward_op, arguments, test_utils=CHECKS)
    if not packed:
        state = given["initial_state"].clone()
        torch.library.opcheck(step_op, (q, k, v, beta, state, decay, 0.25, backend), test_utils=CHECKS)


@pytest.mark.parametrize("dynamic", [False, True])
def test_one_graph(dynamic: bool) -> None:
    """Forward and backward, with the same tensor for q and k, as one graph; then another length."""

    def loss(x: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor, state: Tensor) -> Tensor:
        out, after = gated_delta_rule(x, x, v, beta, log_decay=log_decay, initial_state=state, return_state=True)
        return out.square().sum() + after.sum()

    compiled = torch.compile(loss, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for length in (20, 33):
        given = drawn(f"b=2,h=2,n={length},d=16,state=1,decay=2")
        leaves = [given[name].requires_grad_() for name in ("k", "v", "beta", "log_decay", "initial_state")]
        expected = torch.autograd.grad(loss(*leaves), leaves)
        for one, other in zip(torch.autograd.grad(compiled(*leaves), leaves), expected, strict=True):
            torch.testing.assert_close(one, other)


def test_a_step_is_one_graph_and_changes_its_state() -> None:
    given = drawn("b=2,h=2,n=1,d=16")
    state = torch.randn(2, 2, 16, 16)
    expected = state.clone()
    out = gated_delta_rule_step(**given, state=expected)
    compiled = torch.compile(gated_delta_rule_step, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(**given, state=state), out)
    torch.testing.assert_close(state, expected)


LAYOUTS: tuple[Any, ...] = ("bnhd", "padded", "strided", "expanded")


@pytest.mark.interpreted
@pytest.mark.parametrize(
    ("text", "layout"), list(product(("b=2,h=2,n=67,d=20,dv=40,state=1", "b=1,h=4,n=9,d=33,dv=17,decay=0"), LAYOUTS))
)
def test_no_byte_outside_the_tensors(text: str, layout: Any) -> None:
    given = drawn(text, torch.bfloat16)
    q, k, v = (inputs.poisoned_view(given[name], layout) for name in ("q", "k", "v"))
    options = DeltaOptions(given.get("log_decay"), given.get("initial_state"), None, 0.25)
    tiles = dict(traffic.TILES)
    if given["q"].shape[3] > 32:
        tiles = dict.fromkeys(tiles, Config(64, 16, 4, 1))
    with autotune.override(**tiles), trace():
        out, final, inverses = triton_launch.forward(q, k, v, given["beta"], options)
        dout = inputs.poisoned_view(torch.randn(out.shape).to(out.dtype), layout)
        triton_launch.backward(dout, final, q, k, v, given["beta"], inverses, options)
        triton_launch.step(
            q[:, :, :2], k[:, :, :2], v[:, :, :2], given["beta"][:, :, :2], final,
            None if options.log_decay is None else options.log_decay[:, :, :2], 0.25,
        )  # fmt: skip


@pytest.mark.interpreted
@pytest.mark.parametrize("bad", [[0, 99, 40], [-5, 20, 10], [0, 40, 0, 40], [30, 10, 2**30], [0, 0, -(2**31)]], ids=str)
def test_offsets_out_of_range_stay_inside_the_tensors(bad: list[int]) -> None:
    """On a GPU nobody reads the offsets before the kernels do, so whatever they say must do no harm."""
    q, beta = torch.randn(1, 2, 40, 16), torch.rand(1, 2, 40)
    q = q / q.norm(dim=-1, keepdim=True)
    options = DeltaOptions(-beta, None, torch.tensor(bad, dtype=torch.int32), 0.25)
    tiles = dict.fromkeys(traffic.TILES, Config(16, 16, 4, 1))
    with autotune.override(**tiles), trace():
        out, final, inverses = triton_launch.forward(q, q, q, beta, options)
        grads = triton_launch.backward(out, final, q, q, q, beta, inverses, options)
    assert out.isfinite().all()
    assert all(x is None or x.isfinite().all() for x in grads)


def test_the_chunk_table_covers_every_row_once() -> None:
    lengths = [5, 0, 64, 65, 1, 130, 0]
    offsets = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    total, chunk = 300, 64
    most = total // chunk + len(lengths)
    found, starts, table = triton_launch.chunk_table(offsets, total, chunk, most)
    assert torch.equal(found, offsets)
    rows = [row for first, count in table.tolist() for row in range(first, first + count)]
    assert rows == list(range(sum(lengths)))
    assert starts.tolist() == [0, 1, 1, 2, 4, 5, 8]
    assert table.dtype == starts.dtype == torch.int32
    assert max(count for _, count in table.tolist()) <= chunk

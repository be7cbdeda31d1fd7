"""The case of flash_rnn: costs against hand counts, options covered, peers the same."""

from __future__ import annotations

import pytest
import torch

from iokernels import UnsupportedError
from iokernels.ops.flash_rnn.case import CASE, peers
from iokernels.ops.flash_rnn.case.shapes import VOCABULARY
from iokernels.testing.case.proof import Proof
from iokernels.testing.case.shape import UsageError

CPU = torch.device("cpu")


def test_the_figures_of_the_shape_that_the_issue_names() -> None:
    shape = VOCABULARY.parse("b=16,n=1k,h=12,d=64")
    units = 12 * 64
    assert CASE.flops(shape, "fwd") == 2 * 16 * 1024 * 4 * 64 * units
    assert CASE.flops(shape, "both") == 3 * CASE.flops(shape, "fwd")
    assert CASE.flops(shape.replace(cut=1), "bwd") == CASE.flops(shape, "fwd")
    row, weights, state = 16 * 1024 * units * 2, 4 * 65 * units * 2, 2 * 16 * units * 4
    # Gates and h, R and b, the final state; backward the gates' gradients, h and its gradient, and R's and b's.
    assert CASE.floor_bytes(shape, torch.bfloat16, "fwd") == 5 * row + weights + state
    assert CASE.floor_bytes(shape, torch.bfloat16, "bwd") == 10 * row + 2 * weights
    assert CASE.accounts is not None
    naive = CASE.accounts.naive_bytes(shape, torch.bfloat16, "fwd")
    assert naive == 1024 * (weights + 2 * state) + 22 * row


def test_every_option_is_proved() -> None:
    points = CASE.check_points()
    assert len({point.name for point in points}) == len(points)
    for dimension in VOCABULARY.dimensions:
        assert len({point.shape[dimension.name] for point in points}) > 1, dimension.name
    assert {point.shape.cell for point in points if point.quick} >= {0, 1, 3}


@pytest.mark.parametrize("text", ["cell=0", "cell=1", "cell=2,bias=0", "cell=0,state=1", "cell=1,state=1,nb=1"])
def test_peers_compute_the_same(text: str) -> None:
    shape = VOCABULARY.parse(f"b=2,n=5,h=1,d=8,{text}")
    proof = Proof(CASE, shape, torch.float32, CPU)
    for name in ("loop", "loop-bmm", "torch-rnn"):
        prepare = peers(CPU)[name]
        assert not isinstance(prepare, str)
        assert proof.judge(lambda inputs, prepare=prepare: prepare(inputs)()).status == "ok", name
    wrong = proof.judge(lambda inputs: {name: 1.001 * x for name, x in CASE.run(inputs, "torch").items()})
    assert wrong.status == "wrong"


@pytest.mark.parametrize("name", ["loop", "loop-bmm"])
def test_the_loops_have_heads_and_slstm(name: str) -> None:
    prepare = peers(CPU)[name]
    assert not isinstance(prepare, str)
    proof = Proof(CASE, VOCABULARY.parse("b=2,n=5,h=3,d=8,cell=3,state=1"), torch.bfloat16, CPU)
    assert proof.judge(lambda inputs: prepare(inputs)()).status == "ok"


@pytest.mark.parametrize("text", ["h=2", "cell=3", "lengths=1", "cut=1", "clip=0.5"])
def test_torch_refuses_what_it_cannot_do(text: str) -> None:
    prepare = peers(CPU)["torch-rnn"]
    assert not isinstance(prepare, str)
    shape = VOCABULARY.parse(f"b=1,n=2,d=8,{'' if text == 'h=2' else 'h=1,'}{text}")
    with pytest.raises(UnsupportedError, match=r"torch has one head|no equivalent"):
        prepare(CASE.make_inputs(shape, torch.float32, CPU, 0))


def test_smaller_shapes_keep_their_options() -> None:
    shape = VOCABULARY.parse("b=64,n=4k,h=12,d=64,cell=3,lengths=1,state=1")
    small = CASE.within(shape, 2**22)
    assert CASE.reference_bytes(small) <= 2**22
    assert small == shape.replace(b=small.b, h=small.h, n=small.n)
    with pytest.raises(UsageError, match="empty=1 goes with lengths=1"):
        CASE.make_inputs(shape.replace(lengths=0, empty=1), torch.float32, CPU, 0)

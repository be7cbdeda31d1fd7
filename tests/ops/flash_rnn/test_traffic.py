"""The kernels of flash_rnn under the tracer: no byte outside the tensors, and as many as the model says."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, given, seed, settings

from iokernels import autotune
from iokernels.ops.flash_rnn.case import traffic as model
from iokernels.ops.flash_rnn.cells import CELLS
from iokernels.ops.flash_rnn.options import Needs, Options
from iokernels.ops.flash_rnn.triton import launch as triton_launch
from iokernels.ops.flash_rnn.triton.tuning import Config
from iokernels.testing.case.accounts import Bytes
from iokernels.testing.tracer import Trace, trace

from ...tiers import examples
from .calls import draw

pytestmark = pytest.mark.interpreted

TILES = {name: Config(16, 4, 1) for name in ("flash_rnn_fwd", "flash_rnn_bwd", "flash_rnn_values")}


@st.composite
def calls(draw_one: st.DrawFn) -> dict[str, Any]:
    """Shapes, layouts and options of one call; everything is optional and everything may come together."""
    batch, steps = draw_one(st.sampled_from([1, 3, 18])), draw_one(st.integers(0, 4))
    length = st.integers(0, steps)
    return {
        "cell": draw_one(st.sampled_from(list(CELLS))),
        "batch": batch,
        "steps": steps,
        "heads": draw_one(st.integers(1, 2)),
        "width": draw_one(st.sampled_from([5, 16, 24])),
        "dtype": draw_one(st.sampled_from([torch.float16, torch.bfloat16, torch.float32])),
        "time_first": draw_one(st.booleans()),
        "lengths": draw_one(st.none() | st.lists(length, min_size=batch, max_size=batch)),
        "bias": draw_one(st.booleans()),
        "state": draw_one(st.booleans()),
        "dstate": draw_one(st.booleans()),
        "dinitial": draw_one(st.booleans()),
        "cut": draw_one(st.booleans()),
        "recompute": draw_one(st.booleans()),
    }


def run(call: dict[str, Any], lengths: torch.Tensor | None) -> Trace:
    """Forward and backward of one call under the tracer, which raises at a stray byte."""
    x = draw(
        call["cell"], call["batch"], call["steps"], call["heads"], call["width"], dtype=call["dtype"],
        time_first=call["time_first"],
    )  # fmt: skip
    options = Options(
        x["initial_state"] if call["state"] else None, lengths, call["cell"], 0.0, call["cut"], call["recompute"]
    )
    gates, recurrent, bias = x["gates"], x["recurrent"], x["bias"] if call["bias"] else None
    with autotune.override(**TILES), trace() as traced:
        saved = triton_launch.forward(gates, recurrent, bias, True, options)
        dstate = torch.ones_like(saved.state) if call["dstate"] else None
        grads = triton_launch.backward(
            torch.ones_like(saved.out), dstate, gates if call["recompute"] else None, recurrent, bias, saved, options,
            Needs(True, True, call["bias"], call["dinitial"]),
        )  # fmt: skip
    for found in (saved.out, saved.state, *grads):
        assert found is None or found.isfinite().all()
    return traced


def account(call: dict[str, Any]) -> dict[str, Bytes]:
    """What the model says of a call."""
    lengths = call["lengths"] or [call["steps"]] * call["batch"]
    problem = model.Problem(
        call["cell"], tuple(lengths), call["steps"], call["heads"], call["width"], call["dtype"].itemsize,
        bias=call["bias"], initial=call["state"], dstate=call["dstate"], dinitial=call["dinitial"],
        ragged=call["lengths"] is not None, recompute=call["recompute"], cut=call["cut"],
    )  # fmt: skip
    return {name: found.model for name, found in model.accounts(problem, TILES).items()}


@pytest.mark.parametrize("part", range(4))  # parts, so that workers can share them
def test_as_many_bytes_as_the_model_says_and_none_outside(part: int) -> None:
    @seed(part)
    @settings(max_examples=examples(13), deadline=None, database=None, suppress_health_check=(HealthCheck.too_slow,))
    @given(calls())
    def check(call: dict[str, Any]) -> None:
        ragged = call["lengths"]
        traced = run(call, None if ragged is None else torch.tensor(ragged, dtype=torch.int32))
        expected = account(call)
        assert {kernel.name for kernel in traced.kernels} == set(expected)
        for name, nbytes in expected.items():
            counted = traced.bytes(name)
            assert (counted.read, counted.written) == nbytes, name

    check()


def test_by_hand() -> None:
    """An LSTM of 2 heads of 16 units, 17 sequences of 3 steps in tiles of 16, bfloat16."""
    problem = model.Problem("lstm", (3,) * 17, 3, 2, 16, 2)
    found = model.accounts(problem, TILES)
    matrices, bias, rows = 2 * 4 * 16 * 16 * 2, 2 * 4 * 16 * 2, 2 * 17 * 3
    gates, h, c, state = rows * 4 * 16 * 2, rows * 16 * 2, rows * 16 * 4, 2 * 17 * 2 * 16 * 4
    forward, backward = found["flash_rnn_fwd_kernel"], found["flash_rnn_bwd_kernel"]
    assert forward.floor == Bytes(matrices + bias + gates, h + state + gates + c)
    assert forward.model == Bytes(2 * (matrices + bias) + gates, h + state + gates + c)
    assert backward.floor == Bytes(matrices + gates + h + c, gates)
    assert backward.model == Bytes(2 * matrices + gates + h + c, gates)


def test_lengths_out_of_range_stay_inside_the_tensors() -> None:
    """On a GPU nobody reads the lengths before the kernels do, so whatever they say must do no harm."""
    call = {
        "cell": "slstm", "batch": 3, "steps": 4, "heads": 2, "width": 8, "dtype": torch.float32, "time_first": False,
        "bias": True, "state": True, "dstate": True, "dinitial": True, "cut": False, "recompute": False,
    }  # fmt: skip
    run(call, torch.tensor([2**31 - 1, -(2**31), 5], dtype=torch.int32))

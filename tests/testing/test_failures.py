"""A fault planted in one kernel is named: the tensor, its worst element, what is there, what should be, and the command
that shows it again. In a test of a room and in ``iokernels check`` alike."""

from __future__ import annotations

import re
from functools import partial

import pytest
import torch

from iokernels.bench.cli import main
from iokernels.ops.flash_attention.case import CASE
from iokernels.ops.flash_attention.triton import forward
from iokernels.testing import budget
from iokernels.testing.case.proof import prove_point

pytestmark = pytest.mark.interpreted

ELEMENT = re.compile(r"the error of (\w+) is \S+ times .* most at \(([\d, ]+)\): got (\S+), expected ([-\d.]+)")


@pytest.fixture
def planted(monkeypatch: pytest.MonkeyPatch) -> None:
    """The forward kernel takes its logarithms to another base: every log-sum-exp and every gradient is off."""
    monkeypatch.setattr(forward, "LN2", 0.7)


def name_of(message: str) -> str:
    """The tensor that a message names, whose worst element it shows."""
    found = ELEMENT.search(" ".join(message.split()))
    assert found is not None, message
    assert len(found[2].split(",")) == (3 if found[1] == "lse" else 4)
    assert float(found[3]) != pytest.approx(float(found[4]), rel=1e-3)
    return found[1]


@pytest.mark.usefixtures("planted")
def test_by_a_test(request: pytest.FixtureRequest) -> None:
    shape = CASE.vocabulary.parse("b=1,h=2,n=40,d=16,lse=1")
    with pytest.raises(AssertionError) as failure:
        prove_point(CASE, "triton", shape, torch.float16)
    message = str(failure.value)
    assert message.startswith("flash_attention, triton, float16, b=1,h=2,n=40")
    assert name_of(message) in ("lse", "dq", "dk", "dv")
    assert f'again: python -m pytest "{request.node.nodeid}"' in message


@pytest.mark.usefixtures("planted")
def test_by_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    chosen = ["flash_attention", "--device", "cpu", "--backend", "triton", "--dtype", "fp16", "-k", "causal"]
    assert main(["check", *chosen]) == 1
    printed = " ".join(capsys.readouterr().out.split())
    assert name_of(printed) in ("dq", "dk", "dv")
    assert 'again: iokernels check flash_attention --backend triton --dtype fp16 -k "causal"' in printed


@pytest.mark.parametrize("relative", [False, True])
def test_by_the_budget_of_a_tensor(relative: bool) -> None:
    truth = torch.arange(1.0, 13.0, dtype=torch.float64).view(3, 4)
    wrong = truth.float()
    wrong[2, 1] = 12.5
    check = partial(budget.check, low_precision=truth.float(), factor=budget.GRADIENT)
    if relative:
        check = partial(budget.check_relative_rms, limit=0.01)
    said = r"(?s)dq: .* at \(2, 1\): got 12.5, expected 10.*\n  again: the command$"
    with budget.repeated_by("the command"), pytest.raises(AssertionError, match=said):
        check(wrong, truth, what="dq")
    wrong[2, 3] = float("nan")
    at = budget.worst_of_rows(wrong, truth)
    assert at is not None
    assert at.index == (2, 3)
    assert budget.worst_of_rows(wrong, truth, (0, 1)) is not None

"""Cases that are judged by a stated limit, and cases without gradients."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from iokernels.testing.case import Limit, load
from iokernels.testing.case.proof import Proof
from iokernels.testing.case.shape import UsageError

CASE = load("flash_attention")
SHAPE = CASE.vocabulary.shape(b=1, h=2, n=20, d=16)


@pytest.mark.parametrize("over", [0, 1, 2])
@pytest.mark.parametrize(("error", "status"), [(5e-3, "ok"), (2e-2, "wrong")])
def test_limit_is_relative_to_rows(error: float, status: str, over: int) -> None:
    case = replace(CASE, limit=lambda name, dtype: Limit(1e-2, over))
    proof = Proof(case, SHAPE, torch.float32, torch.device("cpu"))
    verdict = proof.judge(lambda inputs: {"out": CASE.run(inputs, "torch")["out"] * (1 + error)})
    assert verdict.status == status
    assert verdict.ratio == pytest.approx(error / 1e-2, rel=1e-2)


def test_one_wrong_row_shows_only_when_rows_are_judged() -> None:
    def wrong(inputs):
        out = CASE.run(inputs, "torch")["out"]
        return {"out": out * torch.where(torch.arange(20) == 7, 1.05, 1.0)[:, None]}

    for over, status in ((1, "wrong"), (0, "ok")):
        case = replace(
            CASE, limit=lambda name, dtype, over=over: Limit(4e-2 if name == "out" else 0.5, over)
        )  # fmt: skip
        assert Proof(case, SHAPE, torch.float32, torch.device("cpu")).judge(wrong).status == status


def test_passes() -> None:
    inference = replace(CASE, passes=("fwd",))
    assert CASE.passes_of(None) == ("both",)
    assert inference.passes_of(None) == ("fwd",)
    assert CASE.passes_of(("fwd", "bwd")) == ("fwd", "bwd")
    assert inference.passes_of(("fwd", "bwd")) == ("fwd",)
    with pytest.raises(UsageError, match="flash_attention takes no gradients"):
        inference.passes_of(("bwd",))

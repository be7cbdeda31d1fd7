"""Linear attention where products of the Taylor map pass the range of float32: what has no weight has no part."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from iokernels import linear_attention

from ..backends import CUDA

BACKENDS = ("reference", "torch", "triton")
INF = float("inf")


@pytest.mark.parametrize("decayed", [False, True], ids=["plain", "decayed"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_an_overflow_reaches_no_row_before_it(backend: str, decayed: bool) -> None:
    """The square of q . k is infinite from row 9 on. A chunk works it out for the rows before too."""
    rows, huge = 24, 9
    given: dict[str, Any] = {name: torch.rand(1, 1, rows, 4) for name in ("q", "k", "v")}
    given["k"][:, :, huge:] = 1e20
    if decayed:
        given["log_decay"] = -torch.rand(1, 1, rows)
    given["q"].requires_grad_()
    out = linear_attention(**given, feature_map="taylor", backend=backend)
    assert not out[:, :, huge:].isfinite().any()
    out[:, :, :huge].sum().backward()
    alone = {name: x.detach()[:, :, :huge].double().requires_grad_(name == "q") for name, x in given.items()}
    expected = linear_attention(**alone, feature_map="taylor", backend="reference")
    expected.sum().backward()
    torch.testing.assert_close(out[:, :, :huge].double(), expected, rtol=1e-5, atol=1e-5)
    assert given["q"].grad is not None
    torch.testing.assert_close(given["q"].grad[:, :, :huge].double(), alone["q"].grad, rtol=1e-5, atol=1e-5)


def test_the_formula_hides_behind_a_reset_what_overflows() -> None:
    """x = 4 * 2^63, whose square has no place in float32, meets the state before the reset only."""
    one, state = torch.ones(1, 1, 1, 1), torch.ones(1, 1, 3, 1)
    out, last = linear_attention(
        4.0 * one, 0.5 * one, one, scale=2.0**63, log_decay=torch.full((1, 1, 1), -INF), feature_map="taylor",
        initial_state=state, return_state=True, backend="reference",
    )  # fmt: skip
    assert out.item() == 2.0**127  # 1 + x + x^2 / 2 of x = 2 * 2^63
    assert last.flatten().tolist() == [1.0, 0.5, 0.25]


@pytest.mark.parametrize("backend", ["reference", "torch"])  # Triton halves the square of a query last
def test_the_largest_weight_is_not_lost_on_the_way(backend: str) -> None:
    """x^2 overflows, x^2 / 2 does not."""
    x, one = torch.full((1, 1, 1, 1), 2.4e19), torch.ones(1, 1, 1, 1)
    out = linear_attention(x, one, one, scale=1.0, feature_map="taylor", backend=backend)
    assert out.item() == pytest.approx(2.88e38, rel=1e-6)


@pytest.mark.parametrize("decayed", [False, True], ids=["plain", "decayed"])
@pytest.mark.parametrize("backend", [*BACKENDS, CUDA])
def test_a_score_that_overflows_reaches_no_row_before_it(backend: str, decayed: bool) -> None:
    """q . k is infinite from row 9 on."""
    rows, huge = 24, 9
    given: dict[str, Any] = {name: torch.rand(1, 1, rows, 16).bfloat16() for name in ("q", "k", "v")}
    given["k"][:, :, huge:] = 3e38
    given["q"] *= 8.0
    if decayed:
        given["log_decay"] = -torch.rand(1, 1, rows)
    out = linear_attention(**given, scale=1.0, backend=backend)
    alone = {name: x[:, :, :huge] for name, x in given.items()}
    expected = linear_attention(**alone, scale=1.0, backend="reference")
    torch.testing.assert_close(out[:, :, :huge], expected, rtol=3e-2, atol=3e-2)

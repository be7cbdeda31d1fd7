"""The budget passes an honest low-precision result and nothing that is wrong."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from iokernels.testing import inputs
from iokernels.testing.budget import (
    FORWARD,
    check,
    check_relative_rms,
    error_ratio,
    judge,
    relative_rms,
)

DTYPES = [torch.float16, torch.bfloat16, torch.float32]


def attend(q: Tensor, k: Tensor, v: Tensor, *, diagonal: int = 0) -> Tensor:
    scores = q @ k.mT * q.shape[-1] ** -0.5
    hidden = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(diagonal + 1)
    return scores.masked_fill(hidden, -math.inf).softmax(-1) @ v


def honest(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """What a fused kernel gives: float32 statistics, weights rounded once, one rounding of the result."""
    scores = q.float() @ k.float().mT * q.shape[-1] ** -0.5
    scores = scores.masked_fill(torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1), -math.inf)
    weights = (scores - scores.amax(-1, keepdim=True)).exp()
    out = weights.to(q.dtype).float() @ v.float() / weights.sum(-1, keepdim=True)
    return out.to(q.dtype)


def flawed(name: str, out: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out = out.clone()
    if name == "zeros":
        return torch.zeros_like(out)
    if name == "one tile":
        out[1, 2, 16:32] = 0
    elif name == "one row":
        out[1, 2, 37] = out[1, 2, 36]
    elif name == "factor 1.02":
        out *= 1.02
    elif name == "off by one":
        return attend(q, k, v, diagonal=1)
    elif name == "nan":
        out[0, 0, 0, 0] = math.nan
    elif name == "infinity":
        out[0, 0, 0, 0] = math.inf
    elif name == "swapped heads":
        return out[:, [1, 0, 2]]
    return out


@pytest.fixture(params=DTYPES, ids=str)
def case(request: pytest.FixtureRequest) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor, Tensor]]:
    """(reference, low_precision, (q, k, v)) of causal attention."""
    q, k, v = inputs.attention(7, 2, 3, 3, 48, 48, 32, dtype=request.param)
    return attend(q.double(), k.double(), v.double()), attend(q, k, v), (q, k, v)


def test_honest_result_passes(case):
    reference, low, qkv = case
    out = honest(*qkv)
    check(out, reference, low, factor=FORWARD, what="out")
    assert 0.0 < error_ratio(out, reference, low, factor=FORWARD) <= 1.0
    assert error_ratio(low, reference, low, factor=FORWARD) <= 0.5


@pytest.mark.parametrize(
    "flaw", ["zeros", "one tile", "one row", "factor 1.02", "off by one", "nan", "infinity", "swapped heads"]
)
def test_wrong_result_fails(case, flaw):
    reference, low, qkv = case
    wrong = flawed(flaw, honest(*qkv), *qkv)
    with pytest.raises(AssertionError, match=r"out: error .* \(limit .*\) at \("):
        check(wrong, reference, low, factor=FORWARD, what="out")
    assert error_ratio(wrong, reference, low, factor=FORWARD) > 1.0


def test_names_the_worst_element():
    reference = torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=torch.float64)
    wrong = reference.float()
    wrong[1, 0] = 5.0
    with pytest.raises(AssertionError, match=r"dq: error 2 .* at \(1, 0\): got 5, expected 3"):
        check(wrong, reference, reference.float(), factor=FORWARD, what="dq")


def test_exact_formula_allows_rounding_noise_only():
    reference = torch.tensor([1.0, 2.5, -7.0], dtype=torch.float64)
    low = reference.float()
    limit = judge(low, reference, low, factor=FORWARD).limit
    assert 0.0 < limit < 1e-5
    check(low, reference, low, factor=FORWARD, what="out")
    check(low + torch.tensor([0.0, 0.0, 1e-7]), reference, low, factor=FORWARD, what="out")
    with pytest.raises(AssertionError):
        check(low + torch.tensor([0.0, 0.0, 1e-5]), reference, low, factor=FORWARD, what="out")


def test_infinities_are_compared_exactly():
    reference = torch.tensor([1.0, -math.inf, 2.0], dtype=torch.float64)
    low = reference.float()
    check(low, reference, low, factor=FORWARD, what="lse")
    for wrong in ([1.0, math.inf, 2.0], [1.0, math.nan, 2.0], [1.0, -1e30, 2.0], [-math.inf, -math.inf, 2.0]):
        with pytest.raises(AssertionError):
            check(torch.tensor(wrong), reference, low, factor=FORWARD, what="lse")


def test_zero_reference_admits_zero_only():
    zero = torch.zeros(3, dtype=torch.float64)
    check(zero.float(), zero, zero.float(), factor=FORWARD, what="dq")
    with pytest.raises(AssertionError):
        check(zero.float() + 1e-30, zero, zero.float(), factor=FORWARD, what="dq")


def test_empty_tensors_pass():
    empty = torch.zeros(2, 0, 4, dtype=torch.float64)
    check(empty.float(), empty, empty.float(), factor=FORWARD, what="out")
    assert error_ratio(empty.float(), empty, empty.float(), factor=FORWARD) == 0.0


def test_inputs_so_small_that_zeros_would_pass_are_refused():
    reference = torch.full((4,), 1e-4, dtype=torch.float64)
    low = reference.bfloat16()
    with pytest.raises(ValueError, match="zeros would pass"):
        check(low, reference, low, factor=FORWARD, what="dk")
    check(low, reference, low, factor=FORWARD, what="dk", may_vanish=True)


def test_unusable_references_are_refused():
    reference = torch.tensor([1.0, 1e6], dtype=torch.float64)
    low = reference.float()
    with pytest.raises(ValueError, match="must be float64"):
        judge(low, low, low, factor=FORWARD)
    with pytest.raises(ValueError, match="shapes"):
        judge(low[:1], reference, low, factor=FORWARD)
    with pytest.raises(ValueError, match="NaN"):
        judge(low, reference * math.nan, low, factor=FORWARD)
    with pytest.raises(ValueError, match="overflows"):
        judge(low, reference, reference.half(), factor=FORWARD)


def test_relative_rms_holds_each_row():
    reference = torch.randn(2, 5, 64, dtype=torch.float64) * torch.tensor([1.0, 1e-3])[:, None, None]
    check_relative_rms(reference.bfloat16(), reference, limit=8e-3, what="h")
    assert relative_rms(torch.zeros_like(reference), reference).allclose(torch.ones(2, 5, dtype=torch.float64))
    wrong = reference.float()
    wrong[1, 3] *= 1.02
    with pytest.raises(AssertionError, match=r"h: relative RMS error 0.02 exceeds the limit 0.008 in row \(1, 3\)"):
        check_relative_rms(wrong, reference, limit=8e-3, what="h")
    wrong[1, 3, 0] = math.nan
    assert relative_rms(wrong, reference)[1, 3].item() == math.inf
    with pytest.raises(ValueError, match="zeros would pass"):
        check_relative_rms(wrong, reference, limit=1.0, what="h")


def test_relative_rms_of_rows_without_signal():
    reference = torch.zeros(2, 4, dtype=torch.float64)
    actual = torch.zeros(2, 4)
    actual[1, 0] = 1e-30
    assert relative_rms(actual, reference).tolist() == [0.0, math.inf]
    assert relative_rms(reference + 1.0, reference + 1.0, dim=0).tolist() == [0.0] * 4

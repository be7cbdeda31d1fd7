"""The fuzzer itself: its oracles at values that a reader can check, and that it finds what is wrong."""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from iokernels.testing.layouts import LAYOUTS, storage_of, written_elsewhere

from .case import Case, Wrong, bounds, evaluate, prove
from .jitter import Jitter
from .limits import judge
from .oracles import fft_conv, flash_attention, flash_rnn, gated_delta_rule, lean_attention, linear_attention
from .registry import OPERATORS, make, shares

INF, NAN = float("inf"), float("nan")


def given(**args: Any) -> dict[str, Any]:
    return {"jitter": Jitter(), **{n: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x
                                   for n, x in args.items()}}  # fmt: skip


def test_a_row_wholly_at_a_large_negative_bias_is_a_mean() -> None:
    bias = torch.full((1, 1, 1, 8), -1e9, dtype=torch.float64)
    q, k, v = torch.ones(1, 1, 1, 2), torch.ones(1, 1, 8, 2), torch.arange(8.0).view(1, 1, 8, 1)
    assert flash_attention.dense(given(q=q, k=k, v=v, bias=bias))["out"].item() == pytest.approx(3.5)


def test_the_one_key_that_a_query_points_at_is_the_answer() -> None:
    q = torch.zeros(1, 1, 1, 4)
    q[..., 1] = 60.0
    k, v = torch.eye(4).view(1, 1, 4, 4), torch.tensor([1.0, 10.0, 100.0, 1000.0]).view(1, 1, 4, 1)
    lengths = torch.tensor([4], dtype=torch.int32)
    found = lean_attention.lean(given(q=q, k_cache=k, v_cache=v, cache_seqlens=lengths, scale=1.0))
    assert found["out"].item() == pytest.approx(10.0)


def test_a_decay_of_minus_infinity_is_a_reset() -> None:
    one = torch.ones(1, 1, 2, 1)
    decay = torch.tensor([[[0.0, float("-inf")]]])
    found = gated_delta_rule.delta(given(q=one, k=one, v=one, beta=torch.full((1, 1, 2), 0.5), log_decay=decay))
    assert found["out"].flatten().tolist() == [0.5, 0.5]


def test_strong_decays_beside_weak_ones_keep_all_digits() -> None:
    one, decay = torch.ones(1, 1, 128, 1), torch.tensor([-110.0, -0.3], dtype=torch.float64).repeat(64).view(1, 1, 128)
    found = linear_attention.linear(given(q=one, k=one, v=one, log_decay=decay, scale=1.0))
    assert found["out"].flatten()[-1].item() == pytest.approx(1.7408182206817179, rel=1e-12)


@pytest.mark.parametrize(("causal", "expected"), [(True, [1.0, 4.0, 7.0]), (False, [7.0, 4.0, 7.0])])
def test_a_convolution_by_hand(causal: bool, expected: list[float]) -> None:
    u, k = torch.tensor([[[1.0, 2.0, 3.0]]]), torch.tensor([[1.0, 2.0]])
    found = fft_conv.convolved(given(u=u, k=k, causal=causal))
    assert found["y"].flatten().tolist() == expected


def test_all_of_the_frequencies_are_the_filter_itself() -> None:
    u, k = torch.randn(2, 3, 7, dtype=torch.float64), torch.randn(3, 7, dtype=torch.float64)
    for causal in (True, False):
        part = fft_conv.convolved(given(u=u, k=k, causal=causal, freq_keep=0.9999))
        torch.testing.assert_close(part["y"], fft_conv.convolved(given(u=u, k=k, causal=causal))["y"])


@pytest.mark.parametrize("cell", ["lstm", "gru", "elman"])
def test_cells_are_those_of_pytorch(cell: str) -> None:
    theirs = {"lstm": torch.nn.LSTM, "gru": torch.nn.GRU, "elman": torch.nn.RNN}[cell](5, 5, batch_first=True).double()
    weight, recurrent, bias, recurrent_bias = (x.detach() for x in theirs.parameters())
    x = torch.randn(2, 4, 5, dtype=torch.float64)
    gates = (x @ weight.T + bias).view(2, 4, -1, 1, 5)
    found = flash_rnn.run(
        given(gates=gates, recurrent=recurrent.view(-1, 1, 5, 5), bias=recurrent_bias.view(-1, 1, 5), cell=cell)
    )
    torch.testing.assert_close(found["h"].flatten(2), theirs(x)[0])


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layout_changes_no_value(name: str) -> None:
    x = torch.randn(2, 3, 4, 5)
    for seed in range(4):
        view = LAYOUTS[name](x, random.Random(seed))
        assert torch.equal(view, x) or (name == "expanded" and 0 in view.stride())
        before = storage_of(view)
        if name in ("padded", "strided", "offset"):
            view.zero_()
            assert not written_elsewhere(view, before)
            torch.empty(0).set_(view.untyped_storage())[0] = 0.0
            assert written_elsewhere(view, before)


def _scaled(results: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: x * (1.0 + 2.0**-6) if x.is_floating_point() else x for name, x in results.items()}


def _zeros(results: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: x * 0.0 if x.is_floating_point() else x for name, x in results.items()}


def _first_row_lost(results: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: torch.cat([x[..., 1:], x[..., :1]], dim=-1) for name, x in results.items()}


@pytest.mark.parametrize("plant", [_scaled, _zeros, _first_row_lost])
@pytest.mark.parametrize("operator", [name for name in OPERATORS if name != "append_kv"])
def test_a_wrong_result_is_found(operator: str, plant: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    case, generator = _clean_case(operator)
    run = case.run
    case.run = lambda args: plant(run(args))
    with pytest.raises(Wrong):
        prove(case, generator, twice=False)


@pytest.mark.parametrize("operator", list(OPERATORS))
def test_a_modified_argument_is_found(operator: str) -> None:
    case, generator = _clean_case(operator)
    run = case.run
    name = next(n for n, x in case.args.items() if isinstance(x, Tensor) and x.is_floating_point() and x.numel()
                and n not in case.writes)  # fmt: skip

    def meddling(args: dict[str, Any]) -> dict[str, Tensor]:
        found = run(args)
        with torch.no_grad():
            args[name].detach().view(-1)[0] += 1.0
        return found

    case.run, case.gradients = meddling, ()
    with pytest.raises(Wrong, match=f"modified {name}"):
        prove(case, generator, twice=False)


def test_a_case_is_a_function_of_its_number() -> None:
    for operator in OPERATORS:
        first, again = (make(operator, 7)[0] for _ in range(2))
        assert first.describe() == again.describe()
        assert first.describe() != make(operator, 8)[0].describe()


def test_every_operator_gets_a_share() -> None:
    found = dict(shares(10_000, None))
    assert found.keys() == OPERATORS.keys()
    assert sum(OPERATORS.values()) == 100
    assert dict(shares(12, "fft_conv")) == {"fft_conv": 12}


ROUNDED = [
    ("flash_attention", 20261577, "q", 2.0**-8),  # of an lse of hundreds, whose own gradient leads
    ("flash_attention", 20261669, "q", 2.0**-8),
    ("flash_attention", 30000531, "q", 2.0**-10),  # all keys the same, so that dO . out cancels, and a softcap
    ("flash_attention", 30000559, "q", 2.0**-10),
    ("fft_conv", 20261306, "initial_state", 2.0**-8),  # one small point of a transform
    ("flash_rnn", 20261915, "initial_state", 2.0**-12),  # in float64, through slopes of 1e-8 to 1e-11
    ("linear_attention", 30000750, "v", 2.0**-8),  # a normaliser that is a small sum of large terms
]
"""Gradients that rounding moves by more than that of their inputs, and an error that is not rounding's."""


@pytest.mark.parametrize(("operator", "number", "name", "error"), ROUNDED)
def test_what_rounding_does_is_allowed_and_no_more(operator: str, number: int, name: str, error: float) -> None:
    case, d = make(operator, number)
    assert prove(case, d.generator, twice=False) <= 1.0
    case, d = make(operator, number)
    run = case.run

    def astray(args: dict[str, Any]) -> dict[str, Tensor]:
        x = args[name]
        return run({**args, name: x + error * (x - x.detach())})

    case.run = astray
    with pytest.raises(Wrong, match=f"gradient of {name}"):
        prove(case, d.generator, twice=False)


def test_a_bias_of_minus_1e9_gives_no_licence() -> None:
    """lse is -1e9 and its last digit 64, but the part that rounding took is kept."""
    q, k, v = (torch.randn(1, 1, 6, 4) for _ in range(3))
    plain = given(q=q, k=k, v=v, bias=torch.full((1, 1, 6, 6), -1e9))
    expected = flash_attention.dense(plain)["out"]
    moved = flash_attention.dense({**plain, "jitter": Jitter(2.0**-24, 2.0**-24, torch.Generator())})["out"]
    assert 0.0 < (moved - expected).abs().max() < 1e-5


def test_infinity_is_right_where_a_term_overflows_and_only_there() -> None:
    expected, passed = torch.tensor([1e39, 1e38, 1.0], dtype=torch.float64), torch.tensor([True, True, False])
    for got, right in (
        ([INF, 1e38, 1.0], True), ([INF, INF, 1.0], True), ([NAN, NAN, 1.0], True),
        ([INF, 1e38, INF], False), ([INF, 1e38, NAN], False), ([INF, 1.1e38, 1.0], False), ([1e38, 1e38, 1.0], False),
    ):  # fmt: skip
        verdict = judge(torch.tensor(got), expected, [expected], torch.float32, passed=passed)
        assert (verdict.ratio <= 1.0) is right, got


@pytest.mark.parametrize(("scale", "finite"), [(1.0, True), (2.0**63, False)])
def test_a_plain_call_may_not_overflow(scale: float, finite: bool) -> None:
    case, d = make("linear_attention", 20262114)
    case.args["scale"] = scale
    assert all(bool(x.isfinite().all()) for x in bounds(case, case.args).values()) is finite
    run = case.run

    def overflown(args: dict[str, Any]) -> dict[str, Tensor]:
        found = run(args)
        return {**found, "out": found["out"].masked_fill(found["out"] == found["out"].max(), INF)}

    case.run, case.gradients = overflown, ()
    with pytest.raises(Wrong) if finite else nullcontext():
        prove(case, d.generator, twice=False)


def _clean_case(operator: str) -> tuple[Case, torch.Generator]:
    """The first case on ``torch`` in float32 that has something to be wrong in, contiguous throughout."""
    for seed in range(300):
        case, d = make(operator, seed, "torch")
        plain = all(x.is_contiguous() and not x.is_neg() for x in case.args.values() if isinstance(x, Tensor))
        if case.dtype != torch.float32 or not plain or d.values != "normal" or (not case.dtypes and not case.writes):
            continue
        expected = evaluate(case, case.args, {}, torch.float64)
        shown = [x for name, x in expected.items() if name in case.dtypes and x.isfinite().all()]
        if operator == "append_kv" or (len(shown) == len(case.dtypes) and all(x[..., :1].abs().sum() > 0.1
                                       and x.shape[-1] > 1 for x in shown)):  # fmt: skip
            return case, d.generator
    raise AssertionError(f"no case of {operator} to plant a fault in")

"""The quick tier drops repetitions and nothing else; orders are many where they are the matter of a test."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from iokernels.runtime.cuda import emulator
from iokernels.testing.budget import _again  # pyright: ignore[reportPrivateUsage]

from .. import tiers


def item(function: str, module: str = "test_options.py", fixtures: tuple[str, ...] = (), **parameters: Any) -> Any:
    return SimpleNamespace(
        nodeid=f"tests/ops/toy/{module}::{function}[{parameters}]", path=Path(module), fixturenames=fixtures,
        callspec=SimpleNamespace(params=parameters), get_closest_marker=lambda name: None,
    )  # fmt: skip


def point(name: str, quick: bool = False) -> Any:
    return SimpleNamespace(name=name, quick=quick)


def test_every_backend_meets_every_point_and_every_other_value_is_met() -> None:
    swept = [
        item("test_every_option", backend=backend, point=point(name), dtype=dtype)
        for backend in ("torch", "triton", "cuda")
        for name in ("plain", "causal")
        for dtype in ("half", "single")
    ]
    widths = [item("test_widths", backend=backend, width=w) for backend in ("torch", "cuda") for w in (16, 40, 59)]
    kept: list[Any] = tiers.thinned(swept + widths)
    told = [x.callspec.params for x in kept if "test_every_option" in x.nodeid]
    assert len(told) == 6
    assert {(x["backend"], x["point"].name) for x in told} == {
        (backend, name) for backend in ("torch", "triton", "cuda") for name in ("plain", "causal")
    }
    told = [x.callspec.params for x in kept if "test_widths" in x.nodeid]
    assert ({x["backend"] for x in told}, {x["width"] for x in told}) == ({"torch", "cuda"}, {16, 40, 59})
    assert len(told) == 4


def test_of_many_values_the_first_are_met() -> None:
    kept: list[Any] = tiers.thinned([item("test_lengths", backend="cuda", length=n) for n in range(100)])
    assert [x.callspec.params["length"] for x in kept] == list(range(tiers.MOST_VALUES))


def test_what_says_nothing_of_results_is_left_out() -> None:
    plain = item("test_plain")
    others = [item("test_compiled", fixtures=("compiled_apart",)), item("test_graph", "test_integration.py")]
    assert tiers.thinned([*others, plain]) == [plain]


def test_orders() -> None:
    assert tiers.orders(item("test_races", "test_cuda.py")) == tiers.FULL_ORDERS
    assert tiers.orders(item("test_every_option", point=point("plain", quick=True))) == tiers.FULL_ORDERS
    assert tiers.orders(item("test_every_option", "test_cuda.py", point=point("rare"))) == tiers.FEW_ORDERS
    assert tiers.orders(item("test_widths")) == tiers.FEW_ORDERS
    assert tiers.orders(item("test_widths"), 100) == 100


@pytest.mark.orders(7)
@pytest.mark.tiles(toy="small")
def test_the_marks_of_a_test_are_in_force(request: pytest.FixtureRequest) -> None:
    from iokernels.autotune.select import _overrides  # pyright: ignore[reportPrivateUsage]

    assert _overrides.value["toy"] == "small"
    asked = request.config.getoption("orders")
    assert emulator._order.value == range(max(7, asked or 0))  # pyright: ignore[reportPrivateUsage]
    assert request.node.nodeid in _again.value


def test_examples_follow_the_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiers, "examples_scale", 10.0)
    assert tiers.examples(15) == 150
    monkeypatch.setattr(tiers, "examples_scale", 0.01)
    assert tiers.examples(15) == 1

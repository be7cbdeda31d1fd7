"""Which tests a tier runs, and in how many orders the emulated GPU runs each launch of a test.

``quick`` runs one point an option: of a test with parameters, so few of its calls that every backend runs, that every
point of ``iokernels check`` meets every backend, and that the first values of every other parameter are met once. Tests
that compile for real GPUs, trace graphs, count bytes or measure time stay out of it: they say nothing of results.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

import pytest

FULL_ORDERS, FEW_ORDERS = 20, 2
"""Every kernel meets the first, in the tests that are about orders and in the points that ``check --quick`` proves. The
emulator sees races, stray accesses and deadlocks in whatever order it runs (``test_faults`` plants them, and each of 20
orders alone finds every one); results that depend on the order without a race take several, of which two are left."""

examples_scale = 1.0
"""What the command line multiplies drawn examples by."""

_REPEATS = ("backend", "dtype", "part", "seed")
"""Parameters whose values are no options of an operator."""

_NO_RESULTS = ("test_compile.py", "test_integration.py", "test_host_cost.py", "test_traffic.py", "test_tuning.py")

MOST_VALUES = 6
"""Of a parameter that is no point."""

_SWEPT = ("test_cuda.py", "test_faults.py", "test_matmul.py", "test_primitives.py")
"""Modules that prove what depends on the order."""


def orders(item: pytest.Item, asked: int = 0) -> int:
    """In how many orders a launch of this test runs: those ``asked`` for, if any, and at least those of its mark."""
    marker = item.get_closest_marker("orders")
    if marker is not None:
        return max(asked, marker.args[0])
    if asked:
        return asked
    point = _parameters(item).get("point")
    swept = item.path.name in _SWEPT if point is None else getattr(point, "quick", False)
    return FULL_ORDERS if swept else FEW_ORDERS


def examples(number: int) -> int:
    """How many examples a test draws that draws ``number`` of them in ``make test``."""
    return max(1, round(number * examples_scale))


def thinned(items: Iterable[pytest.Item]) -> list[pytest.Item]:
    """Those of the tests that the tier ``quick`` runs."""
    kept: list[pytest.Item] = []
    seen: set[tuple[str, ...]] = set()
    values: Counter[tuple[str, ...]] = Counter()
    for item in items:
        if item.path.name in _NO_RESULTS or "compiled_apart" in getattr(item, "fixturenames", ()):
            continue
        new = {told for told in _told(item) if told not in seen and values[told[:2]] < MOST_VALUES}
        if new:
            values.update(told[:2] for told in new if told[1] in _parameters(item))
            seen |= new
            kept.append(item)
    return kept


def _parameters(item: pytest.Item) -> dict[str, Any]:
    return getattr(getattr(item, "callspec", None), "params", {})


def _told(item: pytest.Item) -> Iterable[tuple[str, ...]]:
    """What a test says that another one of its function may have said before."""
    function = item.nodeid.partition("[")[0]
    parameters = _parameters(item)
    backend = str(parameters.get("backend"))
    yield function, backend
    point = getattr(parameters.get("point"), "name", None)
    if point is not None:
        yield function, backend, point
        return
    for name, value in parameters.items():
        if name not in _REPEATS:
            yield function, name, str(value)

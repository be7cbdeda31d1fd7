"""Enumeration against brute force, the account of what was removed, and how long it takes."""

from __future__ import annotations

import importlib.util
import math
from itertools import product
from pathlib import Path
from timeit import repeat
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from iokernels.autotune.space import (
    Constraint,
    Space,
    at_most,
    divisors,
    fits_registers,
    fits_shared_memory,
    literals,
    occupancy,
    powers_of_two,
)
from iokernels.runtime.device import named

H100 = named("h100-sxm")


def flash_rnn() -> Any:
    """The module beside this one."""
    spec = importlib.util.spec_from_file_location("flash_rnn_space", Path(__file__).with_name("flash_rnn_space.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_axes() -> None:
    problem = SimpleNamespace(head_dim=12)
    assert tuple(literals("a", 3, 1).values(problem)) == (3, 1)
    assert tuple(powers_of_two("a", 16, 128).values(problem)) == (16, 32, 64, 128)
    assert tuple(powers_of_two("a", 1, 5).values(problem)) == (1, 2, 4)
    assert tuple(powers_of_two("a", 3, 4).values(problem)) == (4,)
    assert list(flash_rnn().divisors_of("a", "head_dim").values(problem)) == [1, 2, 3, 4, 6, 12]
    assert divisors(36) == [1, 2, 3, 4, 6, 9, 12, 18, 36]


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 4), min_size=1, max_size=4),
    rules=st.lists(st.tuples(st.sets(st.integers(0, 3), min_size=1), st.integers(2, 5), st.integers(0, 4)), max_size=5),
)
def test_enumeration_is_exact_and_the_account_adds_up(sizes: list[int], rules: list[tuple[set[int], int, int]]) -> None:
    axes = tuple(literals(f"x{i}", *range(size)) for i, size in enumerate(sizes))
    constraints = tuple(
        Constraint(f"c{i}", over, lambda p, d, *v, m=modulus, r=rest: (sum(v) * 7 + r) % m != 0)
        for i, (places, modulus, rest) in enumerate(rules)
        if (over := tuple(f"x{place}" for place in sorted(places) if place < len(sizes)))
    )
    space: Space[tuple[int, ...]] = Space("s", 1, axes, constraints)
    brute = [
        point
        for point in product(*(range(size) for size in sizes))
        if all(c.holds(None, H100, *(point[int(name[1:])] for name in c.axes)) for c in constraints)
    ]
    assert space.candidates(None, H100) == brute
    funnel = space.explain(None, H100)
    assert funnel.total == math.prod(sizes)
    assert funnel.left == len(brute) == funnel.total - sum(funnel.removed.values())
    inside = [p for p in product(*(range(size) for size in sizes)) if space.refusal(None, H100, p) is None]
    assert inside == brute


def test_a_constraint_is_asked_as_soon_as_its_axes_are_bound() -> None:
    asked: list[tuple[int, ...]] = []

    def even(problem: Any, device: Any, a: int) -> bool:
        return a % 2 == 0

    def remember(problem: Any, device: Any, *values: int) -> bool:
        asked.append(values)
        return True

    space: Space[tuple[int, ...]] = Space(
        "s",
        1,
        (literals("a", 1, 2), literals("b", 5, 6), literals("c", 7, 8)),
        (Constraint("both", ("b", "a"), remember), Constraint("even", ("a",), even)),
    )
    assert space.candidates(None, H100) == [(2, 5, 7), (2, 5, 8), (2, 6, 7), (2, 6, 8)]
    assert asked == [(5, 2), (6, 2)]
    assert space.explain(None, H100).removed == {"both": 0, "even": 4}
    assert str(space.explain(None, H100)) == "axes 8 -> both 8 -> even 4"


def test_constraints_in_words() -> None:
    problem = SimpleNamespace(width=96)
    assert at_most("m", ("a",), lambda p, d, a: a, 3).holds(problem, H100, 3)
    assert not at_most("m", ("a",), lambda p, d, a: a, "sms").holds(problem, H100, 133)
    memory = fits_shared_memory(("a",), lambda p, d, a: a * 1024)
    assert memory.holds(problem, H100, 227)
    assert not memory.holds(problem, H100, 228)
    registers = fits_registers(("words", "warps"), "warps", lambda p, d, words, warps: words)
    assert registers.holds(problem, H100, 255 * 128, 4)
    assert not registers.holds(problem, H100, 255 * 128 + 1, 4)
    assert not registers.holds(problem, H100, 65537, 16)


def test_occupancy() -> None:
    assert occupancy(H100, warps=8, shared=100 * 1024, registers=64) == 2
    assert occupancy(H100, warps=8, shared=1024, registers=128) == 2
    assert occupancy(H100, warps=8, shared=1024, registers=16) == 8
    assert occupancy(H100, warps=8, shared=300 * 1024, registers=16) == 0


def test_refusals_are_named(tunable: Any, make_problem: Any, make_config: Any) -> None:
    def refusal(tile: int, warps: int) -> str | None:
        return tunable.space.refusal(make_problem(width=32), H100, make_config(tile, warps))

    assert refusal(32, 8) is None
    assert refusal(32, 5) == "warps=5 is not one of 4, 8"
    assert refusal(64, 8) == "it breaks the constraint 'width'"


@pytest.mark.parametrize(
    ("axes", "constraint", "message"),
    [
        (("a",), Constraint("c", ("b",), lambda *_: True), "space s: 'c' is over 'b', which is no axis"),
        (("a",), Constraint("c", (), lambda *_: True), "space s: 'c' is over no axis"),
        (("a", "a"), Constraint("c", ("a",), lambda *_: True), "space s: an axis stands twice in a, a"),
    ],
)
def test_a_wrong_declaration_says_so(axes: tuple[str, ...], constraint: Constraint, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Space("s", 1, tuple(literals(name, 1) for name in axes), (constraint,))


@pytest.mark.parametrize(("width", "heads"), [(64, 12), (768, 1), (1024, 1)])
def test_enumeration_takes_milliseconds(benchmark: Any, width: int, heads: int) -> None:
    module = flash_rnn()
    problem = module.Problem(width, heads)
    points = module.SPACE.candidates(problem, H100)
    assert len(points) > 500
    assert all(module.SPACE.refusal(problem, H100, point) is None for point in points[:: len(points) // 50])
    benchmark.pedantic(module.SPACE.candidates, (problem, H100), rounds=5)
    # The aim on a quiet machine is 50 ms; the shortest of several runs counts, and a busy one may take five times that.
    assert min(repeat(lambda: module.SPACE.candidates(problem, H100), number=1, repeat=7)) < 0.25

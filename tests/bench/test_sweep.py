"""Sweeps written as text."""

from __future__ import annotations

import pytest

from iokernels.bench.timing.sweep import Sweep, parse, shapes
from iokernels.ops.flash_attention.case.shapes import VOCABULARY
from iokernels.testing.case.shape import UsageError


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("n=1k:64k:x2", (1024, 2048, 4096, 8192, 16384, 32768, 65536)),
        ("n=1k:5000:x2", (1024, 2048, 4096)),
        ("n=256:1k:+256", (256, 512, 768, 1024)),
        ("n=0:2:+1", (0, 1, 2)),
        ("n=7:7:x2", (7,)),
        ("n=4k, 1k,1k", (4096, 1024)),
        ("gain=0.5:2:x2", (0.5, 1.0, 2.0)),
    ],
)
def test_values(text: str, values: tuple[float, ...]) -> None:
    assert parse(text, VOCABULARY) == Sweep(text.partition("=")[0], values)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1k:64k:x2", "is not of the form n=1k"),
        ("n=", "is not of the form n=1k"),
        ("z=1,2", "has no dimension 'z'"),
        ("n=1:2", "is not of the form start:stop:x2"),
        ("n=1:2:3", "is not of the form start:stop:x2"),
        ("n=1:8:x1", "x1 goes nowhere"),
        ("n=1:8:+0", r"\+0 goes nowhere"),
        ("n=8:1:x2", "holds no value"),
        ("n=0:8:x2", "holds no value"),
        ("n=1:1m:+1", "more than 1000 values"),
        ("n=1,q", "n=q is not a whole number"),
        ("n=1:2.5:x2", "n=2.5 is not a whole number"),
    ],
)
def test_slips_of_the_pen(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse(text, VOCABULARY)


def test_every_base_at_every_combination() -> None:
    sweeps = (Sweep("n", (16, 32)), Sweep("b", (1, 2)))
    found = shapes(VOCABULARY, ("d=8", "d=8,causal=1"), sweeps)
    assert [(shape.causal, shape.n, shape.b) for shape in found] == [
        (causal, n, b) for causal in (0, 1) for n in (16, 32) for b in (1, 2)
    ]
    assert {shape.nk - shape.n for shape in found} == {0}, "keys follow the queries by default"
    assert [shape.nk for shape in shapes(VOCABULARY, ("nk=64",), sweeps[:1])] == [64, 64]


def test_a_dimension_is_said_once() -> None:
    with pytest.raises(UsageError, match="n is given by --shape and by --sweep"):
        shapes(VOCABULARY, ("n=4",), (Sweep("n", (1,)),))
    with pytest.raises(UsageError, match="each dimension once"):
        shapes(VOCABULARY, ("",), (Sweep("n", (1,)), Sweep("n", (2,))))

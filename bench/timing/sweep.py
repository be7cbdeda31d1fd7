"""Sweeps: one dimension that takes many values, as ``--sweep`` writes them.

``n=1k:64k:x2`` multiplies, ``n=1k:8k:+1k`` adds (both ends belong to it), ``n=1k,2k,5k`` is a list.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

from iokernels.testing.case.shape import Dimension, Shape, UsageError, Vocabulary

_MOST = 1000
"""A sweep of more values than this is a slip of the pen."""


@dataclass(frozen=True)
class Sweep:
    """The values that one dimension takes, in order."""

    name: str
    values: tuple[int | float, ...]


def parse(text: str, vocabulary: Vocabulary) -> Sweep:
    """A sweep from ``name=start:stop:x2``, ``name=start:stop:+step`` or ``name=a,b,c``. Raises :class:`UsageError`."""
    name, equals, values = (part.strip() for part in text.partition("="))
    if not equals or not values:
        raise UsageError(f"--sweep: {text!r} is not of the form n=1k:64k:x2, n=1k:8k:+1k or n=1k,2k,4k")
    dimension = next((dimension for dimension in vocabulary.dimensions if dimension.name == name), None)
    if dimension is None:
        words = ", ".join(dimension.name for dimension in vocabulary.dimensions)
        raise UsageError(f"--sweep: {vocabulary.operator} has no dimension {name!r}; it has {words}")
    if ":" in values:
        return Sweep(name, _range(dimension, values))
    return Sweep(name, tuple(dict.fromkeys(dimension.parse(value.strip()) for value in values.split(","))))


def _range(dimension: Dimension, text: str) -> tuple[int | float, ...]:
    parts = text.split(":")
    if len(parts) != 3 or parts[2][:1] not in ("x", "+"):
        raise UsageError(f"--sweep: {text!r} is not of the form start:stop:x2 or start:stop:+step")
    value, stop = dimension.parse(parts[0]), dimension.parse(parts[1])
    factor = parts[2].startswith("x")
    step = dimension.parse(parts[2][1:])
    if step <= (1 if factor else 0):
        raise UsageError(f"--sweep: {parts[2]} goes nowhere: a factor is more than 1, a step more than 0")
    if value > stop or (factor and value <= 0):
        raise UsageError(f"--sweep: {text} holds no value that leads from its start to its stop")
    found = []
    while value <= stop:
        found.append(value)
        if len(found) > _MOST:
            raise UsageError(f"--sweep: {text} has more than {_MOST} values")
        value = value * step if factor else value + step
    return tuple(found)


def shapes(vocabulary: Vocabulary, bases: Sequence[str], sweeps: Sequence[Sweep]) -> tuple[Shape, ...]:
    """Every base shape at every combination of swept values; dimensions that equal a swept one by default follow it.

    Raises :class:`UsageError` where a base says what a sweep varies, or two sweeps vary the same.
    """
    names = [sweep.name for sweep in sweeps]
    if len(set(names)) < len(names):
        raise UsageError(f"--sweep: each dimension once; got {', '.join(names)}")
    found: dict[Shape, None] = {}
    for base in bases:
        for name in names:
            if any(item.partition("=")[0].strip() == name for item in base.split(",")):
                raise UsageError(f"{name} is given by --shape and by --sweep")
        for values in product(*(sweep.values for sweep in sweeps)):
            swept = ",".join(f"{name}={value}" for name, value in zip(names, values, strict=True))
            found[vocabulary.parse(f"{base},{swept}")] = None
    return tuple(found)

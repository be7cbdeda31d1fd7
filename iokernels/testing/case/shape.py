"""Shapes as the command line writes them: ``b=4,h=16,n=4k,d=128,causal=1``.

Each operator has its own vocabulary of dimensions and switches, with defaults. A shape holds a number for each of
them, so that one line of text says exactly what was checked or timed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

_SUFFIXES = {"k": 2**10, "m": 2**20}


class UsageError(ValueError):
    """The command line asks for something that does not exist. The message is one sentence."""


@dataclass(frozen=True)
class Dimension:
    """One word of a vocabulary.

    ``default`` is a number, whose type is the type of the dimension, or the name of an earlier dimension that it equals
    unless told otherwise. ``always`` puts it into every printed shape, default or not.
    """

    name: str
    default: int | float | str
    help: str
    least: float = 0
    most: float = math.inf
    always: bool = False

    def parse(self, text: str) -> int | float:
        """The number that ``text`` writes: ``4096``, ``4k``, ``0.5``."""
        try:
            if isinstance(self.default, float):
                value: int | float = float(text)
            elif text[-1:].lower() in _SUFFIXES:
                value = int(text[:-1]) * _SUFFIXES[text[-1].lower()]
            else:
                value = int(text)
        except ValueError:
            kind = "a number" if isinstance(self.default, float) else "a whole number, such as 512 or 4k"
            raise UsageError(f"shape: {self.name}={text} is not {kind}") from None
        return value


class Shape(Mapping[str, Any]):
    """A number for every dimension of a vocabulary. Immutable and hashable; ``shape.n`` is ``shape["n"]``."""

    __slots__ = ("_values", "vocabulary")

    def __init__(self, vocabulary: Vocabulary, values: Mapping[str, Any]) -> None:
        self.vocabulary = vocabulary
        self._values = dict(values)

    def __getitem__(self, name: str) -> Any:
        return self._values[name]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name not in self._values:
            raise AttributeError(name)
        return self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __hash__(self) -> int:
        return hash(tuple(self._values.items()))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Shape) and self._values == other._values

    def __str__(self) -> str:
        """What :meth:`Vocabulary.parse` reads back as the same shape."""
        shown = []
        for dimension in self.vocabulary.dimensions:
            value = self._values[dimension.name]
            if dimension.always or value != self.vocabulary.default(dimension, self._values):
                shown.append(f"{dimension.name}={value}")
        return ",".join(shown)

    def __repr__(self) -> str:
        return f"Shape({self})"

    def replace(self, **values: int | float) -> Shape:
        """This shape with some numbers changed. Dimensions that equal another by default do not follow it."""
        return Shape(self.vocabulary, self._values | values)


@dataclass(frozen=True)
class Vocabulary:
    """The dimensions of one operator, in the order in which they are printed."""

    operator: str
    dimensions: tuple[Dimension, ...]

    @staticmethod
    def default(dimension: Dimension, values: Mapping[str, Any]) -> Any:
        """The value of a dimension that nobody gave."""
        return values[dimension.default] if isinstance(dimension.default, str) else dimension.default

    def shape(self, **given: int | float) -> Shape:
        """A shape from some numbers; the others take their defaults. Raises :class:`UsageError`."""
        known = {dimension.name for dimension in self.dimensions}
        for name in given:
            if name not in known:
                words = ", ".join(dimension.name for dimension in self.dimensions)
                raise UsageError(f"shape: {self.operator} has no dimension {name!r}; it has {words}")
        values: dict[str, Any] = {}
        for dimension in self.dimensions:
            value = given[dimension.name] if dimension.name in given else self.default(dimension, values)
            if not (math.isfinite(value) and dimension.least <= value <= dimension.most):
                limits = f"at least {dimension.least}"
                if dimension.most < math.inf:
                    limits = f"from {dimension.least} to {dimension.most}"
                raise UsageError(f"shape: {dimension.name}={value}; it must be {limits}")
            values[dimension.name] = value
        return Shape(self, values)

    def parse(self, text: str) -> Shape:
        """A shape from ``name=number,name=number``. Raises :class:`UsageError`."""
        by_name = {dimension.name: dimension for dimension in self.dimensions}
        given: dict[str, int | float] = {}
        for item in filter(None, (part.strip() for part in text.split(","))):
            name, equals, number = (part.strip() for part in item.partition("="))
            if not equals:
                raise UsageError(f"shape: {item!r} is not of the form name=number")
            if name in given:
                raise UsageError(f"shape: {name} is given twice")
            given[name] = by_name[name].parse(number) if name in by_name else 0
        return self.shape(**given)

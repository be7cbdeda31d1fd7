"""Whole numbers that a caller gives: of Python, NumPy or a tensor; no bool, and no float however whole."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor

from iokernels.runtime.contracts import Contract

LARGEST = 2**31 - 1
"""Positions and lengths are int32."""


def integer(contract: Contract, name: str, value: Any, *, least: int | None = None, most: int | None = None) -> Any:
    """``value`` as an int within its bounds (a traced one stays symbolic).

    Raises:
        TypeError: it is no whole number.
        ValueError: it is out of bounds.
    """
    if type(value) is not int and not isinstance(value, torch.SymInt):
        # A bool, a tensor's or an array's element included, is an index to Python.
        if isinstance(value, bool) or str(getattr(value, "dtype", "")).endswith("bool"):
            raise TypeError(f"{contract.operator}: {name} is {value!r}; it must be an int, not a bool")
        try:
            value = operator.index(value)
        except TypeError as error:
            raise TypeError(f"{contract.operator}: {name} is {value!r}; it must be an int") from error
    if least is not None:
        contract.require(value >= least, f"{name} is {value}; it must be " + _at_least(least))
    if most is not None:
        contract.require(value <= most, f"{name} is {value}; it must be at most {most}")
    return value


def _at_least(least: int) -> str:
    return "positive" if least == 1 else f"at least {least}"


def index_of(contract: Contract, name: str, value: Any, last: int) -> int:
    """A number from 0 to ``last``; none counts from the end.

    Raises:
        TypeError: it is no whole number.
        ValueError: it is out of bounds.
    """
    value = integer(contract, name, value)
    contract.require(0 <= value <= last, f"{name} is {value}; it must be 0 to {last}")
    return value


def integers(contract: Contract, name: str, values: Any) -> list[int]:
    """The numbers of a sequence, an array or a tensor ``[n]``, which may change afterwards.

    Raises:
        TypeError: it is none of these, or holds something else.
    """
    if isinstance(values, Tensor):
        values = values.tolist()  # of a GPU: waits for it
    if isinstance(values, (str, bytes)) or not (hasattr(values, "__len__") and hasattr(values, "__getitem__")):
        raise TypeError(f"{contract.operator}: {name} is {values!r}; it must be a list of ints")
    return [integer(contract, f"{name}[{index}]", value) for index, value in enumerate(values)]


def flag(contract: Contract, name: str, value: Any) -> bool:
    """``value``, which must be a bool."""
    if not isinstance(value, bool):
        raise TypeError(f"{contract.operator}: {name} is {type(value).__name__}; it must be a bool")
    return value

"""Whole numbers that a caller gives: of Python, NumPy or a tensor; no bool, and no float however whole."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from iokernels.runtime.contracts import Contract
from iokernels.runtime.contracts.plain import shown, whole


def integer(contract: Contract, name: str, value: Any, *, least: int | None = None, most: int | None = None) -> Any:
    """``value`` as an int within its bounds (a traced one stays symbolic).

    Raises:
        TypeError: it is no whole number.
        ValueError: it is out of bounds.
    """
    value = whole(contract.operator, name, value, most=most, tensors=True, quoted=True)
    if least is not None:
        wanted = "positive" if least == 1 else f"at least {least}"
        contract.require(value >= least, f"{name} is {shown(value)}; it must be {wanted}")
    return value


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

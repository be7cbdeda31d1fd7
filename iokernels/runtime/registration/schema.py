"""The schema text of a NamedTuple: its fields are arguments of an operator, in their order."""

from __future__ import annotations

from functools import cache
from types import NoneType
from typing import Annotated, Any, get_args, get_origin, get_type_hints

from torch import Tensor

Size = Annotated[int, "SymInt"]
"""A number that may be symbolic in a graph, as a length is."""

_NAMES: dict[Any, str] = {Tensor: "Tensor", bool: "bool", int: "int", float: "float", str: "str"}


def schema_of(options: type) -> str:
    """``"Tensor? bias, SymInt rows, float scale"`` of a NamedTuple of these fields.

    A type in ``Annotated`` is what its mark says: ``Annotated[Tensor | None, "Tensor(a!)?"]`` is written in place.
    """
    return ", ".join(f"{kind} {name}" for name, kind in _kinds(options).items())


def tensor_fields(options: type) -> tuple[str, ...]:
    """The fields that are tensors or None."""
    return tuple(name for name, kind in _kinds(options).items() if kind.startswith("Tensor"))


@cache
def _kinds(options: type) -> dict[str, str]:
    return {name: _kind(hint) for name, hint in get_type_hints(options, include_extras=True).items()}


def _kind(hint: Any) -> str:
    if get_origin(hint) is Annotated:
        return get_args(hint)[1]
    if hint in _NAMES:
        return _NAMES[hint]
    if get_origin(hint) is list:
        return f"{_kind(get_args(hint)[0])}[]"
    first, *others = get_args(hint) or (None,)
    if others == [NoneType]:
        return f"{_kind(first)}?"
    raise TypeError(f"{hint} is no type of an operator's argument")

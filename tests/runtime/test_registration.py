"""Schemas of operators: exported graphs hold them, so they stay what they are."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Annotated, NamedTuple

import pytest
import torch
from torch import Tensor

from iokernels.ops import OPERATORS
from iokernels.runtime.registration.differentiable import differentiable
from iokernels.runtime.registration.schema import Size, schema_of, tensor_fields

SCHEMAS = Path(__file__).with_name("schemas.txt")


def registered() -> list[str]:
    """The schema of every operator of the library."""
    for operator in OPERATORS:
        import_module(f"iokernels.ops.{operator}.op")
    schemas = torch._C._jit_get_all_schemas()
    return sorted(str(schema) for schema in schemas if schema.name.startswith("iokernels::"))


def test_no_schema_has_changed() -> None:
    assert registered() == SCHEMAS.read_text().splitlines()


class Fields(NamedTuple):
    """One field of every kind."""

    x: Tensor
    y: Tensor | None = None
    held: Annotated[Tensor | None, "Tensor(a!)?"] = None
    parts: list[Tensor] = []  # noqa: RUF012
    flags: list[bool] = []  # noqa: RUF012
    flag: bool = True
    count: int = 0
    rows: Size = 0
    limit: int | None = None
    scale: float = 1.0
    mode: str = "causal"


def test_schema_of_a_named_tuple() -> None:
    assert schema_of(Fields) == (
        "Tensor x, Tensor? y, Tensor(a!)? held, Tensor[] parts, bool[] flags, bool flag, int count, SymInt rows, "
        "int? limit, float scale, str mode"
    )
    assert tensor_fields(Fields) == ("x", "y", "held", "parts")


class Unknown(NamedTuple):
    """A field that no operator can take."""

    numbers: dict[str, int]


def test_a_type_that_no_operator_takes() -> None:
    with pytest.raises(TypeError, match=r"dict\[str, int\] is no type"):
        schema_of(Unknown)


class Misplaced(NamedTuple):
    """A number before a tensor."""

    scale: float
    bias: Tensor


class Needs(NamedTuple):
    """Of an input."""

    x: bool


def test_numbers_before_tensors_are_refused() -> None:
    def nothing(*arguments: object) -> None:
        raise AssertionError

    with pytest.raises(TypeError, match="misplaced: tensors stand before numbers"):
        differentiable(
            "misplaced", "Tensor x", "Tensor", gradients="Tensor dy", saved="Tensor x", like="x", options=Misplaced,
            needs=Needs, forward=nothing, fake=nothing, backward=nothing,
        )  # fmt: skip

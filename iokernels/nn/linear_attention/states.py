"""What the states of the linear mixers have in common: they can be loaded from a file, and a wrong one is named."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor

from iokernels.ops.shared.layout import state_dtype
from iokernels.runtime.contracts import Contract, short
from iokernels.runtime.contracts.memory import overlaps_itself

_State = TypeVar("_State", bound=type)


def loadable(kind: _State) -> _State:
    """A class of named tuples that ``torch.load`` reads with its defaults, ``weights_only=True``."""
    torch.serialization.add_safe_globals([kind])
    return kind


def check_state(contract: Contract, kind: type, state: Any, x: Tensor, *, written: bool, **sizes: Any) -> None:
    """Check that ``state`` is of ``kind`` and holds what x ``[B, N, E]`` needs.

    ``contract`` has the fields as ``state.NAME``; ``sizes`` are those of its dimensions beside B and N. ``written``
    says that the state will be updated in place.

    Raises:
        TypeError: it is something else, or a field is of a wrong type or dtype.
        ValueError: a field is of a wrong shape, elsewhere, or one that cannot be written.
    """
    if not isinstance(state, kind):
        raise TypeError(f"{contract.operator}: state is {type(state).__name__}; it must be {kind.__name__}")
    fields = {f"state.{name}": getattr(state, name) for name in kind._fields}  # pyright: ignore[reportAttributeAccessIssue]
    contract.check(sizes, x=x, **fields)
    expected = state_dtype(x.dtype)
    memory = state.memory
    if memory is not None and memory.dtype != expected:
        raise TypeError(
            f"{contract.operator}: state.memory is {short(memory.dtype)}; it must be {short(expected)} where x is "
            f"{short(x.dtype)}"
        )
    if written:
        for name, field in fields.items():
            contract.require(
                field is None or not overlaps_itself(field),
                f"{name} has elements that share memory, as expand makes them; it is updated in place",
            )

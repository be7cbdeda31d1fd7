"""Checks of arguments that are no tensors: whole numbers, numbers, flags and devices, where a wrong one is named."""

from __future__ import annotations

import operator as operators
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

LARGEST = 2**31 - 1
"""Positions, lengths and counts are int32."""

_REAL = (int, float, Real, torch.SymInt, torch.SymFloat)


def shown(value: Any) -> str:
    """``repr(value)``, but short: Python refuses to write an integer of many digits."""
    if isinstance(value, int) and value.bit_length() > 200:
        return f"an integer of {value.bit_length()} bits"
    if isinstance(value, tuple) and any(isinstance(x, int) and x.bit_length() > 200 for x in value):
        return f"({', '.join(map(shown, value))})"
    try:
        return repr(value)
    except ValueError:
        return f"a {type(value).__name__} that cannot be written"


@contextmanager
def untraced() -> Iterator[None]:
    """Inside, ``torch.jit.trace`` records nothing, and sizes are ints: while it traces they are tensors."""
    state = torch._C._get_tracing_state()
    torch._C._set_tracing_state(None)  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield
    finally:
        torch._C._set_tracing_state(state)  # pyright: ignore[reportAttributeAccessIssue]


def untraced_value(value: Any) -> Any:
    """The number behind what ``torch.jit.trace`` made of one: it turns sizes, and what is computed of them, into
    tensors."""
    if isinstance(value, Tensor) and torch._C._get_tracing_state() is not None and value.dim() == 0:
        with untraced():
            return value.item()
    return value


def integral(value: Any, *, tensors: bool = False) -> Any:
    """``value`` as an int, or None where it is no whole number. NumPy's are whole numbers, those of a tensor too with
    ``tensors``, and a traced one stays symbolic; a bool is none, though Python counts it among them."""
    if type(value) is int or isinstance(value, torch.SymInt):
        return value
    if (
        _is_bool(value)
        or isinstance(value, torch.SymBool)
        or (isinstance(value, Tensor) and (not tensors or value.dtype == torch.bool))
    ):
        return None
    try:
        return operators.index(value)
    except TypeError:
        return None


def whole(where: str, name: str, value: Any, *, least: int | None = None, most: int | None = None,
          tensors: bool = False, quoted: bool = False, hint: str = "") -> Any:  # fmt: skip
    """``value`` as an int within the bounds, for the argument ``name`` of ``where``; see :func:`integral`.

    ``quoted`` writes what is no int into the message, in place of its type; ``hint`` ends the message.

    Raises:
        TypeError: it is no whole number.
        ValueError: it is out of bounds.
    """
    value = untraced_value(value)
    found = integral(value, tensors=tensors)
    if found is None:
        got = shown(value) if quoted else type(value).__name__
        no_bool = ", not a bool" if quoted and (_is_bool(value) or getattr(value, "dtype", None) == torch.bool) else ""
        raise TypeError(f"{where}: {name} is {got}; it must be an int{no_bool}{hint}")
    # Messages are made only where they are raised: torch.compile cannot write a symbol.
    if least is not None and found < least:
        raise ValueError(f"{where}: {name} is {shown(found)}; it must be at least {least}")
    if most is not None and found > most:
        raise ValueError(f"{where}: {name} is {shown(found)}; it must be at most {most}")
    return found


def count(where: str, name: str, value: Any, least: int = 1, *, tensors: bool = False) -> Any:
    """:func:`whole`, of something of which there are at most 2^31 - 1."""
    return whole(where, name, value, least=least, most=LARGEST, tensors=tensors)


def flag(where: str, name: str, value: Any, *, optional: bool = False) -> Any:
    """``value`` as a bool, which it is, or NumPy's; None where it is ``optional`` and None.

    Raises:
        TypeError: it is none.
    """
    if isinstance(value, bool) or (optional and value is None):
        return value
    if _is_bool(value):
        return bool(value)
    raise TypeError(f"{where}: {name} is {type(value).__name__}; it must be a bool" + (" or None" if optional else ""))


def number(where: str, name: str, value: Any, *, above: float | None = None, least: float | None = None,
           below: float | None = None, most: float | None = None, tensors: bool = False) -> Any:  # fmt: skip
    """``value`` as a finite float (a traced one stays symbolic) within the bounds; with ``tensors``, of a tensor and
    whatever else converts itself too.

    Raises:
        TypeError: it is no number.
        ValueError: it is out of bounds.
    """
    value = untraced_value(value)
    real = isinstance(value, _REAL) or (tensors and hasattr(value, "__float__"))
    if not real or isinstance(value, torch.SymBool) or _is_bool(value):
        hint = ": pass 0.0 to turn it off" if value is None and least == 0.0 else ""
        raise TypeError(f"{where}: {name} is {type(value).__name__}; it must be a number{hint}")
    if isinstance(value, Integral):
        value = int(value)
    elif not isinstance(value, (torch.SymInt, torch.SymFloat)):
        try:
            value = float(value)  # NumPy compares in its own precision
        except OverflowError:
            value = float("inf")
        except (TypeError, ValueError):  # an array, or a tensor of many
            raise TypeError(f"{where}: {name} is {type(value).__name__}; it must be a number") from None
    # Comparisons, not math.isfinite, which torch.compile cannot trace on a number that it made dynamic.
    inside = (
        -sys.float_info.max <= value <= sys.float_info.max
        and (above is None or value > above)
        and (least is None or value >= least)
        and (below is None or value < below)
        and (most is None or value <= most)
    )
    if not inside:
        bounds = (("above", above), ("at least", least), ("below", below), ("at most", most))
        asked = "".join(f", {text} {bound}" for text, bound in bounds if bound is not None)
        raise ValueError(f"{where}: {name} is {shown(value)}; it must be finite{asked}")
    return value if isinstance(value, (torch.SymInt, torch.SymFloat)) else float(value)


def place(where: str, device: Any) -> torch.device | None:
    """``device`` as PyTorch knows it; None is its default.

    Raises:
        TypeError: it is neither a name, an index nor a ``torch.device``.
        ValueError: no device has that name.
    """
    if device is None or isinstance(device, torch.device):
        return device
    if isinstance(device, bool) or not isinstance(device, (str, int)):
        raise TypeError(f"{where}: device is {device!r}; it must be None, a name or a torch.device")
    try:
        return torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"{where}: device is {device!r}; it must be one that PyTorch knows") from error


def _is_bool(value: Any) -> bool:
    """Python's or NumPy's, of which an array without dimensions is one; no tensor."""
    if isinstance(value, (int, float, torch.SymInt, torch.SymFloat)):  # torch.compile asks no symbol for attributes
        return isinstance(value, bool)
    return getattr(value, "dtype", None) == "bool" and getattr(value, "ndim", 1) == 0

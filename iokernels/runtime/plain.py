"""Checks of arguments that are no tensors: counts, flags and devices, where a wrong one is named."""

from __future__ import annotations

import operator as operators
from typing import Any

import torch

_MOST = 2**31 - 1


def count(operator: str, name: str, value: Any, least: int = 1) -> int:
    """``value`` as an int of at least ``least``: an int or a NumPy integer, no bool; a traced one stays symbolic.

    Raises:
        TypeError: it is none.
        ValueError: it is smaller, or needs more than 31 bits.
    """
    if isinstance(value, torch.SymInt):
        return value  # pyright: ignore[reportReturnType]
    whole = None
    if not isinstance(value, (bool, torch.Tensor)):
        try:
            whole = operators.index(value)
        except TypeError:
            whole = None
    if whole is None:
        raise TypeError(f"{operator}: {name} is {value!r}, a {type(value).__name__}; it must be an int")
    if not least <= whole <= _MOST:
        shown = whole if abs(whole) <= 2**64 else f"{'-' if whole < 0 else ''}2^{whole.bit_length() - 1} or more"
        raise ValueError(f"{operator}: {name} is {shown}; it must be at least {least}, and below 2^31")
    return whole


def flag(operator: str, name: str, value: Any) -> bool:
    """``value``, a bool.

    Raises:
        TypeError: it is none.
    """
    if not isinstance(value, bool):
        raise TypeError(f"{operator}: {name} is {type(value).__name__}; it must be a bool")
    return value


def place(operator: str, device: Any) -> torch.device | None:
    """``device`` as PyTorch knows it; None is its default.

    Raises:
        TypeError: it is neither a name, an index nor a ``torch.device``.
        ValueError: no device has that name.
    """
    if device is None or isinstance(device, torch.device):
        return device
    if isinstance(device, bool) or not isinstance(device, (str, int)):
        raise TypeError(f"{operator}: device is {device!r}; it must be None, a name or a torch.device")
    try:
        return torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"{operator}: device is {device!r}; it must be one that PyTorch knows") from error

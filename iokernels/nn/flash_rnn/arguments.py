"""What the recurrent modules check of the arguments of their constructors and of the tensors they are called with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from iokernels.runtime.contracts import FLOATS, short
from iokernels.runtime.contracts.memory import overlaps_itself
from iokernels.runtime.registration.autocast import autocast_dtype


def placed(module: str, device: Any, dtype: Any) -> dict[str, Any]:
    """``device`` and ``dtype`` of parameters, if parameters can have them."""
    if dtype is not None and (not isinstance(dtype, torch.dtype) or dtype not in FLOATS):
        allowed = ", ".join(short(one) for one in FLOATS)
        raise TypeError(f"{module}: dtype is {dtype!r}; it must be None or one of {allowed}")
    if device is not None:
        try:
            torch.device(device)
        except (RuntimeError, TypeError) as error:
            raise ValueError(f"{module}: device is {device!r}, which is none: {error}") from None
    return {"device": device, "dtype": dtype}


def strided(module: str, name: str, x: Any) -> Tensor:
    """``x``, if it is an ordinary tensor."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{module}: {name} is {type(x).__name__}; it must be a torch.Tensor")
    if x.layout is not torch.strided or x.is_nested:
        kind = "a nested tensor" if x.is_nested else f"of the layout {str(x.layout).removeprefix('torch.')}"
        raise TypeError(f"{module}: {name} is {kind}; it must be an ordinary, strided tensor")
    return x


def writable(module: str, name: str, x: Tensor) -> None:
    """Raise where elements of ``x`` share memory, so that what is written to one is written to others."""
    if overlaps_itself(x):
        raise ValueError(
            f"{module}: {name} is expanded or overlaps itself, so its elements share memory, and is written: clone it"
        )


def multiplied(module: str, name: str, x: Any, parameter: Tensor) -> None:
    """Raise unless ``x`` can meet ``parameter`` in a product: as :func:`alike`, and of its dtype but under autocast."""
    alike(module, name, x, parameter)
    # Autocast leaves float64 as it is.
    cast = autocast_dtype(x.device.type) is not None and torch.float64 not in (x.dtype, parameter.dtype)
    if x.dtype != parameter.dtype and not cast:
        kind = short(parameter.dtype)
        raise TypeError(f"{module}: {name} is {short(x.dtype)}; the parameters are {kind}, and so must it be")


def alike(module: str, name: str, x: Any, parameter: Tensor) -> None:
    """Raise unless ``x`` is an ordinary tensor of floats on the device of ``parameter``."""
    strided(module, name, x)
    if x.device != parameter.device:
        raise ValueError(f"{module}: {name} is on {x.device}; it must be on {parameter.device}, as the parameters are")
    if not x.is_floating_point():
        raise TypeError(f"{module}: {name} is {short(x.dtype)}; it must be floating point")

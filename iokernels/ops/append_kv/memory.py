"""Whether what ``append_kv`` writes lies apart: two rows in one place would lose one of them, without a word."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from iokernels.runtime.contracts.memory import expanded, overlap, overlaps_itself
from iokernels.runtime.plans import is_concrete


def places(k_cache: Tensor, v_cache: Tensor, k_scale: Any, v_scale: Any) -> tuple[Any, ...] | None:
    """What beside shapes and dtypes decides whether tensors lie apart; None where the host does not know."""
    if torch.compiler.is_compiling():
        return None
    try:
        base = k_cache.data_ptr()
        found: tuple[Any, ...] = (k_cache.stride(), v_cache.stride(), v_cache.data_ptr() - base)
        for scale in (k_scale, v_scale):
            if scale is not None:
                found = (*found, scale.stride(), scale.data_ptr() - base, scale.is_neg())
        return found
    except (AttributeError, RuntimeError):
        return None  # not a tensor, of which the contract speaks, or a fake one


def check_apart(**written: Tensor | None) -> None:
    """Refuse to write where two elements have one place, and scales, which are positive, as their negatives.

    Raises:
        ValueError: a tensor that is expanded or overlaps with itself or with another of them.
    """
    before: dict[str, Tensor] = {}
    for name, x in written.items():
        if x is None or not is_concrete(x):
            continue
        if name.endswith("scale") and x.is_neg():
            raise ValueError(f"append_kv: {name} is a negated view; it is written, so it must not be one")
        if overlaps_itself(x):
            raise ValueError(
                f"append_kv: {name} has several elements in one place, as an expanded tensor has (shape "
                f"{list(x.shape)}, strides {x.stride()}); it is written, so it must have memory for each: clone it"
            )
        for other, y in before.items():
            if overlap(x, y):
                raise ValueError(
                    f"append_kv: {other} and {name} share memory; both are written, so they must lie apart"
                )
        before[name] = x


def check_traced(**written: Tensor | None) -> None:
    """What of :func:`check_apart` tensors without addresses show, a compiler's: expanded ones, and one for two."""
    named = [(name, x) for name, x in written.items() if x is not None]
    for index, (name, x) in enumerate(named):
        if expanded(x):
            raise ValueError(
                f"append_kv: {name} has several elements in one place, as an expanded tensor has: clone it"
            )
        for other, y in named[:index]:
            if x is y:
                raise ValueError(f"append_kv: {other} and {name} share memory: both are written")

"""Whether what ``append_kv`` writes lies apart: two rows in one place would lose one of them, without a word.

A tensor puts element i at ``base + sum_d stride_d i_d``, ``0 <= i_d < size_d``. Two of one tensor meet where
``sum_d stride_d x_d = 0`` has a solution with ``|x_d| < size_d`` that is not 0 everywhere, and those of two tensors
where their addresses differ by less than an element; dimensions with one stride are one unknown. Strides are tried from
the largest on, and for each only what smaller ones can make up for, which leaves one or two values wherever dimensions
are nested. So the answer is exact, whatever views the tensors are, and costs tens of microseconds. It depends on
metadata alone (and on how far tensors are apart), so it is remembered.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from iokernels.runtime.plans import is_concrete

_Term = tuple[int, int, int]
"""A stride in bytes, and the least and the largest value of its unknown."""

_MOST_STEPS = 100_000
"""Tensors whose strides take more to tell apart count as one place."""


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
        if any(step == 0 and size > 1 for size, step in zip(x.shape, x.stride(), strict=True)):
            raise ValueError(
                f"append_kv: {name} has several elements in one place, as an expanded tensor has: clone it"
            )
        for other, y in named[:index]:
            if x is y:
                raise ValueError(f"append_kv: {other} and {name} share memory: both are written")


def overlaps_itself(x: Tensor) -> bool:
    """Whether two elements of x have the same address."""
    if x.numel() == 0:
        return False
    terms = _merged([(step, 1 - size, size - 1) for size, step in zip(x.shape, x.stride(), strict=True) if size > 1])
    if len(terms) < sum(size > 1 for size in x.shape) or any(step == 0 for step, _, _ in terms):
        return True  # two dimensions with one stride, or one without
    # Of a solution and its negative one has a positive first unknown.
    steps = [_MOST_STEPS]
    return any(
        _reach([(step, 1, most), *terms[index + 1 :]], 0, 0, steps) for index, (step, _, most) in enumerate(terms)
    )


def overlap(x: Tensor, y: Tensor) -> bool:
    """Whether an element of x and one of y have a byte in common."""
    if x.numel() == 0 or y.numel() == 0:
        return False
    apart = y.data_ptr() - x.data_ptr()
    wide_x, wide_y = x.element_size(), y.element_size()
    terms = [(step * wide_x, 0, size - 1) for size, step in zip(x.shape, x.stride(), strict=True) if size > 1]
    terms += [(step * wide_y, 1 - size, 0) for size, step in zip(y.shape, y.stride(), strict=True) if size > 1]
    return _reach(_merged([term for term in terms if term[0]]), apart - wide_x + 1, apart + wide_y - 1, [_MOST_STEPS])


def _merged(terms: list[_Term]) -> list[_Term]:
    """Terms with one stride as one, from the largest stride to the smallest."""
    ranges: dict[int, tuple[int, int]] = {}
    for step, least, most in terms:
        low, high = ranges.get(step, (0, 0))
        ranges[step] = low + least, high + most
    return [(step, *ranges[step]) for step in sorted(ranges, reverse=True)]


def _reach(terms: list[_Term], low: int, high: int, steps: list[int]) -> bool:
    """Whether a sum of ``terms`` lies between ``low`` and ``high``, both included."""
    steps[0] -= 1
    if steps[0] < 0:
        return True
    if not terms:
        return low <= 0 <= high
    (step, least, most), rest = terms[0], terms[1:]
    rest_low = sum(s * a for s, a, _ in rest)
    rest_high = sum(s * b for s, _, b in rest)
    first, last = max(least, -((rest_high - low) // step)), min(most, (high - rest_low) // step)
    return any(_reach(rest, low - step * x, high - step * x, steps) for x in range(first, last + 1))

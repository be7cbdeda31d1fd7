"""Whether elements of tensors that are written share memory: what is written to one of them would be lost.

A tensor puts element i at ``base + sum_d stride_d i_d``, ``0 <= i_d < size_d``. Two of one tensor meet where
``sum_d stride_d x_d = 0`` has a solution with ``|x_d| < size_d`` that is not 0 everywhere, and those of two tensors
where their addresses differ by less than an element; dimensions with one stride are one unknown. Strides are tried from
the largest on, and for each only what smaller ones can make up for, which leaves one or two values wherever dimensions
are nested. So the answer is exact, whatever views the tensors are, and costs tens of microseconds. Of one tensor it
depends on sizes and strides alone, and is remembered.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

_Term = tuple[int, int, int]
"""A stride in bytes, and the least and the largest value of its unknown."""

_MOST_STEPS = 100_000
"""Tensors whose strides take more to tell apart count as one place."""


def expanded(x: Tensor) -> bool:
    """Whether a dimension has several elements in one place, as ``expand`` makes it."""
    return any(step == 0 and size > 1 for size, step in zip(x.shape, x.stride(), strict=True))


def overlaps_itself(x: Tensor) -> bool:
    """Whether two elements of x have the same address. Of sizes that are symbols, whether they may."""
    if x.is_contiguous():
        return False
    if torch.compiler.is_compiling():
        return not _nested(x)
    try:
        return _itself(x.shape, x.stride())
    except TypeError:  # symbols have no hash
        return not _nested(x)


def _nested(x: Tensor) -> bool:
    """Whether each dimension steps over all that those of smaller strides reach."""
    reach = 0
    for step, size in sorted((step, size) for size, step in zip(x.shape, x.stride(), strict=True) if size != 1):
        if step <= reach:
            return False
        reach += step * (size - 1)
    return True


@lru_cache(maxsize=4096)
def _itself(shape: Any, strides: Any) -> bool:
    if 0 in shape:
        return False
    terms = _merged([(step, 1 - size, size - 1) for size, step in zip(shape, strides, strict=True) if size > 1])
    if len(terms) < sum(size > 1 for size in shape) or any(step == 0 for step, _, _ in terms):
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

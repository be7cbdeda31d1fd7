"""What the tuning layer knows of one kernel."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields, is_dataclass, replace
from functools import cached_property
from typing import Any, Generic, TypeVar

from iokernels.runtime.device import DeviceSpec

from .space import Space

C = TypeVar("C")

RESULTS = {"changes": "results"}
"""Metadata of a configuration's field that decides the order of sums, and so the last bits of a result."""


@dataclass(frozen=True, eq=False)
class Tunable(Generic[C]):
    """One kernel of one backend.

    ``kernel`` names it in overrides, tables and reports. ``default(problem)`` is the analytic choice, total over the
    problems that the kernel accepts. ``key(problem)`` is what tables are looked up by: words and switches, which have
    to be equal, and the sizes named in ``near``, of which the nearest entry serves.
    """

    kernel: str
    backend: str
    space: Space[C]
    default: Callable[[Any], C]
    key: Callable[[Any], dict[str, Any]]
    near: tuple[str, ...] = ()
    chosen: dict[Any, C] = field(default_factory=dict, repr=False)
    """What :func:`iokernels.autotune.select` has found before."""

    @cached_property
    def pinned(self) -> tuple[str, ...]:
        """The fields of a configuration that change results."""
        made: Any = self.space.make
        known = fields(made) if is_dataclass(made) else ()
        return tuple(one.name for one in known if one.metadata.get("changes") == "results")

    def deterministic(self, problem: Any, device: DeviceSpec, config: C) -> C:
        """``config`` with all that changes results as the default has it; the default where that does not fit."""
        default = self.default(problem)
        mixed = replace(config, **{name: getattr(default, name) for name in self.pinned})  # pyright: ignore
        return default if self.space.refusal(problem, device, mixed) else mixed


def bucket(count: int) -> int:
    """The least power of two that is no smaller than ``count``. Problems round sizes up with it, to be few."""
    return 1 << (count - 1).bit_length() if count > 1 else 1


def precision_word(itemsize: int, tensor_cores: bool) -> str:
    """What tables call the dtype of a problem: float16 and bfloat16 are alike to the hardware."""
    return "half" if itemsize == 2 else ("tf32" if tensor_cores else "fp32")


def precision_of(word: str) -> tuple[int, bool]:
    """The reverse of :func:`precision_word`: bytes an element, and whether matrix units multiply it."""
    return 2 if word == "half" else 4, word != "fp32"

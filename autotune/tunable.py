"""What the tuning layer knows of one kernel."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields, is_dataclass, replace
from functools import cached_property
from typing import Annotated, Any, Generic, TypeVar, get_type_hints

from iokernels.runtime.device import DeviceSpec

from .space import Space

C = TypeVar("C")

RESULTS = {"changes": "results"}
"""Metadata of a configuration's field that decides the order of sums, and so the last bits of a result."""


def bucket(count: int) -> int:
    """The least power of two that is no smaller than ``count``. Problems round sizes up with it, to be few."""
    return 1 << (count - 1).bit_length() if count > 1 else 1


T = TypeVar("T")
_NEAREST, _UNKEYED, _VERBATIM = object(), object(), object()

Size = Annotated[int, _NEAREST]
"""A field of a problem by which tables find the nearest entry. Every other field of a key has to be equal."""
RoundedSize = Annotated[int, _NEAREST, bucket]
"""The same, of a problem that states it exactly: the key rounds it up. A key applies any function that stands in a
field's annotation."""
Unkeyed = Annotated[T, _UNKEYED]
"""A field of a problem that its key leaves out."""
Verbatim = Annotated[T, _VERBATIM]
"""``itemsize`` of a problem whose key states it and ``tensor_cores`` by these names, instead of one word."""


@dataclass(frozen=True, eq=False)
class Tunable(Generic[C]):
    """One kernel of one backend.

    ``kernel`` names it in overrides, tables and reports. ``default(problem)`` is the analytic choice, total over the
    problems that the kernel accepts. ``problem`` is the type of these, a named tuple whose fields make the key of
    tables. ``completed(kernel, fields)``, where it is given, has the fields that such a key leaves out and its others
    decide: only :meth:`problem_of` asks for it.
    """

    kernel: str
    backend: str
    space: Space[C]
    default: Callable[[Any], C]
    problem: type[Any]
    completed: Callable[[str, dict[str, Any]], dict[str, Any]] = lambda kernel, fields: {}
    chosen: dict[Any, C] = field(default_factory=dict, repr=False)
    """What :func:`iokernels.autotune.select` has found before."""

    @cached_property
    def _fields(self) -> dict[str, tuple[Any, ...]]:
        """The fields of a key, and what is said of each. Those of the kernel and of the device are none of them."""
        hints = get_type_hints(self.problem, include_extras=True)
        said = {name: getattr(hint, "__metadata__", ()) for name, hint in hints.items()}
        return {
            name: what
            for name, what in said.items()
            if _UNKEYED not in what and name != "kernel" and name not in DeviceSpec.__dataclass_fields__
        }

    @cached_property
    def near(self) -> tuple[str, ...]:
        """The sizes of a key of which the nearest entry serves."""
        return tuple(name for name, what in self._fields.items() if _NEAREST in what)

    def key(self, problem: Any) -> dict[str, Any]:
        """What tables are looked up by: words and switches, which have to be equal, and the sizes of :attr:`near`.

        The bytes of an element and whether matrix units multiply it are one word, ``dtype``: float16 and bfloat16 are
        alike to the hardware.
        """
        found = {}
        for name, what in self._fields.items():
            found[name] = getattr(problem, name)
            for change in filter(callable, what):
                found[name] = change(found[name])
        if {"itemsize", "tensor_cores"} <= found.keys() and _VERBATIM not in self._fields["itemsize"]:
            found["dtype"] = precision_word(found.pop("itemsize"), found.pop("tensor_cores"))
        return found

    def problem_of(self, key: dict[str, Any], device: DeviceSpec) -> Any:
        """The reverse of :meth:`key`: a problem that has this key. Raises ``TypeError`` for a key of another make."""
        fields = dict(key)
        if "dtype" in fields:
            fields["itemsize"], fields["tensor_cores"] = precision_of(fields.pop("dtype"))
        known = {"kernel": self.kernel} | {name: getattr(device, name) for name in DeviceSpec.__dataclass_fields__}
        known |= self.completed(self.kernel, fields)
        return self.problem(**fields, **{name: known[name] for name in self.problem._fields if name in known})

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


def precision_word(itemsize: int, tensor_cores: bool) -> str:
    """What tables call the dtype of a problem: float16 and bfloat16 are alike to the hardware."""
    return "half" if itemsize == 2 else ("tf32" if tensor_cores else "fp32")


def precision_of(word: str) -> tuple[int, bool]:
    """The reverse of :func:`precision_word`: bytes an element, and whether matrix units multiply it."""
    return 2 if word == "half" else 4, word != "fp32"

"""What a kernel could be launched with: integer axes, and named constraints over them, a problem and a device.

A constraint is applied as soon as the axes that it names are bound, so that a bad choice of one axis is dropped with
all that would have followed from it. The enumeration is exact, and so is the account of what each constraint removed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from operator import itemgetter
from typing import Any, Generic, TypeVar

from iokernels.runtime.device import DeviceSpec

C = TypeVar("C")

Predicate = Callable[..., bool]
"""Called as ``holds(problem, device, *values)`` with the values of a constraint's axes, in its order."""


@dataclass(frozen=True)
class Axis:
    """One integer to choose. ``values(problem)`` are the choices, in the order in which they are tried."""

    name: str
    values: Callable[[Any], Sequence[int]]


def literals(name: str, *values: int) -> Axis:
    """An axis of the given values."""
    return Axis(name, lambda problem: values)


def powers_of_two(name: str, low: int, high: int) -> Axis:
    """An axis of the powers of two from ``low`` to ``high``, both among them."""
    return literals(name, *(1 << e for e in range(max(low - 1, 0).bit_length(), high.bit_length())))


def divisors(number: int) -> list[int]:
    """The divisors of a positive number, ascending."""
    low = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    return low + [number // d for d in reversed(low) if d * d != number]


@dataclass(frozen=True)
class Constraint:
    """A condition with a name, over some axes."""

    name: str
    axes: tuple[str, ...]
    holds: Predicate


def at_most(name: str, axes: Sequence[str], amount: Callable[..., float], limit: float | str) -> Constraint:
    """``amount(problem, device, *values)`` is no more than a number, or than the device's attribute ``limit``."""

    def holds(problem: Any, device: DeviceSpec, *values: int) -> bool:
        most = getattr(device, limit) if isinstance(limit, str) else limit
        return amount(problem, device, *values) <= most

    return Constraint(name, tuple(axes), holds)


def fits_shared_memory(axes: Sequence[str], nbytes: Callable[..., int]) -> Constraint:
    """A block of ``nbytes(problem, device, *values)`` fits into the shared memory that one may have."""
    return at_most("shared memory", axes, nbytes, "smem_block")


def fits_registers(axes: Sequence[str], threads: str, words: Callable[..., float]) -> Constraint:
    """What a block keeps in registers fits.

    ``words(problem, device, *values)`` counts 32-bit registers of the whole block and ``threads`` names the one of
    ``axes`` that holds its warps. A thread addresses 255 registers, and the block may not need more than an SM has.
    """
    position = tuple(axes).index(threads)

    def holds(problem: Any, device: DeviceSpec, *values: int) -> bool:
        count = 32 * values[position]
        return words(problem, device, *values) <= min(255 * count, device.regs_sm)

    return Constraint("registers", tuple(axes), holds)


def occupancy(device: DeviceSpec, *, warps: int, shared: int, registers: int) -> int:
    """How many blocks an SM runs at once: of ``warps``, ``shared`` bytes, and ``registers`` a thread."""
    threads = 32 * warps
    by_memory = device.smem_sm // (shared + 1024)  # the driver takes 1 KiB for every block
    return min(by_memory, device.regs_sm // max(registers * threads, 1), device.threads_sm // threads)


@dataclass(frozen=True)
class Space(Generic[C]):
    """The configurations of one kernel.

    ``name`` and the integer ``version`` stand in tables: raise the version by hand when axes or the kernel change so
    that an old choice no longer applies. ``make(*values)`` builds a configuration whose attributes are the axes (or,
    left out, a tuple).
    """

    name: str
    version: int
    axes: tuple[Axis, ...]
    constraints: tuple[Constraint, ...]
    make: Callable[..., C] = field(default=lambda *values: values)  # pyright: ignore[reportAssignmentType]

    def __post_init__(self) -> None:
        known = [axis.name for axis in self.axes]
        for constraint in self.constraints:
            if not constraint.axes:
                raise ValueError(f"space {self.name}: {constraint.name!r} is over no axis")
            for name in constraint.axes:
                if name not in known:
                    raise ValueError(f"space {self.name}: {constraint.name!r} is over {name!r}, which is no axis")
        if len(set(known)) < len(known):
            raise ValueError(f"space {self.name}: an axis stands twice in {', '.join(known)}")

    def candidates(self, problem: Any, device: DeviceSpec) -> list[C]:
        """All configurations that satisfy every constraint, in the order of the axes."""
        return [self.make(*values) for values in self._walk(problem, device, {})]

    def explain(self, problem: Any, device: DeviceSpec) -> Funnel:
        """How many candidates there are, and how many each constraint removed."""
        removed = {constraint.name: 0 for constraint in self.constraints}
        left = len(self._walk(problem, device, removed))
        total = math.prod(len(axis.values(problem)) for axis in self.axes)
        return Funnel(self.name, {axis.name: len(axis.values(problem)) for axis in self.axes}, total, removed, left)

    def refusal(self, problem: Any, device: DeviceSpec, config: C) -> str | None:
        """Why ``config`` is not in the space, as a phrase, or None where it is."""
        values = {axis.name: getattr(config, axis.name, None) for axis in self.axes}
        if isinstance(config, tuple) and not hasattr(config, "_fields"):
            values = {axis.name: value for axis, value in zip(self.axes, config, strict=True)}
        for axis in self.axes:
            if values[axis.name] not in axis.values(problem):
                return f"{axis.name}={values[axis.name]} is not one of {', '.join(map(str, axis.values(problem)))}"
        for constraint in self.constraints:
            if not constraint.holds(problem, device, *(values[name] for name in constraint.axes)):
                return f"it breaks the constraint {constraint.name!r}"
        return None

    def _walk(self, problem: Any, device: DeviceSpec, removed: dict[str, int]) -> list[tuple[int, ...]]:
        """Bind axis after axis. ``removed``, where it has a constraint's name, receives its count."""
        domains = [tuple(axis.values(problem)) for axis in self.axes]
        position = {axis.name: depth for depth, axis in enumerate(self.axes)}
        due: list[list[tuple[str, Predicate, Callable[[list[int]], Any], dict[Any, bool]]]] = [[] for _ in self.axes]
        for constraint in self.constraints:
            places = [position[name] for name in constraint.axes]
            # Two places at least, so that the getter returns a tuple. What a constraint said of the values of its axes
            # is remembered: the axes that it is not over repeat the question.
            pick = itemgetter(*places, *places[:1])
            due[max(places)].append((constraint.name, constraint.holds, pick, {}))
        following = [math.prod(len(domain) for domain in domains[depth + 1 :]) for depth in range(len(domains))]
        point = [0] * len(domains)
        last = len(domains) - 1

        found: list[tuple[int, ...]] = []

        def bind(depth: int) -> None:
            for value in domains[depth]:
                point[depth] = value
                for name, holds, pick, said in due[depth]:
                    values = pick(point)
                    answer = said.get(values)
                    if answer is None:
                        answer = said[values] = holds(problem, device, *values[:-1])
                    if not answer:
                        if removed:
                            removed[name] += following[depth]
                        break
                else:
                    if depth == last:
                        found.append(tuple(point))
                    else:
                        bind(depth + 1)

        bind(0)
        return found


@dataclass(frozen=True)
class Funnel:
    """What is left of a space: choices an axis, all combinations, those that each constraint removed, the rest.

    A candidate counts for the first constraint that it breaks, so the parts add up to the whole.
    """

    space: str
    axes: dict[str, int]
    total: int
    removed: dict[str, int]
    left: int

    def __str__(self) -> str:
        """``axes 320 -> registers 250 -> shared memory 120``: what is left after each constraint."""
        parts, left = [f"axes {self.total:,}"], self.total
        for name, count in self.removed.items():
            left -= count
            parts.append(f"{name} {left:,}")
        return " -> ".join(parts)

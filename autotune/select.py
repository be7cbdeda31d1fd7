"""Where a kernel's launch parameters come from, in this order: an explicit configuration, an override, the user's
table, the shipped table (each by the exact key, then the nearest), the operator's analytic default.

Nothing is timed here, nothing synchronises, and nothing is read from the environment. Tables are read once, when a
kernel first runs on a GPU model; what was found is remembered by problem.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from contextlib import contextmanager
from functools import reduce
from pathlib import Path
from typing import Any, TypeVar

import torch

from iokernels.runtime.device import DeviceSpec
from iokernels.runtime.scoped import Scoped

from . import tables
from .tunable import Tunable

C = TypeVar("C")

_overrides: Scoped[dict[str, Any]] = Scoped({}, combine=lambda none, given: reduce(operator.or_, given, none))
_watched: Scoped[dict[str, object] | None] = Scoped(None)
_tunables: list[Tunable[Any]] = []
_tables: dict[tuple[str, str, str, Any], tables.Table | None] = {}


@contextmanager
def override(**configs: object) -> Iterator[None]:
    """Launch the named kernels with the given configurations inside, for experiments and tests.

    >>> from iokernels.ops.flash_attention.triton.tuning import Config
    >>> with override(flash_attention_fwd=Config(block_m=64, block_n=32, num_warps=4, num_stages=2)):
    ...     ...

    The setting belongs to the process, not to the thread. Of overrides of one kernel the one entered last wins, in
    whichever order they end.
    """
    with _overrides.set(configs):
        yield


@contextmanager
def watch() -> Iterator[dict[str, object]]:
    """Collect the configuration of every kernel launched inside, by the kernel's name: for reports.

    The setting belongs to the process, not to the thread. Of nested ones the innermost sees the launches.
    """
    seen: dict[str, object] = {}
    with _watched.set(seen):
        yield seen


def select(tunable: Tunable[C], problem: Any, device: DeviceSpec, config: C | None = None) -> C:
    """The configuration for one launch. ``problem`` is a tuple that the kernel's tuning module defines.

    Under ``torch.use_deterministic_algorithms`` tables do not decide on what changes results: those fields are the
    default's, so that the bits are the same on machines with different tables. ``config`` and overrides are obeyed.
    """
    if config is None:
        config = _overrides.value.get(tunable.kernel)
    if config is None:
        key = (device.slug, torch.are_deterministic_algorithms_enabled(), problem)
        config = tunable.chosen.get(key)
        if config is None:
            config = tunable.chosen[key] = _choose(tunable, problem, device, deterministic=key[1])
    if _watched.value is not None:
        _watched.value[tunable.kernel] = config
    return config


def forget() -> None:
    """Read tables again at the next launch: after they were written."""
    _tables.clear()
    for tunable in _tunables:
        tunable.chosen.clear()
    _tunables.clear()


def _choose(tunable: Tunable[C], problem: Any, device: DeviceSpec, *, deterministic: bool) -> C:
    """The slow path: once a problem."""
    if tunable not in _tunables:
        _tunables.append(tunable)
    if len(tunable.chosen) > 4096:  # a server that sees ever new lengths
        tunable.chosen.clear()
    found = _from_tables(tunable, problem, device)
    if found is None:
        return tunable.default(problem)
    return tunable.deterministic(problem, device, found) if deterministic else found


def _from_tables(tunable: Tunable[C], problem: Any, device: DeviceSpec) -> C | None:
    """The first entry that is in the space for this problem: one tuned at other sizes may ask for too much here."""
    for root in (tables.user(), tables.PACKAGE):
        table = _table(tunable, device, root)
        if table is None:
            continue
        for entry in table.find(tunable.key(problem), tunable.near):
            config = config_of(tunable, entry)
            if config is not None and tunable.space.refusal(problem, device, config) is None:
                return config
    return None


def _table(tunable: Tunable[Any], device: DeviceSpec, root: Path) -> tables.Table | None:
    """A table, read once: one that cannot be used warns once."""
    name = (tunable.kernel, tunable.backend, device.slug, root)
    if name not in _tables:
        _tables[name] = tables.load(tunable, device, root)
    return _tables[name]


def config_of(tunable: Tunable[C], entry: tables.Entry) -> C | None:
    """The configuration that an entry states, or None where its fields are not the axes."""
    names = [axis.name for axis in tunable.space.axes]
    return tunable.space.make(*(entry.config[name] for name in names)) if set(names) == set(entry.config) else None

"""Tables of measured choices: one JSON file a GPU model and kernel, in the package and in the user's cache folder.

A table of another schema, space version or GPU is ignored with one warning; one made with another toolchain serves, and
counts as stale. A broken file is one warning, never an error: the analytic default takes its place.

Writers read, merge and replace the file under a lock, so that two of them lose nothing and a reader never sees half.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from iokernels.runtime.device import DeviceSpec
from iokernels.runtime.environment import cache_folder
from iokernels.runtime.files import locked, replacing

from .tunable import Tunable

SCHEMA = 1
PACKAGE = Path(__file__).resolve().parent / "tables"
"""The tables that are shipped."""


def user() -> Path:
    """The user's own: ``tables`` in the folder of :func:`~iokernels.runtime.environment.cache_folder`."""
    return cache_folder() / "tables"


class TableWarning(UserWarning):
    """A table cannot be used, and the analytic defaults are."""


@dataclass(frozen=True)
class Entry:
    """One choice: the key it holds for, the configuration, and what was measured of it (``ms``, ``gain``, ...)."""

    key: dict[str, Any]
    config: dict[str, int]
    facts: dict[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"key": self.key, "config": self.config, **self.facts}

    @staticmethod
    def of(data: dict[str, Any]) -> Entry:
        """The reverse of :meth:`as_dict`. Raises ``KeyError``, ``TypeError`` or ``ValueError``."""
        facts = dict(data)
        key, config = facts.pop("key"), facts.pop("config")
        if not isinstance(key, dict) or not all(type(value) is int for value in config.values()):
            raise ValueError("an entry is a key and a configuration of integers")
        return Entry(key, config, facts)


@dataclass(frozen=True)
class Table:
    """The entries of one kernel on one GPU, and the versions that they were measured with."""

    entries: tuple[Entry, ...]
    toolchain: dict[str, str]

    def find(self, key: dict[str, Any], near: tuple[str, ...]) -> Iterator[Entry]:
        """The entry of ``key``, then those with the same words and switches, nearest sizes first (log distance)."""
        same = {name: value for name, value in key.items() if name not in near}
        alike = [e for e in self.entries if {n: v for n, v in e.key.items() if n not in near} == same]
        return iter(sorted(alike, key=lambda entry: _distance(entry.key, key, near)))

    def made_with(self, entry: Entry) -> dict[str, str]:
        """The versions that an entry was measured with: its own where it states them, else those of the table."""
        return entry.facts.get("toolchain", self.toolchain)

    def stale(self) -> tuple[Entry, ...]:
        """The entries that were measured with other versions than these. They are used all the same."""
        now = toolchain()
        return tuple(entry for entry in self.entries if self.made_with(entry) != now)

    def dated(self, entry: Entry, now: dict[str, str]) -> Entry:
        """The entry for a table made with ``now``: it states its own versions where they are others."""
        facts = {name: fact for name, fact in entry.facts.items() if name != "toolchain"}
        made_with = self.made_with(entry)
        return Entry(entry.key, entry.config, facts if made_with == now else facts | {"toolchain": made_with})


def _distance(entry: dict[str, Any], key: dict[str, Any], near: tuple[str, ...]) -> float:
    return sum(abs(math.log2(max(entry[name], 1) / max(key[name], 1))) for name in near)


def toolchain() -> dict[str, str]:
    """The versions that decide what a kernel compiles to, as major and minor."""
    from importlib import metadata

    import torch

    found = {"torch": torch.__version__, "cuda": torch.version.cuda or "-"}
    try:
        found["triton"] = metadata.version("triton")
    except metadata.PackageNotFoundError:
        found["triton"] = "-"
    return {name: ".".join(version.split("+")[0].split(".")[:2]) for name, version in found.items()}


def path_of(tunable: Tunable[Any], device: DeviceSpec, root: Path) -> Path:
    """Where the table of a kernel lies under ``root``."""
    return root / device.slug / f"{tunable.kernel}.{tunable.backend}.json"


def load(tunable: Tunable[Any], device: DeviceSpec, root: Path) -> Table | None:
    """The table, or None where there is none that can be used."""
    path = path_of(tunable, device, root)
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        return _ignored(path, error.strerror or str(error))
    try:
        data = json.loads(text)
        stands = {name: data[name] for name in _identity(tunable, device)}
        table = Table(tuple(Entry.of(entry) for entry in data["entries"]), dict(data["toolchain"]))
        sizes = all(_is_size(entry.key[name]) for entry in table.entries for name in tunable.near)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return _ignored(path, f"it cannot be read: {type(error).__name__}: {error}")
    for name, value in _identity(tunable, device).items():
        found = stands[name]
        if name == "device":
            agrees = isinstance(found, dict) and all(found.get(part) == value[part] for part in ("slug", "sm"))
        else:
            agrees = found == value
        if not agrees:
            return _ignored(path, f"its {name} is {found!r} and should be {value!r}")
    return table if sizes else _ignored(path, "a key has no size where there should be one")


def _is_size(value: Any) -> bool:
    """Whether a distance can be told from it: JSON's integers have no end, those of problems have 64 bits."""
    return type(value) is int and 0 <= value < 2**63


def _ignored(path: Path, why: str) -> None:
    warnings.warn(f"the tuning table {path} is ignored: {why}", TableWarning, stacklevel=2)


def _identity(tunable: Tunable[Any], device: DeviceSpec) -> dict[str, Any]:
    """What has to agree for a table to be used."""
    return {
        "schema": SCHEMA,
        "op": tunable.kernel,
        "backend": tunable.backend,
        "space": f"{tunable.space.name}/{tunable.space.version}",
        "device": {"slug": device.slug, "name": device.name, "sm": device.sm, "sms": device.sms},
    }


def save(tunable: Tunable[Any], device: DeviceSpec, root: Path, entries: Iterable[Entry]) -> Path:
    """Add ``entries``, measured with the toolchain of this process, to the table on disk. Of two with the same key the
    new one stays. What is there and cannot be used is replaced."""
    path = path_of(tunable, device, root)
    path.parent.mkdir(parents=True, exist_ok=True)
    now = toolchain()
    with locked(path):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", TableWarning)
            old = load(tunable, device, root)
        merged = {} if old is None else {_line(entry.key): old.dated(entry, now) for entry in old.entries}
        merged.update((_line(entry.key), entry) for entry in entries)
        with replacing(path) as part:
            part.write_text(
                _text(_identity(tunable, device) | {"toolchain": now}, [merged[key] for key in sorted(merged)])
            )
    return path


def _text(head: dict[str, Any], entries: list[Entry]) -> str:
    """JSON with a line for every entry, so that a change of one is a change of one line."""
    lines = [f"{_line(name)}: {_line(value)}," for name, value in head.items()]
    body = ",\n".join(f"  {_line(entry.as_dict())}" for entry in entries)
    return "{\n" + "\n".join(lines) + '\n"entries": [\n' + body + "\n]\n}\n"


def _line(value: Any) -> str:
    return json.dumps(value, sort_keys=True)

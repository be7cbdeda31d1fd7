"""Tables on disk: what is used, what is ignored, and writers that die or meet."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from iokernels import autotune
from iokernels.autotune import tables
from iokernels.autotune.tables import Entry, TableWarning
from iokernels.runtime import files
from iokernels.runtime.device import named

H100 = named("h100-sxm")


def entry(length: int, tile: int = 32, dtype: str = "half", width: int = 64, **facts: Any) -> Entry:
    return Entry({"dtype": dtype, "width": width, "length": length}, {"tile": tile, "warps": 8}, facts)


def edit(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def test_what_is_written_is_read(tunable: Any, roots: tuple[Path, Path]) -> None:
    path = tables.save(tunable, H100, roots[0], [entry(2048, ms=0.5), entry(1024, ms=0.25, gain=1.1)])
    assert path == roots[0] / "h100-sxm" / "toy_fwd.triton.json"
    lines = path.read_text().splitlines()
    assert sum('"key"' in line for line in lines) == 2
    assert "1024" in next(line for line in lines if '"key"' in line), "sorted by key"
    data = json.loads(path.read_text())
    assert (data["schema"], data["space"], data["device"]["sm"]) == (1, "toy/3", 90)
    table = tables.load(tunable, H100, roots[0])
    assert table is not None
    assert table.entries == (entry(1024, ms=0.25, gain=1.1), entry(2048, ms=0.5))
    assert table.stale() == ()
    assert tables.load(tunable, named("h200"), roots[0]) is None


def test_saving_merges_and_the_new_entry_stays(tunable: Any, roots: tuple[Path, Path]) -> None:
    tables.save(tunable, H100, roots[0], [entry(1024), entry(2048)])
    tables.save(tunable, H100, roots[0], [entry(2048, tile=64)])
    table = tables.load(tunable, H100, roots[0])
    assert table is not None
    assert [(e.key["length"], e.config["tile"]) for e in table.entries] == [(1024, 32), (2048, 64)]


def test_the_nearest_entry_of_the_same_kind(tunable: Any, roots: tuple[Path, Path]) -> None:
    entries = [entry(1024), entry(16384), entry(4096, dtype="tf32"), entry(4096, width=32)]
    tables.save(tunable, H100, roots[0], entries)
    table = tables.load(tunable, H100, roots[0])
    assert table is not None

    def found(**key: Any) -> list[int]:
        return [e.key["length"] for e in table.find({"dtype": "half", "width": 64} | key, ("length",))]

    assert found(length=16384) == [16384, 1024]
    assert found(length=3000) == [1024, 16384]  # 1.5 and 2.4 octaves away; in elements 1976 and 13384
    assert found(length=5000) == [16384, 1024]  # 1.7 and 2.3; in elements the other would be nearer
    assert found(length=5000, dtype="fp32") == []


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda data: data.update(schema=2), "its schema is 2 and should be 1"),
        (lambda data: data.update(space="toy/2"), "its space is 'toy/2' and should be 'toy/3'"),
        (lambda data: data.update(op="other"), "its op is 'other'"),
        (lambda data: data["device"].update(sm=80), "its device is"),
        (lambda data: data.update(device="h100"), "its device is 'h100'"),
        (lambda data: data.pop("entries"), "it cannot be read: KeyError"),
        (lambda data: data.update(entries=[3]), "it cannot be read: TypeError"),
        (lambda data: data["entries"][0].pop("config"), "it cannot be read: KeyError"),
        (lambda data: data["entries"][0]["config"].update(tile="32"), "it cannot be read: ValueError"),
        (lambda data: data["entries"][0]["key"].pop("length"), "it cannot be read: KeyError"),
        (lambda data: data["entries"][0]["key"].update(length="x"), "a key has no size"),
    ],
)
def test_a_table_that_cannot_be_used_is_one_warning(
    tunable: Any, roots: tuple[Path, Path], change: Callable[[dict[str, Any]], None], why: str
) -> None:
    edit(tables.save(tunable, H100, roots[0], [entry(1024)]), change)
    with pytest.warns(TableWarning, match="is ignored: ") as caught:
        assert tables.load(tunable, H100, roots[0]) is None
    assert why in str(caught[0].message)
    tables.save(tunable, H100, roots[0], [entry(512)])  # a new one takes its place
    table = tables.load(tunable, H100, roots[0])
    assert table is not None
    assert table.entries == (entry(512),)


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"null", b'{"schema": 1}', b"\xff\xfe\x00", b"[" * 100_000])
def test_a_broken_file_is_one_warning(tunable: Any, roots: tuple[Path, Path], text: bytes) -> None:
    path = tables.save(tunable, H100, roots[0], [entry(1024)])
    path.write_bytes(text)
    with pytest.warns(TableWarning, match="it cannot be read"):
        assert tables.load(tunable, H100, roots[0]) is None


def test_a_folder_in_its_place_is_one_warning(tunable: Any, roots: tuple[Path, Path]) -> None:
    tables.path_of(tunable, H100, roots[0]).mkdir(parents=True)
    with pytest.warns(TableWarning):
        assert tables.load(tunable, H100, roots[0]) is None


def test_another_toolchain_serves_and_is_stale(
    tunable: Any, roots: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    old = {"torch": "2.1", "cuda": "12.0", "triton": "3.0"}
    monkeypatch.setattr(tables, "toolchain", lambda: old)
    tables.save(tunable, H100, roots[0], [entry(1024), entry(2048)])
    monkeypatch.undo()
    monkeypatch.setattr(tables, "user", lambda: roots[0])
    table = tables.load(tunable, H100, roots[0])
    assert table is not None
    assert table.stale() == table.entries
    tables.save(tunable, H100, roots[0], [entry(2048)])
    table = tables.load(tunable, H100, roots[0])
    assert table is not None
    assert [e.key["length"] for e in table.stale()] == [1024]
    assert table.stale()[0].facts == {"toolchain": old}
    tables.save(tunable, H100, roots[0], [entry(1024)])
    table = tables.load(tunable, H100, roots[0])
    assert table is not None
    assert table.stale() == ()


def _write_many(tunable: Any, root: Path, first: int) -> None:
    for length in range(first, first + 20):
        tables.save(tunable, H100, root, [entry(length)])


def test_two_writers_lose_nothing(tunable: Any, roots: tuple[Path, Path]) -> None:
    fork = multiprocessing.get_context("fork")
    writers = [fork.Process(target=_write_many, args=(tunable, roots[0], first)) for first in (1000, 2000)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(30)
        assert writer.exitcode == 0
    table = tables.load(tunable, H100, roots[0])
    assert table is not None
    assert {e.key["length"] for e in table.entries} == {*range(1000, 1020), *range(2000, 2020)}


def _die_before_the_rename(tunable: Any, root: Path) -> None:
    files.os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[assignment]
    tables.save(tunable, H100, root, [entry(4096)])


def test_a_writer_killed_midway_leaves_the_old_table_and_no_lock(tunable: Any, roots: tuple[Path, Path]) -> None:
    tables.save(tunable, H100, roots[0], [entry(1024)])
    writer = multiprocessing.get_context("fork").Process(target=_die_before_the_rename, args=(tunable, roots[0]))
    writer.start()
    writer.join(30)
    assert writer.exitcode == -signal.SIGKILL
    table = tables.load(tunable, H100, roots[0])
    assert table is not None
    assert table.entries == (entry(1024),)
    tables.save(tunable, H100, roots[0], [entry(2048)])
    table = tables.load(tunable, H100, roots[0])
    assert table is not None
    assert [e.key["length"] for e in table.entries] == [1024, 2048]


def test_a_failed_write_leaves_no_file_behind(
    tunable: Any, roots: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(files.os, "replace", full)
    with pytest.raises(OSError, match="no space"):
        tables.save(tunable, H100, roots[0], [entry(1024)])
    assert list((roots[0] / "h100-sxm").iterdir()) == []


def test_the_cache_folder_is_named_by_the_environment_once() -> None:
    import subprocess
    import sys

    code = "import os; from iokernels.autotune import tables; print(tables.user())"
    run = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"IOKERNELS_CACHE": "/nowhere/cache"}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert run.stdout.strip() == os.path.join("/nowhere/cache", "tables")


def test_gpus_with_one_name_and_another_architecture_share_no_table(tunable: Any, roots: tuple[Path, Path]) -> None:
    tables.save(tunable, H100, roots[0], [entry(1024)])
    with pytest.warns(TableWarning, match="its device is"):
        assert tables.load(tunable, replace(H100, sm=100), roots[0]) is None


@pytest.mark.parametrize("value", [10**400, 2**63, -1, 1.5, None, True, "1024", [1024], {"n": 1}, float("nan")])
@pytest.mark.parametrize(
    "place", ["size", "word", "config", "fact", "entry", "entries", "toolchain", "schema", "device"]
)
def test_no_value_in_a_table_is_an_error(
    value: Any, place: str, tunable: Any, make_problem: Any, roots: tuple[Path, Path]
) -> None:
    path = tables.save(tunable, H100, roots[0], [entry(1024), entry(2048, ms=0.5)])

    def spoil(data: dict[str, Any]) -> None:
        first = data["entries"][0]
        holders: dict[str, tuple[Any, Any]] = {
            "size": (first["key"], "length"),
            "word": (first["key"], "dtype"),
            "config": (first["config"], "tile"),
            "fact": (first, "toolchain"),
            "entry": (data["entries"], 0),
        }
        holder, name = holders.get(place, (data, place))
        holder[name] = value

    edit(path, spoil)
    autotune.forget()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TableWarning)
        problem = make_problem(length=512)
        chosen = autotune.select(tunable, problem, H100)
        assert tunable.space.refusal(problem, H100, chosen) is None
        table = tables.load(tunable, H100, roots[0])
        assert table is None or len(table.stale()) <= 2
        tables.save(tunable, H100, roots[0], [entry(4096)])
        table = tables.load(tunable, H100, roots[0])
    assert table is not None
    assert entry(4096) in table.entries

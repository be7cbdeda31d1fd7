"""What is kept on disk is used when it is whole and the user's own, and made anew otherwise, once among processes."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from iokernels.runtime.cuda import artifacts
from iokernels.runtime.errors import KernelError


@pytest.fixture(autouse=True)
def _kept_elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(artifacts, "folder", lambda: tmp_path)


def write(text: str, place: Path) -> None:
    place.write_text(text)


def test_changed_include_changes_the_key(tmp_path: Path) -> None:
    (tmp_path / "a.cu").write_text('#include "b.cuh"\n')
    (tmp_path / "b.cuh").write_text("int x;\n")
    before = artifacts.sources(tmp_path / "a.cu", root=tmp_path)
    (tmp_path / "b.cuh").write_text("int y;\n")
    after = artifacts.sources(tmp_path / "a.cu", root=tmp_path)
    assert list(before) == list(after)
    assert artifacts.key_of(*before.values()) != artifacts.key_of(*after.values())
    assert artifacts.key_of("ab", "c") != artifacts.key_of("a", "bc")


def test_what_is_made_meanwhile_by_another_process_does_no_harm(tmp_path: Path) -> None:
    def make(place: Path) -> None:
        place.write_text("mine")
        other = tmp_path / "thing.so"
        other.write_text("another's")  # finished first

    assert artifacts.content(artifacts.stored("thing.so", make)) == b"mine"
    assert artifacts.content(artifacts.stored("thing.so", lambda place: pytest.fail("made twice"))) == b"mine"
    with pytest.raises(ZeroDivisionError):
        artifacts.stored("never.so", lambda place: 1 // 0)  # pyright: ignore[reportArgumentType]
    assert [path.name for path in tmp_path.iterdir()] == ["thing.so"]


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[0] ^= 1
    path.write_bytes(data)


def drop_the_digest(path: Path) -> None:
    path.write_bytes(artifacts.content(path))


def let_others_write(path: Path) -> None:
    path.chmod(0o777)


def put_a_link(path: Path) -> None:
    path.unlink()
    path.symlink_to("/dev/null")


@pytest.mark.parametrize("damage", [truncate, empty, flip_a_bit, drop_the_digest, let_others_write, put_a_link])
def test_a_damaged_file_is_made_anew(damage: Callable[[Path], None]) -> None:
    place = artifacts.stored("a/thing.so", partial(write, "right"))
    assert place.stat().st_mode & 0o777 == 0o755
    damage(place)
    again = artifacts.stored("a/thing.so", partial(write, "anew"))
    assert artifacts.content(again) == b"anew"
    assert again.stat().st_mode & 0o777 == 0o755
    assert not again.is_symlink()


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="files have no owner here")
def test_a_file_of_another_user_is_made_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    artifacts.stored("thing.so", partial(write, "another's"))
    owner = os.stat(artifacts.folder() / "thing.so").st_uid
    fstat = os.fstat

    def of_another(handle: int) -> os.stat_result:
        facts = list(fstat(handle))
        facts[4] = owner + 1
        return os.stat_result(facts)

    with monkeypatch.context() as others:
        others.setattr(artifacts.os, "fstat", of_another)
        others.setattr(artifacts.os, "geteuid", lambda: owner + 2)
        assert artifacts.content(artifacts.stored("thing.so", partial(write, "mine"))) == b"mine"


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(artifacts, "folder", lambda: tmp_path / "file" / "kernels")
    with pytest.raises(KernelError, match="set IOKERNELS_CACHE to a folder of your own"):
        artifacts.stored("thing.so", partial(write, "never"))


def test_an_error_of_the_compiler_is_not_taken_for_one_of_the_folder() -> None:
    def make(place: Path) -> None:
        open("/nowhere/g++").close()

    with pytest.raises(FileNotFoundError, match="nowhere"):
        artifacts.stored("thing.so", make)


def test_leftovers_of_writers_that_died_are_taken_over_and_swept(tmp_path: Path) -> None:
    old = [tmp_path / ".thing.so.part", tmp_path / ".thing.so.lock", tmp_path / ".other.so.part"]
    for path in old:
        path.touch()
        os.utime(path, (1.0, 1.0))
    young = tmp_path / ".third.so.part"
    young.touch()
    assert artifacts.content(artifacts.stored("thing.so", partial(write, "right"))) == b"right"
    assert sorted(path.name for path in tmp_path.iterdir()) == [young.name, "thing.so"]


def _make_slowly(root: Path, place: Path) -> None:
    with (root / "made").open("a") as made:
        made.write(f"{os.getpid()}\n")
    time.sleep(0.2)
    place.write_text("made once")


def _want(root: Path, start: threading.Event) -> None:
    artifacts.folder = lambda: root / "kernels"
    start.wait(30)
    assert artifacts.content(artifacts.stored("a/thing.so", partial(_make_slowly, root))) == b"made once"


def test_of_eight_processes_one_makes_a_file(tmp_path: Path) -> None:
    fork = multiprocessing.get_context("fork")
    start = fork.Event()
    workers = [fork.Process(target=_want, args=(tmp_path, start)) for _ in range(8)]
    for worker in workers:
        worker.start()
    start.set()
    for worker in workers:
        worker.join(30)
    assert [worker.exitcode for worker in workers] == [0] * 8
    assert len((tmp_path / "made").read_text().split()) == 1
    assert [path.name for path in (tmp_path / "kernels" / "a").iterdir()] == ["thing.so"]


def test_of_eight_threads_one_makes_a_file(tmp_path: Path) -> None:
    start = threading.Event()
    workers = [threading.Thread(target=_want, args=(tmp_path, start)) for _ in range(8)]
    for worker in workers:
        worker.start()
    start.set()
    for worker in workers:
        worker.join(30)
    assert len((tmp_path / "made").read_text().split()) == 1


KERNEL_IN_A_PROCESS = """
import torch
from iokernels import lean_attention
q, cache = torch.ones(1, 1, 1, 16, dtype=torch.half), torch.ones(2, 1, 1, 32, 16, dtype=torch.half)
lengths = torch.tensor([32], dtype=torch.int32)
out = lean_attention(q, cache[0], cache[1], cache_seqlens=lengths, backend="cuda")
assert out.eq(1).all(), out
"""


@pytest.mark.gxx
def test_a_process_survives_a_damaged_kernel(tmp_path: Path) -> None:
    environment = os.environ | {"IOKERNELS_CACHE": str(tmp_path), "IOKERNELS_EMULATE": "1"}
    command = [sys.executable, "-c", KERNEL_IN_A_PROCESS]
    subprocess.run(command, env=environment, check=True)
    kept = sorted(tmp_path.rglob("*.so"))
    assert len(kept) >= 2, "the machine and a kernel"
    for path in kept:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    subprocess.run(command, env=environment, check=True)
    assert sorted(tmp_path.rglob("*.so")) == kept

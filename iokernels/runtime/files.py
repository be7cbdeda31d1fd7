"""Files that several processes share: one writes at a time, and no reader sees half of one.

A writer that dies loses its lock and leaves at most two hidden files, ``.name.part`` and ``.name.lock``, which the next
writer of the same file takes over and :func:`swept` removes.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

__all__ = ["locked", "replacing", "swept"]

_FORGOTTEN = 24 * 3600.0
"""Seconds after which a hidden file of a writer is taken for left behind: no compilation takes a day."""

_threads: dict[Path, threading.RLock] = {}


@contextmanager
def locked(place: Path) -> Iterator[None]:
    """Hold the lock of the file ``place`` among processes and threads. It falls with its holder, however that ends.

    Where there is no such lock, on Windows, two processes at once may do the same work, and of two results the last
    stays.
    """
    with _threads.setdefault(place, threading.RLock()):
        try:
            import fcntl
        except ImportError:
            yield
            return
        lock = place.with_name(f".{place.name}.lock")
        while True:
            handle = os.open(lock, os.O_RDWR | os.O_CREAT, 0o600)
            fcntl.flock(handle, fcntl.LOCK_EX)
            if _is_still(handle, lock):
                break
            os.close(handle)  # its last holder has removed it meanwhile: whoever comes next opens another
        try:
            yield
        finally:
            with suppress(OSError):
                os.unlink(lock)
            os.close(handle)


def _is_still(handle: int, path: Path) -> bool:
    """Whether ``path`` names the open file."""
    try:
        return os.path.samestat(os.fstat(handle), os.stat(path))
    except FileNotFoundError:
        return False


@contextmanager
def replacing(place: Path, *, mode: int = 0o644) -> Iterator[Path]:
    """A path to write what takes the place of ``place`` in one step, on the disk before it has the name.

    To be used under :func:`locked`. Nothing changes where the body raises.
    """
    part = place.with_name(f".{place.name}.part")
    try:
        with suppress(FileNotFoundError):
            part.unlink()  # left by a writer that died: its mode and owner are not ours
        yield part
        handle = os.open(part, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
        os.chmod(part, mode)
        os.replace(part, place)
    finally:
        with suppress(FileNotFoundError):
            part.unlink()


def swept(folder: Path) -> list[Path]:
    """Remove what writers that died left in ``folder`` long ago, and return it."""
    gone = []
    for path in folder.glob(".*"):
        with suppress(OSError):
            if time.time() - path.stat().st_mtime > _FORGOTTEN:
                path.unlink()
                gone.append(path)
    return gone

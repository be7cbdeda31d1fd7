"""What was compiled is kept on disk, by a key of all that went into it.

A kept file is code that this process will run, so it is used only if it is whole (the SHA-256 of its content stands
at its end, where loaders of ELF files look at nothing), belongs to the user or to root, and can be written by nobody
else. Any other is made anew. Of processes that want the same file at once, one makes it and the others wait.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import stat
from collections.abc import Callable
from functools import cache
from pathlib import Path

from iokernels.runtime.environment import cache_folder
from iokernels.runtime.errors import KernelError
from iokernels.runtime.files import locked, replacing, swept

__all__ = ["content", "folder", "key_of", "sources", "stored"]

_INCLUDE = re.compile(r'^[ \t]*#[ \t]*include[ \t]+"([^"]+)"', re.MULTILINE)

_MARK = b"\0iokernels sha256 "
_DIGEST = hashlib.sha256().digest_size


@cache
def folder() -> Path:
    """Where compiled kernels are kept: ``kernels`` in the cache folder of this library."""
    return cache_folder() / "kernels"


def sources(*paths: Path, root: Path) -> dict[str, str]:
    """The text of the files and of all that they include in quotes, by path; ``root`` is the include root.

    Raises:
        FileNotFoundError: one of them does not exist.
    """
    found: dict[str, str] = {}
    due = [path.resolve() for path in paths]
    while due:
        path = due.pop()
        if str(path) in found:
            continue
        text = found[str(path)] = path.read_text()
        for name in _INCLUDE.findall(text):
            beside, below = path.parent / name, root / name
            due.append((beside if beside.exists() else below).resolve())
    return found


def key_of(*parts: str) -> str:
    """A name for what the parts determine, on this make of processor."""
    digest = hashlib.sha256()
    for part in (platform.machine(), *parts):
        digest.update(f"{len(part)}:{part}".encode())
    return digest.hexdigest()[:32]


def stored(name: str, make: Callable[[Path], None]) -> Path:
    """The kept file ``name``. Where there is none that can be trusted, ``make(path)`` writes it to a path of its own.

    Raises:
        KernelError: the folder cannot be written.
    """
    place = folder() / name
    if _trusted(place):
        return place
    try:
        place.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with locked(place):
            if _trusted(place):  # another process has made it meanwhile
                return place
            swept(place.parent)
            with replacing(place, mode=0o755) as part:
                make(part)
                with part.open("r+b") as file:
                    made = file.read()
                    file.write(_MARK + hashlib.sha256(made).digest())
    except OSError as error:
        if error.filename is None or not Path(os.fsdecode(error.filename)).is_relative_to(folder()):
            raise
        raise KernelError(
            f"compiled kernels are kept in {folder()}, where {place.name} cannot be written ({error.strerror}): "
            "set IOKERNELS_CACHE to a folder of your own"
        ) from error
    return place


def content(place: Path) -> bytes:
    """What was made, without the digest at the end of a kept file."""
    return _parts(place.read_bytes())[0]


def _trusted(place: Path) -> bool:
    """Whether ``place`` is a whole file that nobody but this user and root can have written."""
    try:
        with place.open("rb") as file:
            facts, data = os.fstat(file.fileno()), file.read()
    except OSError:
        return False
    if hasattr(os, "geteuid") and facts.st_uid not in (os.geteuid(), 0):
        return False
    if facts.st_mode & (stat.S_IWGRP | stat.S_IWOTH) or not stat.S_ISREG(facts.st_mode):
        return False
    made, digest = _parts(data)
    return hashlib.sha256(made).digest() == digest


def _parts(data: bytes) -> tuple[bytes, bytes]:
    """What was made, and the digest behind it: empty where there is none."""
    end = len(data) - len(_MARK) - _DIGEST
    if end < 0 or data[end:-_DIGEST] != _MARK:
        return data, b""
    return data[:end], data[-_DIGEST:]

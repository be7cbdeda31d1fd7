"""What was compiled is kept on disk, by a key of all that went into it.

Files are written beside their place and moved there in one step, so two processes that compile the same thing at once
do no harm, and no one reads half a file.
"""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

__all__ = ["folder", "key_of", "sources", "stored"]

_INCLUDE = re.compile(r'^[ \t]*#[ \t]*include[ \t]+"([^"]+)"', re.MULTILINE)


@cache
def folder() -> Path:
    """Where compiled kernels are kept: ``kernels`` in ``$IOKERNELS_CACHE`` or the platform's cache folder."""
    import platformdirs

    return Path(os.environ.get("IOKERNELS_CACHE") or platformdirs.user_cache_dir("iokernels")) / "kernels"


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
    """A name for what the parts determine."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(f"{len(part)}:{part}".encode())
    return digest.hexdigest()[:32]


def stored(name: str, make: Callable[[Path], None]) -> Path:
    """The kept file ``name``. Where there is none yet, ``make(path)`` writes it to a path of its own first."""
    place = folder() / name
    if place.exists():
        return place
    place.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=place.parent, prefix=".", suffix=place.suffix)
    os.close(handle)
    try:
        make(Path(temporary))
        os.chmod(temporary, 0o755)
        os.replace(temporary, place)
    finally:
        Path(temporary).unlink(missing_ok=True)
    return place

"""The environment variables that this library reads, and the folder where it keeps what it makes.

| variable | meaning | default |
|---|---|---|
| ``IOKERNELS_CACHE`` | folder of compiled kernels and the user's tables; ``~`` is the home folder | the platform's |
| ``IOKERNELS_EMULATE`` | backend ``cuda`` takes CPU tensors, in the emulated GPU | off |
| ``IOKERNELS_EMULATE_ORDERS`` | orders of blocks, warps and lanes in which an emulated launch runs, at least 1 | 1 |
| ``IOKERNELS_EMULATE_SEED`` | the first of these orders | 0 |
| ``IOKERNELS_EMULATE_SANITIZE`` | sanitizers of emulated kernels: ``address,undefined`` | none |
| ``TRITON_INTERPRET`` | Triton's own: its kernels take CPU tensors, in its interpreter | off |
| ``CXX`` | the C++ compiler of the emulated GPU | ``g++`` |

Each is read once. A value that makes no sense raises ``ValueError`` where it is first needed.
"""

from __future__ import annotations

import os
import tempfile
from functools import cache
from pathlib import Path

__all__ = ["cache_folder", "number", "switch"]

_ON = ("1", "true", "yes", "on", "y")
"""What Triton takes for on, in any case; anything else is off."""


def switch(name: str) -> bool:
    """Whether the variable ``name`` is on."""
    return os.environ.get(name, "").strip().lower() in _ON


def number(name: str, default: int, *, least: int = 0) -> int:
    """The whole number that the variable ``name`` holds.

    Raises:
        ValueError: it holds something else, or less than ``least``.
    """
    text = os.environ.get(name, "").strip()
    if not text:
        return default
    try:
        value = int(text)
    except ValueError:
        value = None
    if value is None or value < least:
        raise ValueError(f"the environment variable {name} is {text!r}; it must be a whole number, at least {least}")
    return value


@cache
def cache_folder() -> Path:
    """Where this library keeps files: ``$IOKERNELS_CACHE``, or the platform's cache folder for the user.

    A user without a home folder, as many containers have, gets a folder in the one for temporary files.
    """
    import platformdirs

    named = os.environ.get("IOKERNELS_CACHE")
    try:
        return Path(named).expanduser().absolute() if named else Path(platformdirs.user_cache_dir("iokernels"))
    except (RuntimeError, KeyError) as error:  # no HOME, and no entry in the list of users
        if named:
            raise ValueError(
                f"the environment variable IOKERNELS_CACHE is {named!r}, whose ~ cannot be expanded: {error}"
            ) from error
        owner = os.getuid() if hasattr(os, "getuid") else "user"
        return Path(tempfile.gettempdir()) / f"iokernels-{owner}"

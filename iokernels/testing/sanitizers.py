"""Emulated CUDA kernels under the address and undefined-behaviour sanitizers, in a process of their own.

They see what the emulator does not: a thread that leaves its local arrays, a pointer dereferenced without a primitive,
an integer that overflows. The first report ends the process.
"""

from __future__ import annotations

import os
import subprocess
import sys
from functools import cache

from iokernels.runtime.device import cxx

__all__ = ["libraries", "sanitized"]


@cache
def libraries() -> str | None:
    """The sanitizers' libraries, for ``LD_PRELOAD``, where the C++ compiler has them."""
    tool = cxx()
    if tool is None:
        return None
    found = [
        subprocess.run([tool, f"-print-file-name=lib{name}.so"], capture_output=True, text=True, check=False).stdout
        for name in ("asan", "ubsan")
    ]
    return " ".join(path.strip() for path in found) if all("/" in path for path in found) else None


def sanitized(*arguments: str, seconds: float = 300.0) -> subprocess.CompletedProcess[str]:
    """Run this Python with ``arguments``, its CUDA kernels emulated under the sanitizers.

    >>> done = sanitized("-m", "pytest", "-q", "tests/ops/flash_rnn/test_cuda.py")
    >>> assert done.returncode == 0, done.stdout + done.stderr

    Raises:
        RuntimeError: the C++ compiler has no sanitizers.
        subprocess.TimeoutExpired: after ``seconds``.
    """
    preload = libraries()
    if preload is None:
        raise RuntimeError("the sanitizers come with g++, and are not installed")
    environment = os.environ | {
        "LD_PRELOAD": preload,
        # Python and PyTorch leave memory to the end of the process.
        "ASAN_OPTIONS": "detect_leaks=0",
        "IOKERNELS_EMULATE": "1",
        "IOKERNELS_EMULATE_SANITIZE": "address,undefined",
        # Which thread runs when changes little of what they see.
        "IOKERNELS_EMULATE_ORDERS": "1",
    }
    return subprocess.run(
        [sys.executable, *arguments], env=environment, capture_output=True, text=True, timeout=seconds, check=False
    )

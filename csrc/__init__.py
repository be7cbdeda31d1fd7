"""CUDA C++ sources. ``ROOT`` is the include root for NVRTC."""

from pathlib import Path

if __name__ != "iokernels.csrc":
    raise ImportError("import iokernels.csrc: the top-level name would be a second copy of the package")

ROOT = Path(__file__).parent

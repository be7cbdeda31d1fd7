"""The shared tuning layer: where a kernel's launch parameters come from. Nothing here is ever timed implicitly."""

if __name__ != "iokernels.autotune":
    raise ImportError("import iokernels.autotune: the top-level name would be a second copy of the package")

from .select import forget, override, select, watch
from .space import Space
from .tunable import RESULTS, RoundedSize, Size, Tunable, Unkeyed, Verbatim, bucket, precision_of, precision_word

__all__ = [
    "RESULTS",
    "RoundedSize",
    "Size",
    "Space",
    "Tunable",
    "Unkeyed",
    "Verbatim",
    "bucket",
    "forget",
    "override",
    "precision_of",
    "precision_word",
    "select",
    "watch",
]

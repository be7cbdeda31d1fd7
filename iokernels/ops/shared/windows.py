"""Windows of attention as kernels take them, whatever the backend."""

from __future__ import annotations


def clamp(side: int) -> int:
    """A window side as int32 with room for sums: any longer one is as good as unbounded."""
    return min(side, 2**30)

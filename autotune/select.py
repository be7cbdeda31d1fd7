"""Where a kernel's launch parameters come from: an override, else the operator's analytic default.

Nothing is timed here, nothing synchronises, and nothing is read from the environment.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

_Problem = TypeVar("_Problem")
_Config = TypeVar("_Config")

_overrides: dict[str, object] = {}
_watched: dict[str, object] | None = None


@contextmanager
def override(**configs: object) -> Iterator[None]:
    """Launch the named kernels with the given configurations inside, for experiments and tests.

    >>> from iokernels.ops.flash_attention.tuning import Config
    >>> with override(flash_attention_fwd=Config(block_m=64, block_n=32, num_warps=4, num_stages=2)):
    ...     ...

    The setting belongs to the process, not to the thread. Inner overrides win.
    """
    global _overrides
    outer = _overrides
    _overrides = {**outer, **configs}
    try:
        yield
    finally:
        _overrides = outer


@contextmanager
def watch() -> Iterator[dict[str, object]]:
    """Collect the configuration of every kernel launched inside, by the kernel's name: for reports.

    The setting belongs to the process, not to the thread. Of nested ones the innermost sees the launches.
    """
    global _watched
    outer, _watched = _watched, {}
    try:
        yield _watched
    finally:
        _watched = outer


def select(kernel: str, problem: _Problem, default: Callable[[_Problem], _Config]) -> _Config:
    """The configuration for one launch of ``kernel``."""
    config = _overrides.get(kernel)
    if config is None:
        config = default(problem)
    if _watched is not None:
        _watched[kernel] = config
    return config  # pyright: ignore[reportReturnType]

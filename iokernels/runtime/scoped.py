"""Settings of the process that contexts change for a while, whichever way the contexts end.

A context that saves the value it finds and restores it when it ends is right for contexts that nest. Two threads, two
generators or an ``ExitStack`` may end theirs in another order; then the first to begin would restore over the second,
and the second put back what was over long ago, for good. Here each context has an entry of its own and takes away that
entry alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Generic, TypeVar

T = TypeVar("T")


class _Entry(Generic[T]):
    """Equal to itself alone, as two contexts may set the same value."""

    __slots__ = ("value",)

    def __init__(self, value: T) -> None:
        self.value = value


def _innermost(default: T, values: Sequence[T]) -> T:
    return values[-1] if values else default


class Scoped(Generic[T]):
    """A setting of the process, not of a thread: ``value`` is what all threads see.

    It is that of the context entered last among those that have not ended, or what ``combine`` makes of the default and
    all their values in the order in which they began. ``changed`` is called with it whenever it may be another.

    ``value`` is an attribute, so that torch.compile guards on it and compiled code notices a change.
    """

    def __init__(
        self,
        default: T,
        *,
        combine: Callable[[T, Sequence[T]], T] = _innermost,
        changed: Callable[[T], None] | None = None,
    ) -> None:
        self.value = default
        self._default = default
        self._combine = combine
        self._changed = changed
        self._entries: list[_Entry[T]] = []

    @contextmanager
    def set(self, value: T) -> Iterator[None]:
        """Inside, ``value`` counts."""
        entry = _Entry(value)
        self._entries.append(entry)
        self._settle()
        try:
            yield
        finally:
            self._entries.remove(entry)
            self._settle()

    def _settle(self) -> None:
        """Set ``value`` from the entries. Threads may do so at the same time: whoever writes last looks again after it
        has written, so what it leaves is what the entries say, without a lock, which torch.compile could not trace."""
        while True:
            entries = list(self._entries)
            self.value = self._combine(self._default, [entry.value for entry in entries])
            if self._changed is not None:
                self._changed(self.value)
            if entries == self._entries:
                return

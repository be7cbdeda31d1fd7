"""Which page of a pool holds which keys of which sequence: the bookkeeping of a paged cache, on the host."""

from __future__ import annotations

from collections.abc import Sequence


class Pages:
    """Pages of ``size`` keys, handed out from a free list, and shared by sequences that begin alike.

    ``tables[b]`` lists the pages of sequence b, as many as its keys fill. A page with several users is copied before
    one of them writes into it.
    """

    def __init__(self, sequences: int, size: int, count: int) -> None:
        self.size = size
        self.tables: list[list[int]] = [[] for _ in range(sequences)]
        self._free = list(range(count - 1, -1, -1))
        self._users = [0] * count

    @property
    def free(self) -> int:
        """How many pages nobody uses."""
        return len(self._free)

    def needed(self, before: Sequence[int], after: Sequence[int]) -> int:
        """How many free pages :meth:`grow` takes."""
        leaving: dict[int, int] = {}
        fresh = 0
        for table, start, stop in zip(self.tables, before, after, strict=True):
            fresh += -(-stop // self.size) - len(table)
            if (page := self._shared_end(table, start, stop)) is not None:
                leaving[page] = leaving.get(page, 0) + 1
        # The last user of a page need not leave it.
        return fresh + sum(min(count, self._users[page] - 1) for page, count in leaving.items())

    def grow(self, before: Sequence[int], after: Sequence[int]) -> list[tuple[int, int]]:
        """Make room for every sequence to go on from ``before`` to ``after`` keys; :attr:`free` must suffice.

        Returns the pages to copy, (source, target): those with other users, into which new keys go.
        """
        copies = []
        for table, start, stop in zip(self.tables, before, after, strict=True):
            if (page := self._shared_end(table, start, stop)) is not None:
                table[-1] = self._take()
                self._users[page] -= 1
                copies.append((page, table[-1]))
            while len(table) * self.size < stop:
                table.append(self._take())
        return copies

    def shrink(self, sequence: int, length: int) -> None:
        """Give back what ``length`` keys of a sequence do not fill."""
        table = self.tables[sequence]
        while len(table) > -(-length // self.size):
            self._leave(table.pop())

    def reorder(self, index: Sequence[int]) -> None:
        """Let sequence b go on from the pages of sequence ``index[b]``."""
        taken = [list(self.tables[source]) for source in index]
        for table in taken:
            for page in table:
                self._users[page] += 1
        for table in self.tables:
            for page in table:
                self._leave(page)
        self.tables = taken

    def hold(self, tables: Sequence[Sequence[int]]) -> None:
        """Begin anew with these tables, whose page numbers :attr:`count` bounds."""
        self.tables = [list(table) for table in tables]
        self._users = [0] * self.count
        for table in self.tables:
            for page in table:
                self._users[page] += 1
        self._free = [page for page in range(self.count - 1, -1, -1) if not self._users[page]]

    @property
    def count(self) -> int:
        """How many pages there are."""
        return len(self._users)

    def _shared_end(self, table: list[int], start: int, stop: int) -> int | None:
        """The page in which keys from ``start`` on go beside older ones, if others use it too."""
        if stop == start or start % self.size == 0 or self._users[table[-1]] == 1:
            return None
        return table[-1]

    def _take(self) -> int:
        page = self._free.pop()
        self._users[page] = 1
        return page

    def _leave(self, page: int) -> None:
        self._users[page] -= 1
        if self._users[page] == 0:
            self._free.append(page)

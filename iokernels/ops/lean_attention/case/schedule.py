"""How the Triton kernels of lean_attention divide the keys, in plain Python: the twin of ``triton/lean``'s schedule.

An *item* is a tile of rows that read the same keys: a sequence, a key head and a row tile of its group. Items of a
sequence stand one after the other, sequences likewise, and the tiles of all items form one line, of which every block
takes an equal share.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple


class Segment(NamedTuple):
    """The tiles ``start`` to ``stop`` of an item, which has ``tiles``, in the share of a block."""

    block: int
    item: int
    start: int
    stop: int
    tiles: int

    @property
    def whole(self) -> bool:
        """Whether the block has all of the item, and writes its result."""
        return self.stop - self.start == self.tiles


def first_tile(length: int, rows: int, window_left: int, block_n: int) -> int:
    """The first tile of keys that any of the last ``rows`` positions of a sequence sees."""
    return max(length - rows - window_left, 0) // block_n if window_left >= 0 else 0


def tiles_of(length: int, rows: int, window_left: int, block_n: int) -> int:
    """Tiles of an item: at least one, so that a sequence without keys has a block that writes its result."""
    return max(-(-length // block_n) - first_tile(length, rows, window_left, block_n), 1)


def parts(items: Sequence[int], blocks: int, least: int, most_parts: int) -> int:
    """How many of ``blocks`` share the line of ``items`` (the tiles of each): a share has at least ``least`` tiles,
    and at least a ``most_parts``-th of the longest item."""
    share = max(-(-max(items, default=0) // most_parts), least)
    return max(min(blocks, sum(items) // share), 1)


def share(block: int, total: int, parts: int) -> range:
    """The tiles of one block: the first ``total % parts`` blocks have one more than the others."""
    each, more = divmod(total, parts)
    start = block * each + min(block, more)
    return range(start, start + each + (block < more))


def segments(items: Sequence[int], parts: int) -> Iterator[Segment]:
    """What every block does, block after block: its share, cut where an item ends."""
    total = sum(items)
    item, begin = 0, 0
    for block in range(parts):
        mine = share(block, total, parts)
        tile = mine.start
        while tile < mine.stop:
            stop = min(begin + items[item], mine.stop)
            yield Segment(block, item, tile - begin, stop - begin, items[item])
            tile = stop
            if tile == begin + items[item]:
                begin += items[item]
                item += 1

"""How many bytes the Triton kernels of lean_attention should request from global memory: the model of their schedules.

Counted as a thread block requests them: each address once a load instruction, whatever the caches serve. The model is
exact, with every option; a test holds it to what the tracer counts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from iokernels.ops.lean_attention.triton.tuning import Config
from iokernels.testing.case.accounts import Account, Bytes

from .schedule import first_tile, parts, segments, tiles_of

_NUMBER = 4  # bytes of a length, a page number, a counter, an lse, a factor, and an element of a partial result


@dataclass(frozen=True)
class Problem:
    """One call. ``lengths`` are the keys of the sequences.

    The host decides, without knowing lengths: ``block_m`` rows make a row tile, and ``part_tiles`` tiles a part of a
    split item, each of the call itself and of the pass over a prefix; an item has ``most_tiles`` at most; a share of
    the lean schedule has ``least`` tiles, and an item about ``most_parts`` shares at most.
    """

    lengths: tuple[int, ...]
    rows: int
    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    itemsize: int
    cache_itemsize: int
    window_left: int = -1
    page: int = 0
    prefix: int = 0
    head_scales: bool = False
    key_scales: bool = False
    sinks: bool = False
    block_m: tuple[int, int] = (16, 16)
    part_tiles: tuple[int, int] = (1, 1)
    most_tiles: int = 1
    least: int = 1
    most_parts: int = 1

    @property
    def pair(self) -> int:
        """Bytes of one key and value, and of their own factors."""
        return self.cache_itemsize * (self.head_dim + self.value_dim) + self.key_scales * 2 * _NUMBER

    @property
    def partial(self) -> int:
        """Bytes of one row of a partial result."""
        return _NUMBER * (self.value_dim + 2)

    @property
    def per_segment(self) -> int:
        """Bytes of the factors that a block reads when it turns to an item."""
        return self.head_scales * 2 * _NUMBER

    @property
    def group_rows(self) -> int:
        """Rows of one sequence that read the keys of one head."""
        return self.heads // self.kv_heads * self.rows

    def first_key(self, length: int) -> int:
        """The first key that a sequence of ``length`` reads."""
        return max(length - self.rows - self.window_left, 0) if self.window_left >= 0 else 0

    def seen_of_prefix(self, readers: range) -> range:
        """The keys of the prefix that are read for rows of the whole batch: all from the first that one sees."""
        if self.window_left < 0:
            return range(self.prefix)
        nearest = min(self.lengths[reader // self.group_rows] - self.rows + reader % self.rows for reader in readers)
        return range(max(self.prefix + nearest - self.window_left, 0), self.prefix)

    def row_tiles(self, of_prefix: bool = False) -> list[range]:
        """The rows of every row tile of a key head."""
        count = self.group_rows * (len(self.lengths) if of_prefix else 1)
        size = self.block_m[of_prefix]
        return [range(first, min(first + size, count)) for first in range(0, count, size)]


def keys_read(problem: Problem, length: int, start: int, stop: int, config: Config) -> int:
    """Bytes of the tiles ``start`` to ``stop`` of one head of a sequence, and of the numbers of their pages."""
    first, last = max(start * config.block_n, problem.first_key(length)), min(stop * config.block_n, length)
    if last <= first:
        return 0
    table = 0
    if problem.page:
        # Each tile asks for the numbers of its own pages.
        for tile in range(start, stop):
            begin, end = max(tile * config.block_n, first), min((tile + 1) * config.block_n, last)
            if begin < end:
                table += (end - 1) // problem.page - begin // problem.page + 1
    return (last - first) * problem.pair + table * _NUMBER


def result(problem: Problem, rows: range) -> Bytes:
    """Finishing the item of ``rows``: the prefix's result and the sinks of its heads read, out and lse written."""
    read = 0
    if problem.prefix:
        read += len(rows) * _NUMBER * (problem.value_dim + 1)
    if problem.sinks:
        read += problem.itemsize * len({row // problem.rows for row in rows})
    return Bytes(read, len(rows) * (problem.value_dim * problem.itemsize + _NUMBER))


def items_of(problem: Problem, block_n: int) -> Iterator[tuple[int, range, int, int]]:
    """(length, rows, first tile, tiles) of every item, in the order of the line."""
    for length in problem.lengths:
        start = first_tile(length, problem.rows, problem.window_left, block_n)
        tiles = tiles_of(length, problem.rows, problem.window_left, block_n)
        for _ in range(problem.kv_heads):
            for rows in problem.row_tiles():
                yield length, rows, start, tiles


def grid(problem: Problem, config: Config) -> int:
    """Blocks of the lean kernel."""
    items = len(problem.lengths) * problem.kv_heads * len(problem.row_tiles())
    return min(config.blocks, items * problem.most_tiles)


def own_floor(problem: Problem) -> Bytes:
    """Each row of q, each visible key of the sequences' own, each length and factor read once, the result written."""
    count = len(problem.lengths) * problem.heads * problem.rows
    read = count * problem.head_dim * problem.itemsize + _NUMBER * len(problem.lengths)
    read += problem.head_scales * problem.kv_heads * 2 * _NUMBER + problem.sinks * problem.heads * problem.itemsize
    read += problem.prefix and count * _NUMBER * (problem.value_dim + 1)
    for length in problem.lengths:
        first = min(problem.first_key(length), length)
        read += (length - first) * problem.pair * problem.kv_heads
        if problem.page and length > first:
            read += _NUMBER * ((length - 1) // problem.page - first // problem.page + 1)
    return Bytes(read, count * (problem.value_dim * problem.itemsize + _NUMBER))


def lean(problem: Problem, config: Config) -> Account:
    """Keys once for each row tile; q once a segment; partial results, written and read, where an item is cut."""
    items = list(items_of(problem, config.block_n))
    shared_by = parts([tiles for *_, tiles in items], grid(problem, config), problem.least, problem.most_parts)
    # Every block adds up all lengths, and one with a share searches them once more.
    read = (grid(problem, config) + shared_by) * _NUMBER * len(problem.lengths)
    written = 0
    for segment in segments([tiles for *_, tiles in items], shared_by):
        length, rows, start, _ = items[segment.item]
        read += _NUMBER + problem.per_segment + len(rows) * problem.head_dim * problem.itemsize
        read += keys_read(problem, length, start + segment.start, start + segment.stop, config)
        if not segment.whole:
            # Its partial result, which the last to arrive reads, and the counter, which an atomic reads and writes.
            read += len(rows) * problem.partial + _NUMBER
            written += len(rows) * problem.partial + _NUMBER
        if segment.stop == segment.tiles:
            finished = result(problem, rows)
            read += finished.read
            written += finished.written + (0 if segment.whole else _NUMBER)
    return Account("fwd", own_floor(problem), Bytes(read, written))


def split(problem: Problem, config: Config) -> dict[str, Account]:
    """The parts of every item, and the kernel that combines those of items that have several."""
    most_parts = -(-problem.most_tiles // problem.part_tiles[0])
    read = written = merge_read = merge_written = items = 0
    for length, rows, start, count in items_of(problem, config.block_n):
        items += 1
        parts_of_item = -(-count // problem.part_tiles[0])
        for part in range(parts_of_item):
            first = part * problem.part_tiles[0]
            last = min(first + problem.part_tiles[0], count)
            read += problem.per_segment + len(rows) * problem.head_dim * problem.itemsize
            read += keys_read(problem, length, start + first, start + last, config)
        finished = result(problem, rows)
        if parts_of_item == 1:
            read += finished.read
            written += finished.written
        else:
            written += parts_of_item * len(rows) * problem.partial
            merge_read += finished.read + parts_of_item * len(rows) * problem.partial
            merge_written += finished.written
    floor = own_floor(problem)
    read += items * most_parts * _NUMBER
    found = {"lean_attention_split_kernel": Account("fwd", floor, Bytes(read, written))}
    if most_parts > 1:
        merged = Bytes(merge_read + items * _NUMBER, merge_written)
        once = Bytes(merge_read + len(problem.lengths) * _NUMBER, merge_written)
        found["lean_attention_combine_kernel"] = Account("fwd", once, merged)
    return found


def prefix(problem: Problem, config: Config) -> dict[str, Account]:
    """The pass over a common prefix: its keys once for every BLOCK_M rows of the whole batch."""
    tiles = -(-problem.prefix // config.block_n)
    part_tiles = problem.part_tiles[1]
    most_parts = max(-(-tiles // part_tiles), 1)
    read = written = merge_read = merge_written = 0
    for _ in range(problem.kv_heads):
        for rows in problem.row_tiles(of_prefix=True):
            sequences = len({row // problem.group_rows for row in rows})
            seen = problem.seen_of_prefix(rows)
            for part in range(most_parts):
                read += sequences * _NUMBER + problem.per_segment
                read += len(rows) * problem.head_dim * problem.itemsize
                first, last = part * part_tiles, min((part + 1) * part_tiles, tiles)
                length = min(last * config.block_n, seen.stop) - max(first * config.block_n, seen.start)
                read += max(length, 0) * problem.cache_itemsize * (problem.head_dim + problem.value_dim)
            result_bytes = len(rows) * _NUMBER * (problem.value_dim + 1)
            if most_parts == 1:
                written += result_bytes
            else:
                written += most_parts * len(rows) * problem.partial
                merge_read += most_parts * len(rows) * problem.partial
                merge_written += result_bytes
    count = len(problem.lengths) * problem.heads * problem.rows
    keys = problem.kv_heads * problem.prefix * problem.cache_itemsize * (problem.head_dim + problem.value_dim)
    once = count * problem.head_dim * problem.itemsize + keys + _NUMBER * len(problem.lengths)
    once += problem.head_scales * problem.kv_heads * 2 * _NUMBER
    floor = Bytes(once, count * _NUMBER * (problem.value_dim + 1))
    found = {"lean_attention_split_kernel": Account("fwd", floor, Bytes(read, written))}
    if most_parts > 1:
        merged = Bytes(merge_read, merge_written)
        found["lean_attention_combine_kernel"] = Account("fwd", merged, merged)
    return found


def accounts(problem: Problem, config: Config, stream_k: bool) -> dict[str, Account]:
    """Every kernel of a call by name; where a kernel runs over the prefix and over the rest, both together."""
    if not problem.lengths or not problem.heads:
        return {}
    found = prefix(problem, config) if problem.prefix else {}
    own = {"lean_attention_kernel": lean(problem, config)} if stream_k else split(problem, config)
    for name, account in own.items():
        before = found.get(name)
        found[name] = account if before is None else Account(
            "fwd", _sum(before.floor, account.floor), _sum(before.model, account.model)
        )  # fmt: skip
    return found


def _sum(one: Bytes, other: Bytes) -> Bytes:
    return Bytes(one.read + other.read, one.written + other.written)

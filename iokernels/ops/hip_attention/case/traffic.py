"""What the selection kernels should move: a model by block of queries, stage and tile of chunks.

It is exact while every stage but the last keeps all its chunks (up to 8192 keys, with the published stages): what a
stage reads then depends on shapes alone. Beyond, which chunks go on depends on the data, and the model takes them for
whole: a list may have one chunk that the edge of the window cuts, and one that the sink does.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from iokernels.ops.block_sparse_attention.options import packed_heads
from iokernels.ops.block_sparse_attention.triton.tuning import Config
from iokernels.ops.hip_attention.options import Region, Stage, block_end, list_heads, searched_heads
from iokernels.ops.hip_attention.triton.tuning import SelectConfig
from iokernels.testing.case.accounts import Account, Bytes


class Call(NamedTuple):
    """What the model needs to know of a call."""

    batch: int
    q_heads: int
    kv_heads: int
    q_len: int
    kv_len: int
    width: int
    itemsize: int
    region: Region

    @property
    def searched(self) -> int:
        """Heads that are searched each by itself."""
        return searched_heads(self.region.heads, self.q_heads, self.kv_heads)

    @property
    def lists(self) -> int:
        """Lists of a block of queries."""
        return list_heads(self.region.heads, self.q_heads, self.kv_heads)

    @property
    def blocks(self) -> int:
        """Blocks of queries."""
        return -(-self.q_len // self.region.block_q)

    def rows(self, block: int) -> int:
        """Query rows of a block, of the heads that a searched head stands for."""
        held = min((block + 1) * self.region.block_q, self.q_len) - block * self.region.block_q
        return held * (self.q_heads // self.searched)

    def means(self, stage: Stage) -> int:
        """Rows of a list as a stage sees them: means of neighbours."""
        return -(-min(self.region.block_q, self.q_len) // stage.stride_q) * (self.q_heads // self.searched)


class Visit(NamedTuple):
    """What a stage does for one block of queries."""

    stage: Stage
    block: int
    alive: list[bool]  # which candidates are searched; those past the end of the list that is divided are not in it
    slots: int  # candidates that there is room for
    kept: int  # entries that the list it makes has room for
    before: int  # those of the list that is divided; 0 in the first stage

    @property
    def ratio(self) -> int:
        """Candidates that an entry of the list that is divided becomes."""
        return self.stage.parent // self.stage.chunk if self.before else 1


def visits(call: Call, stages: Sequence[Stage]) -> Iterator[Visit]:
    """All stages, all blocks of queries."""
    listed: list[list[int]] | None = None
    before = 0
    for stage in stages:
        ratio = stage.parent // stage.chunk if listed is not None else 1
        slots = before * ratio if listed is not None else most_slots(call, stage.chunk)
        kept = min(stage.slots, slots)
        made: list[list[int]] = []
        for block in range(call.blocks):
            end = block_end(block, call.q_len, call.kv_len, call.region)
            chunks = (
                [parent * ratio + part for parent in listed[block] for part in range(ratio)]
                if listed is not None
                else list(range(slots))
            )
            alive = [max(c * stage.chunk, call.region.sink) < min((c + 1) * stage.chunk, end) for c in chunks]
            yield Visit(stage, block, alive, slots, kept, before)
            made.append([c for c, ok in zip(chunks, alive, strict=True) if ok][-kept:])
        listed, before = made, kept


def stage_accounts(
    call: Call, stages: Sequence[Stage], stage_config: SelectConfig, searches: dict[int, int]
) -> tuple[Account, Account]:
    """The accounts of the search and of the choice, over all stages. ``searches`` receives the keys that the search
    of a block of queries looks at."""
    row = call.width * call.itemsize
    floor, search, choice = 0, [0, 0], [0, 0]  # read, written
    furthest = 0
    for visit in visits(call, stages):
        furthest = 0 if visit.block == 0 else furthest
        read, keys = _search_bytes(call, stage_config, visit)
        search[0] += call.batch * call.searched * read
        search[1] += call.batch * call.searched * 4 * visit.slots
        searches[visit.block] = searches.get(visit.block, 0) + keys
        floor += searched_floor(call, visit) + call.batch * call.kv_heads * max(keys - furthest, 0) * row
        furthest = max(furthest, keys)
        pooled = call.searched // call.lists
        choice[0] += call.batch * call.lists * 4 * (visit.slots * pooled + visit.before)
        choice[1] += call.batch * call.lists * (4 * min(visit.kept, sum(visit.alive)) + 4)
    return (
        Account("fwd", Bytes(min(floor, search[0]), search[1]), Bytes(*search)),
        Account("fwd", Bytes(*choice), Bytes(*choice)),
    )


def searched_floor(call: Call, visit: Visit) -> int:
    """What a block of queries cannot but read of rows and lists, as if all looked at the same keys: the rows of a stage
    with its first block, and the list that is divided."""
    rows = call.batch * call.q_heads * call.q_len * call.width * call.itemsize if visit.block == 0 else 0
    return rows + (call.batch * call.lists * (4 * visit.before + 4) if visit.before else 0)


def _search_bytes(call: Call, config: SelectConfig, visit: Visit) -> tuple[int, int]:
    """Bytes that the thread blocks of one list read, and keys that they look at."""
    row, steps = call.width * call.itemsize, visit.stage.chunk.bit_length() - 1
    loads = 1 if call.means(visit.stage) <= config.block_r else steps
    read, keys = 0, 0
    for first in range(0, visit.slots, config.block_c):
        mine = visit.alive[first : min(first + config.block_c, visit.slots)]
        if visit.before:
            # The count, and each parent once.
            read += 4 + 4 * len({(first + slot) // visit.ratio for slot in range(len(mine))})
        if any(mine):
            read += loads * call.rows(visit.block) * row + 2 * steps * sum(mine) * row
            keys += 2 * steps * sum(mine)
    return read, keys


def listed_blocks(call: Call, block_k: int, most: int) -> list[int]:
    """How many blocks the list of each block of queries names."""
    found = []
    for block in range(call.blocks):
        end = block_end(block, call.q_len, call.kv_len, call.region)
        there = max(-(-end // block_k) - call.region.sink // block_k, 0) if end > call.region.sink else 0
        found.append(min(there, most))
    return found


def attention_accounts(call: Call, value_dim: int, block_k: int, most: int, config: Config) -> dict[str, Account]:
    """The account of block-sparse attention to what was selected: each listed key once for every tile of rows.

    Exact where no listed block reaches into the sink or the latest keys of a tile: a sink of whole blocks, and a window
    longer than a block of queries and a block of keys.
    """
    region, counts = call.region, listed_blocks(call, block_k, most)
    packed = packed_heads(call.q_heads, call.kv_heads, call.lists)
    packs, rows = call.q_heads // packed, call.q_len if call.blocks == 1 else region.block_q
    keys, entries, tiles, furthest = 0, 0, 0, 0
    for block, count in enumerate(counts):
        own = min(rows, call.q_len - block * rows) * packed
        for first in range(0, own, config.block_m):
            used = min(config.block_m, own - first)
            start, last = (call.kv_len - call.q_len + block * rows + row // packed for row in (first, first + used - 1))
            stop = min(max(last + 1, 0), call.kv_len) if region.causal else call.kv_len
            sink = min(region.sink, stop)
            recent = max(min(last + 1, call.kv_len) - max(start - region.window + 1, sink), 0) if region.window else 0
            read = min(count * block_k, max(stop - sink, 0)) + sink + recent
            keys, entries, tiles = keys + read, entries + count, tiles + 1
            furthest = max(furthest, read)
    lists = call.batch * packs
    queries, pair = (call.itemsize * width for width in (call.width, call.width + value_dim))
    all_rows = call.batch * call.q_heads * call.q_len
    written = all_rows * (value_dim * call.itemsize + 4)
    partials = config.parts * all_rows * (value_dim + 2) * 4
    model = config.parts * all_rows * queries + lists * (keys * pair + 4 * (entries + config.parts * tiles))
    floor = (
        all_rows * queries
        + call.batch * call.kv_heads * furthest * pair
        + call.batch * call.lists * 4 * (sum(counts) + len(counts))
    )
    found = {
        "block_sparse_fwd_kernel": Account(
            "fwd", Bytes(min(floor, model), written), Bytes(model, written if config.parts == 1 else partials)
        )
    }
    if config.parts > 1:
        merge = Bytes(partials, written)
        found["block_sparse_combine_kernel"] = Account("fwd", merge, merge)
    return found


def most_slots(call: Call, chunk: int) -> int:
    """Chunks that the first stage scores for every block of queries."""
    end = call.kv_len - call.region.window if call.region.causal else call.kv_len
    return max(-(-end // chunk), 1)


def page_accounts(call: Call, page: int, slots: int, config: SelectConfig) -> dict[str, Account]:
    """The accounts of Quest: bounds, scores of pages, and the choice."""
    row = call.width * call.itemsize
    pages, scored = -(-call.kv_len // page), most_slots(call, page)
    bounds = Bytes(call.batch * call.kv_heads * call.kv_len * row, 2 * call.batch * call.kv_heads * pages * row)
    read, furthest, written = 0, 0, 0
    for block in range(call.blocks):
        end = block_end(block, call.q_len, call.kv_len, call.region)
        alive = [p * page < end and (p + 1) * page > call.region.sink for p in range(scored)]
        furthest = max(furthest, sum(alive))
        for first in range(0, scored, config.block_c):
            mine = alive[first : first + config.block_c]
            if any(mine):
                read += call.rows(block) * row + 2 * sum(mine) * row
        written += 4 * min(slots, sum(alive)) + 4
    scores = call.batch * call.searched * call.blocks * scored * 4
    floor = call.batch * (call.q_heads * call.q_len * row + 2 * call.kv_heads * furthest * row)
    choice = Bytes(scores, call.batch * call.lists * written)
    return {
        "hip_attention_bounds_kernel": Account("fwd", bounds, bounds),
        "hip_attention_pages_kernel": Account(
            "fwd", Bytes(floor, scores), Bytes(call.batch * call.searched * read, scores)
        ),
        "hip_attention_best_kernel": Account("fwd", choice, choice),
    }

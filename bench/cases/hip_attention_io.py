"""What the selection kernels should move: a model by block of queries, stage and tile of chunks.

It is exact while every stage but the last keeps all its chunks (up to 8192 keys, with the published stages): what a
stage reads then depends on shapes alone. Beyond, which chunks go on depends on the data, and the model takes them for
whole: a list may have one chunk that the edge of the window cuts, and one that the sink does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from iokernels.bench.accounts import Account, Bytes
from iokernels.ops.hip_attention.select_options import Region, Stage, block_end, list_heads, searched_heads
from iokernels.ops.hip_attention.tuning import SelectConfig


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


def stage_accounts(
    call: Call, stages: Sequence[Stage], stage_config: SelectConfig, searches: dict[int, int]
) -> tuple[Account, Account]:
    """The accounts of the search and of the choice, over all stages. ``searches`` receives the keys that the search
    of a block of queries looks at."""
    row = call.width * call.itemsize
    search, choice = [0, 0, 0], [0, 0, 0]  # floor read, model read, written
    # What each block of queries lists, and so how many slots the next stage has.
    listed: list[list[int]] | None = None
    slots_before = 0
    for stage in stages:
        ratio = stage.parent // stage.chunk if listed is not None else 1
        slots = slots_before * ratio if listed is not None else most_slots(call, stage.chunk)
        kept = min(stage.slots, slots)
        made: list[list[int]] = []
        furthest = 0
        for block in range(call.blocks):
            end = block_end(block, call.q_len, call.kv_len, call.region)
            chunks = (
                [parent * ratio + part for parent in listed[block] for part in range(ratio)]
                if listed is not None
                else list(range(slots))
            )
            alive = [max(c * stage.chunk, call.region.sink) < min((c + 1) * stage.chunk, end) for c in chunks]
            read, keys = _search_bytes(call, stage, stage_config, alive, slots, ratio, listed is not None, block)
            search[1] += call.batch * call.searched * read
            search[2] += call.batch * call.searched * 4 * slots
            furthest = max(furthest, keys)
            searches[block] = searches.get(block, 0) + keys
            found = [c for c, ok in zip(chunks, alive, strict=True) if ok]
            made.append(found[-kept:])
            pooled = call.searched // call.lists
            parents = 4 * slots_before if listed is not None else 0
            choice[1] += call.batch * call.lists * (4 * slots * pooled + parents)
            choice[2] += call.batch * call.lists * (4 * min(kept, len(found)) + 4)
        numbers = call.batch * call.lists * call.blocks * (4 * slots_before + 4) if listed is not None else 0
        # As if all blocks of queries looked at the same keys.
        search[0] += call.batch * (call.q_heads * call.q_len * row + call.kv_heads * furthest * row) + numbers
        listed, slots_before = made, kept
    choice[0] = choice[1]
    return (
        Account("fwd", Bytes(min(search[0], search[1]), search[2]), Bytes(search[1], search[2])),
        Account("fwd", Bytes(choice[0], choice[2]), Bytes(choice[1], choice[2])),
    )


def _search_bytes(
    call: Call,
    stage: Stage,
    config: SelectConfig,
    alive: list[bool],
    slots: int,
    ratio: int,
    is_listed: bool,
    block: int,
) -> tuple[int, int]:
    """Bytes that the thread blocks of one list read, and keys that they look at."""
    row, steps = call.width * call.itemsize, stage.chunk.bit_length() - 1
    means = -(-min(call.region.block_q, call.q_len) // stage.stride_q) * (call.q_heads // call.searched)
    loads = 1 if means <= config.block_r else steps
    read, keys = 0, 0
    for first in range(0, slots, config.block_c):
        mine = alive[first : min(first + config.block_c, slots)]
        if is_listed:
            # The count, and each parent once.
            read += 4 + 4 * len({(first + slot) // ratio for slot in range(len(mine))})
        if any(mine):
            read += loads * call.rows(block) * row + 2 * steps * sum(mine) * row
            keys += 2 * steps * sum(mine)
    return read, keys


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

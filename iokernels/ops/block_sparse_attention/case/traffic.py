"""The bytes of block_sparse_attention's Triton kernels, from the very lists that a call gets, and the pairs of rows and
keys that see each other.

What blocks request depends on the lists: which blocks a tile of rows reads, and which rows a tile of keys. The lists of
a shape are drawn with a fixed seed (:func:`.block_sparse_attention_shapes.index_of`), so the model is exact for them.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import gcd

import torch
from torch import Tensor

from iokernels.ops.block_sparse_attention.index.transposed import transposed_lists
from iokernels.ops.block_sparse_attention.options import packed_heads
from iokernels.ops.block_sparse_attention.triton.tuning import DKV, DQ, FWD, Config
from iokernels.testing.case.accounts import Account, Bytes, Configs
from iokernels.testing.case.shape import Shape

from .shapes import index_of, list_heads, query_blocks

_STATISTIC = 4  # bytes of an lse or a delta
_ENTRY = 4  # bytes of an entry of a list, or of a count


@dataclass(frozen=True)
class Problem:
    """One call: its shape, its lists, and what the launcher makes of the shape."""

    shape: Shape
    size: int

    @property
    def packed(self) -> int:
        """Query heads that share a list."""
        return packed_heads(self.shape.h, self.shape.hkv, list_heads(self.shape))

    @property
    def packs(self) -> int:
        """Such groups of heads."""
        return self.shape.h // self.packed

    @property
    def rows(self) -> int:
        """Rows of a query block."""
        return self.shape.n if query_blocks(self.shape) == 1 else self.shape.bq

    @property
    def shift(self) -> int:
        """Position of the first row."""
        return self.shape.nk - self.shape.n

    @property
    def all_rows(self) -> int:
        """Of all heads and sequences."""
        return self.shape.b * self.shape.h * self.shape.n

    @property
    def widths(self) -> int:
        """Bytes of a key and its value."""
        return self.size * (self.shape.d + self.shape.dv)


def _within(first: Tensor, block: int, start: Tensor, stop: Tensor) -> Tensor:
    """How many of the keys ``[first, first + block)`` lie in ``[start, stop)``."""
    return (torch.minimum(first + block, stop) - torch.maximum(first, start)).clamp(min=0)


def _listed_keys(shape: Shape, start: Tensor, stop: Tensor) -> Tensor:
    """Keys within ``[start, stop)`` that each list names, with bounds [Mq, T] of T tiles a query block: [B, Hm, Mq, T].

    Ranges that end before they start hold no keys.
    """
    return _listed_keys_of(shape, slice(None), start, stop)


@lru_cache(maxsize=64)
def pairs(shape: Shape) -> int:
    """Pairs of a row and a key that see each other, over all heads and sequences."""
    blocks = query_blocks(shape)
    rows = shape.n if blocks == 1 else shape.bq
    row = torch.arange(blocks)[:, None] * rows + torch.arange(rows)
    position = torch.where(row < shape.n, row + shape.nk - shape.n, -1)
    exists = row < shape.n
    last = (position + 1).clamp(0, shape.nk)
    sink = torch.full_like(position, shape.sink).clamp(max=shape.nk)
    behind = (position + 1 - shape.window).clamp(min=0)
    recent = (last - torch.maximum(behind, sink)).clamp(min=0) if shape.window else torch.zeros_like(last)
    if shape.causal:
        sink = torch.minimum(sink, last)
    always = torch.where(exists, sink + recent, 0).sum() * shape.b * list_heads(shape)
    listed = 0
    step = max(2**22 // max(rows * index_of(shape, 0).indices[0, :, 0].numel() * shape.b, 1), 1)
    for start in range(0, blocks, step):
        some = slice(start, start + step)
        stop = behind[some] if shape.causal else torch.full_like(behind[some], shape.nk)
        found = _listed_keys_of(shape, some, sink[some], stop)
        if not shape.causal:
            found = found - _listed_keys_of(shape, some, torch.maximum(behind[some], sink[some]), last[some])
        listed += int(torch.where(exists[some], found, 0).sum())
    return (int(always) + listed) * (shape.h // list_heads(shape))


def _listed_keys_of(shape: Shape, some: slice, start: Tensor, stop: Tensor) -> Tensor:
    """:func:`_listed_keys` of some query blocks."""
    index = index_of(shape, 0)
    ids, counts = index.indices[:, :, some].long(), index.counts[:, :, some]
    slots = torch.arange(ids.shape[3])
    first = torch.where(slots < counts[..., None], ids * shape.bk, shape.nk)
    found = _within(first[:, :, :, None], shape.bk, start[..., None], stop[..., None].clamp(max=shape.nk)).sum(-1)
    return torch.where(counts[..., None] < 0, (stop.clamp(max=shape.nk) - start).clamp(min=0), found)


@dataclass(frozen=True)
class Tiles:
    """Sums over the tiles of rows of a kernel: how many there are, and the keys and entries that they read."""

    count: int
    keys: int
    entries: int


@lru_cache(maxsize=256)
def tiles_of(problem: Problem, block_m: int, block_n: int) -> Tiles:
    """The walks of all tiles of BLOCK_M rows over their keys."""
    shape, rows, packed = problem.shape, problem.rows, problem.packed
    block = torch.arange(query_blocks(shape))[:, None]
    tile = torch.arange(-(-rows * packed // block_m))
    own = (shape.n - block * rows).clamp(max=rows) * packed
    used = (own - tile * block_m).clamp(max=block_m)
    exists = used > 0
    first = problem.shift + block * rows + tile * block_m // packed
    last = problem.shift + block * rows + (tile * block_m + used - 1) // packed
    stop = (last + 1).clamp(0, shape.nk) if shape.causal else torch.full_like(last, shape.nk)
    sink = torch.full_like(stop, shape.sink).minimum(stop)
    recent = torch.zeros_like(stop)
    if shape.window:
        recent = ((last + 1).clamp(max=shape.nk) - torch.maximum(first - shape.window + 1, sink)).clamp(min=0)
    copies = problem.packs // list_heads(shape)
    listed = torch.where(exists, _listed_keys(shape, sink, stop), 0).sum() * copies
    always = torch.where(exists, sink + recent, 0).sum() * shape.b * problem.packs
    entries = index_of(shape, 0).counts.clamp(min=0).long()[..., None] * exists
    steps = max(shape.bk // block_n, 1)
    return Tiles(
        count=int(exists.sum()) * shape.b * problem.packs,
        keys=int(listed + always),
        entries=int(entries.sum()) * copies * steps,
    )


@lru_cache(maxsize=64)
def seen_keys(problem: Problem) -> int:
    """Keys that some row sees, over key heads and sequences."""
    shape, index = problem.shape, index_of(problem.shape, 0)
    block = torch.arange(query_blocks(shape))
    last = ((block + 1) * problem.rows).clamp(max=shape.n) - 1 + problem.shift
    stop = (last + 1).clamp(0, shape.nk) if shape.causal else torch.full_like(last, shape.nk)
    slots = torch.arange(index.indices.shape[3])
    first = torch.where(slots < index.counts[..., None], index.indices.long() * shape.bk, shape.nk)
    end = torch.minimum(first + shape.bk, stop[:, None]).maximum(first.clamp(max=shape.nk)).clamp(max=shape.nk)
    lists = (shape.b, list_heads(shape))
    marks = torch.zeros((*lists, shape.nk + 1), dtype=torch.int64)
    for at, sign in ((first.clamp(max=shape.nk), 1), (end, -1)):
        marks.scatter_add_(2, at.flatten(2), torch.full_like(at, sign).flatten(2))
    seen = marks.cumsum(-1)[..., : shape.nk] > 0
    key = torch.arange(shape.nk)
    most = int(stop.max()) if stop.numel() else 0
    dense = torch.where(index.counts < 0, stop, 0).amax(-1) if stop.numel() else index.counts.sum(-1)
    seen |= (key < dense[..., None]) | (key < min(shape.sink, most))
    if shape.window:
        seen |= (key > problem.shift - shape.window) & (key <= problem.shift + shape.n - 1)
    if list_heads(shape) == shape.h != shape.hkv:
        seen = seen.view(shape.b, shape.hkv, -1, shape.nk).any(2)
    return int(seen.sum()) * (shape.hkv // seen.shape[1])


def list_bytes(problem: Problem) -> int:
    """The lists, read once."""
    counts = index_of(problem.shape, 0).counts
    return _ENTRY * (counts.numel() + int(counts.clamp(min=0).sum()))


def forward(problem: Problem, config: Config) -> dict[str, Account]:
    """The forward kernel, and the one that merges its parts where a tile of rows has several."""
    shape, tiles, parts = problem.shape, tiles_of(problem, config.block_m, config.block_n), config.parts
    queries = problem.all_rows * shape.d * problem.size
    results = problem.all_rows * (shape.dv * problem.size + _STATISTIC)
    partials = parts * problem.all_rows * (shape.dv + 2) * _STATISTIC
    read = tiles.keys * problem.widths + _ENTRY * (tiles.entries + parts * tiles.count)
    floor = Bytes(queries + seen_keys(problem) * problem.widths + list_bytes(problem), results)
    model = Bytes(parts * queries + read, results if parts == 1 else partials)
    found = {f"{FWD}_kernel": Account("fwd", floor, model)}
    if parts > 1:
        merge = Bytes(partials, results)
        found["block_sparse_combine_kernel"] = Account("fwd", merge, merge)
    return found


def rows_backward(problem: Problem, config: Config) -> Account:
    """dq and delta: a tile of rows reads what the forward kernel read, and out, dO, lse."""
    shape, tiles = problem.shape, tiles_of(problem, config.block_m, config.block_n)
    statistics = _STATISTIC * problem.all_rows
    own = problem.all_rows * problem.size * (shape.d + 2 * shape.dv) + statistics * (1 + bool(shape.lse))
    written = problem.all_rows * shape.d * problem.size + statistics
    read = tiles.keys * problem.widths + _ENTRY * (tiles.entries + tiles.count)
    floor = Bytes(own + seen_keys(problem) * problem.widths + list_bytes(problem), written)
    return Account("bwd", floor, Bytes(own + read, written))


def _entries_loaded(entries: Tensor, own: int, block_m: int) -> Tensor:
    """How often entries of ``own`` rows each are read in steps of ``block_m`` rows: once, and again at each step that
    begins inside one."""
    steps = -(-entries * own // block_m)
    aligned = own // gcd(own, block_m)
    inner = (steps - 1).clamp(min=0)
    return entries + inner - inner // aligned


@lru_cache(maxsize=256)
def keys_backward(problem: Problem, block_m: int, block_n: int) -> Account:
    """dk and dv: keys once; rows as often as a tile of keys walks over them."""
    shape, index, packed = problem.shape, index_of(problem.shape, 0), problem.packed
    joined = shape.h // shape.hkv // packed
    span = max(block_n, shape.bk)
    found = transposed_lists(
        index.indices, index.counts, -(-shape.nk // shape.bk), ratio=max(block_n // shape.bk, 1), joined=joined
    )  # fmt: skip
    blocks, own = query_blocks(shape), problem.rows * packed
    in_block = (shape.n - torch.arange(blocks) * problem.rows).clamp(max=problem.rows) * packed
    # Rows of the entries up to each, so that those of a tile are a difference.
    rows = torch.nn.functional.pad(in_block[found.entries.long() % blocks].cumsum(-1), (1, 0))
    copies = shape.hkv // found.starts.shape[1]
    first = torch.arange(0, shape.nk, block_n)
    starts = found.starts.long()
    begin, end = (starts[..., at] for at in (first // span, first // span + 1))
    listed_rows = int((rows.gather(-1, end) - rows.gather(-1, begin)).sum()) * copies
    entries = int(_entries_loaded(end - begin, own, block_m).sum()) * copies
    dense = found.dense_counts.long()
    valid = torch.arange(found.dense.shape[2]) < dense[..., None]
    dense_rows = int(torch.where(valid, in_block[found.dense.long() % blocks], 0).sum()) * copies * len(first)
    dense_entries = int(_entries_loaded(dense, own, block_m).sum()) * copies * len(first)

    group = shape.h // shape.hkv
    last = (first + block_n).clamp(max=shape.nk) - 1
    row = (first - problem.shift).clamp(min=0)
    sink_row = row if shape.causal else torch.zeros_like(row)
    always = torch.where(first < shape.sink, (shape.n - sink_row).clamp(min=0), 0)
    if shape.window:
        always = always + ((last + shape.window - problem.shift).clamp(max=shape.n) - row).clamp(min=0)
    heads = shape.b * shape.hkv
    walked = listed_rows + dense_rows + int(always.sum()) * group * heads

    keys = heads * shape.nk * problem.widths
    a_row = problem.widths + 2 * _STATISTIC
    lists = _ENTRY * (2 * entries + dense_entries + 3 * heads * len(first))
    floor = keys + problem.all_rows * a_row + list_bytes(problem)
    return Account("bwd", Bytes(floor, keys), Bytes(keys + walked * a_row + lists, keys))


def accounts(shape: Shape, dtype: torch.dtype, configs: Configs) -> dict[str, Account]:
    """Every kernel that one forward and backward pass launches, by name."""
    problem = Problem(shape, dtype.itemsize)
    if problem.all_rows == 0:
        return {}
    found = forward(problem, configs[FWD])
    found[f"{DQ}_kernel"] = rows_backward(problem, configs[DQ])
    if shape.nk:
        found[f"{DKV}_kernel"] = keys_backward(problem, configs[DKV].block_m, configs[DKV].block_n)
    return found

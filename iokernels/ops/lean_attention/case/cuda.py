"""The CUDA kernel of lean_attention: its configurations, its IO account, and compiling it without a GPU.

Counted as threads request bytes: an address that is the same for a warp once for the warp.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from iokernels import autotune
from iokernels.ops.lean_attention.cuda import tuning as tuning_cuda
from iokernels.ops.lean_attention.cuda.tuning import KERNEL, Config
from iokernels.ops.lean_attention.options import capacity
from iokernels.testing.case import Compilation, Pass
from iokernels.testing.case.accounts import Account, Accounts, Bytes, Configs
from iokernels.testing.case.shape import Shape

from . import traffic as io
from .accounts import NAIVE, naive_bytes, sizes
from .compile import meta_call
from .schedule import parts, segments
from .shapes import VOCABULARY

_NUMBER = 4  # bytes of a length, a page number, a counter, an lse, a factor, and an element of a sum
_WARP = 32


@dataclass(frozen=True)
class Problem(io.Problem):
    """A call as :mod:`.traffic` has it, and the warps of a block: in its own pass, in that over a prefix."""

    warps: tuple[int, int] = (1, 1)

    @property
    def row_of_sum(self) -> int:
        """Bytes of one row of a partial result: m, l, and acc in vectors of four."""
        return _NUMBER * (2 + -(-self.value_dim // 4) * 4)

    def entry(self, rows: range, of_prefix: bool) -> int:
        """Bytes that a block reads when it turns to a segment, beside the lengths that say where it is."""
        warps = self.warps[of_prefix]
        return len(rows) * self.head_dim * self.itemsize + warps * self.head_scales * 2 * _NUMBER

    def keys(self, count: int) -> int:
        """Bytes of so many keys and values of one head, each with its factors and the number of its page."""
        return count * (self.pair + _NUMBER * (self.page > 0))

    def finished(self, rows: range) -> Bytes:
        """Writing the result of an item."""
        read = len(rows) * ((self.prefix > 0) * self.row_of_sum + self.sinks * _NUMBER)
        return Bytes(read, len(rows) * (self.value_dim * self.itemsize + _NUMBER))


def problem(shape: Shape, dtype: torch.dtype, configs: Configs) -> Problem:
    """What the model needs to know of a shape, and what the launcher decides of it."""
    from iokernels.ops.lean_attention.cuda.launch import Launch

    q, k_cache, v_cache, options = meta_call(shape, dtype)
    most = capacity(k_cache, options)
    with autotune.override(**configs):
        own = Launch(q, k_cache, v_cache, options, most)
        common = own
        if options.k_prefix is not None and options.v_prefix is not None:
            keys, values = options.k_prefix.unsqueeze(0), options.v_prefix.unsqueeze(0)
            common = Launch(q, keys, values, options, most, of_prefix=True)
    return Problem(
        **sizes(shape, dtype),
        block_m=(16 * own.row_warps, 16 * common.row_warps),
        part_tiles=(own.part_tiles, common.part_tiles),
        most_tiles=own.tiles,
        least=tuning_cuda.FEWEST_TILES,
        most_parts=tuning_cuda.MOST_PARTS,
        warps=(own.warps, common.warps),
    )


def own_pass(call: Problem, config: Config) -> Bytes:
    """Keys once for each row tile; q once a segment; partial results, written and read, where an item is cut."""
    items = list(io.items_of(call, config.block_n))
    tiles = [count for *_, count in items]
    warps, lanes = call.warps[0], call.kv_heads * len(call.row_tiles())
    read = written = 0
    if call.part_tiles[0]:
        pieces = [
            (index, start, min(start + call.part_tiles[0], count))
            for index, count in enumerate(tiles)
            for start in range(0, count, call.part_tiles[0])
        ]
        # Every block asks for the length of its sequence, to see whether the item has such a part.
        read += len(items) * -(-call.most_tiles // call.part_tiles[0]) * warps * _NUMBER
    else:
        grid = min(config.blocks, len(items) * call.most_tiles)
        shared_by = parts(tiles, grid, call.least, call.most_parts)
        found = list(segments(tiles, shared_by))
        pieces = [(segment.item, segment.start, segment.stop) for segment in found]
        # Every block adds up all lengths; one with a share searches them, 32 at a time, up to its first sequence.
        read += grid * _NUMBER * len(call.lengths) + len(pieces) * warps * _NUMBER
        first = {segment.block: segment.item // lanes for segment in reversed(found)}
        read += sum(_NUMBER * min(len(call.lengths), _WARP * (at // _WARP + 1)) for at in first.values())
    for index, start, stop in pieces:
        length, rows, first_tile, count = items[index]
        keys = min((first_tile + stop) * config.block_n, length)
        keys -= max((first_tile + start) * config.block_n, call.first_key(length))
        read += call.entry(rows, of_prefix=False) + call.keys(max(keys, 0))
        if stop - start < count:
            # The partial result, which the last to arrive reads, and the counter, which an atomic reads and writes.
            read += len(rows) * call.row_of_sum + _NUMBER
            written += len(rows) * call.row_of_sum + _NUMBER
        if stop == count:
            read += call.finished(rows).read
            written += call.finished(rows).written
    return Bytes(read, written)


def prefix_pass(call: Problem, config: Config) -> Bytes:
    """The keys of a common prefix, once for every row tile of the whole batch; the sums of all rows written."""
    tiles, each = max(-(-call.prefix // config.block_n), 1), call.part_tiles[1]
    windowed = call.window_left >= 0
    read = written = 0
    for rows in call.row_tiles(of_prefix=True) * call.kv_heads:
        count = -(-tiles // each)
        # Each warp asks for the lengths of the sequences of its 16 rows, and where there is a window of all rows.
        lengths = call.warps[1] * (16 + windowed * len(rows)) * _NUMBER
        read += count * (lengths + call.entry(rows, of_prefix=True)) + len(call.seen_of_prefix(rows)) * call.pair
        if count > 1:
            read += count * (len(rows) * call.row_of_sum + _NUMBER)
            written += count * (len(rows) * call.row_of_sum + _NUMBER)
        written += len(rows) * call.row_of_sum
    return Bytes(read, written)


def accounts(shape: Shape, dtype: torch.dtype, configs: Configs) -> dict[str, Account]:
    """The account of the kernel; of both passes together, where there are two."""
    call, config = problem(shape, dtype, configs), configs[KERNEL]
    if not call.lengths or not call.heads:
        return {}
    model, floor = own_pass(call, config), io.own_floor(call)
    if call.prefix:
        before = prefix_pass(call, config)
        model = Bytes(model.read + before.read, model.written + before.written)
        count = len(call.lengths) * call.heads * call.rows
        keys = call.kv_heads * call.prefix * call.pair
        # One kernel in two passes: what the first hands to the second is no input and no output.
        floor = Bytes(floor.read + keys - count * _NUMBER * (call.value_dim + 1), floor.written)
    return {"lean_attention_cuda_kernel": Account("fwd", floor, model)}


def configs(shape: Shape, dtype: torch.dtype) -> dict[str, Config]:
    """The configuration that the call would be launched with."""
    from iokernels.ops.lean_attention.cuda.launch import Launch

    q, k_cache, v_cache, options = meta_call(shape, dtype)
    return {KERNEL: Launch(q, k_cache, v_cache, options, capacity(k_cache, options)).config}


def launch(shape: Shape, dtype: torch.dtype, which: Pass) -> None:
    """Launch the kernel with meta tensors."""
    from iokernels.ops.lean_attention.cuda import launch as cuda

    cuda.forward(*meta_call(shape, dtype))


_LLAMA = "b=4,h=32,hkv=4,nk=4k,d=128"
_EVERYTHING = "n=3,left=256,softcap=30,sinks=1,lse=1,bnhd=1"

COMPILATION = Compilation(
    launch=launch,
    points=tuple(
        (VOCABULARY.parse(text), dtype)
        for text, dtype in (
            (f"{_LLAMA},schedule=1", torch.bfloat16),
            ("b=4,h=64,hkv=1,nk=4k,d=256,n=2,schedule=1", torch.bfloat16),
            (f"{_LLAMA},page=16,schedule=2", torch.float16),
            (f"{_LLAMA},cache=1,scales=1", torch.float16),
            (f"{_LLAMA},cache=2,scales=2,page=16", torch.bfloat16),
            (f"{_LLAMA},prefix=1k", torch.bfloat16),
            (f"b=2,h=8,hkv=2,nk=4k,d=40,dv=96,cache=2,scales=2,page=16,{_EVERYTHING}", torch.float16),
            (f"b=2,h=32,hkv=2,nk=4k,d=256,prefix=1k,cache=1,scales=1,schedule=2,{_EVERYTHING}", torch.bfloat16),
        )
    ),
)

_PLAIN = "b=3,h=4,hkv=2,nk=150,shortest=20,spare=7,d=24,dv=40"

_SHAPES = (
    (_PLAIN, torch.float16),
    ("b=35,h=2,hkv=2,nk=70,shortest=0,n=3,d=24,dv=40", torch.float16),
    ("b=2,h=4,hkv=2,nk=0,spare=9,d=24,dv=40,sinks=1", torch.float16),
    (f"{_PLAIN},n=3,left=40,sinks=1,page=16", torch.float16),
    ("b=3,h=40,hkv=2,nk=150,shortest=20,n=2,d=24,dv=40,page=6", torch.float16),
    (f"{_PLAIN},cache=1,scales=1", torch.float16),
    (f"{_PLAIN},cache=2,scales=2,page=16", torch.float16),
    (f"{_PLAIN},prefix=90,n=2,left=100", torch.float16),
    (f"{_PLAIN},schedule=2,sinks=1", torch.float16),
    (f"{_PLAIN},schedule=3", torch.float16),
)

ACCOUNTS = Accounts(
    model=accounts,
    configs=configs,
    naive_bytes=naive_bytes,
    naive=NAIVE,
    shapes=tuple((VOCABULARY.parse(text), dtype) for text, dtype in _SHAPES),
    test_configs={KERNEL: Config(block_n=32, blocks=7, stream_k=1, key_warps=2, stages=2)},
)

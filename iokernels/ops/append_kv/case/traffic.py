"""How many bytes the Triton kernel of append_kv moves: what it must, and what its thread blocks request."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from iokernels.testing.case import Pass
from iokernels.testing.case.accounts import Account, Accounts, Bytes, Configs
from iokernels.testing.case.shape import Shape

from .shapes import CACHE_DTYPES, VOCABULARY, counts, lengths


@dataclass(frozen=True)
class Call:
    """One append: ``counts[b]`` keys, of at most ``rows`` that were given, behind ``lengths[b]`` that are there.

    Widths are in elements, items in bytes; ``page`` is the keys of a page, or 0 for dense caches; ``rot`` elements of a
    key turn; ``key_scales`` and ``head_scales`` count those of k and v together.
    """

    lengths: Sequence[int]
    counts: Sequence[int]
    rows: int
    heads: int
    head_dim: int
    value_dim: int
    new_item: int
    cache_item: int
    page: int = 0
    rot: int = 0
    angle_item: int = 4
    key_scales: int = 0
    head_scales: int = 0
    counted: bool = False
    positioned: bool = False


def floor(call: Call) -> Bytes:
    """New keys and values, the angles of each position and each page number read once; what is kept written once."""
    written = sum(call.counts)
    vectors = 4 * len(call.lengths) * (1 + call.counted + call.positioned) + 4 * call.heads * call.head_scales
    return Bytes(
        read=written * (_row(call, call.new_item) + call.rot * call.angle_item) + vectors + 4 * _pages(call, call.rows),
        written=written * _row(call, call.cache_item) + 4 * written * call.heads * call.key_scales,
    )


def model(call: Call, block_rows: int) -> Bytes:
    """The thread block of ``block_rows`` rows of one head reads its own length, page numbers, angles and scale."""
    written = sum(call.counts)
    blocks = len(call.lengths) * call.heads * -(-call.rows // block_rows)
    vectors = 4 * blocks * (1 + call.counted + call.positioned + call.head_scales)
    angles = written * call.heads * call.rot * call.angle_item
    return Bytes(
        read=written * _row(call, call.new_item) + angles + vectors + 4 * call.heads * _pages(call, block_rows),
        written=floor(call).written,
    )


def _row(call: Call, item: int) -> int:
    """Bytes of a position: all heads' key and value."""
    return call.heads * (call.head_dim + call.value_dim) * item


def _pages(call: Call, block_rows: int) -> int:
    """How many page numbers blocks of so many rows read for one head."""
    if not call.page:
        return 0
    read = 0
    for length, count in zip(call.lengths, call.counts, strict=True):
        for start in range(0, count, block_rows):
            stop = min(start + block_rows, count)
            read += (length + stop - 1) // call.page - (length + start) // call.page + 1
    return read


NAIVE = "turned keys to memory and back, divided by their scales to memory and back, then a copy into the caches"


def call_of(shape: Shape, dtype: torch.dtype) -> Call:
    """What the model needs to know of a call."""
    cached = CACHE_DTYPES[shape.cache] or dtype
    return Call(
        lengths=lengths(shape),
        counts=counts(shape),
        rows=shape.n,
        heads=shape.h,
        head_dim=shape.d,
        value_dim=shape.dv,
        new_item=dtype.itemsize,
        cache_item=cached.itemsize,
        page=shape.page,
        rot=shape.rot,
        key_scales=2 * (shape.scales == 2),
        head_scales=2 * (shape.scales == 1),
        counted=bool(shape.ragged),
        positioned=bool(shape.positions),
    )


def floor_bytes(shape: Shape, dtype: torch.dtype, which: Pass) -> int:
    """New keys and values read once and written once, with what says where."""
    return floor(call_of(shape, dtype)).total


def accounts(shape: Shape, dtype: torch.dtype, configs: Configs) -> dict[str, Account]:
    """The account of the kernel."""
    from iokernels.ops.append_kv.triton import block_rows

    call = call_of(shape, dtype)
    return {"append_kv_kernel": Account("fwd", floor(call), model(call, block_rows(shape.n)))}


def naive_bytes(shape: Shape, dtype: torch.dtype, which: Literal["fwd", "bwd"]) -> int:
    """The bytes of :data:`NAIVE`."""
    call = call_of(shape, dtype)
    rows = sum(call.counts) * _row(call, call.new_item)
    return floor(call).total + 2 * rows * (bool(shape.rot) + bool(shape.scales))


_SHAPES = (
    ("b=2,h=2,n=1,nk=9,d=16", torch.float16),
    ("b=3,h=2,n=19,nk=21,shortest=3,d=12,dv=6,rot=8,ragged=1", torch.bfloat16),
    ("b=3,h=2,n=5,nk=13,shortest=0,d=16,page=4,rot=16,interleaved=1,positions=1", torch.float32),
    ("b=2,h=2,n=18,nk=6,d=20,dv=12,page=16,cache=2,scales=2,rot=8,bnhd=1", torch.float16),
    ("b=2,h=1,n=3,nk=6,d=16,cache=1,scales=1", torch.bfloat16),
)

ACCOUNTS = Accounts(
    model=accounts,
    configs=lambda shape, dtype: {},
    naive_bytes=naive_bytes,
    naive=NAIVE,
    shapes=tuple((VOCABULARY.parse(text), dtype) for text, dtype in _SHAPES),
    test_configs={},
)

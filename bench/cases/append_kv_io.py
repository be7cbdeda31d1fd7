"""How many bytes the Triton kernel of append_kv moves: what it must, and what its thread blocks request."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from iokernels.bench.accounts import Bytes


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

"""How lean_attention divides the keys among thread blocks: shares, parts, merging, and bits that never change.

The kernels run in Triton's interpreter with few, small tiles, so that a handful of keys is a whole schedule; on a GPU
they run natively. The twin of the schedule in plain Python is what ``iokernels io`` counts with.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, seed, settings
from torch import Tensor

from iokernels import autotune
from iokernels.ops.lean_attention.case import schedule as twin
from iokernels.ops.lean_attention.triton import launch as triton_launch
from iokernels.ops.lean_attention.triton.tuning import Config
from iokernels.ops.shared.arrivals import ARRIVALS
from iokernels.runtime import interpreter

from .calls import Call, make, prove

BLOCK_N = 16


def config(blocks: int, stream_k: int = 1) -> Any:
    """Few small tiles, whatever the call."""
    return autotune.override(lean_attention=Config(BLOCK_N, blocks, stream_k, num_warps=4, num_stages=2))


def equal(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(one, other, strict=True))


def counters_are_zero() -> bool:
    return all(not counters.any() for counters in ARRIVALS.values())


@contextmanager
def any_order(number: int) -> Iterator[None]:
    """Blocks in another order, where there is an interpreter to say so; a GPU has its own."""
    with interpreter.shuffled_blocks(number) if interpreter.active() else nullcontext():
        yield


@seed(0)
@settings(max_examples=200, deadline=None, database=None)
@given(
    items=st.lists(st.integers(1, 40), min_size=1, max_size=12),
    blocks=st.integers(1, 300),
    least=st.integers(1, 4),
    most_parts=st.integers(1, 64),
)
def test_the_twin_shares_equally(items: list[int], blocks: int, least: int, most_parts: int) -> None:
    total = sum(items)
    count = twin.parts(items, blocks, least, most_parts)
    shares = [twin.share(block, total, count) for block in range(count)]
    assert 1 <= count <= blocks
    assert [tile for share in shares for tile in share] == list(range(total))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    assert count == 1 or min(map(len, shares)) >= least

    segments = list(twin.segments(items, count))
    for item, tiles in enumerate(items):
        mine = [segment for segment in segments if segment.item == item]
        # In order, without gap or overlap, by blocks that follow each other.
        assert [tile for one in mine for tile in range(one.start, one.stop)] == list(range(tiles))
        assert [one.block for one in mine] == list(range(mine[0].block, mine[0].block + len(mine)))
        assert len(mine) <= most_parts + 1
    for block in range(count):
        parts = [segment.whole for segment in segments if segment.block == block]
        # A block has room for two partial results: of its first segment and of its last.
        assert all(parts[1:-1])


@pytest.mark.parametrize(
    ("length", "rows", "left", "expected"),
    [(0, 1, -1, (0, 1)), (1, 1, -1, (0, 1)), (16, 1, -1, (0, 1)), (17, 1, -1, (0, 2)), (100, 1, 0, (6, 1)),
     (100, 4, 15, (5, 2)), (97, 1, 16, (5, 2)), (3, 8, 2, (0, 1)), (0, 1, 5, (0, 1)), (64, 1, 0, (3, 1))],
)  # fmt: skip
def test_tiles_of_an_item(length: int, rows: int, left: int, expected: tuple[int, int]) -> None:
    assert (twin.first_tile(length, rows, left, 16), twin.tiles_of(length, rows, left, 16)) == expected


# Lengths and blocks; each item is a sequence, because there is one key head.
SCHEDULES = {
    "fewer tiles than blocks": ((33, 5), 132),
    "one block": ((70, 0, 90), 1),
    "two blocks": ((70, 0, 90), 2),
    "not divisible": ((100, 70, 33), 4),
    "exactly divisible": ((64, 64, 64), 4),
    "an item ends at a block's edge": ((64, 32, 96), 6),
    "one tile a block": ((16, 32, 48), 6),
    "one sequence across all blocks": ((230,), 7),
    "one long sequence among short ones": ((3, 300, 0, 17), 9),
    "264 blocks": ((300, 190, 5), 264),
    "empty sequences in between": ((0, 0, 40, 0, 40, 0), 3),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_schedule_gives_the_same_result(name: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lengths, blocks = SCHEDULES[name]
    monkeypatch.setattr(triton_launch, "LEAST_TILES", 1)
    items = [twin.tiles_of(length, 2, -1, BLOCK_N) for length in lengths]
    total, count = sum(items), twin.parts(items, blocks, 1, triton_launch.MOST_PARTS)
    segments = list(twin.segments(items, count))
    spread = {len(twin.share(block, total, count)) for block in range(count)}
    says = {
        "fewer tiles than blocks": total < blocks,
        "not divisible": len(spread) == 2,
        "exactly divisible": len(spread) == 1 < count,
        "an item ends at a block's edge": len(segments) == len(items) + count - 1 - 2,
        "one tile a block": total == count,
        "one sequence across all blocks": count == blocks == len(segments),
    }
    assert says.get(name, True), "the case is not what its name says"
    call = make(1, lengths, heads=4, rows=2, device=device)
    with config(blocks):
        found = prove("triton", call, schedule="lean")
        for number in range(2):
            with any_order(number):
                assert equal(found, call("triton", schedule="lean"))
    assert counters_are_zero()


def test_more_sequences_than_a_block_adds_up_at_once(device: str) -> None:
    call = make(9, (0,) * 200 + (20,) + (0,) * 55 + (40, 17), heads=1, device=device)
    with config(5):
        prove("triton", call, schedule="lean")
    assert counters_are_zero()


@pytest.mark.parametrize(
    "options",
    [
        {"heads": 6, "kv_heads": 3, "page": 5},
        {"heads": 64, "kv_heads": 1, "rows": 3},
        {"heads": 4, "kv_heads": 2, "prefix": 70, "sinks": True},
        {"heads": 4, "kv_heads": 2, "rows": 4, "window": (37, 0)},
        {"heads": 4, "kv_heads": 2, "cache_dtype": torch.int8, "scales": "key", "dtype": torch.float16},
    ],
    ids=["pages", "row tiles", "prefix", "window", "int8"],
)
@pytest.mark.parametrize("schedule", ["lean", "split"])
def test_bits_do_not_depend_on_who_comes_last(schedule: str, options: dict[str, Any], device: str) -> None:
    call = make(2, (130, 0, 70, 200), device=device, **options)
    with config(7, stream_k=schedule == "lean"):
        found = prove("triton", call, schedule=schedule)
        for number in range(3):
            with any_order(number):
                assert equal(found, call("triton", schedule=schedule))
    assert counters_are_zero()


@pytest.mark.parametrize("blocks", [1, 3, 12, 132])
@pytest.mark.parametrize("prefix", [0, 50])
def test_split_into_any_number_of_parts(prefix: int, blocks: int, device: str) -> None:
    """Parts that the short sequences do not have are empty splits."""
    call = make(3, (150, 0, 17, 3), heads=4, kv_heads=1, rows=2, prefix=prefix, device=device)
    with config(blocks, stream_k=0):
        prove("triton", call, schedule="split")


def test_the_caller_decides_on_the_schedule(device: str) -> None:
    """What tuning found is followed where nothing was asked for."""
    from iokernels.testing import tracer

    if not interpreter.active():
        pytest.skip("the tracer, which says what was launched, watches Triton's interpreter")
    call = make(4, (100,), device=device)
    expected = {None: ["lean", "split"], "lean": ["lean", "lean"], "split": ["split", "split"]}
    for schedule, names in expected.items():
        for stream_k, name in zip((1, 0), names, strict=True):
            with config(2, stream_k), tracer.trace() as traced:
                call("triton", schedule=schedule)
            assert (traced.kernels[0].name == "lean_attention_kernel") == (name == "lean")
            with config(2, stream_k), tracer.trace() as traced:
                call("triton", batch_invariant=True)
            assert traced.kernels[0].name == "lean_attention_split_kernel"


@pytest.mark.parametrize(
    "options",
    [{}, {"page": 16}, {"prefix": 40}, {"rows": 3, "window": (60, 0), "sinks": True}],
    ids=["dense", "pages", "prefix", "window"],
)
def test_batch_invariance(options: dict[str, Any], device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sequence's bits are the same alone and among others, in a longer cache, and with any number of blocks."""
    monkeypatch.setattr("iokernels.ops.lean_attention.triton.tuning.INVARIANT_KEYS", 64)
    call = make(5, (150, 0, 17, 200), heads=4, kv_heads=2, dtype=torch.float16, device=device, **options)
    found = []
    for blocks in (1, 7, 264):
        with config(blocks):
            found.append(call("triton", batch_invariant=True))
    assert equal(found[0], found[1])
    assert equal(found[0], found[2])
    prove("triton", call, batch_invariant=True)
    with config(7):
        for sequence in range(4):
            alone = only(call, sequence)("triton", batch_invariant=True)
            assert equal(alone, (found[0][0][sequence : sequence + 1], found[0][1][sequence : sequence + 1]))


def only(call: Call, sequence: int) -> Call:
    """One sequence of a call, in a cache that is as short as it may be."""
    rows, tensors = slice(sequence, sequence + 1), dict(call.tensors)
    for name in ("q", "cache_seqlens", "block_table"):
        if name in tensors:
            tensors[name] = tensors[name][rows]
    if "block_table" not in tensors:
        length = int(tensors["cache_seqlens"][0])
        for name in ("k_cache", "v_cache"):
            tensors[name] = tensors[name][rows, :, : max(length, 1)]
    return call._replace(tensors=tensors)


def test_what_is_not_invariant_is_seen(device: str) -> None:
    """The test of the test: equal shares depend on the batch, and so do their bits."""
    call = make(6, (150, 33, 17, 200), heads=4, kv_heads=2, dtype=torch.float16, device=device)
    with config(5):
        among_others, alone = call("triton", schedule="lean"), only(call, 3)("triton", schedule="lean")
    assert not torch.equal(among_others[1][3:], alone[1])


def test_many_calls_on_one_workspace(device: str) -> None:
    """Two hundred: counters are back at zero after each, whatever the next one is."""
    calls = [make(7, lengths, heads=1, spare=spare, device=device) for lengths, spare in (((40,), 0), ((20, 33), 40))]
    with config(2):
        expected = [call("triton", schedule="lean") for call in calls]
        for number in range(200):
            which = number % 10 == 9
            assert equal(expected[which], calls[which]("triton", schedule="lean"))
    assert counters_are_zero()


def test_a_kernel_that_was_broken_off_leaves_no_counts(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if not interpreter.active():
        pytest.skip("a GPU does not stop in the middle of a launch")
    call = make(8, (100,), device=device)
    with config(3):
        expected = call("triton", schedule="lean")
        from triton.runtime import interpreter as triton_interpreter

        builder = triton_interpreter.interpreter_builder
        set_block = builder.set_grid_idx

        def stop_at_the_last(x: int, y: int, z: int) -> None:
            if x == 2:
                raise KeyboardInterrupt
            set_block(x, y, z)

        monkeypatch.setattr(builder, "set_grid_idx", stop_at_the_last)
        with pytest.raises(KeyboardInterrupt):
            call("triton", schedule="lean")
        monkeypatch.undo()
        assert equal(expected, call("triton", schedule="lean"))

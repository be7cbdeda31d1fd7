"""append_kv and rotary tables where memory and numbers end: layouts, places that are one, pages, wrong arguments."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from torch import Tensor

from iokernels import append_kv, apply_rotary, rotary_table
from iokernels.runtime.contracts.memory import overlap, overlaps_itself
from tests.ops.lean_attention.layouts import LAYOUTS, WRITABLE

BACKENDS = ("reference", "torch", "triton")


def ints(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def new(rows: int = 1, width: int = 4, batch: int = 2, heads: int = 1) -> tuple[Tensor, Tensor]:
    return torch.randn(batch, heads, rows, width), torch.randn(batch, heads, rows, width)


# ---- layouts


@st.composite
def calls(draw: st.DrawFn) -> tuple[dict[str, Any], dict[str, Any]]:
    """Arguments in any layout, and the same ones contiguous."""
    page, cached = draw(st.sampled_from([0, 4])), draw(st.sampled_from([torch.float32, torch.bfloat16, torch.int8]))
    per_key = cached == torch.int8 and draw(st.booleans())
    torch.manual_seed(draw(st.integers(0, 99)))
    size = (5, 2, 4) if page else (2, 2, 9)
    plain: dict[str, Any] = {"k_new": torch.randn(2, 2, 3, 8), "v_new": torch.randn(2, 2, 3, 6)}
    for name, width in (("k_cache", 8), ("v_cache", 6)):
        plain[name] = torch.randint(-9, 9, (*size, width)).to(cached)
    for name in ("k_scale", "v_scale"):
        plain[name] = torch.rand(size) + 0.5 if per_key else torch.rand(2) / 50 + 0.01
    plain |= {"cache_seqlens": ints(2, 5), "new_seqlens": ints(3, 2), "positions": ints(0, 7)}
    plain["rotary"] = rotary_table(12, 4)
    if page:
        plain["block_table"] = torch.tensor([[3, 1, -1], [0, 4, 99]], dtype=torch.int32)

    def lay(name: str, x: Tensor) -> Tensor:
        ways = list(LAYOUTS)
        if name in ("k_cache", "v_cache") or name.endswith("seqlens") or name in ("positions", "block_table"):
            ways = list(WRITABLE)
        if name.endswith("scale") and per_key:
            ways = [way for way in WRITABLE if way not in ("negated", "imaginary")]
        return LAYOUTS[draw(st.sampled_from(ways))](x)

    laid: dict[str, Any] = {name: lay(name, x) for name, x in plain.items() if name != "rotary"}
    laid["rotary"] = tuple(lay("cos", x) for x in plain["rotary"])
    same = {n: x.clone(memory_format=torch.contiguous_format) for n, x in laid.items() if n != "rotary"}
    same["rotary"] = tuple(x.clone(memory_format=torch.contiguous_format) for x in laid["rotary"])
    return laid, same


@pytest.mark.parametrize(("backend", "examples"), [("reference", 20), ("torch", 40), ("triton", 20)])
def test_what_is_written_does_not_depend_on_strides(backend: str, examples: int) -> None:
    """New rows, angles, scales and tables in any layout; caches in any that has a place for every element."""

    @seed(2)
    @settings(max_examples=examples, deadline=None, database=None, suppress_health_check=(HealthCheck.too_slow,))
    @given(calls())
    def check(call: tuple[dict[str, Any], dict[str, Any]]) -> None:
        laid, same = call
        append_kv(**laid, backend=backend)
        append_kv(**same, backend=backend)
        for name in ("k_cache", "v_cache", "k_scale", "v_scale"):
            assert torch.equal(laid[name], same[name]), name

    check()


# ---- places


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_expanded_cache_is_refused(backend: str) -> None:
    k, v = new()
    whole = torch.zeros(2, 1, 8, 4)
    for shared in (
        torch.zeros(1, 1, 8, 4).expand(2, 1, 8, 4),
        torch.zeros(2, 1, 1, 4).expand(2, 1, 8, 4),
        torch.zeros(64).as_strided((2, 1, 8, 4), (32, 32, 3, 1)),
        torch.zeros(64).as_strided((2, 1, 8, 4), (1, 32, 4, 1)),
    ):
        for caches, name in (((shared, whole), "k_cache"), ((whole, shared), "v_cache")):
            with pytest.raises(ValueError, match=f"{name} has several elements in one place"):
                append_kv(k, v, *caches, cache_seqlens=ints(0, 0), backend=backend)
    assert not whole.any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_caches_that_share_memory_are_refused(backend: str) -> None:
    k, v = new()
    line = torch.zeros(200)
    one = line[:64].view(2, 1, 8, 4)
    for other in (
        one,
        line[63:127].view(2, 1, 8, 4),
        one.transpose(0, 1).view(2, 1, 8, 4),
        line[4:68].view(2, 1, 8, 4),
    ):
        for caches in ((one, other), (other, one)):
            with pytest.raises(ValueError, match="k_cache and v_cache share memory"):
                append_kv(k, v, *caches, cache_seqlens=ints(0, 0), backend=backend)
    # A call that was right vouches for no other.
    append_kv(k, v, one, line[64:128].view(2, 1, 8, 4), cache_seqlens=ints(0, 0), backend=backend)
    with pytest.raises(ValueError, match="share memory"):
        append_kv(k, v, one, one, cache_seqlens=ints(0, 0), backend=backend)
    scales = torch.ones(2, 1, 8)
    caches = torch.zeros(2, 2, 1, 8, 4, dtype=torch.int8).unbind(0)
    with pytest.raises(ValueError, match="k_scale and v_scale share memory"):
        append_kv(k, v, *caches, cache_seqlens=ints(0, 0), k_scale=scales, v_scale=scales, backend=backend)


def test_a_compiled_call_refuses_them_too() -> None:
    """A compiler's tensors have no addresses; that they are one, or expanded, shows."""
    k, v = new()
    whole = torch.zeros(2, 1, 8, 4)
    compiled = torch.compile(append_kv, backend="eager", fullgraph=True)
    for caches, message in (
        ((whole, whole), "share memory"),
        ((whole[:1].expand(2, 1, 8, 4), whole.clone()), "in one"),
    ):
        with pytest.raises(Exception, match="append_kv") as raised:
            compiled(k, v, *caches, cache_seqlens=ints(0, 0))
        assert message in str(raised.value)
    assert not whole.any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_views_of_one_tensor_that_lie_apart_are_written(backend: str) -> None:
    k, v = new()
    for caches in (
        torch.zeros(2, 2, 1, 8, 4).unbind(0),
        [x.transpose(1, 2) for x in torch.zeros(2, 8, 2, 1, 4).unbind(2)],
        torch.zeros(2, 1, 8, 8).split(4, dim=3),
        torch.zeros(2, 1, 16, 4).split(8, dim=2),
        torch.zeros(2, 1, 8, 4, 2).unbind(4),
        (torch.zeros(2, 1, 8, 8)[..., ::2], torch.zeros(2, 1, 8, 8)[..., 1::2]),
    ):
        append_kv(k, v, *caches, cache_seqlens=ints(0, 3), backend=backend)
        for cache, x in zip(caches, (k, v), strict=True):
            assert torch.equal(cache[0, :, :1], x[0])
            assert torch.equal(cache[1, :, 3:4], x[1])
            assert cache.count_nonzero() == x.numel()


@seed(3)
@settings(max_examples=300, deadline=None, database=None)
@given(st.data())
def test_whether_places_are_one_is_exact(data: st.DataObject) -> None:
    """Against all addresses one by one."""
    line = torch.arange(400)

    def view() -> Tensor:
        sizes = data.draw(st.lists(st.integers(0, 4), min_size=1, max_size=4))
        strides = data.draw(st.lists(st.integers(0, 14), min_size=len(sizes), max_size=len(sizes)))
        return line.as_strided(sizes, strides, data.draw(st.integers(0, 60)))

    x, y = view(), view()
    at_x, at_y = x.flatten().tolist(), y.flatten().tolist()
    assert overlaps_itself(x) == (len(set(at_x)) < len(at_x))
    assert overlap(x, y) == bool(set(at_x) & set(at_y))


def test_bytes_of_two_dtypes_share_memory_too() -> None:
    line = torch.zeros(16, dtype=torch.uint8)
    wide = line[:8].view(torch.float32)
    assert overlap(wide, line[7:9])
    assert overlap(line[7:9], wide)
    assert not overlap(wide, line[8:])


# ---- pages


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_page_that_does_not_exist_is_named(backend: str) -> None:
    k, v = new(rows=2)
    caches = torch.zeros(2, 5, 1, 4, 4).unbind(0)
    for number in (-1, 5, 10**8):
        table = torch.tensor([[number, 1, number], [2, 3, number]], dtype=torch.int32)
        append_kv(k, v, *caches, cache_seqlens=ints(4, 6), block_table=table, backend=backend)
        message = rf"block_table\[1\] names page {number}; there are 5 \(its entry 2\)"
        with pytest.raises(ValueError, match=message):
            append_kv(k, v, *caches, cache_seqlens=ints(4, 7), block_table=table, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_sequences_cannot_write_one_row_of_a_page(backend: str) -> None:
    k, v = new(rows=2)
    caches = torch.zeros(2, 5, 1, 4, 4).unbind(0)
    table = torch.tensor([[0, 1], [0, 2]], dtype=torch.int32)
    append_kv(k, v, *caches, cache_seqlens=ints(0, 2), block_table=table, backend=backend)  # rows of their own
    append_kv(k, v, *caches, cache_seqlens=ints(4, 4), block_table=table, backend=backend)  # behind a shared page
    append_kv(k, v, *caches, cache_seqlens=ints(0, 0), block_table=table, new_seqlens=ints(2, 0), backend=backend)
    before = [cache.clone() for cache in caches]
    for lengths in ((0, 1), (3, 2), (2, 3)):
        with pytest.raises(ValueError, match=r"sequences 0 and 1 both write to row . of page 0"):
            append_kv(k + 1, v + 1, *caches, cache_seqlens=ints(*lengths), block_table=table, backend=backend)
    assert all(torch.equal(x, y) for x, y in zip(caches, before, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_length_below_0_is_0_where_the_host_does_not_look(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU; and a count above the rows is all of them."""
    monkeypatch.setattr("iokernels.ops.append_kv.api.readable", lambda x: False)
    k, v = new(rows=3)
    found = []
    for lengths, counts in ((ints(-2, 6), ints(9, -1)), (ints(0, 6), ints(3, 0))):
        caches = torch.zeros(2, 2, 1, 8, 4).unbind(0)
        append_kv(k, v, *caches, cache_seqlens=lengths, new_seqlens=counts, backend=backend)
        found.append(caches[0])
    assert torch.equal(*found)
    assert torch.equal(found[0][0, :, :3], k[0])


# ---- rotary


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("interleaved", [False, True])
def test_positions_outside_the_table_are_taken_to_its_edge(
    backend: str, interleaved: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the host does not read them, as on a GPU: below 0 the first row, from its end on the last."""
    monkeypatch.setattr("iokernels.ops.append_kv.api.readable", lambda x: False)
    k, v = new(rows=3)
    cos, sin = (x[5:9].clone() for x in rotary_table(9, 4))  # the first row is no identity
    found = []
    for positions, angles in ((ints(-2, 2), (cos, sin)), (ints(0, 1), (cos[[0, 0, 0, 0]], sin[[0, 0, 0, 0]]))):
        caches = torch.zeros(2, 2, 1, 8, 4).unbind(0)
        append_kv(k, v, *caches, cache_seqlens=ints(0, 0), rotary=angles, positions=positions,
                  interleaved=interleaved, backend=backend)  # fmt: skip
        found.append(caches[0])
    assert torch.equal(found[0][0], found[1][0])
    assert not torch.equal(found[0][1], found[1][1])
    last = torch.zeros(2, 1, 8, 4)
    append_kv(k, v, last, last.clone(), cache_seqlens=ints(0, 0), rotary=(cos[3:], sin[3:]), positions=ints(0, 0),
              interleaved=interleaved, backend=backend)  # fmt: skip
    assert torch.equal(found[0][1, :, 1:3], last[1, :, 1:3])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("interleaved", [False, True])
def test_heads_of_an_odd_width_turn(backend: str, interleaved: bool) -> None:
    """From any offset: what is left of a head stays, and the angle of position 3 is that of the table."""
    line = torch.randn(41)
    k = line[1:34].view(1, 1, 3, 11)
    caches = torch.zeros(2, 1, 1, 8, 11).unbind(0)
    cos, sin = rotary_table(8, 10)
    append_kv(k, k, *caches, cache_seqlens=ints(2), rotary=(cos, sin), interleaved=interleaved, backend=backend)
    turned = caches[0][0, 0, 3]
    x, y = (k[0, 0, 1, 0:2] if interleaved else k[0, 0, 1, [0, 5]]).tolist()
    first, second = turned[0:2].tolist() if interleaved else turned[[0, 5]].tolist()
    c, s = cos[3, 0].item(), sin[3, 0].item()
    assert first == pytest.approx(x * c - y * s, rel=1e-5)
    assert second == pytest.approx(y * c + x * s, rel=1e-5)
    assert turned[10] == k[0, 0, 1, 10]


BAD: list[tuple[tuple[Any, ...], dict[str, Any], type[Exception], str]] = [
    (("4", 4), {}, TypeError, "positions is '4'; it must be an int"),
    ((4, "4"), {}, TypeError, "width is '4'; it must be an int"),
    ((4.0, 4), {}, TypeError, "positions is 4.0; it must be an int"),
    ((True, 4), {}, TypeError, "positions is True; it must be an int, not a bool"),
    ((4, None), {}, TypeError, "width is None"),
    ((2**31, 4), {}, ValueError, "positions is 2147483648; it must be at most"),
    ((-1, 4), {}, ValueError, "positions is -1"),
    ((4, 3), {}, ValueError, "width is 3; it must be positive and even"),
    ((4, 4), {"base": 0.0}, ValueError, "base is 0.0; it must be finite, above 0.0"),
    ((4, 4), {"base": -2}, ValueError, "base is -2"),
    ((4, 4), {"base": float("nan")}, ValueError, "base is nan"),
    ((4, 4), {"base": "x"}, TypeError, "base is str"),
    ((4, 4), {"base": None}, TypeError, "base is NoneType"),
]


@pytest.mark.parametrize(("arguments", "options", "error", "message"), BAD, ids=[message for *_, message in BAD])
def test_a_rotary_table_names_what_is_wrong(
    arguments: tuple[Any, ...], options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match="^rotary_table: " + message):
        rotary_table(*arguments, **options)


def test_a_rotary_table_takes_whole_numbers_of_any_kind() -> None:
    fours: tuple[Any, ...] = (torch.tensor(4), np.int64(4), torch.tensor([4], dtype=torch.int32)[0])
    for four in fours:
        assert all(torch.equal(x, y) for x, y in zip(rotary_table(four, four), rotary_table(4, 4), strict=True))


def test_turning_names_what_is_wrong() -> None:
    x, (cos, sin) = torch.randn(1, 1, 2, 4), rotary_table(4, 4)
    with pytest.raises(TypeError, match=r"^apply_rotary: interleaved is str; it must be a bool"):
        apply_rotary(x, cos, sin, ints(0), interleaved="no")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"^apply_rotary: x is list"):
        apply_rotary([x], cos, sin, ints(0))  # type: ignore[arg-type]

"""The selectors and hip_attention at their borders: no rows and no keys, the edges of what may be selected, scores that
are negative or no numbers, layouts, what is saved and kept."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from iokernels import (
    BlockIndex,
    HipStage,
    PageBounds,
    SelectionCache,
    UnsupportedError,
    flash_attention,
    hip_attention,
    page_bounds,
    select_dense,
    select_exact,
    select_hip,
    select_quest,
    select_window,
)
from iokernels.ops.hip_attention.options import Region
from iokernels.ops.hip_attention.portable import choose

from ..backends import CUDA
from .selection import named, same_lists

negative_view: Any = getattr(torch, "_neg_view")  # noqa: B009, PyTorch has no other name for it
NAN, INF = float("nan"), float("inf")
STAGES = ((32, 4, 64), (8, 1))
SMALL: dict[str, Any] = {"budget": 32, "sink": 3, "window": 10, "block_q": 16}
SELECTORS: dict[str, tuple[Callable[..., BlockIndex], tuple[Any, ...]]] = {
    "hip": (partial(select_hip, stages=STAGES), ("reference", "torch", "triton", CUDA)),
    "global": (partial(select_hip, search="global"), ("torch",)),
    "quest": (select_quest, ("reference", "torch", "triton")),
    "exact": (select_exact, ("reference", "torch")),
}
CALLS = [
    pytest.param(name, *(backend.values if isinstance(backend, type(CUDA)) else (backend,)),
                 marks=backend.marks if isinstance(backend, type(CUDA)) else ())
    for name, (_, backends) in SELECTORS.items() for backend in backends
]  # fmt: skip


def select(name: str, q: Tensor, k: Tensor, backend: str, **options: Any) -> BlockIndex:
    """An index that was checked; halves for the kernels in CUDA C++."""
    if backend == "cuda":
        q, k = q.half(), k.half()
    return SELECTORS[name][0](q, k, backend=backend, **{**SMALL, **options}).validate(deep=True)


def tensors(rows: int = 20, keys: int = 120) -> tuple[Tensor, Tensor]:
    """Whole numbers, so that halves and sums in any order say the same."""
    return torch.randint(-4, 5, (1, 4, rows, 16)).float(), torch.randint(-4, 5, (1, 2, keys, 16)).float()


@pytest.mark.parametrize(
    ("batch", "heads", "rows", "keys"), [(0, 4, 5, 90), (1, 4, 0, 90), (1, 4, 20, 0), (1, 4, 0, 0), (1, 0, 5, 90)]
)
@pytest.mark.parametrize(("name", "backend"), CALLS)
def test_nothing_to_select_for_or_from(name: str, backend: str, batch: int, heads: int, rows: int, keys: int) -> None:
    q, k = torch.randn(batch, heads, rows, 16), torch.randn(batch, 2, keys, 16)
    index = select(name, q, k, backend)
    assert index.counts.shape == (batch, 2, 2 if rows == 20 else 1)
    assert index.counts.sum() == 0
    assert (index.q_len, index.kv_len) == (rows, keys)
    assert index.to_mask(causal=True).shape == (batch, 2, rows, keys)


@pytest.mark.parametrize(("batch", "rows", "keys"), [(0, 5, 90), (1, 0, 90), (1, 20, 0)])
@pytest.mark.parametrize("backend", ["reference", "torch", "triton"])
def test_attention_of_nothing(backend: str, batch: int, rows: int, keys: int) -> None:
    q, k = torch.randn(batch, 4, rows, 16, requires_grad=True), torch.randn(batch, 2, keys, 16)
    for selection in (None, SelectionCache(), select_window, select_dense, partial(select_quest, budget=16)):
        out = hip_attention(q, k, k, budget=16, sink=3, window=10, selection=selection, backend=backend)
        assert out.shape == q.shape
        out.sum().backward()
    bounds = page_bounds(k, backend=None if backend == "reference" else backend)
    assert bounds.kmin.shape == (batch, 2, -(-keys // 16), 16)


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize(("name", "backend"), CALLS)
def test_a_score_that_is_no_number_selects_nothing_and_hides_nothing(name: str, backend: str, value: float) -> None:
    q, k = tensors()
    for heads in ("kv", "all") if value != value else ("kv",):
        plain = select(name, q, k, backend, heads=heads)
        changed = k.clone()
        changed[:, :, 40:48] = value
        index = select(name, q, changed, backend, heads=heads)
        assert (index.counts == plain.counts).all(), "what is not a number takes nobody's place"
        oracle = "torch" if name == "global" else "reference"
        same_lists(index, select(name, q, changed, oracle, heads=heads))
        if value != value:
            lists = [named(index, head, block) for head in range(plain.counts.shape[1]) for block in (0, 1)]
            assert all(40 // index.block_k not in blocks for blocks in lists)
        hidden = q.clone()
        hidden[:, :, 3] = value  # one row of the first block, or a mean with its neighbours
        same_lists(select(name, hidden, k, backend, heads=heads), select(name, hidden, k, oracle, heads=heads))
    assert select(name, q * NAN, k, backend).counts.sum() == 0


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_page_with_what_is_no_number_has_no_bounds(backend: str) -> None:
    _, k = tensors()
    k[0, 0, 17, 3], k[0, 1, 40, 2], k[0, 1, 41, 2] = NAN, INF, -INF
    kmin, kmax = page_bounds(k, backend=backend)
    for bounds in (kmin, kmax):
        assert bounds.isnan().sum() == 1
        assert bounds[0, 0, 1, 3].isnan()
    assert (kmin[0, 1, 2, 2], kmax[0, 1, 2, 2]) == (-INF, INF)


@pytest.mark.parametrize(("name", "backend"), CALLS)
def test_the_highest_of_negative_scores_are_chosen(name: str, backend: str) -> None:
    """Every score is below 0: the best are those nearest to it."""
    q, k = torch.zeros(1, 2, 1, 16), torch.zeros(1, 1, 256, 16)
    order = torch.randperm(32, generator=torch.Generator().manual_seed(2))
    q[..., 0] = -1.0
    k[0, 0, :, 0] = (1 + order).repeat_interleave(8) / 32
    best = sorted(order.argsort()[:5].tolist())
    options: dict[str, Any] = {"sink": 0, "window": 0, "budget": 40, "causal": False}
    if name == "hip":
        index = select_hip(*(x.half() if backend == "cuda" else x for x in (q, k)), stages=((8, 1),), backend=backend,
                           **{**SMALL, **options})  # fmt: skip
    else:
        size = {"page": 8} if name == "quest" else {"block_k": 8}
        if name == "global":  # as many branches as units: it looks at all of them
            options["branch"] = 8
            index = select(name, q, k, backend, **{**options, "budget": 256})
            assert named(index) == list(range(32))
            return
        index = select(name, q, k, backend, **options, **size)
    assert named(index) == best


@pytest.mark.parametrize("room", [1, 7, 50, 99, 100])
def test_the_kernel_orders_negative_scores_as_the_sort_does(room: int) -> None:
    from iokernels.ops.hip_attention.triton.launch import Launch

    q, k, region = torch.empty(1, 1, 1, 16), torch.empty(1, 1, 8, 16), Region("kv", 16)
    spread = torch.randn(100, generator=torch.Generator().manual_seed(1)) * 10.0 ** torch.arange(-30, 30, 0.6)
    for values in (-spread.abs(), spread, -spread.abs().round(), torch.full((100,), -0.0)):
        scores = values.view(1, 1, 1, 100).clone()
        ids, counts = torch.zeros(1, 1, 1, room, dtype=torch.int32), torch.zeros(1, 1, 1, dtype=torch.int32)
        choose(scores.clone(), scores > -INF, torch.arange(100), region, ids, counts)
        found, found_counts = Launch(q, k, region, 1, 100).best(scores, None, 1, room)
        assert torch.equal(found_counts, counts)
        assert torch.equal(found[..., : int(counts)], ids[..., : int(counts)])


@pytest.mark.parametrize(("name", "backend"), CALLS)
def test_room_for_everything_lists_all_between_sink_and_window(name: str, backend: str) -> None:
    """Wherever the edges lie in a block: one key of it is enough."""
    for sink, keys in ((0, 40), (7, 41), (8, 42), (15, 48), (16, 49), (17, 56), (31, 57)):
        q, k = tensors(1, keys)
        index = select(name, q, k, backend, sink=sink, window=8, budget=64)
        last = keys - 1 - 8
        expected = list(range(sink // index.block_k, last // index.block_k + 1)) if sink <= last else []
        assert [named(index, head) for head in (0, 1)] == [expected] * 2, (sink, keys)


@pytest.mark.parametrize("backend", ["reference", "torch", "triton", CUDA])
def test_a_key_that_only_a_row_before_it_wants_is_not_chosen(backend: str) -> None:
    """The first row of a block wants one key alone, which stands behind what it may select; the others want none."""
    q, k = torch.zeros(1, 1, 16, 16), torch.zeros(1, 1, 150, 16)
    q[0, 0, 0, 0], k[0, 0, 127, 0] = 1.0, 100.0
    if backend == "cuda":
        q, k = q.half(), k.half()
    for window, expected in ((8, 0), (7, 15)):  # the last key for the first row is 126, then 127
        index = select_hip(q, k, stages=((8, 1),), budget=8, sink=0, window=window, block_q=16, backend=backend)
        assert named(index) == [expected]


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "last stride of two": lambda x: torch.stack((x, x * NAN), -1).flatten(-2)[..., ::2],
    "last dimension first": lambda x: x.movedim(-1, 0).contiguous().movedim(0, -1),
    "negative bit": lambda x: negative_view((-x).clone()),
    "expanded over heads": lambda x: x[:, :1].expand(x.shape),
    "expanded over columns": lambda x: x[..., :1].expand(x.shape),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("name", "backend"), CALLS)
def test_no_layout_changes_a_list(name: str, backend: str, layout: str) -> None:
    view = LAYOUTS[layout]
    q, k = tensors()
    if backend == "cuda":
        q, k = q.half(), k.half()
    for given in ((view(q), k), (q, view(k))):
        q_plain, k_plain = [x.resolve_neg().clone(memory_format=torch.contiguous_format) for x in given]
        same_lists(select(name, given[0], given[1], backend), select(name, q_plain, k_plain, backend))


@pytest.mark.parametrize("layout", ["last stride of two", "last dimension first"])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_no_layout_changes_bounds(backend: str, layout: str) -> None:
    q, k = tensors()
    expected = page_bounds(k)
    for given in (LAYOUTS[layout](k), negative_view(-k)):
        out = PageBounds(*(LAYOUTS[layout](torch.zeros_like(x)) for x in expected))
        assert page_bounds(given, out=out, backend=backend) is out
        assert all(torch.equal(x, y) for x, y in zip(out, expected, strict=True))
    same_lists(select_quest(q, k, bounds=out, backend=backend, **SMALL), select_quest(q, k, **SMALL))


def test_bounds_are_written_where_every_element_has_memory() -> None:
    _, k = tensors()
    whole = page_bounds(k)
    for kmin, message in (
        (whole.kmin[:, :1].expand(whole.kmin.shape), "out.kmin is expanded"),
        (whole.kmax, "out.kmin is out.kmax"),
        (negative_view(whole.kmin), "out.kmin is the negative of other memory"),
    ):
        with pytest.raises(ValueError, match=message):
            page_bounds(k, out=PageBounds(kmin, whole.kmax))


def test_more_keys_than_kernels_number_are_refused_by_name() -> None:
    q, k = torch.randn(1, 1, 1, 16), torch.randn(1, 1, 1, 16).expand(1, 1, 2**29 + 1, 16)
    for call in (partial(select_hip, q, k), partial(select_quest, q, k), partial(page_bounds, k)):
        with pytest.raises(UnsupportedError, match="it has 536870913 keys"):
            call(backend="triton")


def test_what_is_kept_loads_by_default() -> None:
    q, k = tensors(1)
    cache = SelectionCache((2, 1), STAGES)
    cache.select(q, k, budget=32, sink=3, window=10)
    kept = {"index": select_quest(q, k, **SMALL), "bounds": page_bounds(k), "cache": cache, "stage": HipStage(8, 1)}
    file = io.BytesIO()
    torch.save(kept, file)
    file.seek(0)
    loaded = torch.load(file)
    same_lists(loaded["index"], kept["index"])
    assert loaded["stage"] == HipStage(8, 1)
    assert torch.equal(loaded["bounds"].kmin, page_bounds(k).kmin)
    assert loaded["cache"].due() == cache.due() == (False, True)
    twin = copy.deepcopy(cache)
    for _ in range(2):
        lists = [each.select(q, k, budget=32, sink=3, window=10) for each in (cache, twin, loaded["cache"])]
        same_lists(lists[0], lists[1])
        same_lists(lists[0], lists[2])


def test_a_cache_of_lists_keeps_its_own() -> None:
    refresh, stages = [2, 1], [[32, 4, 64], [8, 1]]
    cache = SelectionCache(refresh, stages)  # pyright: ignore[reportArgumentType]
    refresh[0], stages[0][0] = 1, 16
    assert cache.refresh == (2, 1)
    assert cache.stages == (HipStage(32, 4, 64), HipStage(8, 1))


def test_a_cache_of_lists_notices_fewer_keys() -> None:
    """Also of fewer than the last step had, and no fewer than the first: a later stage may have listed the newest."""
    q, k = tensors(1)
    cache = SelectionCache((2, 1), STAGES)
    cache.select(q, k[:, :, :90], budget=32)
    cache.select(q, k, budget=32)
    with pytest.raises(ValueError, match="longer keys; call reset"):
        cache.select(q, k[:, :, :100], budget=32)


def test_more_branches_than_keys_find_everything() -> None:
    q, k = tensors(1)
    found = select_hip(q, k, search="global", **{**SMALL, "budget": 2**50})
    same_lists(found, select_exact(q, k, **{**SMALL, "budget": 2**50}))


@pytest.mark.parametrize("heads_last", [False, True])
@pytest.mark.parametrize("backend", ["reference", "torch", "triton"])
def test_results_can_be_written_to(backend: str, heads_last: bool) -> None:
    q, k = (x.transpose(1, 2).contiguous().transpose(1, 2) if heads_last else x for x in tensors())
    q.requires_grad_()
    out = hip_attention(q, k, k, backend=backend, **SMALL)
    expected = out.detach() + 1
    out += 1
    torch.testing.assert_close(out.detach(), expected)


def test_what_is_accepted_does_not_depend_on_the_length() -> None:
    q, k = tensors()
    for keys in (k, k[:, :, :20]):
        for changes in ({"budget": -1}, {"sink": -1}, {"window": -1}, {"heads": "x"}, {"block_q": 5}):
            (name,) = changes
            with pytest.raises(ValueError, match=f"hip_attention: {name} is "):
                hip_attention(q[:, :, :20], keys, keys, **{**SMALL, **changes})
    with pytest.raises(ValueError, match="budget is 4; it must be at least a block, 8"):
        hip_attention(q, k, k, **{**SMALL, "budget": 4})
    much = hip_attention(q, k, k, **{**SMALL, "budget": 0, "window": 10**400})
    assert torch.equal(much, flash_attention(q, k, k, causal=True))

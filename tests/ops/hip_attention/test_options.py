"""Selection is what its definition says, on every backend; attention to everything is dense attention; decoding agrees
with the prompt."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import iokernels
from iokernels import (
    BlockIndex,
    SelectionCache,
    flash_attention,
    hip_attention,
    mix_heads,
    page_bounds,
    select_dense,
    select_exact,
    select_hip,
    select_quest,
    select_window,
)
from iokernels.ops.hip_attention.options import Region
from iokernels.ops.hip_attention.portable import choose
from iokernels.testing.poison import poison_

from ..backends import BACKENDS, CUDA, usual
from .selection import named, same_lists, walk

STAGES = ((64, 4, 128), (16, 2, 64), (8, 1))
SMALL: dict[str, Any] = {"budget": 32, "sink": 5, "window": 20, "block_q": 16}
SELECTORS: dict[str, Callable[..., BlockIndex]] = {
    "hip": partial(select_hip, stages=STAGES),
    "quest": select_quest,
    "exact": select_exact,
}


def tensors(
    rows: int, keys: int, dtype: torch.dtype = torch.float64, heads: tuple[int, int] = (4, 2), width: int = 20
) -> tuple[Tensor, Tensor, Tensor]:
    """Random q, k, v, of a batch of two."""
    generator = torch.Generator().manual_seed(rows + keys)

    def made(count: int, length: int) -> Tensor:
        return torch.randn(2, length, count, width, generator=generator).to(dtype).transpose(1, 2)

    return made(heads[0], rows), made(heads[1], keys), made(heads[1], keys)


CALLS = [
    pytest.param(1, 300, {}, id="one row"),
    pytest.param(37, 301, {}, id="ragged blocks of rows and keys"),
    pytest.param(37, 301, {"heads": "all"}, id="one list for all heads"),
    pytest.param(20, 301, {"heads": "query"}, id="a list for each query head"),
    pytest.param(20, 150, {"causal": False}, id="not causal"),
    pytest.param(40, 30, {"window": 3}, id="more rows than keys"),
    pytest.param(40, 90, {"window": 0, "sink": 0}, id="neither sink nor window"),
    pytest.param(3, 60, {"budget": 400}, id="room for everything"),
]


@pytest.mark.parametrize("selector", SELECTORS)
@pytest.mark.parametrize(("rows", "keys", "options"), CALLS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_vectorised_is_the_definition(
    selector: str, rows: int, keys: int, options: dict[str, Any], dtype: torch.dtype
) -> None:
    q, k, _ = tensors(rows, keys, dtype)
    select = partial(SELECTORS[selector], q, k, **{**SMALL, **options})
    index = select(backend="torch")
    index.validate(deep=True)
    same_lists(index, select(backend="reference"))
    if options.get("budget"):
        assert all(len(named(index, head)) * index.block_k >= keys - 5 - 20 for head in range(2))


@pytest.mark.parametrize(
    ("backend", "selector"),
    [("triton", "hip"), ("triton", "quest"), pytest.param("cuda", "hip", marks=CUDA.marks)],
)
@pytest.mark.parametrize(("rows", "keys", "options"), CALLS)
def test_kernels_are_the_definition(
    backend: str, selector: str, rows: int, keys: int, options: dict[str, Any], device: str
) -> None:
    q, k, _ = tensors(rows, keys, usual(backend))
    select = partial(SELECTORS[selector], **{**SMALL, **options})
    same_lists(select(q.to(device), k.to(device), backend=backend), select(q, k, backend="torch"))


@pytest.mark.parametrize("backend", ["triton", CUDA])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_kernels_in_half_precision(backend: str, dtype: torch.dtype, device: str) -> None:
    """Products of halves are exact in float32, and means are rounded to halves on every backend."""
    q, k, _ = tensors(20, 200, dtype, width=16)
    for select in (partial(select_hip, stages=STAGES), select_quest)[: 1 if backend == "cuda" else 2]:
        ours = select(q.to(device), k.to(device), backend=backend, **SMALL)
        same_lists(ours, select(q, k, backend="torch", **SMALL))


@pytest.mark.parametrize("backend", ["triton", CUDA])
def test_several_tiles_of_rows_and_chunks(backend: str, device: str) -> None:
    q, k, _ = tensors(64, 700, usual(backend), heads=(4, 1), width=16)
    options = {**SMALL, "block_q": 64}
    one_stage = partial(select_hip, stages=((8, 1),), **options)
    same_lists(one_stage(q.to(device), k.to(device), backend=backend), one_stage(q, k, backend="torch"))


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_of_equal_scores_the_lower_block_comes_first(backend: str, device: str) -> None:
    device = device if backend in ("triton", "cuda") else "cpu"
    q = torch.zeros(1, 1, 1, 16, dtype=usual(backend), device=device)
    k = torch.ones(1, 1, 400, 16, dtype=q.dtype, device=device)
    for select in (partial(select_hip, stages=STAGES), select_quest)[: 1 if backend == "cuda" else 2]:
        index = select(q, k, backend=backend, **{**SMALL, "sink": 32})
        expected = list(range(32 // index.block_k, 32 // index.block_k + 32 // index.block_k))
        assert named(index) == expected


def test_what_is_not_a_number_is_not_chosen() -> None:
    """The choice sees scores; infinities are numbers, and -inf is nothing."""
    scores = torch.tensor([[[[-1.0, float("-inf"), float("inf"), -0.0, 0.0, -2.0]]]])
    ids, counts = torch.zeros(1, 1, 1, 4, dtype=torch.int32), torch.zeros(1, 1, 1, dtype=torch.int32)
    choose(scores, torch.ones_like(scores, dtype=torch.bool), torch.arange(6), Region(), ids, counts)
    assert (ids.tolist(), counts.tolist()) == ([[[[0, 2, 3, 4]]]], [[[4]]])


def test_the_kernel_chooses_as_the_sort_does(device: str) -> None:
    from iokernels.ops.hip_attention.triton.launch import Launch

    generator = torch.Generator().manual_seed(0)
    q, k = torch.empty(2, 3, 40, 16), torch.empty(2, 3, 8, 16)
    for heads in ("kv", "all"):
        for values in (torch.randn(2, 3, 3, 100, generator=generator), torch.randn(2, 3, 3, 100).round()):
            values[0, 0, 0, 5:] = float("-inf")
            region = Region(heads, 16)
            ids = torch.zeros(2, 1 if heads == "all" else 3, 3, 9, dtype=torch.int32)
            counts = torch.zeros(ids.shape[:3], dtype=torch.int32)
            choose(values, values > float("-inf"), torch.arange(100), region, ids, counts)
            launch = Launch(q.to(device), k.to(device), region, 1, 100)
            ours, ours_counts = launch.best(values.to(device), None, 1, 9)
            assert torch.equal(ours_counts.cpu(), counts)
            valid = torch.arange(9) < counts[..., None]
            assert torch.equal(ours.cpu()[valid], ids[valid])


@pytest.mark.parametrize("backend", BACKENDS)
def test_tails_of_lists_are_never_read(backend: str, device: str) -> None:
    """A stage works on from the valid entries of a list alone."""
    from iokernels.ops.hip_attention.select import hip_plan, hip_stage

    where = "cpu" if backend == "torch" else device
    q, k, _ = (x.to(where) for x in tensors(37, 301, usual(backend)))
    region = Region("kv", 16, 5, 20)
    first, second, _ = hip_plan(STAGES, 32, region)
    ids, counts = hip_stage(q, k, None, None, first, region, backend)
    counts = counts.clamp(max=2)
    expected = hip_stage(q, k, ids, counts, second, region, backend)
    within = torch.arange(ids.shape[3], device=where) < counts[..., None]
    poisoned = ids.masked_fill(~within, 2**31 - 1)
    found = hip_stage(q, k, poisoned, counts, second, region, backend)
    assert torch.equal(found[1], expected[1])
    valid = torch.arange(found[0].shape[3], device=where) < found[1][..., None]
    assert torch.equal(found[0][valid], expected[0][valid])


@pytest.mark.parametrize("backend", BACKENDS)
def test_keys_that_do_not_count_are_not_read(backend: str, device: str) -> None:
    """Sink and window are not searched: NaN there changes nothing (Quest reads whole pages of its bounds)."""
    q, k, _ = tensors(1, 300, usual(backend))
    expected = select_hip(q, k, stages=STAGES, **SMALL)
    poison_(k[:, :, :5])
    poison_(k[:, :, 281:])
    where = "cpu" if backend == "torch" else device
    same_lists(select_hip(q.to(where), k.to(where), stages=STAGES, backend=backend, **SMALL), expected)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("page", [8, 64])
def test_page_bounds_grow_with_a_cache(backend: str, page: int, device: str) -> None:
    k = torch.randn(2, 130, 2, 20, device=device if backend == "triton" else "cpu").transpose(1, 2)
    whole = page_bounds(k, page=page, backend=backend)
    for number in range(whole.kmin.shape[2]):
        part = k[:, :, number * page : (number + 1) * page]
        assert torch.equal(whole.kmin[:, :, number], part.amin(2))
        assert torch.equal(whole.kmax[:, :, number], part.amax(2))
    kept = iokernels.PageBounds(*(torch.full_like(x, float("nan")) for x in whole))
    for start, stop in ((0, 70), (70, 71), (71, 130)):
        again = page_bounds(k[:, :, :stop], page=page, out=kept, first=start, backend=backend)
        assert again is kept
    assert torch.equal(kept.kmin, whole.kmin)
    assert torch.equal(kept.kmax, whole.kmax)


def test_kept_bounds_select_the_same() -> None:
    q, k, _ = tensors(20, 301)
    room = iokernels.PageBounds(*(torch.full((2, 2, 40, 20), float("nan"), dtype=k.dtype) for _ in range(2)))
    kept = page_bounds(k, out=room)
    same_lists(select_quest(q, k, bounds=kept, **SMALL), select_quest(q, k, **SMALL))


@pytest.mark.parametrize("branch", [2, 8])
def test_the_global_search_lists_what_it_finds(branch: int) -> None:
    """With as many branches as there are units it has looked at everything: it is exact."""
    q, k, _ = tensors(1, 300)
    found = select_hip(q, k, search="global", branch=branch, **{**SMALL, "budget": 320})
    same_lists(found, select_exact(q, k, **{**SMALL, "budget": 320}))
    few = select_hip(q, k, search="global", branch=branch, **SMALL)
    few.validate(deep=True)
    assert few.counts.tolist() == [[[4], [4]], [[4], [4]]]


# -- attention


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("rows", [1, 40])
def test_a_budget_for_everything_is_flash_attention(rows: int, causal: bool) -> None:
    q, k, v = tensors(rows, 100, torch.float32)
    sparse = hip_attention(q, k, v, budget=80, sink=20, window=0, causal=causal, scale=0.3, return_lse=True)
    dense = flash_attention(q, k, v, causal=causal, scale=0.3, return_lse=True)
    assert torch.equal(sparse[0], dense[0])
    assert torch.equal(sparse[1], dense[1])
    cached = hip_attention(q, k, v, budget=100, sink=0, selection=SelectionCache() if causal else None, causal=causal)
    assert torch.equal(cached, flash_attention(q, k, v, causal=causal))


def test_listing_everything_is_dense_attention() -> None:
    """Through the search: one key more than the rule of the dense call, and lists that name all there are."""
    q, k, v = tensors(40, 101)
    index = select_hip(q, k, stages=STAGES, **{**SMALL, "budget": 80, "sink": 8, "window": 16})
    assert index.to_mask(causal=True).sum() == 2 * 2 * sum(range(62, 102))
    out = hip_attention(q, k, v, selection=index)
    torch.testing.assert_close(out, flash_attention(q, k, v, causal=True))


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_attention_is_that_of_the_mask(backend: str, device: str) -> None:
    device = device if backend == "triton" else "cpu"
    q, k, v = (x.to(device) for x in tensors(37, 301, torch.float32, width=16))
    index = select_hip(q, k, backend=backend, **SMALL)
    out = hip_attention(q, k, v, backend=backend, **SMALL)
    mask = index.to_mask(causal=True).repeat_interleave(2, dim=1)
    assert 0.1 < mask.float().mean() < 0.5
    expected = flash_attention(q.double().cpu(), k.double().cpu(), v.double().cpu(), mask=mask.cpu())
    torch.testing.assert_close(out.double().cpu(), expected, atol=2e-5, rtol=1e-5)


def test_selections_of_other_kinds() -> None:
    q, k, v = tensors(20, 300)
    quest = hip_attention(q, k, v, selection=partial(select_quest, **SMALL))
    index = select_quest(q, k, **SMALL)
    assert torch.equal(quest, hip_attention(q, k, v, selection=index))
    with pytest.raises(TypeError, match="selection is str"):
        hip_attention(q, k, v, selection="quest")  # pyright: ignore[reportArgumentType]


def test_gradients_flow_through_what_was_attended_to() -> None:
    q, k, v = (x.requires_grad_() for x in tensors(20, 120))
    out = hip_attention(q, k, v, **SMALL)
    out.sin().sum().backward()
    grads = [x.grad for x in (q, k, v)]
    mask = select_hip(q, k, **SMALL).to_mask(causal=True).repeat_interleave(2, dim=1)
    twins = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    flash_attention(*twins, mask=mask).sin().sum().backward()
    for grad, twin in zip(grads, twins, strict=True):
        assert grad is not None
        torch.testing.assert_close(grad, twin.grad)


def test_streaming_and_retrieval_heads() -> None:
    q, k, v = tensors(40, 100)
    streaming = select_window(q, k, sink=4, window=10, block_q=16)
    mixed = mix_heads(torch.tensor([True, False]), select_dense(q, k, block_q=16), streaming)
    out = hip_attention(q, k, v, selection=mixed)
    torch.testing.assert_close(out[:, :2], flash_attention(q[:, :2], k[:, :1], v[:, :1], causal=True))
    expected = flash_attention(q[:, 2:], k[:, 1:], v[:, 1:], mask=streaming.to_mask(causal=True))
    torch.testing.assert_close(out[:, 2:], expected)
    mixed = mix_heads(torch.tensor([False, True]), streaming, select_hip(q, k, **SMALL))
    assert (mixed.sink.tolist(), mixed.window.tolist()) == ([5, 4], [20, 10])  # pyright: ignore


# -- decoding


def test_decoding_is_the_rows_of_a_prompt() -> None:
    """A block of rows of a long call is a call of these rows and the keys that they can see; row by row, where rows
    are searched one by one."""
    q, k, v = tensors(96, 300)
    prompt = hip_attention(q, k, v, **SMALL)
    cache = SelectionCache(refresh=(1, 1, 1))
    for first in range(0, 96, 16):
        reached = 300 - 96 + first + 16
        rows = q[:, :, first : first + 16]
        step = hip_attention(rows, k[:, :, :reached], v[:, :, :reached], selection=cache, **SMALL)
        torch.testing.assert_close(step, prompt[:, :, first : first + 16])


def test_stages_are_refreshed_when_they_are_due() -> None:
    generator = torch.Generator().manual_seed(3)
    k = walk(400, 16, 16.0, generator)[None, None]
    q = 3 * walk(40, 16, 8.0, generator)[None, None]
    cache, always = SelectionCache((4, 2, 1), STAGES), SelectionCache((1, 1, 1), STAGES)
    options: dict[str, Any] = {"budget": 32, "sink": 5, "window": 20}
    seen, same = [], 0
    for step in range(9):
        reached = 360 + step
        now = q[:, :, step : step + 1]
        seen.append(cache.due())
        lists = [ids for ids, _ in cache._lists]
        index = cache.select(now, k[:, :, :reached], **options)
        assert index.window == 20 + step % 4, "no key falls between the list and the window"
        for stage, due in enumerate(seen[-1]):
            assert due or cache._lists[stage][0] is lists[stage]
        fresh = select_hip(now, k[:, :, :reached], stages=STAGES, **options)
        same_lists(always.select(now, k[:, :, :reached], **options), fresh)
        if step % 4 == 0:
            same_lists(index, fresh)
        same += named(index) == named(fresh)
    assert seen[:5] == [(True,) * 3, (False, False, True), (False, True, True), (False, False, True), (True,) * 3]
    assert same < 9, "lists that never change show nothing"


def test_a_cache_of_lists_says_what_it_is_not_for() -> None:
    q, k, _ = tensors(1, 300)
    cache = SelectionCache(stages=STAGES)
    cache.select(q, k, budget=32)
    with pytest.raises(ValueError, match="reset"):
        cache.select(q, k, budget=64)
    with pytest.raises(ValueError, match="reset"):
        cache.select(q, k[:, :, :200], budget=32)
    cache.reset()
    cache.select(q, k[:, :, :200], budget=64)
    with pytest.raises(ValueError, match="100 rows"):
        cache.select(tensors(100, 300)[0], k)
    with pytest.raises(ValueError, match="multiple of the next"):
        SelectionCache((16, 8, 3))
    with pytest.raises(ValueError, match="one for each stage"):
        SelectionCache((16, 8))


def test_drift_of_lists_that_are_kept() -> None:
    """What (16, 8, 4) keeps of the mass that a search in every step keeps: reported, and not nothing."""
    from .selection import SINK, listed, mass, text, weights

    q, k, _ = text(32, 0)
    cache, ratios = SelectionCache(), []
    for step in range(32):
        now, seen = q[:, :, step : step + 1], k[:, :, : k.shape[2] - 64 + step + 1]
        kept = cache.select(now, seen, budget=2048, sink=SINK)
        fresh = select_hip(now, seen, budget=2048, sink=SINK)
        p = weights(now, seen)
        ratios.append((mass(p, listed(kept)) / mass(p, listed(fresh))).item())
    print(f"refresh (16, 8, 4): {min(ratios):.3f} of the mass at worst, {sum(ratios) / 32:.3f} in the mean")
    assert min(ratios) > 0.8


# -- errors


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"heads": "some"}, ValueError, "heads is 'some'"),
        ({"block_q": 48}, ValueError, "block_q is 48"),
        ({"budget": 4}, ValueError, "budget is 4"),
        ({"budget": 2.0}, TypeError, "budget is float"),
        ({"window": -1}, ValueError, "window is -1"),
        ({"sink": 1.5}, TypeError, "sink is float"),
        ({"causal": 1}, TypeError, "causal is int"),
        ({"search": "best"}, ValueError, "search is 'best'"),
        ({"stages": ()}, ValueError, "stages is empty"),
        ({"stages": ((48, 1, 64), (8, 1))}, ValueError, "powers of two"),
        ({"stages": ((8, 1, 64), (32, 1))}, ValueError, "become smaller"),
        ({"stages": ((64, 3, 64), (8, 1))}, ValueError, "stride_q 3"),
        ({"stages": ((64, 1, 64), (4, 1))}, ValueError, "last chunk of stages is 4"),
        ({"search": "global", "branch": 3}, ValueError, "branch is 3"),
        ({"backend": "cuda"}, iokernels.UnsupportedError, "cuda"),
    ],
)
def test_wrong_arguments_are_named(options: dict[str, Any], error: type[Exception], match: str) -> None:
    q, k, _ = tensors(3, 100)
    with pytest.raises(error, match=match):
        select_hip(q, k, **options)


def test_attention_refuses_what_makes_no_sense() -> None:
    q, k, v = tensors(3, 100)
    with pytest.raises(ValueError, match="scale is -1"):
        hip_attention(q, k, v, scale=-1.0)
    with pytest.raises(TypeError, match="budget is float"):
        hip_attention(q, k, v, budget=3.0)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="serves causal decoding"):
        hip_attention(q, k, v, budget=16, sink=0, causal=False, selection=SelectionCache())
    with pytest.raises(ValueError, match="heads of k"):
        hip_attention(q[:, :3], k, v, budget=16, sink=0, window=8)
    with pytest.raises(iokernels.UnsupportedError, match="float64"):
        hip_attention(q, k, v, budget=16, sink=0, window=8, backend="triton")
    with pytest.raises(ValueError, match="bounds has 1 pages"):
        select_quest(q, k, bounds=page_bounds(k[:, :, :16]), **SMALL)
    with pytest.raises(ValueError, match="without out"):
        page_bounds(k, first=3)

"""nn.KVCache and nn.DecodeAttention where lengths, indices and memory end: what they keep, what they refuse, nothing at
all, and what is saved and restored."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from iokernels.nn import DecodeAttention, KVCache

PAGES = (None, 4)


def filled(lengths: list[int], **options: Any) -> KVCache:
    """A cache of two sequences of random keys."""
    torch.manual_seed(3)
    cache = KVCache(2, 12, 2, 4, layers=2, **options)
    cache.extend(lengths)
    for layer in range(2):
        cache.append(*torch.randn(2, 2, 2, max(lengths), 4), layer=layer)
    return cache


def contents(cache: KVCache) -> list[Tensor]:
    return [x for sequence in range(2) for layer in range(2) for x in cache.read(sequence, layer=layer)]


def equal(one: KVCache, other: KVCache) -> bool:
    return one.lengths == other.lengths and all(map(torch.equal, contents(one), contents(other)))


# ---- what it keeps


@pytest.mark.parametrize("page", PAGES)
@pytest.mark.parametrize("kind", [torch.tensor, np.array, tuple, lambda x: torch.tensor(x, dtype=torch.int64)])
def test_lengths_given_as_tensors_are_read_once(page: int | None, kind: Callable[[list[int]], Any]) -> None:
    """What becomes of the tensor later is no change of the cache, whose capacity stays checked."""
    counts, kept, index = kind([5, 7]), kind([4, 6]), kind([1, 0])
    cache = KVCache(2, 12, 2, 4, page=page)
    cache.extend(counts)
    cache.append(*torch.zeros(2, 2, 2, 7, 4))
    cache.truncate(kept)
    cache.reorder(index)
    if not isinstance(counts, tuple):
        for given in (counts, kept, index):
            given[:] = -100
    assert cache.lengths == [6, 4]
    assert all(type(length) is int for length in cache.lengths)
    assert cache.seqlens.tolist() == cache.lengths
    with pytest.raises(ValueError, match="would have 13 keys; the capacity is 12"):
        cache.extend(7)
    cache.lengths[0] = 0
    assert cache.lengths == [6, 4]


def test_scales_of_heads_are_its_own() -> None:
    scale = torch.ones(2)
    cache = KVCache(1, 4, 2, 4, dtype=torch.int8, layers=3, k_scale=scale, v_scale=scale)
    scale.fill_(99.0)
    assert cache.k_scale is not None
    assert (cache.k_scale == 1).all()
    cache.k_scale[0] = 2.0  # of one layer
    assert (cache.k_scale[1:] == 1).all()
    assert cache.v_scale is not None
    assert (cache.v_scale == 1).all()


def test_what_it_reads_is_a_copy() -> None:
    cache = filled([3, 5])
    before = contents(cache)
    for x in contents(cache):
        x.fill_(9.0)
    assert all(map(torch.equal, contents(cache), before))


# ---- what it refuses


@pytest.mark.parametrize("page", PAGES)
@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ([-1], ValueError, r"sequences\[0\] is -1; it must be 0 to 1"),
        ([0, 2], ValueError, r"sequences\[1\] is 2; it must be 0 to 1"),
        ([True], TypeError, r"sequences\[0\] is True; it must be an int, not a bool"),
        (torch.tensor([True, False]), TypeError, r"sequences\[0\] is True"),
        ([1.0], TypeError, r"sequences\[0\] is 1\.0; it must be an int"),
        (1, TypeError, r"sequences is 1; it must be a list of ints"),
        ("01", TypeError, r"sequences is '01'; it must be a list of ints"),
    ],
    ids=str,
)
def test_resetting_names_a_sequence_that_is_not_there(
    page: int | None, given: Any, error: type[Exception], message: str
) -> None:
    cache = filled([3, 5], page=page)
    with pytest.raises(error, match="^KVCache: " + message):
        cache.reset(given)
    assert cache.lengths == [3, 5]


@pytest.mark.parametrize("page", PAGES)
def test_resetting_a_sequence_twice_is_once(page: int | None) -> None:
    twice: tuple[Any, ...] = ([1, 1], torch.tensor([1]), np.array([1, 1]), (1,))
    for given in twice:
        cache = filled([3, 5], page=page)
        cache.reset(given)
        assert cache.lengths == [3, 0]
    cache.reset([])
    assert cache.lengths == [3, 0]
    cache.reset()
    assert cache.lengths == [0, 0]
    assert cache.pages is None or cache.pages.free == cache.pages.count


def one(**changes: Any) -> Any:
    usual: dict[str, Any] = {"batch": 2, "capacity": 8, "num_kv_heads": 1, "head_dim": 4}
    return KVCache(**usual | changes)


ROW = torch.zeros(2, 1, 1, 4)
WRONG: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (lambda: one(batch="2"), TypeError, "batch is '2'; it must be an int"),
    (lambda: one(capacity=8.0), TypeError, r"capacity is 8\.0; it must be an int"),
    (lambda: one(num_kv_heads=True), TypeError, "num_kv_heads is True; it must be an int, not a bool"),
    (lambda: one(head_dim=None), TypeError, "head_dim is None"),
    (lambda: one(layers=0), ValueError, "layers is 0; it must be positive"),
    (lambda: one(capacity=10**30), ValueError, "capacity is 10+; it must be at most 2147483647"),
    (lambda: one(page="4"), TypeError, "page is '4'"),
    (lambda: one(dtype="float32"), TypeError, "dtype is 'float32'; it must be float16"),
    (lambda: one(k_scale=1.0), TypeError, "k_scale is float; it must be a tensor of float32"),
    (lambda: one(v_scale=torch.ones(1).half()), TypeError, "v_scale is float16; it must be a tensor of float32"),
    (lambda: one().extend(1.0), TypeError, r"count is 1\.0; it must be an int"),
    (lambda: one().extend(True), TypeError, "count is True; it must be an int, not a bool"),
    (lambda: one().extend([1, 1.5]), TypeError, r"count\[1\] is 1\.5"),
    (lambda: one().extend(torch.ones(2)), TypeError, r"count\[0\] is 1\.0"),
    (lambda: one().extend("12"), TypeError, "count is '12'; it must be a list of ints"),
    (lambda: one().extend(None), TypeError, "count is None; it must be an int"),
    (lambda: one().extend([[1], [2]]), TypeError, r"count\[0\] is \[1\]; it must be an int"),
    (lambda: one().truncate(0), TypeError, "lengths is 0; it must be a list of ints"),
    (lambda: one().truncate([False, 0]), TypeError, r"lengths\[0\] is False"),
    (lambda: one().reorder([0, -1]), ValueError, r"index is \[0, -1\]; it must name one of 2 sequences"),
    (lambda: one().reorder(["0", "1"]), TypeError, r"index\[0\] is '0'"),
    (lambda: one().reorder([0.0, 1.0]), TypeError, r"index\[0\] is 0\.0"),
    (lambda: one().read(-1), ValueError, "sequence is -1; it must be 0 to 1"),
    (lambda: one().read(2), ValueError, "sequence is 2; it must be 0 to 1"),
    (lambda: one().read(0, layer=1), ValueError, "layer is 1; it must be 0 to 0"),
    (lambda: one().attend(ROW, layer=-1), ValueError, "layer is -1; it must be 0 to 0"),
    (lambda: one().attend(ROW, layer=True), TypeError, "layer is True; it must be an int, not a bool"),
    (lambda: one().append(ROW[:, :, :0], ROW[:, :, :0], layer="0"), TypeError, "layer is '0'"),
    (lambda: one().load_state_dict({"k": ROW}), ValueError, r"state has \['k'\]; it must have \['k', 'lengths', 'v'\]"),
]


@pytest.mark.parametrize(("call", "error", "message"), WRONG, ids=[message for *_, message in WRONG])
def test_a_cache_names_what_is_wrong(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match="^KVCache: " + message):
        call()


MODULE: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"embed_dim": "8"}, TypeError, "embed_dim is '8'; it must be an int"),
    ({"num_heads": 2.0}, TypeError, r"num_heads is 2\.0; it must be an int"),
    ({"num_kv_heads": True}, TypeError, "num_kv_heads is True; it must be an int, not a bool"),
    ({"rotary": None}, TypeError, "rotary is None; it must be an int"),
    ({"rotary": 4, "max_positions": 8.5}, TypeError, r"max_positions is 8\.5"),
    ({"rotary": 4, "max_positions": 2**31}, ValueError, "max_positions is 2147483648; it must be at most"),
    ({"rotary": 4, "max_positions": 8, "rotary_base": 0}, ValueError, "rotary_base is 0; it must be finite, above"),
    ({"rotary": 4, "max_positions": 8, "interleaved": "no"}, TypeError, "interleaved is str; it must be a bool"),
    ({"window": 3}, TypeError, "window is 3; it must be None or two ints"),
    ({"softcap": "2"}, TypeError, "softcap is str; it must be a number"),
    ({"scale": "2"}, TypeError, "scale is str; it must be a number"),
]


@pytest.mark.parametrize(("options", "error", "message"), MODULE, ids=[message for *_, message in MODULE])
def test_decode_attention_names_what_is_wrong(options: dict[str, Any], error: type[Exception], message: str) -> None:
    usual: dict[str, Any] = {"embed_dim": 8, "num_heads": 2}
    with pytest.raises(error, match="^DecodeAttention: " + message):
        DecodeAttention(**usual | options)


@torch.no_grad()
def test_a_cache_that_does_not_fit_a_module_is_named() -> None:
    module, x = DecodeAttention(8, 2), torch.zeros(2, 1, 8)
    with pytest.raises(TypeError, match=r"^DecodeAttention: cache is dict; it must be None or a KVCache"):
        module(x, {})
    others = [
        (KVCache(3, 8, 2, 4), ValueError, r"append_kv: k_cache has .*\(B\) must be 2"),
        (KVCache(2, 8, 1, 4), ValueError, r"append_kv: k_cache has .*\(Hkv\) must be 2"),
        (KVCache(2, 8, 2, 8), ValueError, r"append_kv: k_cache has .*\(D\) must be 4"),
        (KVCache(2, 8, 2, 4, dtype=torch.float16), TypeError, "lean_attention: k_cache is float16; it must be float32"),
    ]
    for cache, error, message in others:
        cache.extend(1)
        cache.in_prompt = False
        with pytest.raises(error, match=message):
            module(x, cache)


# ---- nothing at all


@pytest.mark.parametrize("page", PAGES)
@pytest.mark.parametrize("backend", [None, "reference", "triton"])
@torch.no_grad()
def test_a_step_of_no_positions_gives_no_rows(page: int | None, backend: str | None) -> None:
    """At the start, in the middle, and where one sequence has none; what is held stays."""
    module = DecodeAttention(8, 2, rotary=4, max_positions=16, backend=backend)
    cache = module.new_cache(2, 8, page=page)
    x = torch.randn(2, 5, 8)
    expected = module(x)
    found = []
    for start, stop in ((0, 0), (0, 3), (3, 3), (3, 5), (5, 5)):
        cache.extend(stop - start)
        found.append(module(x[:, start:stop], cache))
        assert found[-1].shape == (2, stop - start, 8)
    torch.testing.assert_close(torch.cat(found, dim=1), expected, rtol=1e-5, atol=1e-6)
    assert cache.lengths == [5, 5]
    out, lse = cache.attend(torch.zeros(2, 2, 0, 4), return_lse=True, backend=backend)
    assert out.shape == (2, 2, 0, 4)
    assert lse.shape == (2, 2, 0)
    cache.extend([0, 1])
    assert module(x[:, :1], cache)[1].isfinite().all()


def test_an_empty_batch_or_prompt_goes_through() -> None:
    module = DecodeAttention(8, 2, rotary=4, max_positions=16)
    for shape in ((0, 3, 8), (2, 0, 8), (0, 0, 8)):
        x = torch.zeros(shape, requires_grad=True)
        out = module(x)
        assert out.shape == shape
        out.sum().backward()
        assert x.grad is not None


# ---- saved and restored


def test_a_module_built_on_meta_turns_by_its_own_angles() -> None:
    """A state_dict has no angles, so they are made where it is assigned as where it is copied."""
    module = DecodeAttention(8, 2, rotary=4, max_positions=16)
    x = torch.randn(2, 5, 8)
    assigned, copied = (DecodeAttention(8, 2, rotary=4, max_positions=16, device="meta") for _ in range(2))
    assigned.load_state_dict(module.state_dict(), assign=True)
    copied.to_empty(device="cpu").load_state_dict(module.state_dict())
    for other in (assigned, copied, copy.deepcopy(assigned)):
        torch.testing.assert_close(other(x), module(x))


@pytest.mark.parametrize("page", PAGES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float8_e4m3fn])
@pytest.mark.parametrize("lengths", [[3, 9], [0, 0]], ids=str)
def test_a_cache_is_saved_and_restored(page: int | None, dtype: torch.dtype, lengths: list[int]) -> None:
    """By the defaults of torch.save and torch.load, whole or as a state_dict; all then go on alike."""
    cache = filled(lengths, page=page, dtype=dtype)
    if page and lengths[1]:
        cache.reorder([1, 1])  # shares pages
    state_file, file = io.BytesIO(), io.BytesIO()
    state = cache.state_dict()
    torch.save(state, state_file)
    torch.save(cache, file)
    restored = KVCache(2, 30, 2, 4, layers=2, page=page, dtype=dtype)
    restored.extend(30)  # whatever it held
    restored.load_state_dict(torch.load(io.BytesIO(state_file.getvalue())))
    others = [torch.load(io.BytesIO(file.getvalue())), restored, copy.deepcopy(cache)]
    assert all(equal(cache, other) for other in others)
    new = torch.randn(2, 2, 2, 2, 4)
    for each in (cache, *others):
        each.extend(2)
        for layer in range(2):
            each.append(*new, layer=layer)
    assert all(equal(cache, other) for other in others)
    assert len(cache.lengths) == 2
    restored.load_state_dict(state)  # it is a copy: what was held then
    assert restored.lengths == ([9, 9] if page and lengths[1] else lengths)


@pytest.mark.parametrize("page", PAGES)
def test_a_state_that_does_not_fit_is_named_and_changes_nothing(page: int | None) -> None:
    state = filled([3, 9], page=page).state_dict()
    others: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"batch": 3}, ValueError, r"state has the lengths \[3, 9\]; it must have 3"),
        ({"capacity": 8}, ValueError, r"state has the lengths \[3, 9\]; it must have 2, of 0 to 8"),
        ({"num_kv_heads": 1}, ValueError, r"state\['k'\] has shape"),
        ({"value_dim": 3}, ValueError, r"state\['v'\] has shape"),
        ({"layers": 1}, ValueError, r"state\['k'\] has shape"),
        ({"dtype": torch.float16}, TypeError, r"state\['k'\] is float32; it must be a tensor of float16"),
        ({"page": 8 if page is None else None}, ValueError, "state has .*; it must have"),
    ]
    if page:
        others.append(({"pages": 3}, ValueError, "state has 4 pages; there are 3"))
        others.append(({"page": 3}, ValueError, r"state\['k'\] has shape"))
        others.append(({"page": 5}, ValueError, r"state\['tables'\] is"))
    for changes, error, message in others:
        cache = KVCache(**{"batch": 2, "capacity": 12, "num_kv_heads": 2, "head_dim": 4, "layers": 2, "page": page}
                        | changes)  # fmt: skip
        with pytest.raises(error, match="^KVCache: " + message):
            cache.load_state_dict(state)
        assert not any(cache.lengths)
        assert cache.pages is None or cache.pages.free == cache.pages.count

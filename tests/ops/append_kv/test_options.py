"""append_kv: what is written and what is not, on every backend, and the bytes that its kernel moves."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from iokernels import UnsupportedError, append_kv, apply_rotary, rotary_table
from iokernels.ops.append_kv import portable, reference
from iokernels.ops.append_kv.case import traffic
from iokernels.ops.append_kv.op import append
from iokernels.ops.append_kv.options import Append
from iokernels.testing import inputs
from iokernels.testing.poison import poison_

BACKENDS = ["torch", "scatter", "triton"]
"""``scatter`` is the backend ``torch`` as on a GPU, where the host reads no length."""


CLOSE = {
    torch.float64: 1e-14, torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2, torch.int8: 1.1e-2,
    torch.float8_e4m3fn: 0.13,
}  # fmt: skip
"""One unit in the last place of the largest elements: where two right sums differ by float32 rounding."""


@pytest.fixture
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "scatter":
        monkeypatch.setattr(portable, "host_reads", lambda x: False)
        return "torch"
    return request.param


def memory_of(x: Tensor) -> Tensor:
    """The bytes of a tensor."""
    return x.contiguous().view(torch.uint8)


def random_call(seed: int, dtype: torch.dtype, cached: torch.dtype, device: str) -> dict[str, Any]:
    """Arguments of a call: ragged, dense or paged, any strides; caches and unused page numbers are garbage."""
    pick = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    batch, heads, rows = pick.choice((1, 3)), pick.choice((1, 2)), pick.choice((1, 1, 3, 19))
    width, value_dim = pick.choice((16, 12, 20)), pick.choice((16, 6))
    lengths = [pick.choice((0, 1, 4, 13, 21)) for _ in range(batch)]
    call: dict[str, Any] = {}
    counts = [rows] * batch
    if pick.random() < 0.4:
        counts = [pick.choice((0, 1, rows)) for _ in range(batch)]
        call["new_seqlens"] = torch.tensor(counts, dtype=torch.int32)
    most = max(n + c for n, c in zip(lengths, counts, strict=True)) + pick.choice((0, 5))
    most = max(most, 1)
    first = (batch, heads, most)
    if pick.random() < 0.6:
        page = pick.choice((1, 4, 16))
        each = -(-most // page)
        table = torch.randperm(batch * each + 3, generator=generator)[: batch * each].view(batch, each).int()
        for row, length, count in zip(table, lengths, counts, strict=True):
            row[-(-(length + count) // page) :] = pick.choice((-7, 10**6))
            row[: length // page] = -1  # full pages are no business of an append
        call["block_table"] = table
        first = (batch * each + 3, heads, page)
    if pick.random() < 0.6:
        rot = pick.choice((width, 8))
        call["rotary"] = rotary_table(60, rot)
        call["interleaved"] = pick.random() < 0.5
        if pick.random() < 0.5:
            call["positions"] = torch.tensor(lengths, dtype=torch.int32) + 7
    scale = pick.choice((None, "head", "key" if cached in (torch.int8, torch.float8_e4m3fn) else "head"))
    for name in ("k_scale", "v_scale"):
        if scale is not None:
            made = torch.rand((heads,) if scale == "head" else first, generator=generator) * 0.05 + 0.01
            call[name] = made if scale == "head" else poison_(made)
    layout: Any = pick.choice(("contiguous", "bnhd", "padded", "strided"))
    for name, shape, of in (
        ("k_new", (batch, heads, rows, width), dtype), ("v_new", (batch, heads, rows, value_dim), dtype),
        ("k_cache", (*first, width), cached), ("v_cache", (*first, value_dim), cached),
    ):  # fmt: skip
        x = torch.randn(shape, generator=generator).to(of) if "new" in name else poison_(torch.zeros(shape, dtype=of))
        call[name] = inputs.poisoned_view(x, layout)
    call["cache_seqlens"] = torch.tensor(lengths, dtype=torch.int32)
    return {
        name: tuple(x.to(device) for x in value) if name == "rotary" else value.to(device) if isinstance(value, Tensor)
        else value for name, value in call.items()
    }  # fmt: skip


def copied(call: dict[str, Any]) -> dict[str, Any]:
    """The same call with caches and scales of its own."""
    fresh = {name: call[name].clone() for name in ("k_cache", "v_cache", "k_scale", "v_scale") if name in call}
    return {**call, **fresh}


PAIRS = [
    (torch.float32, torch.float32), (torch.float16, torch.float16), (torch.bfloat16, torch.bfloat16),
    (torch.float32, torch.bfloat16), (torch.bfloat16, torch.int8), (torch.float32, torch.float8_e4m3fn),
]  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
@pytest.mark.parametrize(("dtype", "cached"), PAIRS)
@pytest.mark.parametrize("seed", range(6))
def test_equals_the_oracle(seed: int, dtype: torch.dtype, cached: torch.dtype, backend: str, device: str) -> None:
    """What is written is the same, and whatever is not keeps its bits."""
    call = random_call(97 * seed + PAIRS.index((dtype, cached)), dtype, cached, device)
    expected, actual = copied(call), copied(call)
    append_kv(**expected, backend="reference")
    append_kv(**actual, backend=backend)
    for name in ("k_cache", "v_cache", "k_scale", "v_scale"):
        if name not in call:
            continue
        before, e, a = (memory_of(x[name]).view(x[name].shape[0], -1) for x in (call, expected, actual))
        size = call[name].element_size()
        changed = [(x != before).unflatten(1, (-1, size)).any(2) for x in (e, a)]
        assert torch.equal(*changed), f"{name}: other elements were written"
        at = changed[0].view(call[name].shape)
        if name.endswith("scale"):
            torch.testing.assert_close(actual[name][at], expected[name][at])
            continue
        close = CLOSE[cached]
        torch.testing.assert_close(actual[name].double()[at], expected[name].double()[at], rtol=close, atol=close)
        differing = (actual[name].double()[at] != expected[name].double()[at]).double().mean() if at.any() else 0.0
        assert cached == torch.float32 or differing < 0.05


@pytest.mark.parametrize("seed", range(12))
def test_equals_the_oracle_in_float64(seed: int) -> None:
    call = random_call(500 + seed, torch.float64, torch.float64, "cpu")
    expected, actual = copied(call), copied(call)
    append_kv(**expected, backend="reference")
    append_kv(**actual, backend="torch")
    for name in ("k_cache", "v_cache"):
        torch.testing.assert_close(actual[name], expected[name], rtol=1e-13, atol=1e-14, equal_nan=True)


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
@pytest.mark.parametrize("page", [None, 1, 4, 16])
def test_one_after_the_other_is_all_at_once(page: int | None, backend: str, device: str) -> None:
    """Across the edges of pages; and the keys of other sequences stay."""
    torch.manual_seed(0)
    k, v = torch.randn(2, 2, 37, 8, device=device), torch.randn(2, 2, 37, 6, device=device)
    each = -(-40 // (page or 40))
    first = (2, 2, 40) if page is None else (2 * each, 2, page)
    table = None if page is None else torch.randperm(2 * each).view(2, each).int().to(device)
    caches = [[torch.zeros(*first, w, device=device) for w in (8, 6)] for _ in range(2)]
    angles = rotary_table(64, 8, device=device)
    start = torch.tensor([0, 3], dtype=torch.int32, device=device)
    append_kv(k, v, *caches[0], cache_seqlens=start, block_table=table, rotary=angles, backend=backend)
    done = 0
    for count in (1, 2, 1, 16, 17):
        part = slice(done, done + count)
        append_kv(
            k[:, :, part], v[:, :, part], *caches[1], cache_seqlens=start + done, block_table=table, rotary=angles,
            backend=backend,
        )  # fmt: skip
        done += count
    assert done == 37
    for whole, parts in zip(*caches, strict=True):
        torch.testing.assert_close(parts, whole, rtol=1e-6, atol=1e-6)
        assert whole.any()


def nearest_float8(x: Tensor) -> Tensor:
    return x.clamp(-448.0, 448.0).to(torch.float8_e4m3fn)


def test_the_kernel_rounds_to_float8_and_int8_exactly(device: str) -> None:
    """Every number of the dtype, every tie between two, their float32 neighbours, and what lies outside."""
    codes = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    ties = (codes[1:] + codes[:-1]) / 2
    beside = [torch.nextafter(ties, torch.full_like(ties, limit)) for limit in (-1e9, 1e9)]
    wild = torch.tensor([0.0, 1e-30, 449.0, 464.0, 480.0, 1e30, float("inf")])
    x = torch.cat([codes, ties, *beside, wild])
    x = torch.cat([x, -x])
    cached = torch.zeros(1, 1, len(x), 1, dtype=torch.float8_e4m3fn, device=device)
    new = x.view(1, 1, -1, 1).to(device)
    none = torch.zeros(1, dtype=torch.int32, device=device)
    append_kv(new, new, cached, cached.clone(), cache_seqlens=none, backend="triton")
    assert torch.equal(cached.cpu().view(torch.uint8).flatten(), nearest_float8(x).view(torch.uint8))
    nan = torch.full((1, 1, 1, 1), float("nan"), device=device)
    append_kv(nan, nan, cached, cached.clone(), cache_seqlens=none, backend="triton")
    assert cached.float().flatten()[0].isnan()

    x = torch.arange(-600, 601) / 4.0
    whole = torch.zeros(1, 1, len(x), 1, dtype=torch.int8, device=device)
    new = x.view(1, 1, -1, 1).to(device)
    append_kv(new, new, whole, whole.clone(), cache_seqlens=none, backend="triton")
    assert torch.equal(whole.cpu().flatten(), x.round().clamp(-127, 127).to(torch.int8))


@pytest.mark.parametrize("backend", ["reference", *BACKENDS], indirect=True)
@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_a_key_comes_back_within_half_a_step(dtype: torch.dtype, backend: str, device: str) -> None:
    """Each key has a scale of its own, so large and small keys keep the same relative error; zero stays zero."""
    torch.manual_seed(0)
    new = torch.randn(1, 2, 5, 32, device=device) * torch.tensor([1e-6, 1.0, 3e4, 0.0, 1e-38], device=device)[:, None]
    caches = [torch.zeros(1, 2, 8, 32, device=device).to(dtype) for _ in range(2)]
    scales = [torch.zeros(1, 2, 8, device=device) for _ in range(2)]
    none = torch.zeros(1, dtype=torch.int32, device=device)
    append_kv(new, new, *caches, cache_seqlens=none, k_scale=scales[0], v_scale=scales[1], backend=backend)
    for cache, scale in zip(caches, scales, strict=True):
        back = (cache.float() * scale[..., None])[:, :, :5]
        largest = new.abs().amax(-1, keepdim=True)
        step = largest / 127 / 2 if dtype == torch.int8 else torch.maximum(new.abs() / 16, largest / 448 / 1024)
        assert ((back - new).abs() <= step * 1.001 + 2.0**-100).all()
        assert not back[:, :, 3].any()
        assert not scale[:, :, 5:].any()


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
@pytest.mark.parametrize("paged", [False, True])
def test_rows_that_have_no_place_are_not_written(paged: bool, backend: str, device: str) -> None:
    """Below the checks, as on a GPU: past the capacity, in pages that do not exist, and with negative lengths."""
    torch.manual_seed(0)
    new = torch.randn(4, 1, 5, 8, device=device)
    first, table = (4, 1, 8), None
    if paged:
        first = (6, 1, 4)
        table = torch.tensor([[0, 1], [2, -1], [3, 99], [4, 5]], dtype=torch.int32, device=device)
    caches = [poison_(torch.zeros(*first, 8, device=device)) for _ in range(2)]
    expected = [x.clone() for x in caches]
    seqlens = torch.tensor([6, 2, 3, 100], dtype=torch.int32, device=device)
    options = Append(seqlens, table, new_seqlens=torch.tensor([9, 5, 5, 5], dtype=torch.int32, device=device))
    reference.append(new, new, expected[0], expected[1], options)
    append(new, new, caches[0], caches[1], backend, *options)
    for a, e in zip(caches, expected, strict=True):
        assert torch.equal(a.nan_to_num(7.0), e.nan_to_num(7.0))
        written = 2 + 2 + 1 if paged else 2 + 5 + 5
        assert (~a.isnan()).sum() == 8 * written
    nothing = Append(torch.full_like(seqlens, 100), table)
    append(new, new, caches[0], caches[1], backend, *nothing)
    for a, e in zip(caches, expected, strict=True):
        assert torch.equal(a.nan_to_num(7.0), e.nan_to_num(7.0))


class NoAsking(TorchDispatchMode):
    """Refuses what would read a value on the host."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert "_local_scalar_dense" not in str(func)
        assert "nonzero" not in str(func)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("seed", range(4))
def test_without_lengths_on_the_host_nothing_waits_for_them(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(portable, "host_reads", lambda x: False)
    call = random_call(300 + seed, torch.float32, torch.int8, "cpu")
    tensors = [call.pop(name) for name in ("k_new", "v_new", "k_cache", "v_cache")]
    cos, sin = call.pop("rotary", (None, None))
    scales = [name for name in ("k_scale", "v_scale") if name in call and call[name].dim() == 3]
    each = {name: name.replace("_", "_key_") for name in scales}
    options = Append(**{each.get(name, name): x for name, x in call.items()}, cos=cos, sin=sin)
    with NoAsking():
        portable.append(tensors[0], tensors[1], tensors[2], tensors[3], options)


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
def test_empty_calls(backend: str, device: str) -> None:
    cache = torch.zeros(2, 1, 4, 8, device=device)
    none = torch.zeros(2, dtype=torch.int32, device=device)
    new = torch.ones(2, 1, 2, 8, device=device)
    for rows, held, lengths, counts in (
        (new[:, :, :0], cache, none, None),
        (new[:0], cache[:0], none[:0], None),
        (new, cache[:, :, :0], none, none),
    ):
        append_kv(rows, rows, held, held.clone(), cache_seqlens=lengths, new_seqlens=counts, backend=backend)
    assert not cache.any()


@pytest.mark.interpreted
@pytest.mark.parametrize("seed", range(24))
def test_the_kernel_touches_nothing_else_and_moves_the_bytes_of_its_model(seed: int) -> None:
    from iokernels.ops.append_kv.triton import block_rows
    from iokernels.testing.tracer import trace

    dtype, cached = PAIRS[seed % len(PAIRS)]
    call = random_call(1000 + seed, dtype, cached, "cpu")
    with trace() as traced:
        append_kv(**call, backend="triton")
    k, cache, scales = call["k_new"], call["k_cache"], [call[n] for n in ("k_scale", "v_scale") if n in call]
    lengths, rows = call["cache_seqlens"].tolist(), k.shape[2]
    counted = "new_seqlens" in call
    account = traffic.Call(
        lengths=lengths,
        counts=call["new_seqlens"].tolist() if counted else [rows] * len(lengths),
        rows=rows,
        heads=k.shape[1],
        head_dim=k.shape[3],
        value_dim=call["v_new"].shape[3],
        new_item=dtype.itemsize,
        cache_item=cached.itemsize,
        page=cache.shape[2] if "block_table" in call else 0,
        rot=2 * call["rotary"][0].shape[1] if "rotary" in call else 0,
        key_scales=sum(x.dim() == 3 for x in scales),
        head_scales=sum(x.dim() == 1 for x in scales),
        counted=counted,
        positioned="positions" in call,
    )
    moved, model = traced.bytes(), traffic.model(account, block_rows(rows))
    assert (moved.read, moved.written, moved.atomic) == (*model, 0)
    assert traffic.floor(account).total <= model.total
    assert len(traced.kernels) == 1


def good(**changes: Any) -> dict[str, Any]:
    call: dict[str, Any] = {
        "k_new": torch.zeros(2, 2, 3, 8), "v_new": torch.zeros(2, 2, 3, 4), "k_cache": torch.zeros(2, 2, 10, 8),
        "v_cache": torch.zeros(2, 2, 10, 4), "cache_seqlens": torch.tensor([0, 7], dtype=torch.int32),
    }  # fmt: skip
    return {**call, **changes}


def of(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


PAGED = {"k_cache": torch.zeros(5, 2, 4, 8), "v_cache": torch.zeros(5, 2, 4, 4)}
TABLE = torch.tensor([[0, 1, 2], [3, 4, 5]], dtype=torch.int32)
WRONG: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"k_new": [1]}, TypeError, "k_new is list"),
    ({"v_new": torch.zeros(2, 2, 3, 4).half()}, TypeError, "v_new is float16"),
    ({"k_cache": torch.zeros(2, 2, 10, 8).long()}, TypeError, "k_cache is int64"),
    ({"v_cache": torch.zeros(2, 2, 10, 4).half()}, TypeError, "v_cache is float16; it must be float32"),
    ({"k_cache": torch.zeros(2, 3, 10, 8)}, ValueError, "k_cache has shape"),
    ({"cache_seqlens": torch.zeros(2)}, TypeError, "cache_seqlens is float32"),
    ({"cache_seqlens": of(0)}, ValueError, "cache_seqlens has shape"),
    ({"cache_seqlens": of(0, 8)}, ValueError, r"cache_seqlens\[1\] is 8; with 3 new keys it must be 0 to 7"),
    ({"cache_seqlens": of(-1, 7)}, ValueError, r"cache_seqlens\[0\] is -1"),
    ({"new_seqlens": of(4, 0)}, ValueError, r"new_seqlens\[0\] is 4; it must be 0 to 3"),
    ({**PAGED, "block_table": TABLE}, ValueError, r"block_table\[1\] names page 5; there are 5"),
    ({"rotary": torch.zeros(3)}, TypeError, "rotary is Tensor"),
    ({"rotary": (torch.zeros(9, 5), torch.zeros(9, 5))}, ValueError, "cos has 5 columns"),
    ({"rotary": (torch.zeros(0, 4), torch.zeros(0, 4))}, ValueError, "cos has no rows"),
    ({"rotary": (torch.zeros(9, 4), torch.zeros(9, 4))}, ValueError, "sequence 1 has the positions 7 to 9"),
    ({"positions": of(0, 0)}, ValueError, "positions are those of rotary"),
    ({"interleaved": 1}, TypeError, "interleaved is int"),
    ({"k_scale": torch.zeros(2, 2, 10)}, ValueError, "computed for quantised caches"),
    ({"k_scale": torch.zeros(3)}, ValueError, "k_scale has shape"),
    ({"k_new": torch.zeros(2, 2, 3, 8).requires_grad_()}, UnsupportedError, "none flows through a cache"),
    ({"backend": "cuda"}, UnsupportedError, "'cuda' cannot run this call"),
    ({"k_cache": torch.zeros(2, 2, 10, 8).double(), "v_cache": torch.zeros(2, 2, 10, 4).double(), "backend": "triton"},
     UnsupportedError, "not float64"),
    ({"k_new": torch.zeros(2, 2, 3, 300), "k_cache": torch.zeros(2, 2, 10, 300), "backend": "triton"},
     UnsupportedError, "D is 300"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "error", "message"), WRONG, ids=[message for _, _, message in WRONG])
def test_errors(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    call = good(**changes)
    with pytest.raises(error, match=message):
        append_kv(**call)
    caches = [call[name] for name in ("k_cache", "v_cache") if isinstance(call[name], Tensor)]
    assert not any(cache.any() for cache in caches)
    append_kv(**good())


def test_under_no_grad_parameters_are_no_obstacle() -> None:
    call = good(k_new=torch.ones(2, 2, 3, 8).requires_grad_())
    with torch.no_grad():
        append_kv(**call)
    assert call["k_cache"].sum() == 2 * 2 * 3 * 8


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotary_turns_queries_as_keys(interleaved: bool) -> None:
    """The score of a query and a key depends on how far they are apart, and on nothing else of where they stand."""
    torch.manual_seed(0)
    cos, sin = rotary_table(50, 8)
    q, k = torch.randn(1, 1, 1, 10, dtype=torch.float64), torch.randn(1, 1, 1, 10, dtype=torch.float64)

    def score(at_q: int, at_k: int) -> Tensor:
        turned = [apply_rotary(x, cos, sin, of(at), interleaved=interleaved) for x, at in ((q, at_q), (k, at_k))]
        cache = torch.zeros(1, 1, 50, 10, dtype=torch.float64)
        rotary = {"rotary": (cos, sin), "interleaved": interleaved, "positions": of(at_k)}
        append_kv(k, k, cache, cache.clone(), cache_seqlens=of(3), **rotary)
        torch.testing.assert_close(cache[:, :, 3:4], turned[1])
        return (turned[0] * turned[1]).sum()

    torch.testing.assert_close(score(30, 20), score(17, 7), rtol=1e-6, atol=1e-6)  # the angles are float32
    assert abs(score(30, 20) - score(30, 21)) > 1e-3
    assert torch.equal(apply_rotary(q, cos, sin, of(9), interleaved=interleaved)[..., 8:], q[..., 8:])
    x = torch.randn(2, 1, 3, 10, dtype=torch.float64, requires_grad=True)
    at = of(4, 0)
    assert torch.autograd.gradcheck(lambda x: apply_rotary(x, cos, sin, at, interleaved=interleaved), x)
    expected = reference.rotated(x[0, 0, 2], cos[6], sin[6], interleaved)
    torch.testing.assert_close(apply_rotary(x, cos, sin, at, interleaved=interleaved)[0, 0, 2], expected)


def test_rotary_errors() -> None:
    cos, sin = rotary_table(10, 4)
    x = torch.zeros(1, 1, 3, 6)
    with pytest.raises(ValueError, match="sequence 0 has the positions 8 to 10; cos has rows for 0 to 9"):
        apply_rotary(x, cos, sin, of(8))
    with pytest.raises(ValueError, match="a head has 2"):
        apply_rotary(x[..., :2], cos, sin, of(0))
    with pytest.raises(TypeError, match="positions is float32"):
        apply_rotary(x, cos, sin, torch.zeros(1))
    for arguments, message in (((-1, 4), "positions is -1"), ((4, 3), "width is 3")):
        with pytest.raises(ValueError, match=message):
            rotary_table(*arguments)

"""The backend ``torch`` of lean_attention: values, what it reads, memory, invariance, and which kernel runs."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from iokernels import lean_attention
from iokernels.ops.lean_attention import portable, reference
from iokernels.ops.lean_attention.options import Options
from iokernels.runtime.registration.precision import eagerly
from iokernels.testing.budget import FORWARD, check, judge
from iokernels.testing.poison import poison_


def normal(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, dtype=torch.float64).to(dtype)


@pytest.fixture(params=["small", "own"])
def chunks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of 5 keys, of which short caches take several; or those of real calls."""
    if request.param == "small":
        monkeypatch.setattr(portable, "_chunks", small_chunks)


def small_chunks(first: int, stop: int, *_: Any) -> list[slice]:
    return [slice(start, min(start + 5, stop)) for start in range(first, stop, 5)]


@pytest.fixture
def on_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Walk as on a GPU, where the host knows no length."""
    monkeypatch.setattr(portable, "host_lengths", lambda k_cache, options: None)


def poisoned(cache: Tensor, seqlens: Tensor, table: Tensor | None) -> Tensor:
    """A copy, NaN (or the largest integer) wherever no sequence has a key."""
    held = torch.zeros(cache.shape[0], cache.shape[2], dtype=torch.bool)
    for sequence, length in enumerate(seqlens.tolist()):
        if table is None:
            held[sequence, :length] = True
            continue
        for i in range(length):
            held[table[sequence, i // cache.shape[2]], i % cache.shape[2]] = True
    garbage = poison_(torch.zeros_like(cache))
    shape = (held.shape[0], 1, held.shape[1], *[1] * (cache.dim() - 3))
    if cache.dtype == torch.float8_e4m3fn:
        bits = torch.where(held.view(shape), cache.view(torch.uint8), garbage.view(torch.uint8))
        return bits.view(cache.dtype)
    return torch.where(held.view(shape), cache, garbage)


def random_call(seed: int, dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    """Arguments of a call: ragged lengths, dense or paged, options at random, garbage wherever nothing may be read."""
    pick = random.Random(seed)
    torch.manual_seed(seed)
    batch, kv_heads, group = pick.choice((1, 2, 3)), pick.choice((1, 2)), pick.choice((1, 3))
    most, width, value_dim = pick.choice((1, 17, 32)), pick.choice((4, 8)), pick.choice((4, 6, 8))
    seqlens = torch.tensor([pick.choice((0, 1, most // 2, most)) for _ in range(batch)], dtype=torch.int32)
    table, first = None, (batch, kv_heads, most)
    if pick.random() < 0.5:
        page = pick.choice((1, 3, 4, 16, 40))
        each = -(-most // page)
        order = torch.randperm(batch * each + 2)
        table = order[: batch * each].view(batch, each).int()
        for sequence, length in enumerate(seqlens.tolist()):
            table[sequence, -(-length // page) :] = pick.choice((-7, 10**6))
        first = (batch * each + 2, kv_heads, page)
    cached = pick.choice((dtype, dtype, torch.int8, torch.float8_e4m3fn))
    options: dict[str, Any] = {"causal": pick.random() < 0.6}
    scale = pick.choice((None, "head", "key"))
    for name in ("k_scale", "v_scale"):
        if scale is not None:
            options[name] = torch.rand((kv_heads,) if scale == "head" else first) + 0.5
            if scale == "key":
                options[name] = poisoned(options[name], seqlens, table)
    if pick.random() < 0.4 and scale != "key":
        prefix = pick.choice((1, 9))
        options["k_prefix"], options["v_prefix"] = (
            (normal(kv_heads, prefix, w) * 2).to(cached) for w in (width, value_dim)
        )
    if pick.random() < 0.4:
        options["window"] = (pick.choice((-1, 0, 3)), pick.choice((-1, 0, 2)))
    if pick.random() < 0.3:
        options["softcap"] = 1.5
    if pick.random() < 0.3:
        options["sinks"] = normal(kv_heads * group)
        options["sinks"][0] = float("-inf")
    k, v = ((normal(*first, w) * 2).to(cached) for w in (width, value_dim))
    return {
        "q": normal(batch, kv_heads * group, pick.choice((1, 1, 3)), width, dtype=dtype),
        "k_cache": poisoned(k, seqlens, table), "v_cache": poisoned(v, seqlens, table), "cache_seqlens": seqlens,
        "block_table": table, **options,
    }  # fmt: skip


@pytest.mark.parametrize("seed", range(40))
def test_equals_the_oracle_in_float64(seed: int, chunks: None) -> None:
    call = random_call(seed)
    expected = lean_attention(**call, return_lse=True, backend="reference")
    schedules: tuple[dict[str, Any], ...] = ({}, {"batch_invariant": True})
    for schedule in schedules:
        actual = lean_attention(**call, **schedule, return_lse=True, backend="torch")
        for a, e in zip(actual, expected, strict=True):
            torch.testing.assert_close(a, e, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("seed", range(100, 140))
def test_equals_the_oracle_without_lengths_on_the_host(seed: int, chunks: None, on_device: None, device: str) -> None:
    """On a GPU where there is one."""
    call: dict[str, Any] = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in random_call(seed).items()}
    expected = lean_attention(**call, return_lse=True, backend="reference")
    schedules: tuple[dict[str, Any], ...] = ({}, {"batch_invariant": True})
    for schedule in schedules:
        actual = lean_attention(**call, **schedule, return_lse=True, backend="torch")
        for a, e in zip(actual, expected, strict=True):
            torch.testing.assert_close(a, e, rtol=1e-11, atol=1e-12)


class NoAsking(TorchDispatchMode):
    """Refuses what would read a value on the host."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert "_local_scalar_dense" not in str(func)
        assert "nonzero" not in str(func)
        return func(*args, **(kwargs or {}))


def test_the_walk_without_lengths_never_asks_for_them(on_device: None) -> None:
    call = random_call(3)

    names = ("cache_seqlens", "block_table", "sinks", "k_scale", "v_scale", "k_prefix", "v_prefix")
    tensors: list[Any] = [call.get(name) for name in names]
    options = Options(*tensors, scale=0.3, window_left=4, window_right=0)
    with NoAsking():
        portable.forward(call["q"], call["k_cache"], call["v_cache"], options)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("rows", [1, 5])
def test_error_budget(dtype: torch.dtype, rows: int) -> None:
    q, k, v = (
        normal(2, 6, rows, 64, dtype=dtype),
        normal(2, 2, 300, 64, dtype=dtype),
        normal(2, 2, 300, 64, dtype=dtype),
    )
    seqlens = torch.tensor([300, 131], dtype=torch.int32)
    options = Options(seqlens, scale=0.125, window_right=0)
    exact, _ = reference.attend(q.double(), k.double(), v.double(), options)
    with eagerly():
        low, _ = reference.attend(q, k, v, options)
    actual = lean_attention(q, k, v, cache_seqlens=seqlens, backend="torch")
    assert actual.dtype == dtype
    check(actual, exact, low, factor=FORWARD, what="out")
    assert not judge(torch.zeros_like(actual), exact, low, factor=FORWARD).within
    assert not judge(actual * 1.1, exact, low, factor=FORWARD).within


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("prefix", [False, True])
def test_a_batch_invariant_row_keeps_its_bits(dtype: torch.dtype, prefix: bool) -> None:
    q, k, v = (normal(5, h, n, 40, dtype=dtype) for h, n in ((6, 2), (2, 400), (2, 400)))
    seqlens = torch.tensor([400, 33, 0, 257, 400], dtype=torch.int32)
    options: dict[str, Any] = {"batch_invariant": True, "return_lse": True, "backend": "torch"}
    if prefix:
        options["k_prefix"], options["v_prefix"] = normal(2, 77, 40, dtype=dtype), normal(2, 77, 40, dtype=dtype)
    whole = lean_attention(q, k, v, cache_seqlens=seqlens, **options)
    for b in range(5):
        own = slice(b, b + 1)
        alone = lean_attention(q[own].clone(), k[own].clone(), v[own].clone(), cache_seqlens=seqlens[own], **options)
        for x, y in zip(whole, alone, strict=True):
            assert torch.equal(x[own], y)


class LargestTensor(TorchDispatchMode):
    """Records the most elements that any operator's result had."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for x in made if isinstance(made, (tuple, list)) else (made,):
            if isinstance(x, Tensor) and not x._is_view():
                self.elements = max(self.elements, x.numel())
        return made


@pytest.mark.parametrize("page", [None, 16, 4096])
def test_memory_does_not_grow_with_the_cache(page: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(portable, "_CHUNK_ELEMENTS", {"cpu": 2**13})
    largest = []
    for length in (4096, 8192):
        first = (1, 2, length) if page is None else (length // page, 2, page)
        table = None if page is None else torch.arange(length // page, dtype=torch.int32)[None]
        k, v = (torch.randn(*first, 8).to(torch.bfloat16) for _ in range(2))
        options = Options(torch.tensor([length], dtype=torch.int32), table, torch.zeros(4), scale=0.3)
        with LargestTensor() as counter:
            portable.forward(torch.randn(1, 4, 1, 8).to(torch.bfloat16), k, v, options)
        largest.append(counter.elements)
    assert largest[0] == largest[1] < 8192


def test_which_calls_run_in_the_kernel_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those for which it is the same function, with grouped heads as rows, and no other."""
    calls = []
    aten = portable._ATEN_FORWARD
    monkeypatch.setattr(portable, "_ATEN_FORWARD", lambda *a, **k: calls.append(a[0].shape) or aten(*a, **k))
    q, k, v = (torch.randn(2, h, n, 8) for h, n in ((6, 1), (2, 20), (2, 20)))
    seqlens = torch.tensor([20, 7], dtype=torch.int32)

    def run(q: Tensor = q, k: Tensor = k, v: Tensor = v, **options: Any) -> int:
        calls.clear()
        actual = lean_attention(q, k, v, cache_seqlens=seqlens, return_lse=True, backend="torch", **options)
        expected = lean_attention(q, k, v, cache_seqlens=seqlens, return_lse=True, backend="reference", **options)
        for a, e in zip(actual, expected, strict=True):
            torch.testing.assert_close(a, e)
        return len(calls)

    assert run() == 2
    assert calls == [(1, 2, 3, 8)] * 2
    assert run(q=torch.randn(2, 6, 3, 8), causal=False) == 2
    assert run(k=k.transpose(1, 2).contiguous().transpose(1, 2)) == 2
    assert run(q=torch.randn(2, 6, 3, 8)) == 0  # causal: its rows do not see the same keys
    assert run(v=torch.randn(2, 2, 20, 4)) == 0
    assert run(k=k.transpose(2, 3).contiguous().transpose(2, 3)) == 0
    others: list[dict[str, Any]] = [
        {"window": (3, 0)}, {"softcap": 2.0}, {"sinks": torch.zeros(6)}, {"k_scale": torch.ones(2)},
        {"batch_invariant": True}, {"k_prefix": k[0], "v_prefix": v[0]},
    ]  # fmt: skip
    for options in others:
        assert run(**options) == 0, options


@pytest.mark.parametrize(("invariant", "walks"), [(False, 1), (True, 3)])
def test_a_prefix_is_read_once_for_all(invariant: bool, walks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """And once for each sequence where none may matter to another."""
    read: list[int] = []
    after_prefix = portable._after_prefix
    monkeypatch.setattr(portable, "_after_prefix", lambda q, *rest: read.append(q.shape[0]) or after_prefix(q, *rest))
    q, k, v = (torch.randn(3, 2, n, 8) for n in (1, 12, 12))
    lengths = torch.tensor([3, 0, 12], dtype=torch.int32)
    prefix: dict[str, Any] = {"k_prefix": torch.randn(2, 30, 8), "v_prefix": torch.randn(2, 30, 8)}
    lean_attention(q, k, v, cache_seqlens=lengths, **prefix, batch_invariant=invariant, backend="torch")
    assert read == [3 // walks] * walks


def test_lengths_out_of_range_are_clamped_below_the_checks() -> None:
    q, k, v = (torch.randn(3, 2, n, 8) for n in (1, 12, 12))

    def run(lengths: list[int]) -> Tensor:
        return portable.forward(q, k, v, Options(torch.tensor(lengths, dtype=torch.int32), scale=0.3))[0]

    assert torch.equal(run([-5, 99, 12]), run([0, 12, 12]))

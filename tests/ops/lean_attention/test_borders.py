"""lean_attention where layouts and numbers end: any strides on any path, NaN and infinity, the largest floats."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from torch import Tensor

from iokernels import lean_attention
from iokernels.ops.lean_attention import portable
from iokernels.ops.lean_attention.cuda import launch as cuda
from iokernels.ops.lean_attention.options import Options
from iokernels.ops.lean_attention.triton import launch as triton_launch
from tests.ops.backends import BACKENDS, usual
from tests.ops.lean_attention.calls import Call, make, prove
from tests.ops.lean_attention.layouts import LAYOUTS

ALL = ("reference", *BACKENDS)


def ints(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


# ---- layouts


@pytest.mark.parametrize("backend", ["reference", "torch", "triton"])
def test_a_query_of_every_other_element(backend: str) -> None:
    """The score of key 1 is 60, so out is its value; ATen's kernel takes rows for contiguous."""
    k = torch.eye(4).view(1, 1, 4, 4)
    v = torch.tensor([1.0, 10.0, 100.0, 1000.0]).view(1, 1, 4, 1).repeat(1, 1, 1, 4)
    wide = torch.zeros(1, 1, 1, 8)
    wide[..., 2] = 60.0
    out = lean_attention(wide[..., ::2], k, v, cache_seqlens=ints(4), scale=1.0, backend=backend)
    torch.testing.assert_close(out, torch.full((1, 1, 1, 4), 10.0))


@st.composite
def laid_out(draw: st.DrawFn, backend: str) -> Call:
    """A call whose tensors lie in any way: plain ones, which ATen takes, and others."""
    plain = draw(st.booleans())
    rows, page, prefix = draw(st.sampled_from([1, 1, 3])), 0, 0
    options: dict[str, Any] = {"causal": draw(st.booleans()), "scale": draw(st.sampled_from([0.3, 0.0, -0.3]))}
    kind: dict[str, Any] = {}
    if not plain:
        page, prefix = draw(st.sampled_from([0, 4])), draw(st.sampled_from([0, 5]))
        kind = {"sinks": draw(st.booleans()), "scales": draw(st.sampled_from(["", "head", "" if prefix else "key"]))}
        options["window"] = draw(st.sampled_from([None, (6, 0)]))
    call = make(
        draw(st.integers(0, 99)), draw(st.sampled_from([(9, 4), (9,), (23, 17, 5)])), heads=4, kv_heads=2, rows=rows,
        head_dim=16, page=page, prefix=prefix, dtype=usual(backend), spare=2, **kind, **options,
    )  # fmt: skip
    found = {}
    for name, x in call.tensors.items():
        ways = [way for way in LAYOUTS if name not in ("cache_seqlens", "block_table") or not way.startswith("rep")]
        found[name] = LAYOUTS[draw(st.sampled_from(ways))](x.contiguous())
    return call._replace(tensors=found)


@pytest.mark.parametrize(("backend", "examples"), [("torch", 60), ("triton", 14), pytest.param("cuda", 6)])
def test_a_result_does_not_depend_on_strides(backend: str, examples: int) -> None:
    """Of q, caches, tables, lengths, scales, sinks and prefix alike, on every path."""

    @seed(1)
    @settings(max_examples=examples, deadline=None, database=None, suppress_health_check=(HealthCheck.too_slow,))
    @given(laid_out(backend))
    def check(call: Call) -> None:
        prove(backend, call)

    check()


def test_a_long_cache_takes_any_query_to_aten(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []
    aten = portable._ATEN_FORWARD
    monkeypatch.setattr(portable, "_ATEN_FORWARD", lambda *a, **k: taken.append(1) or aten(*a, **k))
    for index, lay in enumerate(LAYOUTS.values()):
        call = make(index, (700, 513), heads=4, kv_heads=2, head_dim=32, spare=0)
        prove("torch", call.with_tensors(q=lay(call.tensors["q"].contiguous())))
        assert len(taken) == 2 * (index + 1)


# ---- NaN and infinity


def alike(expected: tuple[Tensor, Tensor], found: tuple[Tensor, Tensor]) -> None:
    for one, other in zip(expected, found, strict=True):
        assert one.isfinite().all()
        torch.testing.assert_close(other, one)


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("where", ["q", "k_cache"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_nan_that_a_row_sees_shows(backend: str, where: str, value: float) -> None:
    """In out and lse of that row, and in no other; 1 and 300 keys take different ways through ATen's kernel."""
    for length in (1, 300) if backend in ("reference", "torch") else (1, 20):
        q, k, v = (torch.randn(2, 2, n, 16, dtype=usual(backend)) for n in (1, length, length))
        x = q if where == "q" else k
        x[1, 0, -1, 3] = value
        if value == math.inf:  # infinity on both sides is NaN; and a score of infinity has no softmax
            q[1, 0, 0, 3], k[1, 0, -1, 3] = (math.inf, 0.0) if where == "q" else (2.0, math.inf)
        out, lse = lean_attention(q, k, v, cache_seqlens=ints(length, length), return_lse=True, backend=backend)
        assert out[1, 0].isnan().all(), length
        assert lse[1, 0].isnan().all(), length
        others = torch.tensor([[True, True], [False, True]])
        assert out[others].isfinite().all()
        assert lse[others].isfinite().all()


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("page", [0, 4])
@pytest.mark.parametrize("scales", ["", "key"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_no_row_sees_may_be_anything(backend: str, page: int, scales: str, value: float) -> None:
    """Keys and scales behind the window of all rows, whose pages may have been given away; so too of a prefix."""
    call = make(
        3, (30, 13, 2), heads=4, kv_heads=2, rows=2, page=page, dtype=usual(backend), scales=scales, window=(5, 0)
    )
    names = ("k_cache", "v_cache", *(("k_scale", "v_scale") if scales else ()))
    dirty = {name: call.tensors[name].clone() for name in names}
    if page:
        table = call.tensors["block_table"].clone()
        for sequence, first in ((0, 23), (1, 6)):
            for pages in dirty.values():
                pages[table[sequence, : first // page].long()] = value
                pages[table[sequence, first // page].long(), :, : first % page] = value
            table[sequence, : first // page] = -1
        dirty["block_table"] = table
    else:
        for cache in dirty.values():
            cache[0, :, :23], cache[1, :, :6] = value, value
    alike(call(backend), call.with_tensors(**dirty)(backend))

    call = make(4, (6, 3), heads=4, kv_heads=2, rows=2, prefix=21, dtype=usual(backend), window=(9, 0))
    unseen = 21 + 3 - 2 - 9
    dirty = {name: call.tensors[name].clone() for name in ("k_prefix", "v_prefix")}
    for keys in dirty.values():
        keys[:, :unseen] = value
    alike(call(backend), call.with_tensors(**dirty)(backend))


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("prefix", [0, 7])
def test_a_row_knows_nothing_of_later_keys(backend: str, prefix: int) -> None:
    """Where several rows are computed at once: a weight of 0 times NaN is NaN."""
    call = make(5, (20, 3), heads=4, kv_heads=2, rows=3, prefix=prefix, window=(12, 0))
    expected = call(backend)
    for value in (math.nan, -math.inf):
        dirty = {name: call.tensors[name].clone() for name in ("k_cache", "v_cache")}
        dirty["k_cache"][:, :, 19], dirty["v_cache"][:, :, 19] = math.nan, value
        dirty["k_cache"][1, :, 2], dirty["v_cache"][1, :, 2] = math.nan, value
        found = call.with_tensors(**dirty)(backend)
        for one, other in zip(expected, found, strict=True):
            torch.testing.assert_close(one[:, :, :2], other[:, :, :2])
            assert other[:, :, 2].isnan().all()


def test_on_a_device_too_nothing_that_is_hidden_from_all_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the host does not know the lengths, all keys are read and replaced."""
    monkeypatch.setattr(portable, "host_lengths", lambda k_cache, options: None)
    q, k, v = (torch.randn(2, 2, n, 8) for n in (2, 20, 20))
    options = Options(ints(18, 9), scale=0.3, window_left=4, window_right=0)
    expected = portable.forward(q, k, v, options)
    for x in (k, v):
        x[0, :, :12], x[0, :, 18:], x[1, :, :3], x[1, :, 9:] = math.nan, math.nan, math.inf, math.nan
    alike(expected, portable.forward(q, k, v, options))


# ---- the largest numbers


@pytest.mark.parametrize("backend", ["reference", "torch", "triton"])
@pytest.mark.parametrize("level", [-1e9, 1e9, torch.finfo(torch.float32).min, torch.finfo(torch.float32).max])
def test_a_softmax_does_not_depend_on_the_level_of_its_scores(backend: str, level: float) -> None:
    """All eight keys at one score, as large as floats are: the mean of 0 to 7 is 3.5."""
    k = torch.zeros(1, 1, 8, 16)
    k[..., 0] = level
    q = torch.eye(16)[:1].view(1, 1, 1, 16)
    v = torch.arange(8.0).view(1, 1, 8, 1).repeat(1, 1, 1, 16)
    prefix = {"k_prefix": k[0], "v_prefix": v[0]}
    choices: list[dict[str, Any]] = [{}, {"softcap": 1e30}, prefix, {"schedule": "split"}]
    for options in choices:
        out, lse = lean_attention(
            q, k, v, cache_seqlens=ints(8), scale=1.0, return_lse=True, backend=backend, **options
        )
        torch.testing.assert_close(out, torch.full_like(out, 3.5))
        if "softcap" not in options:
            torch.testing.assert_close(lse, torch.full_like(lse, level), rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("keys", [0, 8])
@pytest.mark.parametrize("level", [-1e9, torch.finfo(torch.float32).min, 3e38])
def test_sinks_as_large_as_floats(backend: str, keys: int, level: float) -> None:
    """A sink at the lowest number weighs nothing beside keys, and is all that a row without keys has."""
    dtype = usual(backend)
    q, k = torch.zeros(1, 2, 1, 16, dtype=dtype), torch.zeros(1, 1, 8, 16, dtype=dtype)
    sinks = torch.full((2,), level)
    out, lse = lean_attention(q, k, k + 1.0, cache_seqlens=ints(keys), sinks=sinks, return_lse=True, backend=backend)
    wins = keys == 0 or level > 0
    torch.testing.assert_close(out, torch.full_like(out, 0.0 if wins else 1.0))
    torch.testing.assert_close(lse, torch.full_like(lse, level if wins else math.log(8)), rtol=1e-6, atol=0.0)


def test_scores_beyond_log2_e_on_cuda() -> None:
    """float16 cannot hold such a key, so the scale makes the score; bits of the mean come out."""
    q = torch.ones(1, 1, 1, 16, dtype=torch.float16)
    v = torch.arange(8.0).view(1, 1, 8, 1).repeat(1, 1, 1, 16).half()
    for sign in (1.0, -1.0):
        out, lse = lean_attention(
            q, torch.ones(1, 1, 8, 16).half(), v, cache_seqlens=ints(8), scale=sign * 2e37, return_lse=True,
            backend="cuda",
        )  # fmt: skip
        assert torch.equal(out, torch.full_like(out, 3.5))
        torch.testing.assert_close(lse, torch.full_like(lse, sign * 3.2e38), rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("value_dim", [16, 18])
def test_a_prefix_of_an_odd_number_of_rows_on_cuda(heads: int, value_dim: int) -> None:
    """The sums that it leaves begin at multiples of 16 bytes whatever B Hq Nq is: the emulator looks at addresses."""
    prove("cuda", make(6, (7,), heads=heads, value_dim=value_dim, prefix=9, dtype=torch.float16))
    prove("cuda", make(7, (7, 0, 20), heads=heads, rows=3, prefix=40, dtype=torch.float16, sinks=True))


# ---- page numbers


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("number", [-1, 5, 10**8])
def test_a_page_that_does_not_exist_is_named_on_the_cpu(backend: str, number: int) -> None:
    dtype = usual(backend)
    q, cache = torch.zeros(2, 2, 1, 16, dtype=dtype), torch.zeros(5, 1, 4, 16, dtype=dtype)
    table = torch.tensor([[0, 1, number], [2, number, 3]], dtype=torch.int32)

    def run(*lengths: int, **options: Any) -> Tensor:
        return lean_attention(
            q, cache, cache, cache_seqlens=ints(*lengths), block_table=table, backend=backend, **options
        )

    assert not run(8, 4).any()
    assert not run(0, 12, window=(3, 0)).any()  # behind the window
    with pytest.raises(ValueError, match=rf"block_table\[0\] names page {number}; there are 5 \(its entry 2\)"):
        run(9, 4)
    with pytest.raises(ValueError, match=rf"block_table\[1\] names page {number}; there are 5 \(its entry 1\)"):
        run(8, 12, window=(4, 0))


@pytest.mark.parametrize("backend", ["torch", "triton", "cuda"])
def test_a_kernel_takes_a_page_that_does_not_exist_to_the_nearest(backend: str) -> None:
    """On a GPU the host does not read the table; whatever it says, nothing outside the caches is read."""
    run = {"torch": portable, "triton": triton_launch, "cuda": cuda}[backend].forward
    dtype = usual(backend)
    q, k, v = (torch.randn(n, 2, m, 16).to(dtype) for n, m in ((2, 1), (5, 4), (5, 4)))
    found = []
    for table in ([[-9, 10**8], [2, 5]], [[0, 4], [2, 4]]):
        options = Options(ints(8, 7), block_table=torch.tensor(table, dtype=torch.int32), scale=0.3)
        found.append(run(q, k, v, options))
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("pages", [0, 5])
def test_no_sequence_has_gradients_of_0(pages: int) -> None:
    """Of everything that the oracle differentiates, where there are no rows too."""
    shapes = {"q": (0, 2, 1, 8), "sinks": (2,), "k_prefix": (1, 3, 8), "v_prefix": (1, 3, 8), "v_scale": (1,)}
    shapes |= {"k_cache": (pages, 1, 4, 8), "v_cache": (pages, 1, 4, 8)}
    wanted: dict[str, Any] = {name: torch.randn(shape, requires_grad=True) for name, shape in shapes.items()}
    table = torch.zeros(0, 2, dtype=torch.int32) if pages else None
    out, lse = lean_attention(**wanted, cache_seqlens=ints(), block_table=table, return_lse=True, backend="reference")
    assert out.shape == (0, 2, 1, 8)
    (out.sum() + lse.sum()).backward()
    for name, x in wanted.items():
        assert x.grad is not None, name
        assert not x.grad.any(), name


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rising", [slice(0, 8), slice(8, 16), slice(15, 16)], ids=str)
def test_the_maxima_of_some_rows_rise_and_those_of_others_do_not(backend: str, rising: slice) -> None:
    """What was summed before is made less for each row by itself."""
    call = make(9, (200,), heads=16, kv_heads=1, head_dim=16, spare=0, dtype=usual(backend), scale=1.0)
    q, k = torch.zeros_like(call.tensors["q"]), call.tensors["k_cache"].clone()
    q[:, rising, :, 0] = 1.0
    k[..., 0] = torch.arange(200) / 8  # the last weighs most
    out, _ = prove(backend, call.with_tensors(q=q, k_cache=k))
    assert not torch.equal(out[:, rising][:, 0], out[:, (rising.start + 8) % 16])

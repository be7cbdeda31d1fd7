"""Bad input to lean_attention: each is refused by an error that names the argument, what it got and what it takes."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from iokernels import UnsupportedError, lean_attention, use_backend
from iokernels.runtime import device

Q, K, V = (2, 4, 3, 16), (2, 2, 9, 16), (2, 2, 9, 8)
PAGES = {"k_cache": (5, 2, 4, 16), "v_cache": (5, 2, 4, 8)}


def ints(*values: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype)


def dense(**changes: Any) -> dict[str, Any]:
    """Arguments of a call that is accepted, but for the changes."""
    return {
        "q": torch.ones(Q),
        "k_cache": torch.ones(K),
        "v_cache": torch.ones(V),
        "cache_seqlens": ints(9, 4),
        "backend": "reference",
        **changes,
    }


def paged(**changes: Any) -> dict[str, Any]:
    """The same with pages of 4 keys: sequences of 9 and 4 keys."""
    caches = {name: torch.ones(shape) for name, shape in PAGES.items()}
    return dense(**caches, block_table=torch.tensor([[4, 0, 2], [1, 99, -7]], dtype=torch.int32), **changes)


ACCEPTED: list[dict[str, Any]] = [
    {},
    {"causal": False},
    {"window": [3, 2]},
    {"window": (0, -1)},
    {"scale": 0},
    {"scale": -0.5},
    {"softcap": 30},
    {"sinks": torch.zeros(4, dtype=torch.float64)},
    {"k_scale": torch.ones(2)},
    {"k_scale": torch.ones(2), "v_scale": torch.ones(2)},
    {"k_scale": torch.ones(2, 2, 9), "v_scale": torch.ones(2, 2, 9)},
    {"k_cache": torch.ones(K).to(torch.int8), "v_cache": torch.ones(V).to(torch.int8)},
    {"k_prefix": torch.ones(2, 5, 16), "v_prefix": torch.ones(2, 5, 8)},
    {"batch_invariant": True},
    {"batch_invariant": True, "schedule": "split"},
    {"schedule": "lean"},
    {"cache_seqlens": ints(0, 0)},
]


@pytest.mark.parametrize("change", ACCEPTED, ids=str)
def test_accepted(change: dict[str, Any]) -> None:
    assert lean_attention(**dense(**change)).shape == (2, 4, 3, 8)


def test_accepted_paged() -> None:
    """Entries that no length reaches may hold anything."""
    assert lean_attention(**paged()).shape == (2, 4, 3, 8)
    assert lean_attention(**paged(k_scale=torch.ones(5, 2, 4))).shape == (2, 4, 3, 8)


FP8 = torch.float8_e4m3fn
TENSORS = [
    ({"q": torch.ones(4, 3, 16)}, ValueError, r"q has 3 dimensions, shape \[4, 3, 16\]; it must have 4: \[B, Hq, Nq"),
    ({"k_cache": torch.ones(2, 9, 16)}, ValueError, r"k_cache has 3 dimensions"),
    ({"k_cache": torch.ones(3, 2, 9, 16)}, ValueError, r"k_cache has .*dimension 0 \(B\) must be 2, from the B of q"),
    ({"k_cache": torch.ones(2, 2, 9, 8)}, ValueError, r"k_cache has .*dimension 3 \(D\) must be 16, from the D of q"),
    ({"v_cache": torch.ones(2, 2, 8, 8)}, ValueError, r"v_cache has .*\(N\) must be 9, from the N of k_cache"),
    ({"v_cache": torch.ones(2, 4, 9, 8)}, ValueError, r"v_cache has .*\(Hkv\) must be 2, from the Hkv of k_cache"),
    ({"k_cache": torch.ones(2, 3, 9, 16), "v_cache": torch.ones(2, 3, 9, 8)}, ValueError,
     r"q has 4 heads and k_cache has 3; the heads of k_cache must divide"),
    ({"k_cache": torch.ones(2, 0, 9, 16), "v_cache": torch.ones(2, 0, 9, 8)}, ValueError,
     r"q has 4 heads and .*has 0"),
    ({"v_cache": torch.ones(2, 2, 9, 0)}, ValueError, r"head widths are 16 and 0; they must be at least 1"),
    ({"q": torch.ones(2, 4, 17, 16)}, ValueError, r"q has 17 rows; it must have 1 to 16 \(flash_att"),
    ({"q": torch.ones(2, 4, 0, 16)}, ValueError, r"q has 0 rows; it must have 1 to 16"),
    ({"q": torch.ones(Q).int()}, TypeError, r"q is int32; it must be float16 or bfloat16 or float32 or float64"),
    ({"q": torch.ones(Q).half()}, TypeError,
     r"k_cache is float32; it must be float16, as q is, or float8_e4m3fn or int8"),
    ({"k_cache": torch.ones(K).to(torch.float8_e5m2)}, TypeError, r"k_cache is float8_e5m2; it must be float16 or"),
    ({"k_cache": torch.ones(K).to(FP8)}, TypeError, r"v_cache is float32; it must be float8_e4m3fn, as k_cache is"),
    ({"k_cache": torch.ones(K, device="meta")}, ValueError, r"k_cache is on meta; it must be on cpu, as q is"),
    ({"q": None}, TypeError, r"q is None; it must be a torch\.Tensor"),
    ({"k_cache": [[1.0]]}, TypeError, r"k_cache is list; it must be a torch\.Tensor"),
    ({"cache_seqlens": None}, TypeError, r"cache_seqlens is None; it must be a torch\.Tensor"),
    ({"cache_seqlens": 9}, TypeError, r"cache_seqlens is int; it must be a torch\.Tensor"),
    ({"cache_seqlens": ints(9)}, ValueError, r"cache_seqlens has .*\(B\) must be 2, from the B of q"),
    ({"cache_seqlens": ints(9, 4, dtype=torch.int64)}, TypeError, r"cache_seqlens is int64; it must be int32"),
    ({"cache_seqlens": ints(9, 4).to("meta")}, ValueError, r"cache_seqlens is on meta; it must be on cpu"),
    ({"sinks": torch.ones(2)}, ValueError, r"sinks has .*\(Hq\) must be 4, from the Hq of q"),
    ({"sinks": torch.ones(4).int()}, TypeError, r"sinks is int32; it must be float16"),
    ({"k_scale": torch.ones(3)}, ValueError, r"k_scale has .*\(Hkv\) must be 2, from the Hkv of k_cache"),
    ({"k_scale": torch.ones(2).half()}, TypeError, r"k_scale is float16; it must be float32"),
    ({"k_scale": torch.ones(2, 2, 8)}, ValueError, r"k_scale has .*\(N\) must be 9, from the N of k_cache"),
    ({"k_scale": torch.ones(2, 2, 9), "v_scale": torch.ones(2)}, ValueError, r"v_scale has 1 dimensions"),
    ({"k_scale": 1.0}, TypeError, r"k_scale is float; it must be a torch\.Tensor"),
    ({"k_prefix": torch.ones(2, 5, 16)}, ValueError, r"k_prefix and v_prefix go together: give both or neither"),
    ({"v_prefix": torch.ones(2, 5, 8)}, ValueError, r"k_prefix and v_prefix go together"),
    ({"k_prefix": torch.ones(2, 5, 16), "v_prefix": torch.ones(2, 6, 8)}, ValueError,
     r"v_prefix has .*\(P\) must be 5, from the P of k_prefix"),
    ({"k_prefix": torch.ones(2, 5, 16).half(), "v_prefix": torch.ones(2, 5, 8)}, TypeError,
     r"k_prefix is float16; it must be float32, as k_cache is"),
    ({"k_prefix": torch.ones(2, 5, 16), "v_prefix": torch.ones(2, 5, 8), "k_scale": torch.ones(2, 2, 9)}, ValueError,
     r"a prefix cannot go with scales for each key; scale by heads, or not at all"),
]  # fmt: skip

NUMBERS = [
    ({"scale": math.nan}, ValueError, r"scale is nan; it must be finite"),
    ({"scale": "1"}, TypeError, r"scale is str; it must be a number"),
    ({"softcap": -1.0}, ValueError, r"softcap is -1\.0; it must be finite, at least 0\.0"),
    ({"softcap": None}, TypeError, r"softcap is NoneType; it must be a number"),
    ({"window": (-2, 0)}, ValueError, r"window is \(-2, 0\); each side must be at least 0, or -1 for unbounded"),
    ({"window": 3}, TypeError, r"window is 3; it must be None or two ints, \(left, right\)"),
    ({"causal": 1}, TypeError, r"causal is int; it must be a bool"),
    ({"batch_invariant": 1}, TypeError, r"batch_invariant is int; it must be a bool"),
    ({"schedule": "fixed"}, ValueError, r"schedule is 'fixed'; it must be None, 'lean' or 'split'"),
    ({"schedule": "invariant"}, ValueError, r"schedule is 'invariant'; it must be None"),
    ({"schedule": "lean", "batch_invariant": True}, ValueError,
     r"schedule is 'lean', whose shares depend on the whole batch; batch_invariant needs another"),
]  # fmt: skip

VALUES = [
    ({"cache_seqlens": ints(10, 4)}, r"cache_seqlens\[0\] is 10; it must be 0 to 9, the cache's capacity"),
    ({"cache_seqlens": ints(9, -1)}, r"cache_seqlens\[1\] is -1; it must be 0 to 9"),
]

PAGED = [
    ({"cache_seqlens": ints(9, 13)}, r"cache_seqlens\[1\] is 13; it must be 0 to 12, the cache's capacity"),
    ({"cache_seqlens": ints(9, 5)}, r"block_table\[1\] names page 99; there are 5"),
    ({"cache_seqlens": ints(9, 9)}, r"block_table\[1\] names page -7; there are 5"),
    ({"block_table": torch.zeros(3, 3, dtype=torch.int32)}, r"block_table has .*dimension 0 \(B\) must be 2"),
    ({"block_table": torch.zeros(6, dtype=torch.int32)}, r"block_table has 1 dimensions"),
    ({"k_cache": torch.ones(5, 2, 0, 16), "v_cache": torch.ones(5, 2, 0, 8)}, r"k_cache has pages of 0 keys; they"),
    ({"v_cache": torch.ones(4, 2, 4, 8)}, r"v_cache has .*\(pages\) must be 5, from the pages of k_cache"),
    ({"v_scale": torch.ones(5, 2, 3)}, r"v_scale has .*\(page\) must be 4, from the page of k_cache"),
]


def short_id(value: Any) -> str | None:
    if isinstance(value, dict):
        return "-".join(value)
    return value.__name__ if isinstance(value, type) else ""


@pytest.mark.parametrize(("change", "error", "message"), TENSORS + NUMBERS, ids=short_id)
def test_refused(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match="^lean_attention: " + message):
        lean_attention(**dense(**change))


@pytest.mark.parametrize(("change", "message"), VALUES, ids=short_id)
def test_lengths_are_checked_where_reading_them_is_free(change: dict[str, Any], message: str) -> None:
    for backend in ("reference", "torch"):
        with pytest.raises(ValueError, match="^lean_attention: " + message):
            lean_attention(**dense(**change, backend=backend))


@pytest.mark.parametrize(("change", "message"), PAGED, ids=short_id)
def test_refused_paged(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match="^lean_attention: " + message):
        lean_attention(**{**paged(), **change})


def test_refused_block_table_dtype() -> None:
    table = torch.zeros(2, 3, dtype=torch.int64)
    with pytest.raises(TypeError, match=r"^lean_attention: block_table is int64; it must be int32"):
        lean_attention(**{**paged(), "block_table": table})


WIDE = {"q": torch.ones(2, 4, 1, 300), "k_cache": torch.ones(2, 2, 9, 300)}
DOUBLE = {name: torch.ones(shape).double() for name, shape in (("q", Q), ("k_cache", K), ("v_cache", V))}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"backend": "triton", **DOUBLE}, UnsupportedError,
         r"backend 'triton' cannot run this call: its kernels .* not float64\. Backends that can: torch, reference\."),
        ({"backend": "triton", **WIDE}, UnsupportedError,
         r"backend 'triton' .*: D is 300, and its kernels hold heads up to 256 wide\. Backends that can: torch"),
        ({"backend": "triton", "v_cache": torch.ones(2, 2, 9, 264)}, UnsupportedError, r"backend .*: Dv is 264, and"),
        ({"backend": "cuda"}, UnsupportedError,
         r"backend 'cuda' cannot run this call: its kernel takes queries of float16 and bfloat16, not float32"),
        ({"backend": "numpy"}, ValueError,
         r"backend is 'numpy'; it must be None or one of triton, cuda, torch, reference"),
    ],
    ids=["float64", "wide", "wide-values", "cuda", "unknown"],
)  # fmt: skip
def test_refused_backend(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match="^lean_attention: " + message):
        lean_attention(**dense(**change))


def test_triton_on_the_cpu_needs_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "INTERPRET", False)
    with pytest.raises(UnsupportedError, match=r"only under TRITON_INTERPRET=1|Triton is not installed"):
        lean_attention(**dense(backend="triton", scale=0.123))


@pytest.mark.parametrize("name", ["q", "k_cache", "v_cache"])
def test_gradients_are_refused_with_a_way_out(name: str) -> None:
    arguments = dense(backend=None)
    arguments[name].requires_grad_()
    with pytest.raises(UnsupportedError, match=r"decoding has none\. Call it under torch\.no_grad\(\)"):
        lean_attention(**arguments)
    with pytest.raises(UnsupportedError, match=r"'torch' cannot run this call: it computes no gradients"):
        lean_attention(**{**arguments, "backend": "torch"})
    with torch.no_grad():
        assert not lean_attention(**arguments).requires_grad
    out = lean_attention(**{**arguments, "backend": "reference"})
    (gradient,) = torch.autograd.grad(out.sin().sum(), arguments[name])
    assert gradient.abs().sum() > 0 or name != "v_cache"


def test_use_backend_is_obeyed_and_does_not_fall_back() -> None:
    arguments = dense(**WIDE, backend=None)
    with use_backend("reference"):
        assert lean_attention(**arguments).shape == (2, 4, 1, 8)
    with use_backend("triton"), pytest.raises(UnsupportedError, match="D is 300"):
        lean_attention(**arguments)


def test_an_accepted_call_does_not_vouch_for_a_wrong_one() -> None:
    """What was checked is remembered by metadata; lengths are checked every time."""
    lean_attention(**dense(causal=True))
    with pytest.raises(TypeError, match="causal is int"):
        lean_attention(**dense(causal=1))
    with pytest.raises(ValueError, match=r"cache_seqlens\[0\] is 99"):
        lean_attention(**dense(cache_seqlens=ints(99, 4)))

"""Bad input to flash_attention: each is refused by an error that names the argument, what it got and what it takes."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from iokernels import UnsupportedError, flash_attention, flash_attention_varlen, use_backend
from iokernels.runtime import device

Q, K = (2, 4, 5, 16), (2, 2, 7, 16)


def dense(**changes: Any) -> dict[str, Any]:
    """Arguments of a call that is accepted, but for the changes."""
    arguments: dict[str, Any] = {"q": torch.ones(Q), "k": torch.ones(K), "v": torch.ones(K), "backend": "reference"}
    return {**arguments, **changes}


def offsets(*values: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype)


def packed(**changes: Any) -> dict[str, Any]:
    """Arguments of a packed call that is accepted: sequences of 3 and 2 queries, 4 and 3 keys."""
    return {
        "q": torch.ones(5, 4, 16),
        "k": torch.ones(7, 2, 16),
        "v": torch.ones(7, 2, 16),
        "cu_seqlens_q": offsets(0, 3, 5),
        "cu_seqlens_k": offsets(0, 4, 7),
        "max_seqlen_q": 3,
        "max_seqlen_k": 4,
        "backend": "reference",
        **changes,
    }


ACCEPTED: list[dict[str, Any]] = [
    {},
    {"mask": torch.ones(7, dtype=torch.bool)},
    {"bias": torch.zeros(4, 5, 7, dtype=torch.float64)},
    {"alibi_slopes": torch.ones(4)},
    {"alibi_slopes": torch.ones(2, 4)},
    {"sinks": torch.zeros(4, dtype=torch.bfloat16)},
    {"scale": 0},
    {"scale": -0.5},
    {"softcap": 30},
    {"window": (0, -1)},
    {"window": [3, 2]},
    {"dropout_p": 0.5},
    {"deterministic": True},
]


@pytest.mark.parametrize("change", ACCEPTED, ids=str)
def test_accepted(change: dict[str, Any]) -> None:
    assert flash_attention(**dense(**change)).shape == Q


def test_accepted_packed() -> None:
    assert flash_attention_varlen(**packed()).shape == (5, 4, 16)
    # Rows past the last sequence are allowed; so is a generous bound on the lengths.
    loose = packed(cu_seqlens_q=offsets(0, 3, 4), cu_seqlens_k=offsets(0, 0, 6), max_seqlen_q=9, max_seqlen_k=9)
    assert flash_attention_varlen(**loose).shape == (5, 4, 16)


SLOPES = torch.ones(4, requires_grad=True)
TENSORS = [
    ({"q": torch.ones(4, 5, 16)}, ValueError, r"q has 3 dimensions, shape \[4, 5, 16\]; it must have 4: \[B, Hq, N"),
    ({"k": torch.ones(2, 7, 16)}, ValueError, r"k has 3 dimensions, shape \[2, 7, 16\]; it must have 4"),
    ({"v": torch.ones(1, *K)}, ValueError, r"v has 5 dimensions"),
    ({"k": torch.ones(3, 2, 7, 16)}, ValueError, r"k has shape \[3, 2, 7, 16\]; its dimension 0 \(B\) must be 2, from"),
    ({"k": torch.ones(2, 2, 7, 8)}, ValueError, r"k has .*dimension 3 \(D\) must be 16, from the D of q"),
    ({"v": torch.ones(2, 2, 6, 16)}, ValueError, r"v has .*dimension 2 \(Nk\) must be 7, from the Nk of k"),
    ({"v": torch.ones(2, 4, 7, 16)}, ValueError, r"v has .*dimension 1 \(Hkv\) must be 2, from the Hkv of k"),
    ({"k": torch.ones(2, 3, 7, 16), "v": torch.ones(2, 3, 7, 16)}, ValueError, r"q has 4 heads and k has 3; the heads"),
    ({"k": torch.ones(2, 8, 7, 16), "v": torch.ones(2, 8, 7, 16)}, ValueError, r"q has 4 heads and k has 8; the heads"),
    ({"k": torch.ones(2, 0, 7, 16), "v": torch.ones(2, 0, 7, 16)}, ValueError, r"q has 4 heads and k has 0"),
    ({"q": torch.ones(2, 4, 5, 0), "k": torch.ones(2, 2, 7, 0)}, ValueError, r"head widths are 0 and 16; they must be"),
    ({"v": torch.ones(2, 2, 7, 0)}, ValueError, r"head widths are 16 and 0"),
    ({"k": torch.ones(K).half()}, TypeError, r"k is float16; it must be float32, as q is"),
    ({"v": torch.ones(K).double()}, TypeError, r"v is float64; it must be float32, as q is"),
    ({"q": torch.ones(Q).int()}, TypeError, r"q is int32; it must be float16 or bfloat16 or float32 or float64"),
    ({"q": torch.ones(Q, dtype=torch.complex64)}, TypeError, r"q is complex64; it must be float16"),
    ({"k": torch.ones(K, device="meta")}, ValueError, r"k is on meta; it must be on cpu, as q is"),
    ({"mask": torch.ones(5, 7, device="meta").bool()}, ValueError, r"mask is on meta; it must be on cpu, as q is"),
    ({"q": None}, TypeError, r"q is None; it must be a torch\.Tensor"),
    ({"k": [[1.0]]}, TypeError, r"k is list; it must be a torch\.Tensor"),
    ({"bias": 1.0}, TypeError, r"bias is float; it must be a torch\.Tensor"),
    ({"mask": torch.ones(5, 7)}, TypeError, r"mask is float32; it must be bool"),
    ({"mask": torch.ones(5, 6).bool()}, ValueError, r"mask has .*\(Nk\|1\) must be 7, from the Nk of k"),
    ({"mask": torch.ones(2, 2, 5, 7).bool()}, ValueError, r"mask has .*\(Hq\|1\) must be 4, from the Hq of q"),
    ({"mask": torch.ones(1, 2, 4, 5, 7).bool()}, ValueError, r"mask has 5 dimensions"),
    ({"bias": torch.ones(5, 7).int()}, TypeError, r"bias is int32; it must be float16"),
    ({"bias": torch.ones(4, 7)}, ValueError, r"bias has .*\(Nq\|1\) must be 5, from the Nq of q"),
    ({"alibi_slopes": torch.ones(2)}, ValueError, r"alibi_slopes has .*\(Hq\) must be 4, from the Hq of q"),
    ({"alibi_slopes": torch.ones(4).half()}, TypeError, r"alibi_slopes is float16; it must be float32"),
    ({"alibi_slopes": SLOPES}, ValueError, r"alibi_slopes requires a gradient, which is not computed; pass .* as bias"),
    ({"sinks": torch.ones(2)}, ValueError, r"sinks has .*\(Hq\) must be 4, from the Hq of q"),
    ({"sinks": torch.ones(4).int()}, TypeError, r"sinks is int32; it must be float16"),
]  # fmt: skip

NUMBERS = [
    ({"scale": math.nan}, ValueError, r"scale is nan; it must be finite"),
    ({"scale": math.inf}, ValueError, r"scale is inf; it must be finite"),
    ({"scale": "1"}, TypeError, r"scale is str; it must be a number"),
    ({"scale": torch.tensor(1.0)}, TypeError, r"scale is Tensor; it must be a number"),
    ({"softcap": -1.0}, ValueError, r"softcap is -1\.0; it must be finite, at least 0\.0"),
    ({"softcap": math.nan}, ValueError, r"softcap is nan; it must be finite"),
    ({"softcap": None}, TypeError, r"softcap is NoneType; it must be a number"),
    ({"dropout_p": 1.0}, ValueError, r"dropout_p is 1\.0; it must be finite, at least 0\.0, below 1\.0"),
    ({"dropout_p": -0.1}, ValueError, r"dropout_p is -0\.1; it must be finite, at least 0\.0, below 1\.0"),
    ({"dropout_p": math.nan}, ValueError, r"dropout_p is nan"),
    ({"window": (-2, 0)}, ValueError, r"window is \(-2, 0\); each side must be at least 0, or -1 for unbounded"),
    ({"window": (0, -3)}, ValueError, r"window is \(0, -3\); each side"),
    ({"window": 3}, TypeError, r"window is 3; it must be None or two ints, \(left, right\)"),
    ({"window": (1,)}, TypeError, r"window is \(1,\); it must be None or two ints"),
    ({"window": (1.0, 2)}, TypeError, r"window is \(1\.0, 2\); it must be None or two ints"),
    ({"causal": 1}, TypeError, r"causal is int; it must be a bool"),
    ({"causal": "top-left"}, TypeError, r"causal is str; it must be a bool"),
    ({"deterministic": 1}, TypeError, r"deterministic is int; it must be a bool or None"),
]


def short_id(value: Any) -> str | None:
    if isinstance(value, dict):
        return "-".join(value)
    return value.__name__ if isinstance(value, type) else ""


@pytest.mark.parametrize(("change", "error", "message"), TENSORS + NUMBERS, ids=short_id)
def test_refused(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match="^flash_attention: " + message):
        flash_attention(**dense(**change))


@pytest.mark.parametrize(("change", "error", "message"), NUMBERS, ids=short_id)
def test_packed_calls_refuse_the_same_numbers(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match="^flash_attention_varlen: " + message):
        flash_attention_varlen(**packed(**change))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"q": torch.ones(1, 5, 4, 16)}, ValueError, r"q has 4 dimensions, .*; it must have 3: \[Tq, Hq, D\]"),
        ({"v": torch.ones(6, 2, 16)}, ValueError, r"v has .*\(Tk\) must be 7, from the Tk of k"),
        ({"k": torch.ones(7, 3, 16), "v": torch.ones(7, 3, 16)}, ValueError, r"q has 4 heads and k has 3"),
        ({"cu_seqlens_q": None}, TypeError, r"cu_seqlens_q is None; it must be a torch\.Tensor"),
        ({"cu_seqlens_k": [0, 4, 7]}, TypeError, r"cu_seqlens_k is list; it must be a torch\.Tensor"),
        ({"cu_seqlens_q": offsets(0, 3, 5, dtype=torch.int64)}, TypeError, r"cu_seqlens_q is int64; it must be int32"),
        ({"cu_seqlens_q": offsets(0, 3, 5)[None]}, ValueError, r"cu_seqlens_q has 2 dimensions"),
        ({"cu_seqlens_q": offsets()}, ValueError, r"cu_seqlens_q is empty; it must have one entry more than"),
        ({"cu_seqlens_k": offsets(0, 7)}, ValueError, r"cu_seqlens_k has .*must be 3, from the B of cu_seqlens_q"),
        ({"cu_seqlens_q": offsets(0, 4, 3)}, ValueError, r"cu_seqlens_q is \[0, 4, 3\]; it must not decrease"),
        ({"cu_seqlens_k": offsets(0, -1, 7)}, ValueError, r"cu_seqlens_k is \[0, -1, 7\]; it must not decrease"),
        ({"cu_seqlens_q": offsets(1, 3, 5)}, ValueError, r"cu_seqlens_q starts with 1; it must start with 0"),
        ({"cu_seqlens_q": offsets(0, 3, 6)}, ValueError, r"cu_seqlens_q ends with 6, past the 5 packed rows"),
        ({"cu_seqlens_k": offsets(0, 4, 8)}, ValueError, r"cu_seqlens_k ends with 8, past the 7 packed rows"),
        ({"cu_seqlens_q": offsets(0, 3, 5).to("meta")}, ValueError, r"cu_seqlens_q is on meta; it must be on cpu"),
        ({"max_seqlen_q": 2}, ValueError, r"max_seqlen_q is 2, and the longest sequence of cu_seqlens_q has 3 rows"),
        ({"max_seqlen_k": 3}, ValueError, r"max_seqlen_k is 3, and the longest sequence of cu_seqlens_k has 4 rows"),
        ({"max_seqlen_q": -1}, ValueError, r"max_seqlen_q is -1; it must be at least 0"),
        ({"max_seqlen_k": 4.0}, TypeError, r"max_seqlen_k is float; it must be an int"),
        ({"max_seqlen_k": torch.tensor(4)}, TypeError, r"max_seqlen_k is Tensor; it must be an int"),
        ({"mask": torch.ones(3, 5).bool()}, ValueError, r"mask has .*\(Nk\|1\) must be 4, from the Nk of"),
        ({"alibi_slopes": torch.ones(3, 4)}, ValueError, r"alibi_slopes has .*\(B\|1\) must be 2"),
    ],
    ids=short_id,
)  # fmt: skip
def test_refused_packed(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match="^flash_attention_varlen: " + message):
        flash_attention_varlen(**packed(**change))


WIDE = torch.ones(1, 1, 2, 512)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"backend": "triton", "q": torch.ones(Q).double(), "k": torch.ones(K).double(), "v": torch.ones(K).double()},
         UnsupportedError,
         r"backend 'triton' cannot run this call: its kernels .* not float64\. Backends that can: torch, reference\."),
        ({"backend": "triton", "q": WIDE, "k": WIDE, "v": torch.ones(1, 1, 2, 64)}, UnsupportedError,
         r"backend 'triton' .*: D is 512, and its kernels hold heads up to 256 wide\. Backends that can: torch"),
        ({"backend": "triton", "v": torch.ones(2, 2, 7, 264)}, UnsupportedError, r"backend .*: Dv is 264, and"),
        ({"backend": "cuda"}, UnsupportedError,
         r"backend 'cuda' cannot run this call: its kernels take float16 and bfloat16, not float32\."),
        ({"backend": "numpy"}, ValueError,
         r"backend is 'numpy'; it must be None or one of triton, cuda, torch, reference"),
        ({"backend": 1}, ValueError, r"backend is 1; it must be None or one of"),
    ],
    ids=["float64", "wide", "wide-values", "cuda", "unknown", "number"],
)  # fmt: skip
def test_refused_backend(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match="^flash_attention: " + message):
        flash_attention(**dense(**change))


def test_triton_on_the_cpu_needs_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "INTERPRET", False)
    with pytest.raises(UnsupportedError, match=r"only under TRITON_INTERPRET=1|Triton is not installed"):
        flash_attention(**dense(backend="triton", scale=0.123))


def test_use_backend_is_obeyed_and_does_not_fall_back() -> None:
    arguments = dense(q=WIDE, k=WIDE, v=WIDE, backend=None)
    with use_backend("reference"):
        assert flash_attention(**arguments).shape == WIDE.shape
    with use_backend("triton"), pytest.raises(UnsupportedError, match="D is 512"):
        flash_attention(**arguments)


def test_an_accepted_call_does_not_vouch_for_a_wrong_one() -> None:
    flash_attention(**dense(causal=True))
    with pytest.raises(TypeError, match="causal is int"):
        flash_attention(**dense(causal=1))


def test_errors_are_the_same_under_compile() -> None:
    compiled = torch.compile(flash_attention, backend="eager")
    with pytest.raises(Exception, match="k is float16; it must be float32, as q is"):
        compiled(**dense(k=torch.ones(K).half()))

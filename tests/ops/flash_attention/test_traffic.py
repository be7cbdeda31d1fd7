"""The tracer on the kernels of flash_attention: whatever the call, no byte outside the tensors is touched.

That they request as many bytes as their model says is held by ``tests/bench/test_accounts.py``, for every operator.
"""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, given, seed, settings

from iokernels import autotune
from iokernels.ops.flash_attention.options import Needs, Options
from iokernels.ops.flash_attention.triton import launch as triton_launch
from iokernels.ops.flash_attention.triton.tuning import Config
from iokernels.testing import inputs
from iokernels.testing.tracer import trace

from ...tiers import examples

pytestmark = pytest.mark.interpreted

TILES = {
    "flash_attention_fwd": Config(16, 32, 4, 2),
    "flash_attention_bwd_dq": Config(32, 16, 4, 2),
    "flash_attention_bwd_dkv": Config(16, 32, 4, 2),
    "flash_attention_bwd_dbias": Config(16, 16, 4, 1),
}


@st.composite
def calls(draw: st.DrawFn) -> dict[str, Any]:
    """Shapes, layouts and options of one call; everything is optional and everything may come together."""
    packed = draw(st.booleans())
    length = st.integers(0, 36)
    sequences = draw(st.integers(1, 3 if packed else 2))
    sides = [(draw(length), draw(length)) for _ in range(sequences if packed else 1)]
    kv_heads, group = draw(st.sampled_from([(1, 1), (1, 2), (1, 3), (2, 1), (2, 2)]))
    broadcast = st.tuples(*(st.booleans() for _ in range(4)))
    return {
        "packed": packed,
        "lengths": sides if packed else sides * sequences,
        "kv_heads": kv_heads,
        "heads": kv_heads * group,
        "head_dim": draw(st.sampled_from([8, 16, 20, 33])),
        "value_dim": draw(st.sampled_from([8, 16, 24])),
        "dtype": draw(st.sampled_from([torch.float16, torch.bfloat16, torch.float32])),
        "layout": draw(st.sampled_from(["contiguous", "bnhd", "seq_major", "padded", "strided", "expanded"])),
        "window": draw(st.tuples(st.integers(-1, 30), st.integers(-1, 30))),
        "softcap": draw(st.sampled_from([0.0, 2.0])),
        "dropout": draw(st.sampled_from([0.0, 0.4])),
        "mask": draw(st.none() | broadcast),
        "bias": draw(st.none() | broadcast),
        "alibi": draw(st.booleans()),
        "sinks": draw(st.booleans()),
        "dlse": draw(st.booleans()),
    }


def run(call: dict[str, Any], device: str = "cpu") -> Any:
    """Forward and backward of one call under the tracer, which raises at a stray byte."""
    lengths, heads, kv_heads = call["lengths"], call["heads"], call["kv_heads"]
    queries, keys = (list(side) for side in zip(*lengths, strict=True))
    head_dim, value_dim, dtype = call["head_dim"], call["value_dim"], call["dtype"]
    longest = max(n for n, _ in lengths), max(nk for _, nk in lengths)
    options = Options(scale=0.3, window_left=call["window"][0], window_right=call["window"][1], softcap=call["softcap"])
    if call["packed"]:
        q, k, v, cu_q, cu_k = inputs.packed(0, queries, keys, heads, kv_heads, head_dim, value_dim, dtype=dtype)
        q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
        options = options._replace(
            cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, max_seqlen_q=longest[0], max_seqlen_k=longest[1]
        )
    else:
        q, k, v = inputs.attention(
            0,
            len(lengths),
            heads,
            kv_heads,
            queries[0],
            keys[0],
            head_dim,
            value_dim,
            dtype=dtype,
            layout=call["layout"],
        )
    scores = (len(lengths), heads, *longest)
    for name, kind in (("mask", torch.bool), ("bias", dtype)):
        if call[name] is not None:
            shape = [1 if one else size for one, size in zip(call[name], scores, strict=True)]
            options = options._replace(**{name: torch.randn(shape).gt(-0.5).to(kind)})
    if call["alibi"]:
        options = options._replace(alibi_slopes=torch.rand(1, heads))
    if call["sinks"]:
        options = options._replace(sinks=torch.randn(heads))
    if call["dropout"]:
        options = options._replace(dropout_p=call["dropout"], dropout_seed=torch.tensor([7]))
    with autotune.override(**TILES), trace() as traced:
        out, lse = triton_launch.forward(q, k, v, options)
        dout = torch.randn(out.shape).to(out.dtype)
        dlse = torch.randn(lse.shape) if call["dlse"] else None
        needs = Needs(True, True, True, options.bias is not None, options.sinks is not None)
        triton_launch.backward(dout, dlse, q, k, v, out, lse, options, needs)
    return traced


@pytest.mark.parametrize("part", range(4))  # parts, so that workers can share them
def test_no_byte_outside_the_tensors(part: int) -> None:
    @seed(part)
    @settings(max_examples=examples(15), deadline=None, database=None, suppress_health_check=(HealthCheck.too_slow,))
    @given(calls())
    def check(call: dict[str, Any]) -> None:
        run(call)

    check()


def test_offsets_out_of_range_stay_inside_the_tensors() -> None:
    """On a GPU nobody reads the offsets before the kernels do, so whatever they say must do no harm."""
    q = torch.randn(1, 2, 40, 16)
    for bad in ([0, 99, 40], [-5, 20, 10], [30, 10, 2**30], [0, 0, -(2**31)]):
        offsets = torch.tensor(bad, dtype=torch.int32)
        options = Options(cu_seqlens_q=offsets, cu_seqlens_k=offsets, max_seqlen_q=25, max_seqlen_k=40)
        with autotune.override(**TILES), trace():
            out, lse = triton_launch.forward(q, q, q, options)
            grads = triton_launch.backward(out, None, q, q, q, out, lse, options, Needs(True, True, True))
        assert out.isfinite().all()
        assert all(x is None or x.isfinite().all() for x in grads)

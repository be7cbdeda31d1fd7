"""The tracer on the kernels of lean_attention: no byte that a length hides is touched, and KV is read once.

That the kernels request as many bytes as their model says, shape by shape, is held by ``tests/bench/test_accounts.py``.
"""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, given, seed, settings

from iokernels import autotune
from iokernels.ops.lean_attention.case import CASE
from iokernels.ops.lean_attention.options import Options
from iokernels.ops.lean_attention.triton import launch as triton_launch
from iokernels.ops.lean_attention.triton.tuning import Config
from iokernels.testing.case.count import count
from iokernels.testing.case.shape import Shape
from iokernels.testing.tracer import Trace, trace

from ...tiers import examples
from ..backends import HALF_AND_SINGLE
from .calls import Call, make


@st.composite
def calls(draw: st.DrawFn) -> dict[str, Any]:
    """Shapes, layouts and options of one call; everything is optional and everything may come together."""
    kv_heads = draw(st.integers(1, 2))
    scales = draw(st.sampled_from(["", "head", "key"]))
    window = draw(st.none() | st.tuples(st.integers(-1, 40), st.integers(-1, 3)))
    options = {} if window is None else {"window": window}
    return {
        "seed": draw(st.integers(0, 9)),
        "lengths": draw(st.lists(st.integers(0, 50), min_size=1, max_size=4)),
        "kv_heads": kv_heads,
        "heads": kv_heads * draw(st.sampled_from([1, 2, 3, 20])),
        "rows": draw(st.sampled_from([1, 2, 5])),
        "head_dim": draw(st.sampled_from([8, 16, 20, 33])),
        "value_dim": draw(st.sampled_from([8, 16, 24])),
        "spare": draw(st.integers(0, 9)),
        "page": draw(st.sampled_from([0, 0, 1, 5, 16])),
        "prefix": 0 if scales == "key" else draw(st.sampled_from([0, 0, 1, 40])),
        "dtype": draw(st.sampled_from(HALF_AND_SINGLE)),
        "cache_dtype": draw(st.sampled_from([None, torch.int8, torch.float8_e4m3fn])),
        "scales": scales,
        "sinks": draw(st.booleans()),
        "layout": draw(st.sampled_from(["contiguous", "bnhd", "padded", "strided", "expanded"])),
        "causal": draw(st.booleans()),
        "softcap": draw(st.sampled_from([0.0, 2.0])),
        "schedule": draw(st.sampled_from(["lean", "split"])),
        **options,
    }


def traced(call: Call, blocks: int = 5) -> tuple[Trace, torch.Tensor]:
    """One call under the tracer, which raises at a stray byte."""
    config = Config(block_n=16, blocks=blocks, stream_k=1, num_warps=4, num_stages=2)
    with autotune.override(lean_attention=config), trace() as record:
        out, _ = call("triton")
    return record, out


@pytest.mark.interpreted
@pytest.mark.parametrize("part", range(3))  # parts, so that workers can share them
def test_no_byte_outside_the_tensors(part: int) -> None:
    """Nor past a length: the keys read of each head are those that the lengths, or a window, show."""

    @seed(part)
    @settings(max_examples=examples(10), deadline=None, database=None, suppress_health_check=(HealthCheck.too_slow,))
    @given(calls())
    def check(given: dict[str, Any]) -> None:
        call = make(**given)
        record, out = traced(call)
        assert out.isfinite().all()
        own = next(kernel for kernel in reversed(record.kernels) if "combine" not in kernel.name)
        rows, size = given["heads"] // given["kv_heads"] * given["rows"], call.tensors["k_cache"].element_size()
        row_tiles = -(-rows // min(max(16, 1 << (rows - 1).bit_length()), 64))
        most = sum(given["lengths"]) * row_tiles * given["kv_heads"]
        windowed = given.get("window", (-1, -1))[0] >= 0
        for argument, width in (("inputs.k", given["head_dim"]), ("inputs.v", given["value_dim"])):
            found = own.arguments[argument].read
            assert found <= most * width * size if windowed else found == most * width * size

    check()


@pytest.mark.interpreted
@pytest.mark.parametrize("page", [0, 8])
@pytest.mark.parametrize("stream_k", [0, 1])
def test_lengths_out_of_range_stay_inside_the_tensors(stream_k: int, page: int) -> None:
    """On a GPU nobody reads the lengths before the kernels do, so whatever they say must do no harm."""
    call = make(1, (40, 0, 33), heads=4, kv_heads=2, spare=0, page=page, prefix=20)
    tensors: Any = {name: x for name, x in call.tensors.items() if name not in ("q", "k_cache", "v_cache")}
    arguments: Any = [call.tensors[name] for name in ("q", "k_cache", "v_cache")]
    if page:
        tensors["block_table"] = torch.zeros(3, 5, dtype=torch.int32)
    arguments[1:] = [x.nan_to_num() for x in arguments[1:]]
    config = Config(block_n=16, blocks=5, stream_k=stream_k, num_warps=4, num_stages=2)
    found = []
    for lengths in ((2**31 - 1, -7, 41), (40, 0, 40)):
        tensors["cache_seqlens"] = torch.tensor(lengths, dtype=torch.int32)
        with autotune.override(lean_attention=config), trace():
            q, k_cache, v_cache = arguments
            found.append(triton_launch.forward(q, k_cache, v_cache, Options(**tensors, window_right=0)))
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def moved(shape: Shape, config: Config | None = None) -> tuple[int, int]:
    """Bytes of the model and of the floor."""
    assert CASE.accounts is not None
    configs = CASE.accounts.configs(shape, torch.float16) if config is None else {"lean_attention": config}
    kernels = CASE.accounts.model(shape, torch.float16, configs)
    return sum(account.model.total for account in kernels.values()), CASE.floor_bytes(shape, torch.float16, "fwd")


@pytest.mark.parametrize("options", ["h=32,hkv=4", "h=64,hkv=8,page=16", "h=8,hkv=1", "h=64,hkv=8,schedule=2"])
def test_a_long_sequence_costs_what_its_cache_holds(options: str) -> None:
    """One user with 64k keys: all traffic beside one reading of the cache is within 2 % of it."""
    model, floor = moved(CASE.vocabulary.parse(f"b=1,nk=64k,d=128,{options}"))
    assert floor <= model <= 1.02 * floor


@pytest.mark.interpreted
def test_a_long_sequence_counted() -> None:
    assert CASE.accounts is not None
    shape = CASE.vocabulary.parse("b=1,h=4,hkv=1,nk=64k,d=64")
    configs = CASE.accounts.configs(shape, torch.float16)
    kernels = CASE.accounts.model(shape, torch.float16, configs)
    counted = count(CASE, shape, torch.float16, configs)
    assert counted == {name: account.model for name, account in kernels.items()}
    assert sum(found.total for found in counted.values()) <= 1.02 * CASE.floor_bytes(shape, torch.float16, "fwd")


def test_a_common_prefix_is_read_once() -> None:
    """16 users of one prompt: with it as a prefix, its keys are read for 64 rows of the batch at a time."""
    common, own = moved(CASE.vocabulary.parse("b=16,h=32,hkv=4,nk=1k,prefix=16k,d=128"))
    each, all_own = moved(CASE.vocabulary.parse("b=16,h=32,hkv=4,nk=17k,d=128"))
    prompt = 16 * 1024 * 4 * 2 * 128 * 2  # bytes of keys and values
    assert all_own - own == pytest.approx(15 * prompt, rel=1e-3)
    # 16 sequences of 8 heads are two tiles of 64 rows; what is saved pays for their partial results too.
    assert 0.95 * (16 - 2) * prompt < each - common < (16 - 2) * prompt
    assert common < each / 4


def test_bytes_by_hand() -> None:
    """One sequence of 100 keys, one tile of 2 heads, shares of 4 and 3 tiles of 16 keys."""
    assert CASE.accounts is not None
    shape = CASE.vocabulary.parse("b=1,h=2,hkv=1,nk=100,d=16")
    config = Config(block_n=16, blocks=2, stream_k=1, num_warps=4, num_stages=2)
    (account,) = CASE.accounts.model(shape, torch.float16, {"lean_attention": config}).values()
    q, keys, out, lse, partial = 2 * 16 * 2, 100 * 32 * 2, 2 * 16 * 2, 2 * 4, 2 * 18 * 4
    assert account.floor == (q + keys + 4, out + lse)
    # Each block adds up the lengths, searches them and reads that of its item; counters are counted up, and cleared.
    assert account.model.read == keys + 2 * (q + 3 * 4) + 2 * (4 + partial)
    assert account.model.written == 2 * (partial + 4) + 4 + out + lse
    assert account.floor.total == CASE.floor_bytes(shape, torch.float16, "fwd")

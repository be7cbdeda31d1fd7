"""lean_attention against its oracle: every option, and the edges where decode kernels have broken before.

Caches hold NaN wherever nothing may be read. How the work is divided among thread blocks is the subject of
``test_lean_attention_schedule.py``.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from iokernels import flash_attention, lean_attention
from iokernels.ops.lean_attention.case import CASE
from iokernels.ops.lean_attention.cuda import tuning as tuning_cuda
from iokernels.ops.lean_attention.triton.tuning import Config
from iokernels.testing.case import Point
from iokernels.testing.case.proof import prove_point

from ..backends import BACKENDS, CUDA, HALF_AND_SINGLE, runs, usual
from .calls import make, prove

RAGGED = (0, 40, 1, 90, 33)


TILES = {"block_n": 32, "blocks": 6, "stream_k": 1}
# So that short sequences cross many tiles and blocks; the check command takes those that a GPU would get.
pytestmark = pytest.mark.tiles(
    lean_attention=Config(**TILES, num_warps=4, num_stages=2),
    lean_attention_cuda=tuning_cuda.Config(**TILES, key_warps=2, stages=2),
)


@pytest.mark.parametrize("point", CASE.check_points(), ids=lambda point: point.name)
@pytest.mark.parametrize(
    ("backend", "dtype"),
    [
        pytest.param(name, dtype, marks=CUDA.marks if name == "cuda" else ())
        for name in ("torch", "triton", "cuda")
        for dtype in CASE.implementations[name].dtypes
    ],
    ids=str,
)
def test_every_option(backend: str, point: Point, dtype: torch.dtype, device: str) -> None:
    prove_point(CASE, backend, point.shape, dtype, device)


@pytest.mark.parametrize("rows", [1, 3, 16])
@pytest.mark.parametrize("lengths", [(1,), (3,), (1, 147), (64, 65, 63), (239, 0, 16)], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_lengths(backend: str, lengths: tuple[int, ...], rows: int, device: str) -> None:
    """One query and one key, tails of every kind, and sequences shorter than their queries."""
    prove(backend, make(1, lengths, rows=rows, dtype=torch.bfloat16, device=device))


@pytest.mark.parametrize("page", [0, 4])
@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_sequences(backend: str, page: int, device: str) -> None:
    out, lse = prove(backend, make(2, RAGGED, rows=2, page=page, dtype=torch.float16, device=device))
    assert (out[0] == 0).all()
    assert (lse[0] == -math.inf).all()
    # The sequence of one key: its first query stands before the key.
    assert (out[2, :, 0] == 0).all()
    assert (lse[2, :, 0] == -math.inf).all()
    assert lse[2, :, 1].isfinite().all()


@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("prefix", [0, 9])
@pytest.mark.parametrize("backend", BACKENDS)
def test_all_sequences_empty(backend: str, prefix: int, sinks: bool, device: str) -> None:
    call = make(3, (0, 0, 0), prefix=prefix, sinks=sinks, dtype=usual(backend), device=device)
    out, lse = call(backend) if not prefix else prove(backend, call)
    if not prefix:
        assert (out == 0).all()
        expected = call.tensors["sinks"].float() if sinks else torch.full((2,), -math.inf, device=device)
        torch.testing.assert_close(lse, expected[None, :, None].expand_as(lse))


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_nothing_at_all(backend: str, device: str) -> None:
    """No sequence, and no room in the cache."""
    out, lse = make(4, (), page=0, dtype=usual(backend), device=device)(backend)
    assert out.shape == (0, 2, 1, 16)
    assert lse.shape == (0, 2, 1)
    for page in (0, 4):
        out, lse = make(4, (0, 0), spare=0, page=page, dtype=usual(backend), device=device)(backend)
        assert (out == 0).all()
        assert (lse == -math.inf).all()


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    "window",
    [(0, 0), (5, 0), (0, 5), (5, 3), (-1, 1), (40, -1), (90, 90), (2**31 - 1, 2**40), (3, -1), (0, -1)],
    ids=str,
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_windows(backend: str, window: tuple[int, int], causal: bool, device: str) -> None:
    call = make(5, (90, 0, 33, 2), rows=4, dtype=torch.float16, kind="flat", device=device)
    prove(backend, call, causal=causal, window=window)


@pytest.mark.parametrize("window", [(0, 0), (3, 0), (11, 2), (30, -1)], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_windows_reach_into_the_prefix(backend: str, window: tuple[int, int], device: str) -> None:
    """Positions count on from the prefix: a short sequence still sees some of it, a long one none."""
    call = make(6, (40, 0, 5, 2), rows=4, prefix=21, dtype=torch.float16, kind="flat", device=device)
    prove(backend, call, window=window, causal=window[1] == 0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_window_as_long_as_the_sequence_is_none(backend: str, device: str) -> None:
    call = make(7, (70, 33), rows=3, dtype=usual(backend), device=device)
    for one, other in zip(call(backend, window=(90, 0)), call(backend), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("kind", ["flat", "large", "constant"])
@pytest.mark.parametrize(("backend", "dtype"), runs(*HALF_AND_SINGLE), ids=str)
def test_logits(backend: str, dtype: torch.dtype, kind: Any, device: str) -> None:
    prove(backend, make(8, (90, 70), head_dim=32, rows=2, dtype=dtype, kind=kind, device=device))


@pytest.mark.parametrize("softcap", [3.0, 0.5])
@pytest.mark.parametrize("backend", BACKENDS)
def test_saturated_softcap(backend: str, softcap: float, device: str) -> None:
    prove(backend, make(9, (70, 33), head_dim=32, kind="large", dtype=usual(backend), device=device), softcap=softcap)


@pytest.mark.parametrize("scale", [-0.2, 0.0])
@pytest.mark.parametrize("backend", BACKENDS)
def test_negative_and_zero_scale(backend: str, scale: float, device: str) -> None:
    prove(backend, make(10, (70, 33), rows=2, dtype=usual(backend), device=device), scale=scale)


@pytest.mark.parametrize("sink", [0.0, 5.0, -30.0, -math.inf])
@pytest.mark.parametrize("backend", BACKENDS)
def test_sinks(backend: str, sink: float, device: str) -> None:
    """The sink of a row without keys is its log-sum-exp; a sink of -inf is none."""
    call = make(11, RAGGED, heads=6, kv_heads=2, rows=2, dtype=torch.float16, device=device)
    sinks = torch.full((6,), sink, device=device)
    out, lse = prove(backend, call, sinks=sinks)
    assert (out[0] == 0).all()
    torch.testing.assert_close(lse[0], torch.full_like(lse[0], sink))
    if sink == -math.inf:
        for one, other in zip((out, lse), call(backend), strict=True):
            torch.testing.assert_close(one, other)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_sinks_of_any_dtype_and_stride(backend: str, dtype: torch.dtype, device: str) -> None:
    call = make(12, (20, 7), heads=4, kv_heads=2, dtype=usual(backend), device=device)
    sinks = torch.linspace(-1.0, 2.0, 4, device=device, dtype=dtype)
    strided = sinks.repeat_interleave(3)[::3]
    assert not strided.is_contiguous()
    out, lse = prove(backend, call, sinks=strided)
    for one, other in zip((out, lse), call(backend, sinks=sinks), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "rows"), [(3, 3, 1), (6, 2, 5), (5, 1, 3), (14, 2, 2), (16, 1, 1), (64, 1, 1), (64, 1, 3)],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("backend", BACKENDS)
def test_grouped_heads(backend: str, heads: int, kv_heads: int, rows: int, device: str) -> None:
    """Groups of 1, 3, 5, 7, 16 and 64: tiles that a group fills partly, exactly, and several that one group needs."""
    call = make(13, (37, 70), heads=heads, kv_heads=kv_heads, rows=rows, dtype=torch.float16, device=device)
    prove(backend, call)


@pytest.mark.parametrize(
    "widths", [(16, 16), (40, 40), (59, 59), (96, 40), (111, 192), (192, 128), (256, 256), (1, 3)], ids=str
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_widths(backend: str, widths: tuple[int, int], device: str) -> None:
    head_dim, value_dim = widths
    call = make(
        14, (45, 20), head_dim=head_dim, value_dim=value_dim, dtype=torch.float16, layout="padded", device=device
    )
    prove(backend, call)


@pytest.mark.parametrize("page", [0, 5])
@pytest.mark.parametrize("scales", ["", "head", "key"])
@pytest.mark.parametrize("cache_dtype", [torch.float8_e4m3fn, torch.int8], ids=str)
@pytest.mark.parametrize(("backend", "dtype"), runs(torch.float16, torch.float32), ids=str)
def test_quantised_caches(
    backend: str, dtype: torch.dtype, cache_dtype: torch.dtype, scales: str, page: int, device: str
) -> None:
    call = make(
        15, (50, 0, 21), heads=4, kv_heads=2, rows=2, page=page, dtype=dtype, cache_dtype=cache_dtype, scales=scales,
        device=device,
    )  # fmt: skip
    prove(backend, call)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_code_of_a_quantised_cache(backend: str, dtype: torch.dtype, device: str) -> None:
    """A number comes out as it was stored: with one key, out is v."""
    codes = torch.arange(256, dtype=torch.int32).to(torch.uint8).view(dtype)
    finite = torch.where(codes.float().isfinite(), codes.float(), 0.0).to(dtype)
    cache = finite.view(16, 1, 1, 16).to(device)
    lengths = torch.ones(16, dtype=torch.int32, device=device)
    q = torch.full((16, 1, 1, 16), 0.01, dtype=usual(backend), device=device)
    out = lean_attention(q, cache, cache, cache_seqlens=lengths, backend=backend)
    assert torch.equal(out.flatten().float(), finite.float().to(device))


@pytest.mark.parametrize("scales", ["head", "key"])
@pytest.mark.parametrize("one", ["k_scale", "v_scale"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_one_scale_without_the_other(backend: str, one: str, scales: str, device: str) -> None:
    """Scales also go with caches of the dtype of q."""
    call = make(16, (50, 21), scales=scales, dtype=usual(backend), device=device)
    call.tensors.pop(one)
    prove(backend, call)


@pytest.mark.parametrize("page", [1, 4, 16, 64])
@pytest.mark.parametrize("layout", ["contiguous", "bnhd", "padded"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_pages(backend: str, layout: str, page: int, device: str) -> None:
    """Shuffled pages, the last one partly full, and entries that name no page past the end."""
    call = make(
        17, (70, 0, 33, 16), heads=4, kv_heads=2, rows=2, page=page, dtype=torch.bfloat16, layout=layout, device=device
    )
    dense = make(17, (70, 0, 33, 16), heads=4, kv_heads=2, rows=2, dtype=torch.bfloat16, device=device)
    out, _ = prove(backend, call)
    torch.testing.assert_close(out, dense(backend)[0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_sequences_may_share_pages(backend: str, device: str) -> None:
    call = make(18, (24, 24), page=8, dtype=usual(backend), device=device)
    table = call.tensors["block_table"].clone()
    table[1, :2] = table[0, :2]
    prove(backend, call.with_tensors(block_table=table))


@pytest.mark.parametrize("layout", ["contiguous", "bnhd", "seq_major", "padded", "strided", "expanded"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_layouts(backend: str, layout: str, device: str) -> None:
    call = make(
        19, (70, 20), heads=4, kv_heads=2, rows=3, head_dim=24, dtype=torch.bfloat16, layout=layout, device=device
    )
    out, _ = prove(backend, call)
    q = call.tensors["q"]
    in_order = out.transpose(1, 2) if q.stride(1) < q.stride(2) else out
    assert in_order.is_contiguous(), "out follows the memory order of q"


@pytest.mark.parametrize("scales", ["", "head"])
@pytest.mark.parametrize("page", [0, 8])
@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("backend", BACKENDS)
def test_prefix(backend: str, rows: int, page: int, scales: str, device: str) -> None:
    """The keys of a prefix stand before every sequence's own, and those of an empty sequence are all it has."""
    common: dict[str, Any] = {"heads": 6, "kv_heads": 2, "rows": rows, "page": page, "prefix": 45, "device": device}
    prove(backend, make(20, RAGGED, dtype=torch.float16, scales=scales, sinks=bool(scales), **common))
    prove(backend, make(21, RAGGED, dtype=usual(backend), softcap=2.0, **common))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_prefix_is_keys_that_all_sequences_have(backend: str, device: str) -> None:
    call = make(22, (20, 20, 20), heads=4, kv_heads=2, rows=2, prefix=30, dtype=usual(backend), device=device)
    tensors = dict(call.tensors)
    for name in "kv":
        common = tensors.pop(f"{name}_prefix").expand(3, -1, -1, -1)
        tensors[f"{name}_cache"] = torch.cat([common, tensors[f"{name}_cache"]], dim=2)
    tensors["cache_seqlens"] = tensors["cache_seqlens"] + 30
    for one, other in zip(call(backend), call._replace(tensors=tensors)(backend), strict=True):
        torch.testing.assert_close(one, other, **_rounded_to(one.dtype))


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_empty_prefix_is_none(backend: str, device: str) -> None:
    call = make(23, (20, 7), dtype=usual(backend), device=device)
    nothing = torch.zeros(1, 0, 16, dtype=usual(backend), device=device)
    for one, other in zip(call(backend, k_prefix=nothing, v_prefix=nothing), call(backend), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("backend", BACKENDS)
def test_decoding_is_the_last_rows_of_attention(backend: str, device: str) -> None:
    q, k, v = (torch.randn(2, heads, 40, 16, device=device).to(usual(backend)) for heads in (4, 2, 2))
    lengths = torch.full((2,), 40, dtype=torch.int32, device=device)
    expected = flash_attention(*(x.double() for x in (q, k, v)), causal=True, backend="reference")[:, :, -3:]
    out = lean_attention(q[:, :, -3:], k, v, cache_seqlens=lengths, backend=backend)
    torch.testing.assert_close(out, expected.to(out.dtype), **_rounded_to(out.dtype))


def _rounded_to(dtype: torch.dtype) -> dict[str, Any]:
    """How far apart two results of numbers near 1 may be."""
    return {"rtol": 2e-3, "atol": 5e-4} if dtype == torch.float16 else {"rtol": 1e-4, "atol": 1e-5}


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_same_call_gives_the_same_bits(backend: str, device: str) -> None:
    call = make(24, (200, 3, 90, 0), heads=4, kv_heads=2, dtype=torch.float16, device=device)
    first = call(backend)
    for _ in range(3):
        assert all(torch.equal(x, y) for x, y in zip(first, call(backend), strict=True))

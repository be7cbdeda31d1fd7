"""block_sparse_attention against dense attention with the expanded mask: every option, and the edges of lists.

The kernels run with small tiles, so that short sequences cross many of them.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from iokernels import BlockIndex, autotune, block_sparse_attention, flash_attention
from iokernels.ops.block_sparse_attention.case import CASE
from iokernels.ops.block_sparse_attention.case.shapes import POISON
from iokernels.ops.block_sparse_attention.triton import launch as triton_launch
from iokernels.ops.block_sparse_attention.triton.tuning import DKV, DQ, FWD, Config
from iokernels.runtime import interpreter
from iokernels.runtime.registration.precision import eagerly
from iokernels.testing import budget, inputs
from iokernels.testing.case import Point
from iokernels.testing.case.proof import Proof, prove_point

BACKENDS = ("torch", "triton")
SMALL_TILES = {FWD: Config(64, 32, 1, 4, 2), DQ: Config(64, 32, 1, 4, 2), DKV: Config(64, 32, 1, 4, 2)}
POINTS = CASE.check_points()
_ALL = [
    (backend, dtype, point)
    for backend, dtype in (("triton", torch.float16), ("torch", torch.float32), ("torch", torch.float64))
    for point in POINTS
]
_QUICK = [
    (backend, dtype, point)
    for backend, dtype in (
        ("triton", torch.bfloat16), ("triton", torch.float32), ("torch", torch.float16), ("torch", torch.bfloat16)
    )
    for point in POINTS if point.quick
]  # fmt: skip


pytestmark = pytest.mark.tiles(**SMALL_TILES)


@pytest.mark.parametrize(
    ("backend", "dtype", "point"), _ALL + _QUICK, ids=lambda x: x.name if isinstance(x, Point) else str(x)
)
def test_every_option(backend: str, dtype: torch.dtype, point: Point, device: str) -> None:
    prove_point(CASE, backend, point.shape, dtype, device)


@pytest.mark.parametrize("wrong", ["zeros", "no sink", "a key less in the window", "sink counted twice", "tails read"])
def test_wrong_results_are_found(wrong: str) -> None:
    """The proof fails where one key is missing, or counts twice."""
    shape = CASE.vocabulary.parse("b=1,h=2,n=80,nk=110,d=16,bq=32,bk=16,budget=16,sink=5,window=20,ragged=1,lse=1")

    def run(given: Any) -> dict[str, Tensor]:
        index: BlockIndex = given.options["index"]
        tensors: dict[str, Any] = dict(given.tensors)
        if wrong == "no sink":
            index = replace(index, sink=0)
        if wrong == "a key less in the window":
            index = replace(index, window=index.window - 1)
        if wrong == "tails read":
            room = torch.where(index.indices == POISON, 0, index.indices)
            index = replace(index, indices=room, counts=(index.counts + 1).clamp(max=room.shape[3]))
        if wrong == "sink counted twice":
            tensors = {name: torch.cat((x[:, :, :1], x), 2) if name != "q" else x for name, x in tensors.items()}
            index = replace(index, sink=index.sink + 1, kv_len=index.kv_len + 1)
            index = replace(index, indices=torch.where(index.indices == POISON, 0, index.indices))
        out, lse = block_sparse_attention(**tensors, index=index, return_lse=True, backend="torch")
        return {"out": out * (wrong != "zeros"), "lse": lse}

    verdict = Proof(CASE, shape, torch.float16, torch.device("cpu")).judge(run)
    assert verdict.status != "ok"


def drawn(
    seed: int, heads: tuple[int, int, int], rows: int, keys: int, width: int = 16, **fields: Any
) -> tuple[Tensor, Tensor, Tensor, BlockIndex]:
    """q, k, v and random lists of (query heads, key heads, lists), with what is no entry poisoned."""
    query_heads, kv_heads, lists = heads
    q, k, v = inputs.attention(seed, 2, query_heads, kv_heads, rows, keys, width, dtype=torch.float32)
    given: dict[str, Any] = {"block_q": 32, "block_k": 16} | fields
    generator = torch.Generator().manual_seed(seed)
    blocks = (-(-rows // given["block_q"]), -(-keys // given["block_k"]))
    mask = torch.rand((2, lists, *blocks), generator=generator) < torch.rand(
        (2, lists, blocks[0], 1), generator=generator
    )
    index = BlockIndex.from_mask(mask, **given, q_len=rows, kv_len=keys).validate(deep=True)
    slots = torch.arange(index.indices.shape[3])
    return q, k, v, replace(index, indices=torch.where(slots < index.counts[..., None], index.indices, POISON))


def results(backend: str, q: Tensor, k: Tensor, v: Tensor, index: BlockIndex, **options: Any) -> list[Tensor]:
    """out, lse, dq, dk, dv of one call. The gradient of the LSE is 1 where it is finite."""
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    out, lse = block_sparse_attention(q, k, v, index, **options, return_lse=True, backend=backend)
    dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    gradients = torch.autograd.grad([out, lse], [q, k, v], [dout, lse.isfinite().to(lse)])
    return [out.detach(), lse.detach(), *gradients]


def prove(backend: str, q: Tensor, k: Tensor, v: Tensor, index: BlockIndex, **options: Any) -> list[Tensor]:
    """Hold the results of ``backend`` to the error budget, and return them."""
    found = results(backend, q, k, v, index, **options)
    truth = results("reference", q.double(), k.double(), v.double(), index, **options)
    with eagerly():
        low = results("reference", q, k, v, index, **options)
    factors = (budget.FORWARD, budget.FORWARD, *(budget.GRADIENT,) * 3)
    for what, factor, x, y, z in zip(("out", "lse", "dq", "dk", "dv"), factors, found, truth, low, strict=True):
        budget.check(x, y, z, factor=factor, what=what)
    return found


PER_HEAD: dict[str, Any] = {
    "sink": torch.tensor([0, 3, 40, 100], dtype=torch.int32),
    "window": torch.tensor([30, 0, 1, 200], dtype=torch.int32),
}


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("backend", BACKENDS)
def test_sinks_and_windows_that_differ_by_head(backend: str, causal: bool) -> None:
    """Those of DuoAttention: full, streaming and mixed heads in one call."""
    q, k, v, index = drawn(1, (4, 2, 4), 60, 75, **PER_HEAD)
    index.counts[:, 3] = -1
    prove(backend, q, k, v, index, causal=causal)


@pytest.mark.parametrize("backend", BACKENDS)
def test_keys_that_are_named_three_times_count_once(backend: str) -> None:
    q, k, v, index = drawn(2, (2, 1, 1), 64, 64, sink=20, window=50)
    everything = replace(
        index,
        indices=torch.arange(4, dtype=torch.int32).expand(2, 1, 2, -1),
        counts=torch.full_like(index.counts, 4),
    )
    found = prove(backend, q, k, v, everything)
    dense = results(backend, q, k, v, replace(index, counts=torch.full_like(index.counts, -1), sink=0, window=0))
    for x, y in zip(found, dense, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_dense_rows_are_flash_attention(backend: str) -> None:
    q, k, v, index = drawn(3, (4, 2, 2), 50, 70)
    dense = replace(index, counts=torch.full_like(index.counts, -1), indices=index.indices[..., :0])
    out, lse, *_ = results(backend, q, k, v, dense)
    expected = flash_attention(q, k, v, causal=True, return_lse=True, backend="reference")
    torch.testing.assert_close(out, expected[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse, expected[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_keys_no_rows(backend: str) -> None:
    q, k, v, index = drawn(4, (2, 1, 2), 40, 50)
    out, lse, *gradients = results(backend, q, k, v, replace(index, counts=torch.zeros_like(index.counts)))
    assert (out == 0).all()
    assert (lse == float("-inf")).all()
    assert all((gradient == 0).all() for gradient in gradients)
    for rows, keys in ((0, 32), (32, 0), (0, 0)):
        x, y = torch.randn(1, 2, rows, 16), torch.randn(1, 1, keys, 16)
        empty = BlockIndex.from_mask(torch.ones(1, 1, rows, keys, dtype=torch.bool), block_q=32, block_k=16, window=5)
        out, lse, *gradients = results(backend, x, y, y, empty)
        assert (lse == float("-inf")).all()
        assert all((gradient == 0).all() for gradient in (out, *gradients))


def test_tiles_that_straddle_blocks_in_every_way() -> None:
    """Key tiles smaller and larger than a block, rows that share tiles with another query block's heads."""
    q, k, v, index = drawn(5, (6, 2, 2), 60, 50, block_q=48, block_k=8, sink=3, window=9)
    truth = results("reference", q, k, v, index)
    for rows, keys in ((32, 16), (128, 64), (32, 128)):
        tiles = {name: Config(rows, keys, 1, 4, 2) for name in SMALL_TILES}
        with autotune.override(**tiles):
            for x, y in zip(results("triton", q, k, v, index), truth, strict=True):
                torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)
    q, k, v, index = drawn(6, (2, 1, 2), 70, 150, block_k=128, window=40)
    prove("triton", q, k, v, index)


@pytest.mark.parametrize("parts", [2, 20])
def test_parts_of_a_list(parts: int) -> None:
    """Decoding: thread blocks share a list, some of them get nothing."""
    q, k, v, index = drawn(7, (8, 2, 2), 3, 200, block_q=16, sink=10, window=20)
    tiles = {FWD: Config(16, 16, parts, 4, 2)}
    expected = block_sparse_attention(q, k, v, index, return_lse=True, backend="reference")
    with autotune.override(**tiles):
        found = block_sparse_attention(q, k, v, index, return_lse=True, backend="triton")
        with interpreter.shuffled_blocks(3):
            again = block_sparse_attention(q, k, v, index, return_lse=True, backend="triton")
    for x, y, z in zip(found, expected, again, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)
        assert x.equal(z)


def test_the_same_bits_in_any_order_of_blocks() -> None:
    q, k, v, index = drawn(8, (4, 2, 1), 60, 60, sink=5, window=10, block_k=8)
    first = results("triton", q, k, v, index)
    with interpreter.shuffled_blocks(1):
        again = results("triton", q, k, v, index)
    assert all(x.equal(y) for x, y in zip(first, again, strict=True))
    assert all(x.equal(y) for x, y in zip(*(results("torch", q, k, v, index) for _ in range(2)), strict=True))


@pytest.mark.parametrize("layout", ["bnhd", "strided", "expanded"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_layouts(backend: str, layout: Any) -> None:
    """Every element beside the tensors is NaN: whoever reads it shows it. The lists are views too."""
    _, _, _, index = drawn(9, (4, 2, 2), 50, 60)
    index = replace(
        index, indices=index.indices[:1, :1].expand(2, 4, -1, -1), counts=index.counts[:1, :1].expand(2, 4, -1)
    )
    q, k, v = inputs.attention(9, 2, 4, 2, 50, 60, 24, dtype=torch.float32, layout=layout)
    out, *_ = prove(backend, q, k, v, replace(index, window=7))
    in_order = out.transpose(1, 2) if q.stride(1) < q.stride(2) else out
    assert in_order.is_contiguous(), "out follows the memory order of q"


def test_64_bit_offsets(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same bits with offsets forced to 64 bits; and the launcher sees when 32 are too few."""
    q, k, v, index = drawn(10, (2, 1, 2), 40, 50, sink=3, window=5)
    narrow = results("triton", q, k, v, index)
    monkeypatch.setattr(triton_launch, "_reach", lambda x: 2**31)
    wide = results("triton", q, k, v, index)
    assert all(x.equal(y) for x, y in zip(narrow, wide, strict=True))
    monkeypatch.undo()
    long = torch.empty((1, 8, 2**22, 128), device="meta", dtype=torch.float16)
    assert triton_launch._reach(long) >= 2**31 > triton_launch._reach(long[:, :2])


def paged(k: Tensor, page: int, seed: int) -> tuple[Tensor, Tensor]:
    """Keys as shuffled pages with spare ones of NaN, and their table with entries past the end that name no page."""
    batch, heads, keys, width = k.shape
    needed = -(-keys // page)
    order = torch.randperm(batch * needed + 3, generator=torch.Generator().manual_seed(seed))[: batch * needed]
    pages = torch.full((batch * needed + 3, heads, page, width), float("nan"))
    whole = torch.full((batch, heads, needed * page, width), float("nan"))
    whole[:, :, :keys] = k
    pages[order] = whole.view(batch, heads, needed, page, width).transpose(1, 2).flatten(0, 1)
    table = torch.full((batch, needed + 2), 2**30, dtype=torch.int32)
    table[:, :needed] = order.view(batch, needed)
    return pages, table


@pytest.mark.parametrize(("rows", "page", "parts"), [(1, 16, 4), (3, 5, 2), (50, 32, 1)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_pages(backend: str, rows: int, page: int, parts: int) -> None:
    q, k, v, index = drawn(11, (4, 2, 2), rows, 150, sink=10, window=20)
    expected = block_sparse_attention(q, k, v, index, return_lse=True, backend="reference")
    k_pages, table = paged(k, page, 0)
    v_pages, _ = paged(v, page, 0)
    with autotune.override(**{FWD: Config(32, 32, parts, 4, 2)}):
        found = block_sparse_attention(q, k_pages, v_pages, index, block_table=table, return_lse=True, backend=backend)
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_sequences_of_their_own_lengths(backend: str) -> None:
    """Positions align with each length; what lies past it is NaN, and lists may name it."""
    q, k, v, index = drawn(12, (4, 2, 4), 3, 100, sink=10, window=20)
    lengths = torch.tensor([57, 99, 2, 99], dtype=torch.int32)[::2]
    for x in (k, v):
        x[0, :, 57:] = x[1, :, 2:] = float("nan")
    options = {"cache_seqlens": lengths, "return_lse": True, "backend": backend}
    out, lse = block_sparse_attention(q, k, v, index, **options)
    assert out.isfinite().all()
    assert (lse[1, :, 0] == float("-inf")).all(), "the first of three rows stands before two keys"
    for b, length in enumerate(lengths.tolist()):
        own = replace(index, indices=index.indices[b : b + 1], counts=index.counts[b : b + 1], kv_len=length)
        keys, values = k[b : b + 1, :, :length], v[b : b + 1, :, :length]
        expected, its_lse = block_sparse_attention(
            q[b : b + 1], keys, values, own, return_lse=True, backend="reference"
        )
        torch.testing.assert_close(out[b : b + 1], expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(lse[b : b + 1], its_lse, rtol=1e-5, atol=1e-5)
    k_pages, table = paged(k, 16, 1)
    v_pages, _ = paged(v, 16, 1)
    again, _ = block_sparse_attention(q, k_pages, v_pages, index, block_table=table, **options)
    torch.testing.assert_close(again, out, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("wanted", ["q", "k", "v"])
def test_one_gradient_alone(backend: str, wanted: str) -> None:
    q, k, v, index = drawn(13, (2, 1, 1), 40, 50, window=5)
    everything = results(backend, q, k, v, index)
    leaves: dict[str, Any] = {"q": q, "k": k, "v": v}
    leaves[wanted] = leaves[wanted].detach().requires_grad_()
    out, lse = block_sparse_attention(**leaves, index=index, return_lse=True, backend=backend)
    dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    (found,) = torch.autograd.grad([out, lse], [leaves[wanted]], [dout, lse.isfinite().to(lse)])
    assert found.equal(everything[2 + "qkv".index(wanted)])

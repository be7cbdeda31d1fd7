"""block_sparse_attention under torch.library's checks and torch.compile, its errors, and its launch parameters."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from iokernels import BlockIndex, UnsupportedError, autotune, block_sparse_attention, use_backend
from iokernels.ops.block_sparse_attention.case import CASE
from iokernels.ops.block_sparse_attention.op import backward_op, forward_op
from iokernels.ops.block_sparse_attention.options import Options
from iokernels.ops.block_sparse_attention.triton.tuning import (
    KERNELS,
    TUNABLES,
    Config,
    Problem,
    default,
    shared_bytes,
)
from iokernels.runtime.device import KNOWN
from iokernels.testing.tracer import trace

CHECKS = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")


def call(rows: int = 20, keys: int = 30, **fields: Any) -> tuple[Tensor, Tensor, Tensor, BlockIndex]:
    """q, k, v of 4 heads and 2 key heads, and an index of every third key block."""
    q, k, v = torch.randn(1, 4, rows, 16), torch.randn(1, 2, keys, 16), torch.randn(1, 2, keys, 16)
    mask = torch.arange(keys).expand(1, 2, rows, keys) // 8 % 3 == 1
    return q, k, v, BlockIndex.from_mask(mask, **({"block_q": 16, "block_k": 8, "sink": 3, "window": 5} | fields))


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_operators_are_what_they_say(backend: str) -> None:
    q, k, v, index = call()
    heads = torch.tensor([1, 2], dtype=torch.int32)
    options = Options(index.indices, index.counts, heads, heads, None, None, 16, 8, 0, 0, 30, 0.25, True)
    torch.library.opcheck(forward_op, (q, k, v, backend, *options), test_utils=CHECKS)
    out, lse = forward_op(q, k, v, backend, *options)
    q = q.transpose(1, 2).contiguous().transpose(1, 2)
    for needs in ([True, True, True], [False, True, False]):
        arguments = (out, lse, q, k, v, out, lse, needs, backend, *options)
        torch.library.opcheck(backward_op, arguments, test_utils=CHECKS)
    table = torch.tensor([[0, 1]], dtype=torch.int32)
    paged = options._replace(block_table=table, cache_seqlens=torch.tensor([25], dtype=torch.int32))
    pages = [x.view(1, 2, 2, 15, 16).transpose(1, 2).flatten(0, 1) for x in (k, v)]
    torch.library.opcheck(forward_op, (q, *pages, backend, *paged), test_utils=CHECKS)


@pytest.mark.parametrize("dynamic", [False, True])
def test_one_graph(dynamic: bool) -> None:
    """Forward and backward, with the same tensor for k and v, from an index and from its tensors; other lengths."""

    def loss(q: Tensor, k: Tensor, index: BlockIndex) -> Tensor:
        own = BlockIndex(index.indices, index.counts, 16, 8, 3, 5, q.shape[2], k.shape[2])
        out, lse = block_sparse_attention(q, k, k, index, return_lse=True)
        return out.square().sum() + lse.sum() + block_sparse_attention(q, k, k, own).sum()

    compiled = torch.compile(loss, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for rows, keys in ((20, 30), (40, 47)):
        q, k, _, index = call(rows, keys)
        leaves = [x.requires_grad_() for x in (q, k)]
        found, expected = (
            torch.autograd.grad(function(leaves[0], leaves[1], index), leaves) for function in (compiled, loss)
        )  # fmt: skip
        for x, y in zip(found, expected, strict=True):
            torch.testing.assert_close(x, y)


def test_lengths_lists_and_batches_compile_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a kernel is compiled for does not depend on how long anything is."""
    from iokernels.ops.block_sparse_attention.triton import launch as launcher

    seen = set()
    for rows, keys, window in ((100, 100, 5), (150, 333, 64), (64, 64, 1)):
        q, k, v, index = call(rows, keys, window=window)
        options = Options(index.indices, index.counts, None, None, None, None, 16, 8, 3, window, keys, 0.25, True)
        launch = launcher.Launch(q, k, v, options)
        seen.add((launch.features(q, k, v), *launch.constants.items()))
    assert len(seen) == 1


def test_no_byte_outside_its_tensors() -> None:
    """Poisoned tails of lists, pages and their table; the tracer raises at the first stray access."""
    q, k, v, index = call(5, 30, block_q=16)
    slots = torch.arange(index.indices.shape[3])
    index = replace(index, indices=torch.where(slots < index.counts[..., None], index.indices, 2**30))
    table = torch.tensor([[1, 0, 2**30]], dtype=torch.int32)
    pages = [torch.randn(2, 2, 15, 16) for _ in range(2)]
    with trace() as traced:
        block_sparse_attention(q, pages[0], pages[1], index, block_table=table, backend="triton")
        q, k, v = (x.requires_grad_() for x in (q, k, v))
        block_sparse_attention(q, k, v, index, backend="triton").sum().backward()
    assert {kernel.name for kernel in traced.kernels} >= {"block_sparse_fwd_kernel", "block_sparse_bwd_dkv_kernel"}


def test_autocast_and_backends() -> None:
    q, k, v, index = call()
    with torch.autocast("cpu", torch.bfloat16):
        assert block_sparse_attention(q, k, v, index).dtype == torch.bfloat16
    with use_backend("reference"):
        expected = block_sparse_attention(q, k, v, index)
    torch.testing.assert_close(block_sparse_attention(q, k, v, index), expected)


def test_second_derivatives() -> None:
    q, k, v, index = call()
    q.requires_grad_()
    (gradient,) = torch.autograd.grad(block_sparse_attention(q, k, v, index).sum(), q, create_graph=True)
    with pytest.raises(UnsupportedError, match=r'block_sparse_attention: .* backend="reference"'):
        gradient.sum().backward()
    (gradient,) = torch.autograd.grad(
        block_sparse_attention(q, k, v, index, backend="reference").sum(), q, create_graph=True
    )
    gradient.square().sum().backward()
    assert q.grad is not None


def _with(**changes: Any) -> tuple[Any, dict[str, Any]]:
    q, k, v, index = call()
    given = {"q": q, "k": k, "v": v, "index": index} | changes
    return tuple(given.pop(name) for name in ("q", "k", "v", "index")), given


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"index": None}, TypeError, "index is NoneType; it must be a BlockIndex"),
        ({"q": None}, TypeError, "q is None; it must be a torch.Tensor"),
        ({"k": torch.randn(1, 2, 30, 16).half()}, TypeError, "k is float16; it must be float32, as q is"),
        ({"k": torch.randn(1, 3, 30, 16), "v": torch.randn(1, 3, 30, 16)}, ValueError, "the heads of k must divide"),
        ({"k": torch.randn(1, 1, 30, 16), "v": torch.randn(1, 1, 30, 16)}, ValueError, "index has lists for 2 heads"),
        ({"q": torch.randn(1, 4, 21, 16)}, ValueError, "index has q_len 20; q has 21 rows"),
        ({"k": torch.randn(1, 2, 31, 16), "v": torch.randn(1, 2, 31, 16)}, ValueError, "kv_len 30; k has 31 keys"),
        ({"causal": 1}, TypeError, "causal is int; it must be a bool"),
        ({"scale": float("nan")}, ValueError, "scale is nan"),
        ({"cache_seqlens": torch.tensor([31], dtype=torch.int32)}, ValueError, "each must be from 0 to"),
        ({"cache_seqlens": torch.tensor([3])}, TypeError, "cache_seqlens is int64; it must be int32"),
        ({"block_table": torch.zeros(2, 1, dtype=torch.int32)}, ValueError, "block_table has shape"),
        ({"block_table": torch.zeros(1, 0, dtype=torch.int32)}, ValueError, "block_table has room for 0 keys"),
        ({"backend": "cuda"}, UnsupportedError, "it has no such implementation"),
    ],
    ids=lambda x: str(list(x))[:30] if isinstance(x, dict) else "",
)
def test_wrong_arguments(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments, options = _with(**changes)
    with pytest.raises(error, match=message):
        block_sparse_attention(*arguments, **options)


def test_refusals_name_the_reason() -> None:
    (q, k, v, index), _ = _with()
    with pytest.raises(UnsupportedError, match="not float64"):
        block_sparse_attention(q.double(), k.double(), v.double(), index, backend="triton")
    wide: Any = [torch.randn(*x.shape[:3], 300) for x in (q, k, v)]
    with pytest.raises(UnsupportedError, match="D is 300"):
        block_sparse_attention(wide[0], wide[1], wide[2], index, backend="triton")
    q.requires_grad_()
    inference: Any = (
        ({"cache_seqlens": torch.tensor([3], dtype=torch.int32)}, "take no cache_seqlens"),
        ({"block_table": torch.tensor([[0]], dtype=torch.int32)}, "do not reach paged caches"),
    )
    for given, reason in inference:
        with pytest.raises(UnsupportedError, match=reason):
            block_sparse_attention(q, k, v, index, **given)
        with torch.no_grad():
            block_sparse_attention(q, k, v, index, **given)


def test_a_table_may_choose_the_tiles() -> None:
    shape = CASE.vocabulary.parse("b=1,h=2,n=40,d=16,budget=32,bk=8,bq=16,sink=0,window=0")
    made = CASE.make_inputs(shape, torch.float32, torch.device("cpu"), 0)
    with torch.no_grad(), autotune.override(block_sparse_fwd=Config(16, 16, 1, 4, 1)), trace() as traced:
        CASE.run(made, "triton")
    assert traced.kernels[0].programs == 3 * 2


@pytest.mark.parametrize("kernel", KERNELS)
def test_defaults_are_in_the_space(kernel: str) -> None:
    """For every GPU, width, dtype and number of rows, the default is one of the configurations that tuning may try."""
    for device in KNOWN.values():
        for width in (16, 64, 128, 256):
            for itemsize, tensor_cores in ((2, True), (4, True), (4, False)):
                for item_rows, items in ((16, 8), (64, 4096), (512, 512)):
                    problem = Problem(
                        kernel, width, width, itemsize, tensor_cores, 8, False, device.sm, device.sms,
                        device.smem_block, item_rows, items,
                    )  # fmt: skip
                    config = default(problem)
                    assert shared_bytes(problem, config) <= device.smem_block
                    assert TUNABLES[kernel].space.refusal(problem, device, config) is None, (problem, config)
                    assert TUNABLES[kernel].key(
                        TUNABLES[kernel].problem_of(TUNABLES[kernel].key(problem), device)
                    ) == TUNABLES[kernel].key(problem)


def test_decoding_fills_the_gpu_and_prompts_do_not_split() -> None:
    device = KNOWN["h100-sxm"]

    def parts(item_rows: int, items: int) -> int:
        sizes = (device.sm, device.sms, device.smem_block, item_rows, items)
        return default(Problem(KERNELS[0], 128, 128, 2, True, 8, False, *sizes, 131072)).parts

    assert 8 * parts(16, 8) >= device.sms
    assert parts(256, 16384) == 1

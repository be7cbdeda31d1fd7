"""lean_attention where only a GPU can show it: captured graphs, streams side by side, caches past 2^31 elements."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from iokernels import lean_attention
from iokernels.ops.shared.arrivals import ARRIVALS
from iokernels.runtime import device as devices
from iokernels.runtime import interpreter

from .calls import make

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or interpreter.active(), reason="needs a GPU, on which kernels are compiled"
)

BACKENDS = (
    "triton",
    pytest.param("cuda", marks=pytest.mark.skipif(not devices.has_cupy(), reason="CuPy is not installed")),
)
LENGTHS = ((500, 0, 3000, 77), (4000, 4000, 4000, 4000), (0, 0, 0, 0), (1, 2, 3, 4), (4000, 1, 0, 900))


@pytest.mark.parametrize("options", [{}, {"page": 16}, {"prefix": 300}, {"rows": 4}], ids=str)
@pytest.mark.parametrize("schedule", ["lean", "split"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_captured_graph_follows_the_lengths(backend: str, schedule: str, options: Any) -> None:
    """Captured once, replayed with other lengths, a hundred times over: nobody on the host looked at them."""
    longest = make(0, (4000,) * 4, heads=16, kv_heads=2, head_dim=64, dtype=torch.bfloat16, device="cuda", **options)
    lengths = longest.tensors["cache_seqlens"].clone()
    call = longest.with_tensors(cache_seqlens=lengths)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        call(backend, schedule=schedule)  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = call(backend, schedule=schedule)
    for number in range(100):
        lengths.copy_(torch.tensor(LENGTHS[number % len(LENGTHS)]))
        graph.replay()
        if number < 2 * len(LENGTHS):
            expected = call(backend, schedule=schedule)
            assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
            truth = call.double()("reference")
            assert (found[0].double() - truth[0]).abs().max() < 0.03
    torch.cuda.synchronize()
    assert not any(counters.any() for counters in ARRIVALS.values())


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_streams_at_once(backend: str) -> None:
    """Each has counters and a workspace of its own; what both compute is what one computes alone."""
    calls = [
        make(seed, (3000, 10, 900), heads=16, kv_heads=2, head_dim=64, dtype=torch.bfloat16, device="cuda")
        for seed in (1, 2)
    ]
    expected = [call(backend, schedule="lean") for call in calls]
    streams = [torch.cuda.Stream() for _ in calls]
    torch.cuda.synchronize()
    found: list[list[tuple[Tensor, Tensor]]] = [[], []]
    for _ in range(200):
        for which, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                found[which].append(calls[which]("triton", schedule="lean"))
    torch.cuda.synchronize()
    for which, results in enumerate(found):
        for result in results:
            assert all(torch.equal(one, other) for one, other in zip(result, expected[which], strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_call_does_not_synchronise(backend: str) -> None:
    call = make(3, (3000, 10), heads=16, kv_heads=2, head_dim=64, dtype=torch.bfloat16, prefix=100, device="cuda")
    call(backend)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for schedule in ("lean", "split"):
            call(backend, schedule=schedule)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("page", [0, 16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_caches_past_2_to_the_31_elements(backend: str, page: int) -> None:
    if torch.cuda.mem_get_info()[0] < 12 * 2**30:
        pytest.skip("needs a GPU with 12 GB to spare")
    heads, width, keys = 8, 128, 2**31 // (8 * 128) + 4096
    # Keys of one sequence with all heads in a row, so that its last keys lie past 2^31 elements.
    storage = torch.zeros(keys, heads, width, device="cuda", dtype=torch.bfloat16)
    storage[-512:] = torch.randn(512, heads, width, device="cuda").to(torch.bfloat16)
    q = torch.randn(1, heads, 1, width, device="cuda", dtype=torch.bfloat16)
    lengths = torch.tensor([keys], dtype=torch.int32, device="cuda")
    cache, table = storage.transpose(0, 1)[None], None
    if page:
        cache = storage.view(-1, page, heads, width).transpose(1, 2)
        table = torch.arange(cache.shape[0], dtype=torch.int32, device="cuda")[None]
    out = lean_attention(q, cache, cache, cache_seqlens=lengths, block_table=table, window=(255, 0), backend=backend)
    last = storage[-256:].transpose(0, 1)[None]
    few = torch.tensor([256], dtype=torch.int32, device="cuda")
    expected = lean_attention(q.double(), last.double(), last.double(), cache_seqlens=few, backend="reference")
    assert (out.double() - expected).abs().max() < 0.02

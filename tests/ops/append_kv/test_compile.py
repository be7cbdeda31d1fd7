"""append_kv and lean_attention as operators of torch: schemas, mutation, torch.compile; and the kernel on real GPUs."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from iokernels import append_kv, lean_attention, rotary_table
from iokernels.ops.append_kv.options import Append


def options_of(kind: str, device: str) -> tuple[list[Tensor], Append]:
    """New rows and caches of two sequences, one of which ends beyond a page, and the rest of the arguments."""
    torch.manual_seed(0)
    cached = torch.float32 if kind in ("dense", "paged") else torch.int8
    first = (2, 2, 12) if kind != "paged" else (6, 2, 4)
    new = [torch.randn(2, 2, 3, 8, device=device) for _ in range(2)]
    caches = [torch.zeros(*first, 8, device=device).to(cached) for _ in range(2)]
    cos, sin = (x.to(device) for x in rotary_table(16, 6))
    options = Append(torch.tensor([2, 9], dtype=torch.int32, device=device), cos=cos, sin=sin)
    if kind == "paged":
        table = torch.tensor([[3, 0, 1], [2, 5, 4]], dtype=torch.int32, device=device)
        counts = torch.tensor([3, 1], dtype=torch.int32, device=device)
        options = options._replace(block_table=table, new_seqlens=counts)
    if kind == "scaled":
        scales = [torch.zeros(first, device=device) for _ in range(2)]
        options = options._replace(k_key_scale=scales[0], v_key_scale=scales[1])
    if kind == "by head":
        options = options._replace(k_scale=torch.full((2,), 0.1, device=device))
    return [*new, *caches], options


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("kind", ["dense", "paged", "scaled", "by head"])
def test_opcheck(kind: str, backend: str, device: str) -> None:
    tensors, options = options_of(kind, device)
    torch.library.opcheck(torch.ops.iokernels.lean_attention_append.default, (*tensors, backend, *options))


def step(
    q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, starts: Tensor, table: Tensor | None,
    rotary: tuple[Tensor, Tensor], backend: str,
) -> Tensor:  # fmt: skip
    append_kv(
        k, v, k_cache, v_cache, cache_seqlens=starts, block_table=table, rotary=rotary, backend=backend
    )  # fmt: skip
    return lean_attention(q, k_cache, v_cache, cache_seqlens=starts + k.shape[2], block_table=table, backend=backend)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("paged", [False, True])
def test_append_and_attend_compile_to_one_graph_once(paged: bool, backend: str, device: str) -> None:
    """Lengths, page tables and the size of the cache change; keys and values may share one storage."""
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled: Callable[..., Tensor] = torch.compile(step, fullgraph=True, dynamic=True, backend=counter)
    rotary = rotary_table(64, 8, device=device)
    results: list[list[Tensor]] = []
    for run in (step, compiled):
        torch.manual_seed(0)
        results.append([])
        for pages, lengths in ((5, [0, 5]), (4, [7, 2]), (4, [8, 3]), (3, [9, 0])):
            table = torch.randperm(2 * pages).view(2, pages).int().to(device) if paged else None
            both = torch.randn(2, 2 * pages if paged else 2, 2, 4 if paged else 4 * pages, 8, device=device)
            q, k, v = (torch.randn(2, heads, 3, 8, device=device) for heads in (4, 2, 2))
            starts = torch.tensor(lengths, dtype=torch.int32, device=device)
            results[-1] += [run(q, k, v, both[0], both[1], starts, table, rotary, backend), both]
    assert counter.frame_count == 1
    for eager, traced in zip(*results, strict=True):
        assert torch.equal(eager, traced)


def test_aot_keeps_the_mutation_of_the_caches(device: str) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    q, k, v = (torch.randn(1, 2, 1, 8, device=device) for _ in range(3))
    caches = [torch.zeros(1, 2, 16, 8, device=device) for _ in range(4)]
    starts = torch.tensor([5], dtype=torch.int32, device=device)
    rotary = rotary_table(16, 8, device=device)
    outs = []
    for run, (k_cache, v_cache) in ((step, caches[:2]), (compiled, caches[2:])):
        outs.append(run(q, k, v, k_cache, v_cache, starts, None, rotary, "torch"))
    torch.testing.assert_close(*outs)
    assert caches[0].any()
    assert torch.equal(caches[0], caches[2])
    assert torch.equal(caches[1], caches[3])


_COMPILE = """
import sys
import torch
from iokernels.autotune.resources import compiling_for
from iokernels.ops.append_kv import triton
from iokernels.ops.append_kv.options import Append
from iokernels.runtime.device import named

def empty(*size, of=torch.int32):
    return torch.empty(size, dtype=of, device="meta")

def append(batch, keys, new, paged, cached, rot, scales):
    first = (batch * keys // 16, 8, 16) if paged else (batch, 8, keys)
    table = empty(batch, keys // 16) if paged else None
    angles = empty(keys, rot // 2, of=torch.float32) if rot else None
    options = Append(empty(batch), table, cos=angles, sin=angles)
    if scales:
        scales = [empty(*first, of=torch.float32) for _ in range(2)]
        options = options._replace(k_key_scale=scales[0], v_key_scale=scales[1])
    k = empty(batch, new, 8, 128, of=torch.bfloat16).transpose(1, 2)
    triton.append(k, k, empty(*first, 128, of=cached), empty(*first, 128, of=cached), options)

for gpu in sys.argv[1:]:
    with compiling_for(named(gpu)) as compiled:
        append(4, 1024, 1, False, torch.bfloat16, 128, False)
        append(4, 1024, 1, True, torch.float8_e4m3fn, 64, True)
        append(4, 1024, 100, True, torch.int8, 0, True)
    assert len(compiled) == 3
    for kernel in compiled:
        assert kernel.spill_bytes == 0, (gpu, kernel)
        assert kernel.registers <= 64, (gpu, kernel)

kernels = triton.append_kv_kernel.device_caches
def count():
    return sum(len(caches[0]) for caches in kernels.values())
before = count()
with compiling_for(named(gpu)):
    for batch, keys, new in ((2, 512, 1), (32, 4096, 1), (7, 48, 1), (4, 256, 33), (3, 4096, 2000)):
        append(batch, keys, new, True, torch.float8_e4m3fn, 64, True)
assert count() == before + 1, count() - before
"""


def test_the_kernel_fits_every_gpu_and_is_compiled_once(compiled_apart: Callable[..., str]) -> None:
    """No spills; and one more kernel for prompts, whatever batch, capacity and number of new keys."""
    # A process of its own, because the tests' process interprets its kernels.
    compiled_apart("-c", _COMPILE, "a100-sxm", "h100-sxm", "b200")

"""The CUDA kernel of the hierarchical selector, in the emulator: its tiles, its last block, and what it refuses."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from iokernels import (
    SelectionCache,
    UnsupportedError,
    autotune,
    block_sparse_attention,
    flash_attention,
    hip_attention,
    page_bounds,
    select_exact,
    select_hip,
    select_quest,
)
from iokernels.ops.hip_attention.case.select_cuda import select_account
from iokernels.ops.hip_attention.case.traffic import Call
from iokernels.ops.hip_attention.cuda import launch as cuda
from iokernels.ops.hip_attention.cuda.tuning import HELD, TUNABLE, Config, Problem
from iokernels.ops.hip_attention.options import Region, Stage
from iokernels.ops.hip_attention.select import hip_plan, hip_stage
from iokernels.ops.shared.arrivals import ARRIVALS
from iokernels.runtime.cuda.emulator import watch
from iokernels.runtime.cuda.kernel import CudaKernel
from iokernels.runtime.device import KNOWN
from iokernels.runtime.errors import KernelFault
from iokernels.testing import inputs

from ..backends import needs_cuda
from .selection import named, same_lists

STAGES = ((64, 4, 128), (16, 2, 64), (8, 1))
OPTIONS: dict[str, Any] = {"stages": STAGES, "budget": 48, "sink": 5, "window": 20, "block_q": 32}


def config(block_r: int = 16, num_warps: int = 1) -> Any:
    return autotune.override(hip_attention_select_cuda=Config(block_r, num_warps))


def draw(
    rows: int, keys: int, *, heads: tuple[int, int] = (4, 2), width: int = 24, dtype: torch.dtype = torch.bfloat16
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows + keys + width)
    q, k = (torch.randn(2, count, n, width, generator=generator) for count, n in zip(heads, (rows, keys), strict=True))
    return q.to(dtype), k.to(dtype)


def prove(q: Tensor, k: Tensor, device: str, **options: Any) -> None:
    found = select_hip(q.to(device), k.to(device), backend="cuda", **{**OPTIONS, **options})
    same_lists(found, select_hip(q, k, backend="torch", **{**OPTIONS, **options}))


def counters_are_zero() -> bool:
    return all(not counters.any() for counters in ARRIVALS.values())


@needs_cuda
@pytest.mark.parametrize("heads", ["kv", "all", "query"])
@pytest.mark.parametrize(
    ("tile", "width", "dtype"),
    [((16, 1), 20, torch.bfloat16), ((32, 3), 64, torch.float16), ((64, 2), 96, torch.bfloat16)],
    ids=str,
)
def test_every_tiling(tile: tuple[int, int], width: int, dtype: torch.dtype, heads: str, device: str) -> None:
    """Rows in one tile and in several, several blocks to a list and to the heads that share it, twice each: what a
    call leaves behind, the next one finds."""
    q, k = draw(70, 401, width=width, dtype=dtype)
    with config(*tile):
        for _ in range(2):
            prove(q, k, device, heads=heads)
            assert counters_are_zero()


@needs_cuda
@pytest.mark.parametrize("layout", ["bnhd", "padded", "strided", "expanded"])
def test_layouts(layout: Any, device: str) -> None:
    """Every element beside the tensors is NaN, and the emulator sees who reads it."""
    q, k, _ = inputs.attention(6, 2, 4, 2, 37, 201, 24, dtype=torch.float16, device=device, layout=layout)
    same_lists(select_hip(q, k, backend="cuda", **OPTIONS), select_hip(q, k, backend="torch", **OPTIONS))


@needs_cuda
@pytest.mark.parametrize("heads", ["kv", "all"])
def test_equal_scores_across_tiles(heads: str, device: str) -> None:
    """Scores are few integers of both signs: whole runs of candidates tie, in several warps and blocks."""
    generator = torch.Generator().manual_seed(1)
    q = torch.ones(2, 4, 32, 16).half()
    k = torch.zeros(2, 2, 700, 16)
    k[..., 0] = torch.randint(-2, 3, (2, 2, 88), generator=generator).repeat_interleave(8, 2)[..., :700]
    with config(16, 2):
        for budget in (48, 512):
            prove(q, k.half(), device, heads=heads, stages=((8, 4),), budget=budget)


@needs_cuda
@pytest.mark.parametrize("heads", ["kv", "all"])
def test_more_candidates_than_shared_memory_holds(heads: str, device: str) -> None:
    """Their scores are read again from global memory, and the bytes are those of the model."""
    q, k = (x[:1] for x in draw(1, 8 * HELD + 90, heads=(2, 2), width=8))
    region = Region(heads, 32, 5, 20)
    call = Call(1, 2, 2, 1, k.shape[2], 8, 2, region)
    tile = Config(16, 8)
    with autotune.override(hip_attention_select_cuda=tile), watch() as launches:
        prove(q, k, device, heads=heads, stages=((8, 1),), budget=1024)
    if device == "cpu":  # where launches are watched
        (launch,) = launches
        moved = launch.arguments.values()
        model = select_account(call, hip_plan(((8, 1),), 1024, region), tile).model
        assert sum(one.read + one.atomic for one in moved) == model.read
        assert sum(one.written + one.atomic for one in moved) == model.written


@needs_cuda
def test_lists_with_more_room_than_candidates(device: str) -> None:
    q, k = (x.to(device) for x in draw(40, 120))
    region = Region("kv", 16, 5, 20)
    exact = cuda.stage(q, k, None, None, region, Stage(16, 1, 7))
    roomy = cuda.stage(q, k, None, None, region, Stage(16, 1, 50))
    assert roomy[0].shape[3] == 50
    assert torch.equal(exact[1], roomy[1])
    assert roomy[1].max() == 7
    valid = torch.arange(7, device=device) < exact[1][..., None]
    assert torch.equal(exact[0][valid], roomy[0][..., :7][valid])


@needs_cuda
@pytest.mark.parametrize("heads", ["kv", "all"])
def test_nothing_to_select(heads: str, device: str) -> None:
    """Blocks of rows with nothing before their window have empty lists, and so have all their stages."""
    q, k = (x.to(device) for x in draw(64, 64))
    index = select_hip(q, k, backend="cuda", heads=heads, **{**OPTIONS, "window": 33, "sink": 0})
    assert index.counts[:, :, 0].eq(0).all()
    assert index.counts[:, :, 1].gt(0).all()
    nothing = select_hip(q, k, backend="cuda", heads=heads, **{**OPTIONS, "window": 2**40})
    assert nothing.counts.eq(0).all()
    sunk = select_hip(q, k, backend="cuda", heads=heads, **{**OPTIONS, "window": 0, "sink": 2**40})
    assert sunk.counts.eq(0).all()
    assert counters_are_zero()
    assert select_hip(q[:0], k[:0], backend="cuda", **OPTIONS).counts.numel() == 0


@needs_cuda
def test_parents_that_were_shortened(device: str) -> None:
    """A stage that finds fewer parents than it has blocks for: those past them return uncounted."""
    q, k = draw(37, 701, heads=(2, 2))
    region = Region("all", 16, 5, 20)
    first, second, _ = hip_plan(((64, 4, 512), (16, 2, 64), (8, 1)), 32, region)
    ids, counts = hip_stage(q.to(device), k.to(device), None, None, first, region, "cuda")
    counts = counts.clamp(max=3)
    with config(16, 1):
        found = hip_stage(q.to(device), k.to(device), ids, counts, second, region, "cuda")
    expected = hip_stage(q, k, ids.cpu(), counts.cpu(), second, region, "torch")
    assert torch.equal(found[1].cpu(), expected[1])
    valid = torch.arange(expected[0].shape[3]) < expected[1][..., None]
    assert torch.equal(found[0].cpu()[valid], expected[0][valid])
    assert counters_are_zero()


@needs_cuda
def test_what_is_not_a_number_is_not_chosen(device: str) -> None:
    q, k = draw(1, 300, heads=(1, 1))
    k[:, :, 96:104] = float("nan")
    k[:, :, 200:208] = float("inf")
    k[:, :, 200:208, 1:] = 0.0
    q[..., 0] = 1.0
    index = select_hip(q.to(device), k.to(device), backend="cuda", **{**OPTIONS, "stages": ((8, 1),)})
    assert 25 in named(index)
    assert 12 not in named(index)


@needs_cuda
def test_a_kernel_that_was_broken_off_leaves_no_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k = draw(20, 200)

    def broken(self: CudaKernel, grid: Any, block: int, smem: int, args: Any) -> None:
        args["arrivals_ptr"][0] = 1
        raise KernelFault("a fault in the middle")

    monkeypatch.setattr(CudaKernel, "launch", broken)
    with pytest.raises(KernelFault, match="in the middle"):
        select_hip(q, k, backend="cuda", **OPTIONS)
    monkeypatch.undo()
    prove(q, k, "cpu")


@needs_cuda
def test_lists_that_outlive_a_step(device: str) -> None:
    q, k = (x.to(device) for x in draw(6, 300))
    caches = {backend: SelectionCache((4, 2, 1), STAGES) for backend in ("cuda", "torch")}
    for step in range(6):
        seen = k[:, :, : 295 + step]
        found = {
            backend: cache.select(q[:, :, step : step + 1], seen, budget=32, sink=5, window=20, backend=backend)
            for backend, cache in caches.items()
        }
        same_lists(found["cuda"], found["torch"])


@needs_cuda
def test_one_launch_a_stage(device: str) -> None:
    q, k = (x.to(device) for x in draw(20, 200))
    with watch() as launches:
        select_hip(q, k, backend="cuda", **OPTIONS)
    if device == "cpu":  # where launches are watched
        assert [launch.name for launch in launches] == ["hip_attention_select_cuda_kernel"] * 3


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (lambda q, k: select_hip(q.float(), k.float(), backend="cuda"), "takes float16 and bfloat16, not float32"),
        (
            lambda q, k: select_hip(*draw(1, 40, width=264), backend="cuda"),
            "D is 264, and its kernel holds heads",
        ),
        (lambda q, k: select_quest(q, k, backend="cuda"), "select_quest.*it has no such implementation"),
        (lambda q, k: page_bounds(k, backend="cuda"), "page_bounds.*it has no such implementation"),
        (lambda q, k: select_exact(q, k, backend="cuda"), "select_exact.*it has no such implementation"),
        (partial(hip_attention, v=draw(1, 400)[1], budget=16, sink=0, window=8, backend="cuda"), "only its search has"),
        (
            lambda q, k: block_sparse_attention(q, k, k, select_hip(q, k, **OPTIONS), backend="cuda"),
            "block_sparse_attention.*it has no such implementation",
        ),
    ],
    ids=range(7),
)
def test_what_it_refuses(call: Any, reason: str) -> None:
    with pytest.raises(UnsupportedError, match=reason):
        call(*draw(1, 400))


@needs_cuda
def test_attention_to_what_it_selects(device: str) -> None:
    """The search here, the attention on another backend; where nothing is selected, all is flash_attention."""
    q, k = (x.to(device) for x in draw(20, 200))
    selection = partial(select_hip, backend="cuda", **OPTIONS)
    out = hip_attention(q, k, k, selection=selection, backend="torch")
    assert torch.equal(out, hip_attention(q, k, k, selection=partial(select_hip, **OPTIONS), backend="torch"))
    everything = hip_attention(q, k, k, budget=200, sink=0, backend="cuda")
    assert torch.equal(everything, flash_attention(q, k, k, causal=True, backend="cuda"))


@pytest.mark.parametrize("device_name", KNOWN)
def test_the_default_is_in_the_space(device_name: str) -> None:
    spec = KNOWN[device_name]
    for block_d in range(32, 257, 32):
        for rows in (1, 4, 64, 256, 2048):
            for candidates in (1, 16, 512, 65536):
                for searches in (1, 64, 65536):
                    problem = Problem(
                        block_d, rows, spec.sm, spec.sms, spec.smem_block, spec.smem_sm, candidates, searches
                    )
                    default = TUNABLE.default(problem)
                    assert TUNABLE.space.refusal(problem, spec, default) is None, (problem, default)

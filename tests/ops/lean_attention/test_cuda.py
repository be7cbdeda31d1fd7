"""The CUDA kernel of lean_attention where it is not like the others: its schedule in every order of blocks and warps,
its counters, its configurations. That its results are right, option by option, is held by ``test_lean_attention.py``.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from iokernels import UnsupportedError, autotune
from iokernels.ops.lean_attention.case import schedule as twin
from iokernels.ops.lean_attention.cuda import launch as cuda
from iokernels.ops.lean_attention.cuda import tuning as tuning_cuda
from iokernels.ops.lean_attention.cuda.tuning import TUNABLE, Config, Problem
from iokernels.ops.lean_attention.options import SCHEDULES as WORDS
from iokernels.ops.lean_attention.options import Options
from iokernels.ops.shared.arrivals import ARRIVALS
from iokernels.runtime.cuda.kernel import CudaKernel
from iokernels.runtime.device import KNOWN
from iokernels.runtime.errors import KernelFault

from ..backends import needs_cuda
from .calls import make, prove
from .test_schedule import SCHEDULES, equal, only

BLOCK_N = 16


def config(blocks: int, *, key_warps: int = 1, stages: int = 2) -> Any:
    """Tiles of 16 keys a warp, whatever the call."""
    return autotune.override(lean_attention_cuda=Config(BLOCK_N * key_warps, blocks, 1, key_warps, stages))


def counters_are_zero() -> bool:
    return all(not counters.any() for counters in ARRIVALS.values())


@needs_cuda
@pytest.mark.parametrize(
    "options",
    [
        {"rows": 2, "sinks": True, "softcap": 2.0},
        {"heads": 40, "page": 5, "cache_dtype": torch.int8, "scales": "key", "window": (37, 0)},
        {"heads": 20, "prefix": 40, "dtype": torch.bfloat16, "schedule": "split"},
    ],
    ids=["plain", "two warps of rows, pages, int8, factors", "prefix, split"],
)
def test_last_arriver_of_many(options: dict[str, Any], device: str) -> None:
    call = make(1, (90, 0, 41), **{"dtype": torch.float16, **options}, device=device)
    with config(5, key_warps=2, stages=3):
        prove("cuda", call)
    assert counters_are_zero()


@needs_cuda
@pytest.mark.parametrize("name", SCHEDULES)
def test_every_schedule_gives_the_same_result(name: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lengths, blocks = SCHEDULES[name]
    monkeypatch.setattr(tuning_cuda, "FEWEST_TILES", 1)
    call = make(2, lengths, heads=4, rows=2, dtype=torch.float16, device=device)
    with config(blocks):
        prove("cuda", call, schedule="lean")
    assert counters_are_zero()


@needs_cuda
def test_more_sequences_than_a_warp_adds_up_at_once(device: str) -> None:
    call = make(3, (0,) * 40 + (20,) + (0,) * 30 + (40, 17), heads=1, dtype=torch.float16, device=device)
    with config(5):
        prove("cuda", call, schedule="lean")
    assert counters_are_zero()


@needs_cuda
def test_more_parts_than_a_warp_merges_at_once(device: str) -> None:
    call = make(4, (700, 30), heads=1, dtype=torch.float16, device=device)
    with config(80):
        prove("cuda", call, schedule="split")
    assert counters_are_zero()


@needs_cuda
@pytest.mark.parametrize("options", [{}, {"prefix": 40}, {"rows": 3, "window": (60, 0)}], ids=str)
def test_batch_invariance(options: dict[str, Any], device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sequence's bits are the same alone and among others, in a longer cache, and with any number of blocks."""
    monkeypatch.setattr(tuning_cuda, "INVARIANT_KEYS", 64)
    call = make(5, (150, 0, 17, 200), heads=4, kv_heads=2, dtype=torch.float16, device=device, **options)
    found = []
    for blocks in (1, 264):
        with config(blocks):
            found.append(call("cuda", batch_invariant=True))
    assert equal(*found)
    with config(7):
        prove("cuda", call, batch_invariant=True)
        for sequence in range(4):
            alone = only(call, sequence)("cuda", batch_invariant=True)
            assert equal(alone, (found[0][0][sequence : sequence + 1], found[0][1][sequence : sequence + 1]))


@needs_cuda
def test_many_calls_on_one_workspace(device: str) -> None:
    """Counters are back at zero after each, whatever the next one is."""
    calls = [
        make(7, lengths, heads=1, spare=spare, dtype=torch.float16, device=device)
        for lengths, spare in (((40,), 0), ((20, 33), 40))
    ]
    with config(2):
        expected = [call("cuda", schedule="lean") for call in calls]
        for number in range(300):
            which = number % 10 == 9
            assert equal(expected[which], calls[which]("cuda", schedule="lean"))
    assert counters_are_zero()


@needs_cuda
def test_a_kernel_that_was_broken_off_leaves_no_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    call = make(8, (100,), dtype=torch.float16)
    with config(3):
        expected = call("cuda", schedule="lean")

        def broken(self: CudaKernel, grid: Any, block: int, smem: int, args: Any) -> None:
            args["arrivals_ptr"][0] = 1
            raise KernelFault("a fault in the middle")

        monkeypatch.setattr(CudaKernel, "launch", broken)
        with pytest.raises(KernelFault, match="in the middle"):
            call("cuda", schedule="lean")
        monkeypatch.undo()
        assert equal(expected, call("cuda", schedule="lean"))


@needs_cuda
@pytest.mark.parametrize("page", [0, 8])
@pytest.mark.parametrize("schedule", ["lean", "split"])
def test_lengths_out_of_range_stay_inside_the_tensors(schedule: str, page: int) -> None:
    """On a GPU nobody reads the lengths before the kernel does, so whatever they say must do no harm."""
    call = make(1, (40, 0, 33), heads=4, kv_heads=2, spare=0, page=page, dtype=torch.float16)
    q, k_cache, v_cache = (call.tensors[name] for name in ("q", "k_cache", "v_cache"))
    tensors: dict[str, Any] = {"block_table": torch.zeros(3, 5, dtype=torch.int32)} if page else {}
    found = []
    for lengths in ((2**31 - 1, -7, 41), (40, 0, 40)):
        tensors["cache_seqlens"] = torch.tensor(lengths, dtype=torch.int32)
        with config(5):
            options = Options(**tensors, window_right=0, schedule=schedule)
            found.append(cuda.forward(q, k_cache.nan_to_num(), v_cache.nan_to_num(), options))
    assert equal(*found)


def test_the_twin_is_what_the_launcher_assumes() -> None:
    """The account of equal shares, which a test holds to counted bytes, uses the constants of the launcher."""
    assert twin.parts([100], blocks=200, least=tuning_cuda.FEWEST_TILES, most_parts=tuning_cuda.MOST_PARTS) == 50


@pytest.mark.parametrize("device_name", KNOWN)
def test_the_default_is_in_the_space(device_name: str) -> None:
    spec = KNOWN[device_name]
    machine = (spec.sm, spec.sms, spec.smem_block, spec.smem_sm)
    for row_warps in (1, 2, 4):
        for width, value_width in ((16, 16), (64, 64), (128, 128), (192, 128), (256, 256)):
            for cache, scales in ((2, False), (1, False), (1, True)):
                for schedule in WORDS:
                    for items in (0, 8, 4096):
                        problem = Problem(
                            row_warps, width, value_width, cache, scales, schedule, False, *machine, items, items * 16
                        )
                        default = TUNABLE.default(problem)
                        assert TUNABLE.space.refusal(problem, spec, default) is None, (problem, default)
                        assert default.stages > 1


def test_what_it_refuses() -> None:
    call = make(9, (20,), dtype=torch.float32)
    with pytest.raises(UnsupportedError, match=r"'cuda' .* takes queries of float16 and bfloat16, not float32.*triton"):
        call("cuda")
    call = make(9, (20,), head_dim=264, dtype=torch.float16)
    with pytest.raises(UnsupportedError, match="D is 264, and its kernel holds heads up to 256 wide"):
        call("cuda")

"""The primitives of csrc/common against PyTorch, on the GPU or in the emulator."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from iokernels.runtime.cuda.emulator import warp_order
from iokernels.runtime.cuda.kernel import Argument, Int64, cuda_kernel

from .launching import launch, needs_a_machine

pytestmark = needs_a_machine

HERE = Path(__file__).parent


def run(name: str, args: dict[str, Argument], *, dtype: torch.dtype = torch.float16, grid: int = 1, block: int = 32,
        smem: int = 0, cooperative: bool = False, source: str = "primitives.cu") -> None:  # fmt: skip
    kernel = cuda_kernel(str(HERE / source), name, Element=dtype)
    launch(kernel, grid, block, smem, args, cooperative=cooperative)


def every_kind_of_float(dtype: torch.dtype) -> Tensor:
    """Random bits; every number of ``dtype``, the middles between neighbours, and what lies next to those."""
    numbers = torch.arange(2 ** (8 * dtype.itemsize)).to({1: torch.uint8, 2: torch.uint16}[dtype.itemsize]).view(dtype)
    finite = numbers.float()[numbers.float().isfinite()].unique()
    middles = (finite[1:].double() + finite[:-1].double()).div(2).float()
    chosen = torch.cat((finite, middles, torch.nextafter(middles, middles * 2), torch.nextafter(middles, middles * 0)))
    if len(chosen) > 60_000:
        chosen = chosen[torch.randperm(len(chosen))[:60_000]]
    bits = torch.randint(-(2**31), 2**31, (20_000,)).int().view(torch.float32)
    return torch.cat((chosen, bits, torch.tensor([0.0, -0.0, float("nan")])))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn], ids=str)
def test_conversions_round_as_torch_does(dtype: torch.dtype) -> None:
    x = every_kind_of_float(dtype)
    if dtype == torch.float8_e4m3fn:  # ours saturates, and PyTorch's overflows to NaN
        x = x[x.isnan() | (x.abs() <= 448)]
    y, bits = torch.empty_like(x), torch.empty(x.shape, dtype=torch.uint8 if dtype.itemsize == 1 else torch.uint16)
    args: dict[str, Argument] = {"x_ptr": x, "y_ptr": y, "bits_ptr": bits, "n": len(x)}
    run("round_trip", args, dtype=dtype, source="conversions.cu")
    expected = x.to(dtype).float()
    assert torch.equal(y.isnan(), expected.isnan())
    real = ~y.isnan()
    assert torch.equal(y[real], expected[real])
    assert torch.equal(bits.view(dtype).float()[real].signbit(), expected[real].signbit())


def test_fp8_saturates() -> None:
    x = torch.tensor([449.0, 464.0, 465.0, 1e9, -500.0, float("inf"), -float("inf")])
    y, bits = torch.empty_like(x), torch.empty(7, dtype=torch.uint8)
    args: dict[str, Argument] = {"x_ptr": x, "y_ptr": y, "bits_ptr": bits, "n": 7}
    run("round_trip", args, dtype=torch.float8_e4m3fn, source="conversions.cu")
    assert y.tolist() == [448.0, 448.0, 448.0, 448.0, -448.0, 448.0, -448.0]


def test_elementary_functions() -> None:
    x = torch.cat((torch.linspace(-100, 100, 4001), torch.logspace(-30, 0, 400), -torch.logspace(-30, 0, 400)))
    y = torch.empty(4, len(x))
    run("elementary", {"x_ptr": x, "y_ptr": y, "n": len(x)})
    d = x.double()
    expected = torch.stack((d.exp2(), d.abs().log2(), d.sigmoid(), d.tanh()))
    error = (y - expected).abs()
    assert (error[[0, 3]] <= 5e-7 * expected[[0, 3]].abs() + 1e-38).all()
    assert (error[2] <= 5e-7 * (1 + d.abs()) * expected[2] + 1e-38).all()
    assert (error[1][d != 0] <= 1e-6 * expected[1][d != 0].abs() + 1e-7).all()


def test_reductions_shuffles_and_votes() -> None:
    x = torch.randint(-50, 50, (128,)).float()
    y, votes = torch.empty(4, 128), torch.empty(4, dtype=torch.int32)
    run("reductions", {"x_ptr": x, "y_ptr": y, "votes_ptr": votes}, block=128, smem=128)
    lanes = torch.arange(32)
    warps = x.view(4, 32)
    assert torch.equal(y[0], x.sum().expand(128))
    assert torch.equal(y[1], x.max().expand(128))
    assert torch.equal(y[2].view(-1, 4), x.view(-1, 4).sum(1, keepdim=True).expand(-1, 4))
    up, down = warps[:, (lanes - 1).clamp(min=0)], warps[:, torch.where(lanes + 2 > 31, lanes, lanes + 2)]
    assert torch.equal(y[3].view(4, 32), up + 1000 * down)
    assert torch.equal(votes.long() & 0xFFFFFFFF, ((warps > 0).long() << lanes).sum(1))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_fragments_of_16_bits(dtype: torch.dtype) -> None:
    a, b = torch.randn(16, 16).to(dtype), torch.randn(16, 8).to(dtype)
    c, ct = torch.empty(16, 8), torch.empty(16, 8)
    args: dict[str, Argument] = {"a_ptr": a, "b_ptr": b, "bt_ptr": b.t().contiguous(), "c_ptr": c, "ct_ptr": ct}
    run("fragments", args, dtype=dtype, smem=512 + 256 + 256)
    assert torch.equal(c, ct)
    assert (c - a.double() @ b.double()).abs().max() < 1e-5


def test_fragments_of_tf32() -> None:
    a, b = torch.randn(16, 8), torch.randn(8, 8)
    c = torch.empty(16, 8)
    run("fragments_tf32", {"a_ptr": a, "b_ptr": b, "c_ptr": c})
    exact = a.double() @ b.double()
    size = (a.double().abs() @ b.double().abs()).max()
    assert 2**-24 * size < (c - exact).abs().max() < 2**-10 * size  # rounded to 11 bits, and no more


def test_blocks_in_step() -> None:
    blocks, steps = 5, 6
    expected = torch.zeros(blocks, dtype=torch.int64)
    for _ in range(steps):
        expected = expected.sum() + torch.arange(blocks)
    for seed in range(20):
        held, counter = torch.zeros(2, blocks, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
        args: dict[str, Argument] = {"held_ptr": held, "counter": counter, "blocks": blocks, "steps": steps}
        with warp_order(seed):
            run("in_step", args, grid=blocks, block=64, cooperative=True)
        assert torch.equal(held[steps % 2].long(), expected)
        assert counter.item() == 0


def test_last_block_merges_and_leaves_the_counter_as_it_was() -> None:
    x = torch.randint(-9, 9, (7, 64)).float()
    partial, total = torch.empty(7), torch.empty(1)
    counter, lasts = torch.zeros(1, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    args: dict[str, Argument] = {
        "x_ptr": x, "partial_ptr": partial, "sum_ptr": total, "counter": counter, "counts": lasts,
    }  # fmt: skip
    for seed in range(20):
        total.fill_(float("nan"))
        with warp_order(seed):
            run("merged", args, grid=7, block=64, smem=256)
        assert (total.item(), counter.item(), lasts.item()) == (x.sum().item(), 0, seed + 1)


def test_warps_hand_over_at_named_barriers() -> None:
    x = torch.randn(5, 64)
    for seed in range(20):
        y = torch.empty(5, 64)
        with warp_order(seed):
            run("producer_consumer", {"x_ptr": x, "y_ptr": y, "rounds": 5}, block=128, smem=256)
        assert torch.equal(y, x.flip(1))


def test_arguments_of_every_kind() -> None:
    x, y = torch.randn(6, 5).t()[1:], torch.empty(4, 6)
    args: dict[str, Argument] = {
        "x_ptr": x, "y_ptr": y, "stride_x": x.stride(), "n": 6, "total": Int64(24), "bias": 0.5,
    }  # fmt: skip
    run("arguments", args)
    assert torch.equal(y, x + 0.5)
    run("arguments", {**args, "x_ptr": None})
    assert torch.equal(y, torch.full((4, 6), 0.5))

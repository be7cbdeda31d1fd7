"""The mended interpreter agrees with PyTorch, bit for bit where rounding is defined."""

# Triton types a launch as a call of the kernel, where plain integers are not constexpr.
# pyright: reportArgumentType=false

from __future__ import annotations

import math
import os
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch

from iokernels import flash_attention
from iokernels.runtime import interpreter

pytest.importorskip("triton")
import triton
import triton.language as tl

pytestmark = pytest.mark.interpreted


@triton.jit
def cast(x_ptr, y_ptr, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + offsets, tl.load(x_ptr + offsets).to(y_ptr.dtype.element_ty))


@triton.jit
def cut_off(x_ptr, y_ptr, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    tl.store(y_ptr + offsets, tl.load(x_ptr + offsets).to(tl.bfloat16, fp_downcast_rounding="rtz"))


@triton.jit
def dot(a_ptr, b_ptr, out_ptr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    a = tl.load(a_ptr + m[:, None] * K + k[None, :])
    b = tl.load(b_ptr + n[:, None] * K + k[None, :])
    tl.store(out_ptr + m[:, None] * N + n[None, :], tl.dot(a, tl.trans(b), tl.full([M, N], 1.0, tl.float32)))


@triton.jit
def arithmetic(x_ptr, y_ptr, out_ptr, mask_ptr, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    x, y = tl.load(x_ptr + offsets), tl.load(y_ptr + offsets)
    half = tl.full([BLOCK], 0.5, x.dtype)
    tl.store(out_ptr + offsets, x + y)
    tl.store(out_ptr + BLOCK + offsets, x * y)
    tl.store(out_ptr + 2 * BLOCK + offsets, x - half)
    tl.store(out_ptr + 3 * BLOCK + offsets, tl.maximum(x, y))
    tl.store(out_ptr + 4 * BLOCK + offsets, -x)
    tl.store(out_ptr + 5 * BLOCK + offsets, tl.abs(x))
    tl.store(out_ptr + 6 * BLOCK + offsets, tl.where(x > y, x, y * 2.0))
    tl.store(out_ptr + 7 * BLOCK + offsets, tl.exp2(x.to(tl.float32)))
    tl.store(out_ptr + 8 * BLOCK + offsets, tl.load(x_ptr + offsets, mask=offsets < 3, other=-1.5))
    tl.store(mask_ptr + offsets, (x <= y) & (x != 0.0))


@triton.jit
def first_larger(a, b):
    return tl.where(b > a, b, a)


@triton.jit
def reduce(x_ptr, out_ptr, M: tl.constexpr, N: tl.constexpr):
    m, n = tl.arange(0, M), tl.arange(0, N)
    x = tl.load(x_ptr + m[:, None] * N + n[None, :])
    tl.store(out_ptr + m, tl.max(x, 1))
    tl.store(out_ptr + M + m, tl.min(x, 1))
    tl.store(out_ptr + 2 * M + m, tl.reduce(x, 1, first_larger))
    tl.store(out_ptr + 3 * M + m, tl.sum(x, 1))


@triton.jit
def softmax_edges(x_ptr, out_ptr, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offsets)
    tl.store(out_ptr + offsets, tl.exp2(x - 1.0))
    tl.store(out_ptr + BLOCK + offsets, x - x)
    tl.store(out_ptr + 2 * BLOCK + offsets, tl.log2(tl.exp2(x)))
    tl.store(out_ptr + 3 * BLOCK + offsets, 1.0 / x)
    tl.store(out_ptr + 4 * BLOCK + offsets, tl.exp2(x * 1e38))
    tl.store(out_ptr + 5 * BLOCK + offsets, tl.max(x - x, 0) + tl.zeros([BLOCK], tl.float32))
    tl.store(out_ptr + 6 * BLOCK + offsets, tl.maximum(x - x, 7.0))


@triton.jit
def philox_words(out_ptr, seed_ptr, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    seed = tl.load(seed_ptr)
    c0, c1, c2, c3 = tl.randint4x(seed, offsets)  # pyright: ignore[reportGeneralTypeIssues]
    tl.store(out_ptr + offsets, c0.to(tl.uint32, bitcast=True).to(tl.int64))
    tl.store(out_ptr + BLOCK + offsets, c1.to(tl.uint32, bitcast=True).to(tl.int64))
    tl.store(out_ptr + 2 * BLOCK + offsets, c2.to(tl.uint32, bitcast=True).to(tl.int64))
    tl.store(out_ptr + 3 * BLOCK + offsets, c3.to(tl.uint32, bitcast=True).to(tl.int64))


@triton.jit
def add_below(x_ptr, limit_ptr, negate, BLOCK: tl.constexpr):
    limit = tl.load(limit_ptr)
    total = tl.zeros([BLOCK], tl.float32)
    for i in range(tl.cdiv(limit, BLOCK)):
        offsets = i * BLOCK + tl.arange(0, BLOCK)
        total += tl.load(x_ptr + offsets, mask=offsets < limit, other=0.0)
    if negate:
        total = -total
    tl.store(x_ptr, tl.sum(total))


@triton.jit
def high_words(x_ptr, out_ptr, BLOCK: tl.constexpr):
    x = tl.load(x_ptr + tl.arange(0, BLOCK))
    tl.store(out_ptr + tl.arange(0, BLOCK), tl.umulhi(x, x))


@triton.jit
def take_a_number(counter_ptr, turn_ptr):
    block = (tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)) * tl.num_programs(2) + tl.program_id(2)
    tl.store(turn_ptr + block, tl.atomic_add(counter_ptr, 1))


def every_bfloat16() -> torch.Tensor:
    return torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)


def run_cast(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    y = torch.zeros(x.shape, dtype=dtype)
    cast[(x.numel() // 4096,)](x, y, BLOCK=4096)
    return y


def same(actual: torch.Tensor, expected: torch.Tensor) -> bool:
    return torch.equal(actual.isnan(), expected.isnan()) and torch.equal(actual.nan_to_num(), expected.nan_to_num())


def test_rounds_float32_to_nearest_even():
    # Every bfloat16, and at and beside the middle between it and the next: all the cases there are.
    upper = torch.arange(2**16, dtype=torch.int64)[:, None] << 16
    lower = torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF])[None, :]
    x = torch.zeros(2**19, dtype=torch.float32)
    x[: 6 * 2**16] = (upper + lower).flatten().to(torch.int32).view(torch.float32)
    assert same(run_cast(x, torch.bfloat16), x.to(torch.bfloat16))


def test_cuts_off_when_asked():
    x = torch.tensor([1.0, 1.0 + 2**-8 + 2**-12, -1.0 - 2**-7 - 2**-8, math.pi])
    y = torch.zeros(4, dtype=torch.bfloat16)
    cut_off[(1,)](x, y, BLOCK=4)
    assert y.tolist() == [1.0, 1.0, -1.0 - 2**-7, 3.140625]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_casts_every_bfloat16(dtype):
    x = every_bfloat16()
    assert same(run_cast(x, dtype), x.to(dtype))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.float64, torch.float16])
def test_casts_to_bfloat16(dtype):
    x = (torch.randn(4096) * 1000).to(dtype)
    assert torch.equal(run_cast(x, torch.bfloat16), x.to(torch.float32).to(torch.bfloat16))
    assert torch.equal(run_cast(x.to(torch.bfloat16), dtype), x.to(torch.bfloat16).to(dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_dot(dtype):
    a, b, out = torch.randn(16, 32, dtype=dtype), torch.randn(8, 32, dtype=dtype), torch.zeros(16, 8)
    dot[(1,)](a, b, out, M=16, N=8, K=32)
    torch.testing.assert_close(out.double(), a.double() @ b.double().T + 1.0, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_arithmetic(dtype):
    x, y = torch.randn(64).to(dtype), torch.randn(64).to(dtype)
    x[:4] = torch.tensor([0.0, -0.0, float("inf"), float("-inf")])
    out, mask = torch.zeros(9, 64, dtype=dtype), torch.zeros(64, dtype=torch.bool)
    arithmetic[(1,)](x, y, out, mask, BLOCK=64)
    filled = torch.where(torch.arange(64) < 3, x, torch.tensor(-1.5, dtype=dtype))
    expected = [x + y, x * y, x - 0.5, x.maximum(y), -x, x.abs(), torch.where(x > y, x, y * 2.0)]
    for actual, right in zip(out, [*expected, x.float().exp2().to(dtype), filled], strict=True):
        assert torch.equal(actual, right)
    assert torch.equal(mask, (x <= y) & (x != 0.0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_reductions(dtype):
    # Small integers, whose sums are exact in either type.
    x = torch.randint(-8, 9, (8, 16)).to(dtype)
    x[0] = x[0].abs().neg()
    out = torch.zeros(4, 8, dtype=dtype)
    reduce[(1,)](x, out, M=8, N=16)
    assert torch.equal(out, torch.stack([x.amax(1), x.amin(1), x.amax(1), x.sum(1)]))


def test_infinities_are_silent_inside_kernels_only():
    infinity, nan = float("inf"), float("nan")
    x, out = torch.tensor([-infinity, 0.0, 1.0, infinity]), torch.zeros(7, 4)
    softmax_edges[(1,)](x, out, BLOCK=4)
    expected = torch.tensor(
        [
            [0.0, 0.5, 1.0, infinity],
            [nan, 0.0, 0.0, nan],
            [-infinity, 0.0, 1.0, infinity],
            [0.0, infinity, 1.0, 0.0],
            [0.0, 1.0, infinity, infinity],
            [0.0] * 4,
            [7.0] * 4,
        ]
    )
    assert same(out.nan_to_num(nan=99.0, posinf=98.0), expected.nan_to_num(nan=99.0, posinf=98.0))
    # A row of nothing but NaN has no maximum to warn about.
    softmax_edges[(1,)](x[:1], out[:, :1].contiguous(), BLOCK=1)
    with pytest.warns(RuntimeWarning, match="divide by zero"):
        np.divide(np.float32(1.0), np.float32(0.0))


def test_philox_matches_the_published_words():
    """Counter 0, key 0 of Philox-4x32-10: the known-answer vector of its authors (Random123, kat_vectors)."""
    out = torch.zeros(4, 8, dtype=torch.int64)
    philox_words[(1,)](out, torch.zeros(1, dtype=torch.int64), BLOCK=8)
    assert [hex(word) for word in out[:, 0].tolist()] == ["0x6627e8d5", "0xe169c58d", "0xbc57ac4c", "0x9b00dbd8"]


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_high_words_are_unsigned(dtype):
    x, out = torch.tensor([-5, -1, 2**30, 3], dtype=dtype), torch.zeros(4, dtype=dtype)
    high_words[(1,)](x, out, BLOCK=4)
    bits = torch.iinfo(dtype).bits
    expected = [(word % 2**bits) ** 2 >> bits for word in x.tolist()]
    assert [word % 2**bits for word in out.tolist()] == expected


@pytest.mark.parametrize("negate", [True, False])
def test_tensor_loop_bounds_and_bool_arguments(negate):
    x = torch.arange(10.0)
    add_below[(1,)](x, torch.tensor([7]), negate, BLOCK=4)
    assert x[0].item() == (-21.0 if negate else 21.0)


def turns(grid: tuple[int, ...]) -> list[int]:
    """When each block of a launch ran."""
    turn = torch.full((math.prod(grid),), -1, dtype=torch.int32)
    take_a_number[grid](torch.zeros(1, dtype=torch.int32), turn)
    return turn.tolist()


@pytest.mark.parametrize("grid", [(12,), (3, 4), (2, 3, 2)], ids=str)
def test_shuffled_blocks_all_run_once_in_another_order(grid):
    in_order = list(range(12))
    with interpreter.shuffled_blocks(1):
        first, second = turns(grid), turns(grid)
    with interpreter.shuffled_blocks(1):
        assert turns(grid) == first
    assert sorted(first) == sorted(second) == in_order
    assert len({tuple(first), tuple(second), tuple(in_order)}) == 3
    assert turns(grid) == in_order


def test_language_is_restored_after_a_launch():
    before = {name: vars(module).copy() for name, module in (("tl", tl), ("core", tl.core), ("math", tl.math))}
    members = dict(vars(tl.core.tensor))
    x = torch.arange(8.0)
    add_below[(1,)](x, torch.tensor([7]), False, BLOCK=4)
    assert before == {"tl": vars(tl), "core": vars(tl.core), "math": vars(tl.math)}
    assert members == dict(vars(tl.core.tensor))


def test_install_twice_changes_nothing():
    from triton.runtime import interpreter as triton_interpreter

    before = vars(triton_interpreter.InterpreterBuilder).copy()
    interpreter.install()
    assert before == vars(triton_interpreter.InterpreterBuilder)


PLAIN = """
import torch
from iokernels import flash_attention, linear_attention, short_conv
torch.manual_seed(0)
q, k, v = torch.randn(3, 1, 2, 40, 32).bfloat16()
for run in (
    lambda q, k, v, backend: flash_attention(q, k, v, causal=True, backend=backend),
    lambda q, k, v, backend: linear_attention(q, k, v, backend=backend),
    lambda q, k, v, backend: short_conv(q[0], k[0, 0, :, :4], backend=backend),
):
    right = run(q.double(), k.double(), v.double(), "reference")
    error = (run(q, k, v, "triton").double() - right).norm() / right.norm()
    assert error < 1e-2, error
"""


@pytest.mark.parametrize("switch", ["1", "true"])
def test_the_documented_switch_is_right_by_itself(switch: str) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("IOKERNELS_EMULATE")}
    done = subprocess.run(
        [sys.executable, "-W", "error::RuntimeWarning", "-c", PLAIN],
        env=environment | {"TRITON_INTERPRET": switch}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_launches_from_several_threads_are_right() -> None:
    wrong: list[tuple[int, int]] = []

    def work(seed: int) -> None:
        draw = torch.Generator().manual_seed(seed)
        for length in (17, 33, 40):
            q, k, v = torch.randn(3, 1, 1, length, 16, generator=draw)
            out = flash_attention(q, k, v, causal=True, backend="triton")
            if not torch.allclose(out, flash_attention(q, k, v, causal=True, backend="torch"), atol=1e-4):
                wrong.append((seed, length))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []

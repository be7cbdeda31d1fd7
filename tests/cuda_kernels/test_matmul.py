"""The matrix product that shows how a kernel is written: results, counted bytes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from iokernels.runtime.cuda.emulator import watch
from iokernels.runtime.cuda.kernel import cuda_kernel

from .launching import NATIVE, launch, needs_a_machine

pytestmark = needs_a_machine

SOURCE = str(Path(__file__).with_name("matmul.cu"))
WARPS, BLOCK_N, BLOCK_K = 2, 16, 32


def matmul(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    kernel = cuda_kernel(SOURCE, "matmul", Element=a.dtype, WARPS=WARPS, BLOCK_N=BLOCK_N, BLOCK_K=BLOCK_K)
    (m, k), n = a.shape, b.shape[1]
    c = torch.empty(m, n)
    blocks = -(-m // (16 * WARPS)) * -(-n // BLOCK_N)
    smem = 2 * 2 * (16 * WARPS * (BLOCK_K + 8) + BLOCK_K * (BLOCK_N + 8))
    launch(kernel, blocks, 32 * WARPS, smem, {"a_ptr": a, "b_ptr": b, "c_ptr": c, "m": m, "n": n, "k": k})
    return c


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("m", "n", "k"), [(32, 16, 32), (33, 24, 40), (50, 40, 104)])
def test_product(dtype: torch.dtype, m: int, n: int, k: int) -> None:
    a, b = torch.randn(m, k, dtype=torch.float64).to(dtype), torch.randn(k, n, dtype=torch.float64).to(dtype)
    exact = a.double() @ b.double()
    # Products of 16-bit numbers are exact in float32; what is left is the rounding of k sums.
    assert (matmul(a, b) - exact).abs().max() <= 2**-24 * k * (a.double().abs() @ b.double().abs()).max()


@pytest.mark.skipif(NATIVE, reason="the emulator counts bytes")
def test_bytes_are_those_of_the_tiling() -> None:
    m, n, k = 50, 40, 104
    a, b = torch.randn(m, k).half(), torch.randn(k, n).half()
    with watch() as launches:
        matmul(a, b)
    moved = launches[0].arguments
    assert moved["a_ptr"].read == 2 * m * k * -(-n // BLOCK_N)
    assert moved["b_ptr"].read == 2 * n * k * -(-m // (16 * WARPS))
    assert moved["c_ptr"].written == 4 * m * n

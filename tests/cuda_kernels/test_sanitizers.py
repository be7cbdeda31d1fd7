"""Kernels and the emulator itself under the address and undefined-behaviour sanitizers, in processes of their own."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from iokernels.ops import CASES
from iokernels.testing.case import load
from iokernels.testing.sanitizers import libraries, sanitized

HERE = str(Path(__file__).parent)


pytestmark = pytest.mark.skipif(libraries() is None, reason="g++ with its sanitizers is not installed")


MATMUL = """
import sys, torch
from iokernels.runtime.cuda.emulator import warp_order
from iokernels.runtime.errors import KernelFault
from iokernels.runtime.cuda.kernel import cuda_kernel

a, b, c = torch.randn(50, 104).half(), torch.randn(104, 40).half(), torch.empty(50, 40)
kernel = cuda_kernel(sys.argv[1] + "/matmul.cu", "matmul", Element=a.dtype, WARPS=2, BLOCK_N=16, BLOCK_K=32)
args = {"a_ptr": a, "b_ptr": b, "c_ptr": c, "m": 50, "n": 40, "k": 104}
for seed in range(20):
    try:  # a launch that is given up half-way leaves stacks behind, which the next one takes
        kernel.launch((6,), 64, 8192, {**args, "m": 51})
    except KernelFault as fault:
        assert "after the end of" in str(fault)
    else:
        raise AssertionError("a stray access passed")
    with warp_order(seed):
        kernel.launch((6,), 64, 8192, args)
    assert (c - a.float() @ b.float()).abs().max() < 1e-4

x, y = torch.ones(4), torch.empty(1)
cuda_kernel(sys.argv[1] + "/overrun.cu", "overrun", FAULT=0).launch((1,), 32, 0, {"x_ptr": x, "y_ptr": y, "n": 4})
assert y.item() == 2**26
"""

OVERRUN = """
import sys, torch
from iokernels.runtime.cuda.kernel import cuda_kernel

x, y = torch.ones(4), torch.empty(1)
kernel = cuda_kernel(sys.argv[1] + "/overrun.cu", "overrun", FAULT=int(sys.argv[2]))
kernel.launch((1,), 32, 0, {"x_ptr": x, "y_ptr": y, "n": 4})
"""


def test_product_and_emulator_are_clean() -> None:
    done = sanitized("-c", MATMUL, HERE)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("case", [case for case in CASES if "cuda" in load(case).implementations])
def test_operators_are_clean(case: str) -> None:
    """What a quick check proves, forward and backward."""
    done = sanitized("-m", "iokernels", "check", case, "--backend", "cuda", "--dtype", "fp16", "--quick")
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"^[1-9]\d* proved, 0 wrong$", done.stdout, re.MULTILINE), done.stdout


@pytest.mark.parametrize(
    ("fault", "said"), [(1, "out of bounds"), (2, "AddressSanitizer"), (3, "signed integer overflow")]
)
def test_planted_overrun(fault: int, said: str) -> None:
    done = sanitized("-c", OVERRUN, HERE, str(fault))
    assert done.returncode != 0
    assert said in done.stderr
    assert "overrun.cu" in done.stderr

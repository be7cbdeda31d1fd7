"""The CUDA kernels of fft_conv: every size of transform, any order of warps, what they refuse.

Every option, lengths, amplitudes and layouts are in ``test_fft_conv.py``, bytes in ``tests/bench/test_accounts.py``.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from iokernels import UnsupportedError, autotune, fft_conv
from iokernels.ops.fft_conv.case import limit
from iokernels.ops.fft_conv.cuda import filters as cuda_filters
from iokernels.ops.fft_conv.cuda import tuning as tuning_cuda
from iokernels.ops.fft_conv.cuda.tuning import Config
from iokernels.runtime import device as devices
from iokernels.testing import budget

from ..backends import needs_cuda

pytestmark = needs_cuda


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0, device: str = "cpu") -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator).to(device, dtype)


def gated_call(n: int, taps: int, dtype: torch.dtype, device: str, **options: Any) -> list[Tensor]:
    """y and every gradient, by name of the argument, of three sequences of one channel."""
    u, pre, post = (draw(3, 1, n, seed=seed, dtype=dtype, device=device).requires_grad_() for seed in range(3))
    k = (draw(1, taps, device=device) / taps**0.5).requires_grad_()
    skip = draw(1, device=device).requires_grad_()
    leaves = (u, k, pre, post, skip)
    if options.get("backend") == "torch":
        leaves = tuple(x.detach().double().requires_grad_() for x in leaves)
    y = fft_conv(leaves[0], leaves[1], pre_gate=leaves[2], post_gate=leaves[3], skip=leaves[4], **options)
    dy = draw(3, 1, n, seed=4, dtype=dtype, device=device)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy.to(y.dtype))]


@pytest.mark.parametrize(
    ("length", "n", "taps", "causal"),
    [
        (8192, 4096, 4096, True),
        (16384, 8192, 8191, True),
        (16384, 16384, 300, False),
        (32768, 16384, 16384, True),
    ],
)
def test_long_transforms(length: int, n: int, taps: int, causal: bool, device: str) -> None:
    """Every factor of both sizes. The tests of the room take 4096 points."""
    config = Config(length, 1, 8)
    with autotune.override(fft_conv_fwd_cuda=config, fft_conv_bwd_cuda=config):
        found = gated_call(n, taps, torch.float16, device, causal=causal, backend="cuda")
    expected = gated_call(n, taps, torch.float16, device, causal=causal, backend="torch")
    for what, x, truth in zip(("y", "du", "dk", "dpre", "dpost", "dskip"), found, expected, strict=True):
        allowed, over = limit(what, torch.float16)
        errors = budget.relative_rms(x, truth, tuple(range(x.dim())) if over == 0 else -1)
        assert (errors <= allowed).all(), f"{what}: {errors.max().item():.3g} of {allowed:.3g}"


def test_units_of_a_thread_block_change_nothing(device: str) -> None:
    """Forward to the bit; the filter's gradient is summed in another order."""
    results = []
    for units in (1, 4):
        config = Config(4096, units, 8)
        with autotune.override(fft_conv_fwd_cuda=config, fft_conv_bwd_cuda=config):
            results.append(gated_call(4100, 30, torch.bfloat16, device, backend="cuda"))
    (y, du, dk, dpre, dpost, _), (other_y, other_du, other_dk, other_dpre, other_dpost, _) = results
    for x, other in ((y, other_y), (du, other_du), (dpre, other_dpre), (dpost, other_dpost)):
        assert torch.equal(x, other)
    assert budget.relative_rms(dk, other_dk).max() < 1e-6


def test_batch_invariance(device: str) -> None:
    u, k = draw(3, 1, 300, dtype=torch.float16, device=device), draw(1, 300, device=device)
    found = fft_conv(u, k, batch_invariant=True, backend="cuda")
    assert torch.equal(found[2:], fft_conv(u[2:], k, batch_invariant=True, backend="cuda"))
    assert not torch.equal(found, fft_conv(u, k, backend="cuda")), "or the flag would not be needed"


@pytest.mark.parametrize("length", tuning_cuda.LENGTHS)
def test_a_spectrum_has_every_frequency(length: int) -> None:
    order = cuda_filters.order_of(length, torch.device("cpu"))
    assert torch.equal(order.sort().values, torch.arange(length))


@pytest.mark.parametrize(
    ("u", "taps", "message"),
    [
        (torch.ones(1, 1, 10), 10, "its kernels take float16 and bfloat16, not float32"),
        (torch.ones(1, 1, 10).double(), 10, "its kernels take float16 and bfloat16, not float64"),
        (torch.ones(1, 1, 16386).half(), 16400, "sequences up to 16384 with any filter that reaches no further"),
    ],
    ids=["float32", "float64", "long"],
)
def test_refused(u: Tensor, taps: int, message: str, device: str) -> None:
    k = torch.ones(1, taps, device=device)
    with pytest.raises(UnsupportedError, match=message):
        fft_conv(u.to(device), k, backend="cuda")


def test_a_small_gpu_takes_shorter_transforms() -> None:
    long = torch.ones(1, 1, 16384).half(), torch.ones(1, 16384)
    with devices.assume(devices.named("rtx-4090")), pytest.raises(UnsupportedError, match="sequences up to 8192"):
        fft_conv(*long, backend="cuda")

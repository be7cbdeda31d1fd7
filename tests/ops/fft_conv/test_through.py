"""Transforms through memory (Triton): every option at sizes that are forced there, and a long sequence that has to go.

A configuration with rows makes the launcher take three steps where one would do, so that small calls prove them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from iokernels import autotune, fft_conv, kernel_spectrum
from iokernels.ops.fft_conv.case import CASE, limit
from iokernels.ops.fft_conv.options import TWO_SIDED, Options
from iokernels.ops.fft_conv.triton import through, tuning
from iokernels.ops.fft_conv.triton.call import Launch
from iokernels.ops.fft_conv.triton.filters import planes_of
from iokernels.ops.fft_conv.triton.tuning import Config, OuterConfig
from iokernels.runtime.device import named
from iokernels.testing import budget
from iokernels.testing.case.proof import prove_point

TILE = OuterConfig(rows=16, columns=128, depth=16, num_warps=4, num_stages=1)


@contextmanager
def through_memory(outer: int = 16, length: int = 256, tile: OuterConfig = TILE, units: int = 2) -> Iterator[None]:
    config = Config(length, units, 4, 1, outer)
    with autotune.override(fft_conv_fwd=config, fft_conv_bwd=config, fft_conv_outer=tile):
        yield


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0, device: str = "cpu") -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator).to(device, dtype)


def check(actual: Tensor, expected: Tensor, what: str, dtype: torch.dtype) -> None:
    allowed, over = limit(what, dtype)
    errors = budget.relative_rms(actual, expected, tuple(range(actual.dim())) if over == 0 else -1)
    assert (errors <= allowed).all(), f"{what}: {errors.max().item():.3g} of {allowed:.3g}"


@pytest.mark.parametrize(
    ("text", "dtype"),
    [
        ("b=3,h=1,n=300,gated=1,skip=1", torch.bfloat16),
        ("b=1,h=2,n=255", torch.float32),
        ("b=2,h=1,n=1000,nk=400,state=1,gated=1,skip=1", torch.float16),
        ("b=2,h=1,n=20,nk=60,state=1", torch.float32),
        ("b=2,h=1,n=700,nk=600,causal=0,gated=1,skip=1", torch.float16),
        ("b=1,h=1,n=4096,nk=50,causal=0", torch.bfloat16),
        ("b=1,h=2,n=300,nk=599,causal=0,gated=1", torch.float32),
        ("b=2,h=1,n=500,nk=300,keep=0.3,gated=1,skip=1,bnh=1", torch.float16),
        ("b=3,h=1,n=300,uneven=1,gated=1", torch.float16),
        # Several blocks, whose gates' gradients take steps of their own.
        ("b=1,h=1,n=4000,nk=300,state=1,gated=1", torch.float16),
        ("b=1,h=1,n=3900,nk=300,causal=0,gated=1", torch.bfloat16),
    ],
)
def test_every_option(text: str, dtype: torch.dtype, device: str) -> None:
    shape = CASE.vocabulary.parse(text)
    with through_memory():
        prove_point(CASE, "triton", shape, dtype, device)


@pytest.mark.parametrize(
    ("outer", "length", "tile"),
    [
        (32, 256, OuterConfig(16, 64, 16, 4, 1)),
        (32, 512, OuterConfig(32, 256, 32, 4, 1)),
        (64, 256, OuterConfig(32, 64, 64, 4, 1)),
    ],
)
def test_tiles_change_nothing_but_the_last_bits(outer: int, length: int, tile: OuterConfig, device: str) -> None:
    u, k = (x.requires_grad_() for x in (draw(1, 1, 600, device=device), draw(1, 500, device=device) / 22))
    wide = [x.detach().double().requires_grad_() for x in (u, k)]
    with through_memory(outer, length, tile):
        y = fft_conv(u, k, backend="triton")
        found = torch.autograd.grad(y.square().sum(), (u, k))
    expected = fft_conv(*wide, backend="reference")
    check(y, expected, "y", torch.float32)
    for name, x, truth in zip(("du", "dk"), found, torch.autograd.grad(expected.square().sum(), wide), strict=True):
        check(x, truth, name, torch.float32)


@pytest.mark.parametrize(("n", "taps"), [(5000, 5000), (16384, 10000)])
def test_long_filters_on_long_sequences(n: int, taps: int, device: str) -> None:
    """Nothing is forced here: no transform on chip serves these."""
    u, k = draw(1, 1, n, dtype=torch.float16, device=device), draw(1, taps, device=device) / taps**0.5
    expected = fft_conv(u.double(), k.double(), backend="torch")
    with autotune.watch() as chosen:
        check(fft_conv(u, k, backend="triton"), expected, "y", torch.float16)
    config = chosen["fft_conv_fwd"]
    assert isinstance(config, Config)
    assert config.outer > 1


@pytest.mark.parametrize("amplitude", [1e-4, 1e3])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_amplitudes(dtype: torch.dtype, amplitude: float, device: str) -> None:
    u = (draw(1, 1, 300, device=device) * amplitude).to(dtype).requires_grad_()
    k = (draw(1, 300, device=device) / 17 / amplitude).requires_grad_()
    dy = (draw(1, 1, 300, seed=1, device=device) * amplitude).to(dtype)
    with through_memory():
        y = fft_conv(u, k, backend="triton")
        found = torch.autograd.grad(y, (u, k), dy)
    wide = [x.detach().double().requires_grad_() for x in (u, k)]
    truth = fft_conv(*wide, backend="reference")
    for what, x, expected in zip(
        ("y", "du", "dk"), (y, *found), (truth, *torch.autograd.grad(truth, wide, dy.double())), strict=True
    ):
        check(x, expected, what, dtype)


def test_zeros_and_infinities_stay_in_their_sequence(device: str) -> None:
    """Sequences do not meet, so none is needed to keep the others' bits."""
    u, k = draw(3, 1, 300, device=device), draw(1, 300, device=device) / 17
    u[0] = 0.0
    u[1, 0, 7] = torch.inf
    with through_memory():
        y = fft_conv(u, k, backend="triton")
        alone = fft_conv(u[2:], k, backend="triton")
    assert (y[0] == 0).all()
    assert not y[1].isfinite().all()
    assert torch.equal(y[2:], alone)


def test_a_spectrum_is_the_filter(device: str) -> None:
    u, k, skip = draw(1, 2, 300, device=device), draw(2, 200, device=device), draw(2, device=device)
    with through_memory():
        spectrum = kernel_spectrum(k, 300, dtype=u.dtype, backend="triton")
        assert torch.equal(fft_conv(u, spectrum), fft_conv(u, k, backend="triton"))
        found = fft_conv(u, spectrum, skip=skip)
    # The spectrum knows how long its transforms are.
    assert torch.equal(fft_conv(u, spectrum, skip=skip), found)
    check(found, fft_conv(u.double(), k.double(), skip=skip.double(), backend="reference"), "y", u.dtype)


def test_dropped_frequencies(device: str) -> None:
    """Where the transform has as many points as the one that defines which frequencies are kept."""
    u, k = draw(1, 1, 32768, dtype=torch.float16, device=device), draw(1, 300, device=device) / 17
    leaves = [u.requires_grad_(), k.requires_grad_()]
    wide = [x.detach().double().requires_grad_() for x in leaves]
    with through_memory(16, 4096, units=1):
        y = fft_conv(u, k, freq_keep=0.2, backend="triton")
        found = torch.autograd.grad(y.float().square().sum(), leaves)
    truth = fft_conv(wide[0], wide[1], freq_keep=0.2, backend="torch")
    expected = torch.autograd.grad(truth.square().sum(), wide)
    for what, x, other in zip(("y", "du", "dk"), (y, *found), (truth, *expected), strict=True):
        check(x, other, what, torch.float16)
    launch = Launch(u, k, [], Options(keep=0.2), named("h100-sxm"))
    cover = tuning.through(16, 4096, 32768, 65535, TWO_SIDED, False)
    assert cover is not None
    assert launch.columns(cover) < cover.n2


def test_heads_in_groups_change_nothing(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    given: dict[str, Any] = {
        "u": draw(1, 3, 200, device=device), "k": draw(3, 90, device=device), "post_gate": draw(1, 3, 200, seed=1),
        "skip": draw(3, device=device), "initial_state": draw(1, 3, 89, device=device),
    }  # fmt: skip
    results = []
    for bound in (through.WORKSPACE, 1):
        monkeypatch.setattr(through, "WORKSPACE", bound)
        leaves = {name: x.detach().to(device).requires_grad_() for name, x in given.items()}
        with through_memory():
            y = fft_conv(**leaves, backend="triton")
            results.append((y.detach(), *torch.autograd.grad(y.square().sum(), list(leaves.values()))))
    assert all(torch.equal(x, other) for x, other in zip(*results, strict=True))


def test_planes_are_the_rows_of_the_filters_transform() -> None:
    k = draw(2, 700).double()
    cover = tuning.through(16, 256, 3000, 700, "causal", False)
    assert cover is not None
    planes, scale = planes_of(k, 3000, cover, torch.float32, Options())
    found = torch.complex(planes[:, :, 0], planes[:, :, 1]) * scale[:, None, None, None]  # [H, rows, N1, N2]
    full = torch.fft.fft(k, n=4096).view(2, cover.n2, cover.n1, 16)  # frequency k0 + N0 (k1 + N1 k2)
    torch.testing.assert_close(found, full[..., :9].permute(0, 3, 2, 1).to(found.dtype), rtol=1e-5, atol=1e-4)

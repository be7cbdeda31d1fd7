"""fft_conv against its oracle: every option, lengths around the transforms', amplitudes, streaming, spectra.

Errors are relative to a row, in the root mean square: a row of zeros or one that is shifted by a step fails.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from iokernels import UnsupportedError, autotune, fft_conv, kernel_spectrum
from iokernels.ops.fft_conv.case import CASE, limit
from iokernels.ops.fft_conv.options import TWO_SIDED, Options, band_length, kept_bins
from iokernels.ops.fft_conv.triton.tuning import Config
from iokernels.testing import budget, inputs
from iokernels.testing.case import Point
from iokernels.testing.case.proof import Proof, prove_point

from ..backends import BACKENDS, CUDA, HALF_AND_SINGLE, runs, usual


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0, device: str = "cpu") -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator).to(device, dtype)


def check(actual: Tensor, expected: Tensor, what: str, dtype: torch.dtype | None = None) -> None:
    """Hold every row to the limit of its dtype."""
    allowed, over = limit(what, dtype or actual.dtype)
    dims = tuple(range(actual.dim())) if over == 0 else -1
    errors = budget.relative_rms(actual, expected, dims)
    assert (errors <= allowed).all(), f"{what}: {errors.max().item():.3g} of {allowed:.3g}"


@pytest.mark.parametrize("point", CASE.check_points(), ids=lambda point: point.name)
@pytest.mark.parametrize(
    ("backend", "dtype"),
    [
        pytest.param(name, dtype, marks=CUDA.marks if name == "cuda" else ())
        for name in ("torch", "triton", "cuda")
        for dtype in CASE.implementations[name].dtypes
    ],
    ids=str,
)
def test_every_option(backend: str, point: Point, dtype: torch.dtype, device: str) -> None:
    prove_point(CASE, backend, point.shape, dtype, device)


@pytest.mark.parametrize("wrong", ["zeros", "shifted", "one sequence for another"])
def test_the_proof_can_fail(wrong: str, device: str) -> None:
    proof = Proof(CASE, CASE.vocabulary.shape(b=3, h=2, n=100), torch.bfloat16, torch.device(device))

    def run(given: Any) -> dict[str, Tensor]:
        y = CASE.run(given, "torch")["y"]
        return {"y": {"zeros": y * 0.0, "shifted": y.roll(1, -1), "one sequence for another": y.flip(0)}[wrong]}

    assert proof.judge(run).status == "wrong"


@pytest.mark.parametrize("n", [1, 7, 63, 64, 100, 255, 256, 1000, 1024, 4096])
@pytest.mark.parametrize("backend", BACKENDS)
def test_lengths(backend: str, n: int, device: str) -> None:
    """Filters of one tap, of an eighth, as long as the sequence (causal and circular), and two-sided."""
    u = draw(3, 1, n, dtype=torch.float16, device=device)
    for taps, causal in {
        (1, True),
        (max(1, n // 8), True),
        (n, True),
        (n, False),
        (2 * n - 1, True),
        (2 * n - 1, False),
    }:
        k = draw(1, taps, device=device) / taps**0.5
        truth = "reference" if n < 1000 else "torch"  # which is held to the reference at shorter lengths
        expected = fft_conv(u.double(), k.double(), causal=causal, backend=truth)
        check(fft_conv(u, k, causal=causal, backend=backend), expected, f"y of {taps} taps")


def test_long_sequences_with_long_filters() -> None:
    u, k = draw(2, 2, 5000), draw(2, 5000) / 70
    check(fft_conv(u, k, backend="torch"), fft_conv(u.double(), k.double(), backend="reference"), "y")
    u, k = draw(1, 1, 16384), draw(1, 16384) / 128
    expected = np.convolve(u[0, 0].double().numpy(), k[0].double().numpy())[:16384]
    check(fft_conv(u, k, backend="torch"), torch.from_numpy(expected)[None, None], "y")


@pytest.mark.parametrize("backend", BACKENDS)
def test_numpy_agrees(backend: str, device: str) -> None:
    u, k = draw(1, 1, 90, dtype=usual(backend), device=device), draw(1, 40, device=device)
    full = np.convolve(u[0, 0].double().cpu().numpy(), k[0].double().cpu().numpy())
    check(fft_conv(u, k, backend=backend), torch.from_numpy(full[:90])[None, None], "y")
    periodic = full[:90].copy()
    periodic[: len(full) - 90] += full[90:]
    check(fft_conv(u, k, causal=False, backend=backend), torch.from_numpy(periodic)[None, None], "y")
    same = draw(1, 179, device=device)
    middle = np.convolve(u[0, 0].double().cpu().numpy(), same[0].double().cpu().numpy())[89:179]
    check(fft_conv(u, same, causal=False, backend=backend), torch.from_numpy(middle)[None, None], "y")


@pytest.mark.parametrize("amplitude", [1e-4, 1e-2, 1e2, 1e3])
@pytest.mark.parametrize(("backend", "dtype"), runs(*HALF_AND_SINGLE), ids=str)
def test_amplitudes(backend: str, dtype: torch.dtype, amplitude: float, device: str) -> None:
    """Relative accuracy does not depend on the scale of inputs, filters or gradients."""
    u = (draw(2, 1, 300, device=device) * amplitude).to(dtype).requires_grad_()
    k = (draw(1, 300, device=device) / 17 / amplitude).requires_grad_()
    dy = (draw(2, 1, 300, seed=1, device=device) * amplitude).to(dtype)
    y = fft_conv(u, k, backend=backend)
    found = torch.autograd.grad(y, (u, k), dy)
    wide = [x.detach().double().requires_grad_() for x in (u, k)]
    expected_y = fft_conv(*wide, backend="reference")
    expected = torch.autograd.grad(expected_y, wide, dy.double())
    for what, x, truth in zip(("y", "du", "dk"), (y, *found), (expected_y, *expected), strict=True):
        check(x, truth, what, dtype)


@pytest.mark.parametrize("backend", BACKENDS)
def test_zeros_beside_numbers(backend: str, device: str) -> None:
    """A sequence, a gradient or a filter of zeros has no exponent to scale by."""
    u, k = draw(2, 2, 300, dtype=usual(backend), device=device), draw(2, 300, device=device)
    u[0] = 0.0
    k[1] = 0.0
    u.requires_grad_()
    k.requires_grad_()
    y = fft_conv(u, k, backend=backend)
    (y[1] * draw(2, 300, seed=3, device=device)).sum().backward()
    assert (y[0] == 0).all()
    assert (y[:, 1] == 0).all()
    assert u.grad is not None
    assert k.grad is not None
    assert (u.grad[0] == 0).all()
    assert (u.grad[1, 0] != 0).any()
    check(y[1, :1], fft_conv(u.double(), k.double(), backend="reference")[1, :1], "y")
    assert k.grad.isfinite().all()
    assert (k.grad != 0).any()


@pytest.mark.parametrize("cuts", [(100,), (1, 2, 50, 200, 299)], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_streaming_is_the_whole(backend: str, cuts: tuple[int, ...], device: str) -> None:
    dtype = usual(backend)
    u, gate = (draw(2, 2, 300, seed=s, dtype=dtype, device=device).requires_grad_() for s in (0, 1))
    k = (draw(2, 120, device=device) / 10).requires_grad_()
    whole, last = fft_conv(u, k, pre_gate=gate, return_state=True, backend=backend)
    pieces, state = [], torch.zeros(2, 2, 119, device=device)
    for part, gated in zip(torch.tensor_split(u, cuts, 2), torch.tensor_split(gate, cuts, 2), strict=True):
        y, state = fft_conv(part, k, pre_gate=gated, initial_state=state, return_state=True, backend=backend)
        pieces.append(y)
    check(torch.cat(pieces, 2), whole.detach().double(), "y")
    assert torch.equal(state, last)
    dy = draw(2, 2, 300, seed=2, dtype=dtype, device=device)
    expected = torch.autograd.grad(whole, (u, k, gate), dy)
    found = torch.autograd.grad(torch.cat(pieces, 2), (u, k, gate), dy)
    for what, x, truth in zip(("du", "dk", "dpre"), found, expected, strict=True):
        # Two results of this precision are compared, and the gradient of the filter is a sum over the pieces.
        assert budget.relative_rms(x, truth).max() < (4e-6 if dtype == torch.float32 else 2e-3), what


@pytest.mark.parametrize(
    ("n", "taps", "options"),
    [(100, 100, {}), (300, 40, {}), (700, 20, {}), (64, 127, {"causal": False}), (1024, 1024, {"freq_keep": 0.25})],
    ids=str,
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_spectrum_is_the_filter(backend: str, n: int, taps: int, options: dict[str, Any], device: str) -> None:
    u, k = draw(3, 2, n, dtype=torch.float16, device=device), draw(2, taps, device=device)
    spectrum = kernel_spectrum(k, n, dtype=u.dtype, backend=backend, **options)
    gates: dict[str, Any] = {
        "skip": draw(2, device=device),
        "pre_gate": draw(3, 2, n, seed=1, dtype=u.dtype, device=device),
    }
    assert torch.equal(fft_conv(u, spectrum, **options), fft_conv(u, k, backend=backend, **options))
    check(fft_conv(u, spectrum, **gates, **options),
          fft_conv(u.double(), k.double(), backend="reference", **options,
                   **{name: x.double() for name, x in gates.items()}), "y")  # fmt: skip
    u.requires_grad_()
    assert torch.autograd.grad(fft_conv(u, spectrum, **options).sum(), u)[0].isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_spectrum_with_a_state(backend: str, device: str) -> None:
    u = draw(2, 1, 100, dtype=usual(backend), device=device)
    k, past = draw(1, 30, device=device), draw(2, 1, 29, device=device)
    found = fft_conv(u, kernel_spectrum(k, 100, dtype=u.dtype, backend=backend), initial_state=past)
    check(found, fft_conv(u.double(), k.double(), initial_state=past.double(), backend="reference"), "y")


@pytest.mark.parametrize("keep", [0.1, 0.5, 0.9])
def test_kept_frequencies(keep: float) -> None:
    """Circular, the filter's transform is cut off; otherwise, that of the padded length."""
    u, k = draw(1, 1, 96).double(), draw(1, 96).double()
    mask = torch.arange(49) < kept_bins(keep, 96)
    expected = torch.fft.irfft(torch.fft.rfft(u) * torch.fft.rfft(k) * mask, n=96)
    for backend in ("reference", "torch"):
        found = fft_conv(u, k, causal=False, freq_keep=keep, backend=backend)
        torch.testing.assert_close(found, expected)
    assert band_length(96, TWO_SIDED) == 256
    mask = torch.arange(129) < kept_bins(keep, 256)
    expected = torch.fft.irfft(torch.fft.rfft(u, n=256) * torch.fft.rfft(k, n=256) * mask, n=256)[..., :96]
    torch.testing.assert_close(fft_conv(u, k, freq_keep=keep, backend="reference"), expected)


def test_dropped_frequencies_are_not_computed() -> None:
    from iokernels.ops.fft_conv.triton.launch import Launch
    from iokernels.runtime.device import named

    u, k = torch.empty(2, 1, 4096, dtype=torch.float16, device="meta"), torch.empty(1, 4096, device="meta")
    columns = []
    for keep in (1.0, 0.5, 0.25):
        launch = Launch(u, k, [], Options(keep=keep), named("h100-sxm"))
        columns.append(launch.columns(launch.blocks(launch.config("fft_conv_fwd"))))
    assert columns == [64, 64, 32] or columns == [64, 32, 16]


@pytest.mark.parametrize("layout", ["contiguous", "padded", "strided"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_layouts(backend: str, layout: Any, device: str) -> None:
    """Every element beside the tensors is NaN: whoever reads it shows it."""
    values = [draw(3, 2, 300, seed=seed, dtype=torch.bfloat16, device=device) for seed in range(3)]
    k = draw(2, 30, device=device)
    expected = fft_conv(values[0], k, pre_gate=values[1], post_gate=values[2], backend=backend)
    views = [inputs.poisoned_view(x, layout).requires_grad_() for x in values]
    found = fft_conv(views[0], inputs.poisoned_view(k, layout), pre_gate=views[1], post_gate=views[2], backend=backend)
    assert torch.equal(found, expected)
    assert found.is_contiguous()
    for gradient in torch.autograd.grad(found, views, torch.ones((), device=device).to(found.dtype).expand(3, 2, 300)):
        assert gradient.isfinite().all()


@pytest.mark.parametrize("shape", [(0, 2, 50), (2, 0, 50), (2, 2, 0)], ids=str)
@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_empty(backend: str, shape: tuple[int, int, int], device: str) -> None:
    u = torch.ones(shape, dtype=usual(backend), device=device, requires_grad=True)
    k = torch.ones(shape[1], 5, device=device, requires_grad=True)
    y, state = fft_conv(u, k, return_state=True, backend=backend)
    assert y.shape == shape
    assert state.shape == (*shape[:2], 4)
    y.sum().backward()
    assert k.grad is not None
    assert (k.grad == 0).all()


def test_units_of_a_thread_block_change_nothing(device: str) -> None:
    """Forward to the bit; the filter's gradient is summed in another order."""
    u, k = (x.requires_grad_() for x in (draw(5, 2, 1000, device=device), draw(2, 40, device=device)))
    results = []
    for units in (1, 4):
        config = Config(512, units, 4, 1)
        with autotune.override(fft_conv_fwd=config, fft_conv_bwd=config):
            y = fft_conv(u, k, backend="triton")
            results.append((y.detach(), *torch.autograd.grad(y.square().sum(), (u, k))))
    (y, du, dk), (other_y, other_du, other_dk) = results
    assert torch.equal(y, other_y)
    assert torch.equal(du, other_du)
    assert budget.relative_rms(dk, other_dk).max() < 1e-6


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_same_bits_every_time(backend: str, device: str) -> None:
    u = draw(3, 2, 300, dtype=usual(backend), device=device).requires_grad_()
    k = draw(2, 300, device=device).requires_grad_()

    def call() -> list[Tensor]:
        y = fft_conv(u, k, backend=backend)
        return [y.detach(), *torch.autograd.grad(y.sum(), (u, k))]

    first = call()
    assert all(torch.equal(x, y) for x, y in zip(first, call(), strict=True))


def test_batch_invariance(device: str) -> None:
    u, k = draw(4, 2, 300, device=device), draw(2, 300, device=device)
    found = fft_conv(u, k, batch_invariant=True, backend="triton")
    alone = fft_conv(u[2:3], k, batch_invariant=True, backend="triton")
    assert torch.equal(found[2:3], alone)
    paired = fft_conv(u, k, backend="triton")
    assert not torch.equal(paired, found), "pairs show in the last bits, or the flag would not be needed"


def test_gradients_of_gradients() -> None:
    u, k = draw(1, 1, 20).double().requires_grad_(), draw(1, 20).double().requires_grad_()
    assert torch.autograd.gradgradcheck(lambda u, k: fft_conv(u, k, backend="reference"), (u, k))
    (du,) = torch.autograd.grad(fft_conv(u, k, backend="torch").square().sum(), u, create_graph=True)
    with pytest.raises(UnsupportedError, match="fft_conv: the gradients of this backend"):
        du.sum().backward()


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast(backend: str, device: str) -> None:
    u, k = draw(1, 1, 50, device=device), draw(1, 50, device=device)
    with torch.autocast(device, dtype=torch.bfloat16):
        assert fft_conv(u, k, backend=backend).dtype == torch.bfloat16

"""fft_conv at its borders: filters longer than the sequence, every layout on every path, long rows, nothing at all.

Expected values come from sums over a matrix of lags in float64, written here, not from a backend.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from iokernels import fft_conv, kernel_spectrum
from iokernels.ops.fft_conv.portable import lengths as portable_lengths
from iokernels.ops.fft_conv.portable import rows as portable_rows
from iokernels.ops.fft_conv.real_fft import irfft, is_rough, rfft
from iokernels.ops.fft_conv.step import LazyState
from iokernels.runtime.device import cuda_refusal
from iokernels.testing import budget

from ..backends import BACKENDS, usual
from ..conv_layouts import LAYOUTS, gradients, laid, leaf, truth
from .test_through import through_memory

EVERY = ("reference", *BACKENDS)
REFUSAL = cuda_refusal(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
LIMITS = {torch.float64: 1e-13, torch.float32: 4e-6, torch.float16: 5e-3}


def direct(
    u: Tensor, k: Tensor, *, causal: bool = True, pre_gate: Any = None, post_gate: Any = None, skip: Any = None,
    initial_state: Any = None,
) -> Tensor:  # fmt: skip
    """The definition, one lag after the other."""
    n, taps = u.shape[2], k.shape[1]
    v = u if pre_gate is None else u * pre_gate
    past = v.new_zeros(*v.shape[:2], taps - 1) if initial_state is None else initial_state
    row = torch.cat([past, v], 2)
    if causal:
        w = sum(k[:, j, None] * row[..., taps - 1 - j : taps - 1 - j + n] for j in range(taps))
    elif taps == 2 * n - 1:
        around = torch.nn.functional.pad(v, (n - 1, n - 1))
        w = sum(k[:, j, None] * around[..., taps - 1 - j : taps - 1 - j + n] for j in range(taps))
    else:
        w = sum(k[:, j, None] * v.roll(j, 2) for j in range(taps))
    w = w if skip is None else w + skip[:, None] * v
    return torch.as_tensor(w if post_gate is None else w * post_gate)


def check(found: list[Tensor], expected: list[Tensor], limit: float, names: Any) -> None:
    for name, x, y in zip(names, found, expected, strict=True):
        error = budget.relative_rms(x.resolve_neg(), y, tuple(range(y.dim()))).item()
        assert error <= limit, f"{name}: {error:.3g} of {limit:.3g}"


def call(
    n: int, taps: int, *, state: bool, gated: bool, dtype: torch.dtype, device: str, b: int = 3, h: int = 2
) -> dict[str, Tensor]:
    given = {"u": torch.randn(b, h, n).to(dtype), "k": torch.randn(h, taps) / taps**0.5}
    if gated:
        given |= {"pre_gate": torch.randn(b, h, n).to(dtype), "post_gate": torch.randn(b, h, n).to(dtype)}
        given["skip"] = torch.rand(h) + 0.5
    if state:
        given["initial_state"] = torch.randn(b, h, taps - 1)
    return {name: x.to(device) for name, x in given.items()}


@pytest.mark.parametrize("backend", EVERY)
def test_a_spectrum_is_its_filter_whatever_the_taps_and_the_state(backend: str, device: str) -> None:
    """Filters shorter than the sequence, as long, and longer; with and without all else that goes with them."""
    dtype = usual(backend)
    slow = backend in ("triton", "cuda")  # interpreted and emulated
    longer = [(12, 30, True), (1, 7, True)] if backend == "cuda" else [(12, 5, True), (12, 30, True), (1, 7, True)]
    shapes = [*longer, (12, 12, True), (12, 13, True), (40, 300, True), (12, 1, True), (12, 12, False), (12, 23, False)]
    for n, taps, causal in longer if slow else shapes:
        for state in (False, True) if causal else (False,):
            for gated in (state,) if slow else (False, True):
                b, h = (2, 1) if slow else (3, 2)
                values = call(n, taps, state=state, gated=gated, dtype=dtype, device=device, b=b, h=h)
                dy = torch.randn(b, h, n, device=device)
                right = {name: truth(x) for name, x in values.items()}
                expected = gradients(direct, right, (dy.double(),), causal=causal)
                raw = {name: leaf(x) for name, x in values.items()}
                found = gradients(fft_conv, raw, (dy,), causal=causal, backend=backend)
                check(found, expected, LIMITS[dtype], ("y", *values))
                spectrum: Any = kernel_spectrum(values["k"], n, causal=causal, dtype=dtype, backend=backend)
                found = gradients(fft_conv, {**raw, "k": spectrum}, (dy,), causal=causal)
                without_k = [g for name, g in zip(("y", *values), expected, strict=True) if name != "k"]
                check(found, without_k, LIMITS[dtype], ("y", *(name for name in values if name != "k")))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_spectrum_of_kept_frequencies_is_its_filter(backend: str, device: str) -> None:
    for n, taps, causal in ((12, 30, True), (9, 17, False)):
        values = call(n, taps, state=False, gated=True, dtype=usual(backend), device=device, b=2, h=1)
        options: dict[str, Any] = {"causal": causal, "freq_keep": 0.5}
        dy = torch.randn(2, 1, n, device=device)
        expected = gradients(
            fft_conv, {name: truth(x) for name, x in values.items()}, (dy.double(),), **options, backend="reference"
        )
        spectrum: Any = kernel_spectrum(values["k"], n, dtype=usual(backend), backend=backend, **options)
        found = gradients(fft_conv, {**{name: leaf(x) for name, x in values.items()}, "k": spectrum}, (dy,), **options)
        del expected[2]
        check(found, expected, LIMITS[usual(backend)], ("y", "u", "pre_gate", "post_gate", "skip"))


def test_a_stream_in_pieces_shorter_than_the_filter_transforms_it_once(monkeypatch: pytest.MonkeyPatch) -> None:
    u, k = torch.randn(1, 2, 24, dtype=torch.float64), torch.randn(2, 20, dtype=torch.float64)
    whole, spectrum, state = fft_conv(u, k), kernel_spectrum(k, 8), torch.zeros(1, 2, 19, dtype=torch.float64)
    monkeypatch.setattr("iokernels.ops.fft_conv.portable.whole._place", None)  # no more of the filter is looked at
    made = []
    for piece in u.split(8, 2):
        y, state = fft_conv(piece, spectrum, initial_state=state, return_state=True)
        made.append(y)
    torch.testing.assert_close(torch.cat(made, 2), whole)


PATHS: dict[str, tuple[str, int, int, bool, bool]] = {  # backend, N, taps, causal, state
    "reference": ("reference", 10, 4, True, True),
    "torch, a row at once": ("torch", 20, 9, True, True),
    "torch, around": ("torch", 20, 20, False, False),
    "torch, blocks": ("torch", 40, 3, True, True),
    "triton, one block": ("triton", 20, 20, True, False),
    "triton, many blocks": ("triton", 400, 30, True, True),
    "triton, around": ("triton", 300, 20, False, False),
    "triton, through memory": ("triton", 300, 40, True, True),
    "triton, two-sided through memory": ("triton", 60, 119, False, False),
    "cuda": ("cuda", 20, 12, True, False),
    "cuda with a state": ("cuda", 23, 12, True, True),
}


def layouts_of(path: str) -> tuple[str, ...]:
    """All that there are, but where a call takes seconds: there one of each kind."""
    slow = path.startswith("cuda") or "through" in path
    return ("strided", "steps first", "negated", "one batch") if slow else LAYOUTS


@pytest.mark.parametrize(("path", "layout"), [(path, layout) for path in PATHS for layout in layouts_of(path)])
def test_layouts_change_nothing_on_any_path(path: str, layout: str, device: str, monkeypatch: Any) -> None:
    """Inputs, gates, filter, skip, state and incoming gradients."""
    backend, n, taps, causal, state = PATHS[path]
    if backend == "cuda" and REFUSAL is not None:
        pytest.skip(REFUSAL)
    if "blocks" in path and backend == "torch":
        monkeypatch.setattr(portable_lengths, "LEAST_BLOCK", 16)
        monkeypatch.setattr(portable_rows, "_LEAST_TRANSFORMS", 2)
    dtype = usual(backend)
    b, h = (2, 1) if "through" in path else (2, 2)
    values = call(n, taps, state=state, gated=True, dtype=dtype, device=device, b=b, h=h)
    dy = laid(torch.randn(b, h, n).to(device, dtype), layout)
    given = {name: leaf(laid(x, layout)) for name, x in values.items()}
    right = {name: truth(x) for name, x in given.items()}
    where: AbstractContextManager[None] = through_memory() if "through" in path else nullcontext()
    with where:
        found = gradients(fft_conv, given, (dy,), causal=causal, backend=backend)
    expected = gradients(direct, right, (dy.resolve_neg().double(),), causal=causal)
    check(found, expected, 6e-3 if dtype == torch.float16 else 4e-6, ("y", *values))


@pytest.mark.parametrize(
    ("n", "taps", "options"),
    [(2**19, 2**19, {}), (2**20, 9, {"causal": False}), (2**19, 9, {"freq_keep": 0.5}), (2**21, 2**17 + 9, {})],
    ids=["a row at once", "around", "part of the frequencies", "blocks"],
)
def test_rows_of_a_million_points_are_as_exact_as_short_ones(n: int, taps: int, options: dict[str, Any]) -> None:
    """The library that PyTorch calls takes several rows of 2^20 points with an error of 4e-6."""
    u, k = torch.randn(1, 2, n), torch.randn(2, taps) / taps**0.5
    for heads in (slice(0, 1), slice(0, 2)):
        found = fft_conv(u[:, heads], k[heads], backend="torch", **options)
        expected = fft_conv(u[:, heads].double(), k[heads].double(), backend="torch", **options)
        assert budget.relative_rms(found, expected).max() < 1e-6
    if taps == n:  # forward and backward are the same transforms
        dy = torch.randn_like(u)
        found = gradients(fft_conv, {"u": leaf(u), "k": leaf(k)}, (dy,), backend="torch")
        expected = gradients(fft_conv, {"u": truth(u), "k": truth(k)}, (dy.double(),), backend="torch")
        check(found, expected, 1e-6, ("y", "u", "k"))


def test_no_chosen_length_is_one_that_the_library_is_rough_on() -> None:
    assert is_rough(2**20)
    assert not is_rough(2**19)
    assert not is_rough(3 * 2**20)
    for least in (2**20 - 5, 2**20, 2**20 + 1, 2**21 - 1, 2**23):
        length = portable_lengths.good_length(least)
        assert least <= length < 1.01 * least
        assert not is_rough(length)


def test_long_squares_of_a_lazy_state_are_exact() -> None:
    state = LazyState(torch.randn(2, 2**19), 1, 2**19, torch.float32)
    v = torch.randn(1, 2, 2**19)
    found = state._square(v, 2**19)
    state.k, state._spectra = state.k.double(), {}
    assert budget.relative_rms(found, state._square(v.double(), 2**19)).max() < 1e-6


def test_real_transforms_of_nothing() -> None:
    assert rfft(torch.ones(0, 3, 8)).shape == (0, 3, 5)
    assert rfft(torch.ones(3, 0), n=8).shape == (3, 5)
    assert irfft(torch.ones(0, 5, dtype=torch.complex128), 8).shape == (0, 8)
    assert irfft(torch.ones(0, 5, dtype=torch.complex128), 8).dtype == torch.float64


@pytest.mark.parametrize("backend", EVERY)
def test_a_state_of_no_steps_has_a_gradient(backend: str, device: str) -> None:
    """Of a filter of one tap, and alone among the arguments."""
    past = torch.zeros(2, 3, 0, device=device, requires_grad=True)
    u, k = torch.randn(2, 3, 9, dtype=usual(backend), device=device), torch.randn(3, 1, device=device)
    y, _ = fft_conv(u, k, initial_state=past, return_state=True, backend=backend)
    (grad,) = torch.autograd.grad(y.sum(), past)
    assert grad.shape == past.shape
    assert budget.relative_rms(y, u.double() * k.double()).max() < LIMITS[usual(backend)]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("backend", EVERY)
def test_nothing_comes_of_nothing(backend: str, causal: bool, device: str) -> None:
    """No sequences, no heads, no steps: empty results of the right shape, gradients of zero."""
    for b, h, n in ((0, 2, 5), (2, 0, 5), (2, 2, 0), (0, 0, 0)):
        for taps in (1, 3):
            for keep in (None, 0.5):
                state = causal and keep is None
                values = call(n, taps, state=state, gated=True, dtype=usual(backend), device=device)
                given = {name: leaf(x[:h] if x.dim() < 3 else x[:b, :h]) for name, x in values.items()}
                options: dict[str, Any] = {"causal": causal, "freq_keep": keep, "backend": backend}
                found = fft_conv(**given, return_state=state, **options)
                y = found[0] if isinstance(found, tuple) else found
                assert y.shape == (b, h, n)
                grads = torch.autograd.grad(y.sum(), list(given.values()))
                assert [g.shape for g in grads] == [x.shape for x in given.values()]
                assert not any(g.any() for g in grads)
                if state:
                    expected = given["initial_state"].shape
                    assert found[1].shape == expected
                    if n == 0:
                        assert torch.equal(found[1], given["initial_state"])
                spectrum = kernel_spectrum(given["k"], n, dtype=given["u"].dtype, **options)
                assert fft_conv(given["u"].detach(), spectrum, causal=causal, freq_keep=keep).shape == (b, h, n)


@pytest.mark.parametrize("backend", ["reference", "torch", "triton", None])
def test_shapes_on_meta(backend: str | None) -> None:
    values = call(9, 4, state=True, gated=True, dtype=torch.float32, device="meta")
    given: Any = {name: leaf(x) for name, x in values.items()}
    y, state = fft_conv(**given, return_state=True, backend=backend)
    grads = torch.autograd.grad(y.sum() + state.sum(), list(given.values()))
    assert (y.shape, state.shape) == ((3, 2, 9), (3, 2, 3))
    assert [(g.shape, g.device.type) for g in grads] == [(x.shape, "meta") for x in given.values()]
    spectrum = kernel_spectrum(given["k"], 9, backend=backend)
    assert fft_conv(given["u"], spectrum).is_meta


@pytest.mark.parametrize("backend", EVERY)
def test_results_may_be_changed_in_place(backend: str, device: str) -> None:
    values = call(9, 4, state=True, gated=False, dtype=usual(backend), device=device)
    given: Any = {name: leaf(x) for name, x in values.items()}
    y, state = fft_conv(**given, return_state=True, backend=backend)
    expected = torch.autograd.grad(y.sum() * 2 + state.sum(), list(given.values()), retain_graph=True)
    y += y.detach()
    y *= 2.0
    state += 1.0
    for found, right in zip(torch.autograd.grad(y.sum() + state.sum(), list(given.values())), expected, strict=True):
        torch.testing.assert_close(found, right)

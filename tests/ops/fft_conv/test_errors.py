"""Bad input to fft_conv and its companions: refused by an error that names the argument, what it got, what it takes."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from iokernels import UnsupportedError, fft_conv, fft_conv_step, kernel_spectrum, lazy_state
from iokernels.runtime import device

U, K = torch.ones(2, 3, 10), torch.ones(3, 4)


def short_id(value: Any) -> str | None:
    return "-".join(value) if isinstance(value, dict) else value.__name__ if isinstance(value, type) else ""


@pytest.mark.parametrize(
    "change",
    [
        {}, {"k": K.double()}, {"k": torch.ones(3, 25)}, {"causal": False}, {"causal": False, "k": torch.ones(3, 19)},
        {"pre_gate": U, "post_gate": U, "skip": torch.ones(3).half()}, {"freq_keep": 1}, {"freq_keep": 0.01},
        {"initial_state": torch.ones(2, 3, 3).half(), "return_state": True}, {"batch_invariant": True},
        {"k": torch.ones(3, 1), "initial_state": torch.ones(2, 3, 0)},
    ],
    ids=str,
)  # fmt: skip
def test_accepted(change: dict[str, Any]) -> None:
    for backend in ("reference", "torch"):
        found = fft_conv(**{"u": U, "k": K, "backend": backend} | change)
        assert (found[0] if isinstance(found, tuple) else found).shape == U.shape


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"u": torch.ones(3, 10)}, ValueError, r"u has 2 dimensions, shape \[3, 10\]; it must have 3: \[B, H, N\]"),
        ({"u": U.int()}, TypeError, r"u is int32; it must be float16 or bfloat16 or float32 or float64"),
        ({"u": [1.0]}, TypeError, r"u is list; it must be a torch\.Tensor"),
        ({"k": torch.ones(1, 3, 4)}, ValueError, r"k has 3 dimensions"),
        (
            {"k": torch.ones(2, 4)},
            ValueError,
            r"k has shape \[2, 4\]; its dimension 0 \(H\) must be 3, from the H of u",
        ),
        ({"k": torch.ones(3, 4, dtype=torch.complex64)}, TypeError, r"k is complex64"),
        ({"k": torch.ones(3, 0)}, ValueError, r"k has no taps; it must have at least one"),
        ({"k": K.to("meta")}, ValueError, r"k is on meta; it must be on cpu, as u is"),
        (
            {"k": torch.ones(3, 11), "causal": False},
            ValueError,
            r"k has 11 taps and N is 10; without causal it must have",
        ),
        ({"causal": 1}, TypeError, r"causal is int; it must be a bool"),
        ({"pre_gate": U.half()}, TypeError, r"pre_gate is float16; it must be float32, as u is"),
        ({"post_gate": U[:, :, :5]}, ValueError, r"post_gate has shape .*must be 10, from the N of u"),
        ({"skip": torch.ones(2)}, ValueError, r"skip has shape \[2\]; its dimension 0 \(H\) must be 3"),
        ({"freq_keep": 0.0}, ValueError, r"freq_keep is 0\.0; it must be finite, above 0"),
        ({"freq_keep": 1.5}, ValueError, r"freq_keep is 1\.5; it must be above 0 and at most 1"),
        ({"freq_keep": math.nan}, ValueError, r"freq_keep is nan"),
        ({"freq_keep": "all"}, TypeError, r"freq_keep is str; it must be a number"),
        ({"initial_state": torch.ones(2, 3, 4)}, ValueError, r"initial_state has 4 steps; it must have Nk - 1 = 3"),
        ({"initial_state": torch.ones(2, 3, 3), "causal": False}, ValueError, r"initial_state needs causal=True"),
        ({"return_state": True, "freq_keep": 0.5}, ValueError, r"return_state does not go with freq_keep"),
        ({"return_state": 1}, TypeError, r"return_state is int; it must be a bool"),
        ({"batch_invariant": None}, TypeError, r"batch_invariant is NoneType; it must be a bool"),
        ({"backend": "fast"}, ValueError, r"backend is 'fast'; it must be None or one of triton, cuda, torch"),
    ],
    ids=short_id,
)
def test_refused(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match="^fft_conv: " + message):
        fft_conv(**{"u": U, "k": K, "backend": "reference"} | change)


@pytest.mark.parametrize(
    ("u", "options", "message"),
    [
        (torch.ones(2, 3, 11), {}, r"k is a spectrum for N = 10; u has N = 11"),
        (U, {"causal": False}, r"k is a spectrum made with causal=True; the call has False"),
        (U, {"freq_keep": 0.5}, r"k is a spectrum made with freq_keep=1\.0; the call has 0\.5"),
        (U.half(), {}, r"k is a spectrum for float32 inputs; u is float16"),
        (U, {"backend": "reference"}, r"k is a spectrum of the backend 'torch'; the call runs on 'reference'"),
    ],
    ids=short_id,
)
def test_spectrum_of_another_call(u: torch.Tensor, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match="^fft_conv: " + message):
        fft_conv(u, kernel_spectrum(K, 10, backend="torch"), **options)


def test_bad_spectra() -> None:
    with pytest.raises(TypeError, match=r"^kernel_spectrum: n is float; it must be an int"):
        kernel_spectrum(K, 10.0)  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match=r"^kernel_spectrum: dtype is torch\.int32; it must be float16"):
        kernel_spectrum(K, 10, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"^kernel_spectrum: k has 4 taps and N is 3; without causal"):
        kernel_spectrum(K, 3, causal=False)


@pytest.mark.skipif(not device.has_triton(), reason="Triton is not installed")
@pytest.mark.parametrize(
    ("u", "k", "options", "reason"),
    [
        (U.double(), K, {}, "its kernels take float16, bfloat16 and float32, not float64"),
        (
            torch.ones(1, 1, 1).expand(1, 1, 5_000_000).half(),
            torch.ones(1, 1).expand(1, 5_000_000),
            {},
            r"sequences up to 4194304 .* 4194305 taps .* N is 5000000",
        ),
    ],
    ids=short_id,
)
def test_what_triton_refuses(u: torch.Tensor, k: torch.Tensor, options: dict[str, Any], reason: str) -> None:
    with pytest.raises(
        UnsupportedError, match=rf"backend 'triton' cannot run .*{reason}.*can: (cuda, )?torch, reference"
    ):
        fft_conv(u, k.expand(u.shape[1], -1), backend="triton", **options)


def test_bad_steps() -> None:
    u, state = U[:, :, 0], torch.zeros(2, 3, 3)
    with pytest.raises(ValueError, match=r"^fft_conv_step: state has 2 steps; it must have Nk - 1 = 3"):
        fft_conv_step(u, K, state[:, :, :2])
    with pytest.raises(TypeError, match=r"^fft_conv_step: state is float16; it must be float32"):
        fft_conv_step(u, K, state.half())
    with pytest.raises(TypeError, match=r"^fft_conv_step: state is torch\.float64; it must be torch\.float32"):
        fft_conv_step(u, K, state.double())
    with pytest.raises(ValueError, match=r"^fft_conv_step: u has 3 dimensions"):
        fft_conv_step(U, K, state)
    full = lazy_state(K, 2, 1)
    fft_conv_step(u, K, full)
    with pytest.raises(ValueError, match=r"^fft_conv_step: state is full: it was made for 1 tokens"):
        fft_conv_step(u, K, full)
    with pytest.raises(ValueError, match=r"^lazy_state: length is 0; it must be at least 1"):
        lazy_state(K, 2, 0)
    with pytest.raises(TypeError, match=r"^lazy_state: batch is float; it must be an int"):
        lazy_state(K, 2.0, 1)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"^lazy_state: initial_state has shape \[2, 3, 2\]; it must have \[2, 3, 3\]"):
        lazy_state(K, 2, 5, initial_state=torch.ones(2, 3, 2))

"""One token at a time: a window of the past and the relaxed convolution, both beside the whole sequence."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from iokernels import fft_conv, fft_conv_step, lazy_state
from iokernels.ops.fft_conv.step import LazyState
from iokernels.testing import budget


@pytest.mark.parametrize("taps", [1, 7, 150, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_tokens_are_the_sequence(taps: int, dtype: torch.dtype) -> None:
    """A prompt of any length in one call, then one token after the other."""
    u, pre, post = (torch.randn(2, 3, 200, dtype=dtype) for _ in range(3))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    # Both at lag 0 and of one sign, so that a filter of one tap is not cancelled.
    k, skip = torch.rand(3, taps, dtype=wide) / taps**0.5, torch.rand(3, dtype=wide)
    gates: dict[str, Any] = {"pre_gate": pre, "post_gate": post}
    whole, last = fft_conv(u, k, skip=skip, return_state=True, **gates)
    prompt = 30
    _, window = fft_conv(
        u[:, :, :prompt], k, return_state=True, **{name: x[:, :, :prompt] for name, x in gates.items()}
    )
    lazy = lazy_state(k, 2, 200 - prompt, dtype=dtype, initial_state=window)
    for state in (lazy, window):
        made = []
        for t in range(prompt, 200):
            now = {name: x[:, :, t] for name, x in gates.items()}
            made.append(fft_conv_step(u[:, :, t], k, state, skip=skip, **now))
        found = torch.stack(made, 2)
        assert found.dtype == dtype
        limit = {torch.float32: 4e-6, torch.float64: 1e-14, torch.bfloat16: 2e-3}[dtype]
        assert budget.relative_rms(found, whole[:, :, prompt:]).max() < limit
    assert torch.equal(window, last), "the window is moved on in place, and is what the whole call would return"


def test_the_relaxed_convolution_works_in_squares(monkeypatch: pytest.MonkeyPatch) -> None:
    """L tokens: L / 2 squares of side 1, L / 4 of side 2, ...: sublinear work for each."""
    sides: list[int] = []
    square = LazyState._square
    monkeypatch.setattr(LazyState, "_square", lambda self, v, side: sides.append(side) or square(self, v, side))
    k, length = torch.randn(1, 256), 256
    state = lazy_state(k, 1, length)
    for _ in range(length):
        fft_conv_step(torch.randn(1, 1), k, state)
    assert {side: sides.count(side) for side in set(sides)} == {2**i: length >> (i + 1) for i in range(8)}
    assert state.position == length

"""The torch backend's own ways: lengths of transforms, blocks of a long row, bounded memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from iokernels import fft_conv
from iokernels.ops.fft_conv import portable
from iokernels.ops.fft_conv.options import Needs, Options
from iokernels.ops.fft_conv.portable import lengths as portable_lengths
from iokernels.ops.fft_conv.portable import rows as portable_rows
from iokernels.testing import budget


def test_good_lengths() -> None:
    for least in (*range(1, 300), 4095, 65537, 100_003):
        length = portable_lengths.good_length(least)
        rest = length
        for prime in (2, 3, 5):
            while rest % prime == 0:
                rest //= prime
        assert rest == 1
        assert length % 2 == 0
        assert least <= length <= 2 * least
    assert portable_lengths.good_length(2 * 5000 - 1) == 10_000


@pytest.mark.parametrize(
    ("n", "taps", "state"), [(8192 + 77, 900, True), (8200, 1, False), (9000, 1000, False), (30_000, 3, True)], ids=str
)
def test_blocks_are_the_whole(n: int, taps: int, state: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every gradient, with a few blocks at a time and rows one by one."""
    monkeypatch.setattr(portable_rows, "_LEAST_TRANSFORMS", 2)
    monkeypatch.setattr(portable_rows, "workspace", lambda u: 0)
    shape = (2, 2, n)
    tensors: dict[str, Any] = {name: torch.randn(shape, dtype=torch.float64) for name in ("u", "pre_gate", "post_gate")}
    tensors |= {"k": torch.randn(2, taps, dtype=torch.float64), "skip": torch.randn(2, dtype=torch.float64)}
    if state:
        tensors["initial_state"] = torch.randn(2, 2, taps - 1, dtype=torch.float64)
    for x in tensors.values():
        x.requires_grad_()
    assert portable_lengths.cut(n, taps, Options(initial_state=tensors.get("initial_state"))).blocks
    found = fft_conv(**tensors, backend="torch")
    gradients = torch.autograd.grad(found.square().sum(), list(tensors.values()))
    monkeypatch.setattr(portable_lengths, "SHORT", n + 1)
    expected = fft_conv(**tensors, backend="torch")
    assert budget.relative_rms(found, expected).max() < 1e-13
    whole = torch.autograd.grad(expected.square().sum(), list(tensors.values()))
    for x, y in zip(gradients, whole, strict=True):
        assert budget.relative_rms(x, y).max() < 1e-12


class Largest(TorchDispatchMode):
    """Bytes of the largest storage that was made inside, apart from those of given sizes."""

    def __init__(self, apart: set[int]) -> None:
        super().__init__()
        self.apart, self.nbytes = apart, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for x in made if isinstance(made, (tuple, list)) else (made,):
            if isinstance(x, torch.Tensor) and x.untyped_storage().nbytes() not in self.apart:
                self.nbytes = max(self.nbytes, x.untyped_storage().nbytes())
        return made


def test_a_short_filter_on_a_million_steps_needs_blocks_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(portable_rows, "workspace", lambda u: 2**20)  # it follows the number of threads
    u, k = torch.randn(1, 2, 2**20), torch.randn(2, 2048)
    options = Options(pre_gate=torch.randn_like(u))
    with Largest({u.nbytes}) as largest:
        y = portable.forward(u, k, [], options)
        portable.backward(y, u, k, [], options, Needs(True, True, True))
    length = portable_lengths.cut(2**20, 2048, options).length
    assert largest.nbytes <= 2 * 4 * (length + 2) * portable_rows._LEAST_TRANSFORMS * 2
    assert largest.nbytes < u.nbytes // 2, "less than a row"


def test_long_rows_are_taken_a_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(portable_rows, "workspace", lambda u: 2**20)
    u, k = torch.randn(64, 4, 4096), torch.randn(4, 4096)
    with Largest({u.nbytes}) as largest:
        portable.forward(u, k, [], Options())
    assert largest.nbytes < u.nbytes


@pytest.mark.parametrize(
    ("taps", "options"),
    [(40, {}), (40, {"state": True}), (41, {"causal": False}), (121, {"causal": False}), (61, {"freq_keep": 0.4})],
    ids=["causal", "state", "circular", "two-sided", "part of the frequencies"],
)
def test_tiles_are_the_whole(taps: int, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole rows, some sequences of some heads at a time, whichever gradients are wanted."""
    u, dy = torch.randn(2, 5, 3, 61, dtype=torch.float64).unbind(0)
    leaves: dict[str, Any] = {"u": u, "k": torch.randn(3, taps, dtype=torch.float64)}
    leaves |= {"pre_gate": torch.randn_like(u), "post_gate": torch.randn_like(u), "skip": torch.randn(3).double()}
    options = dict(options)
    if options.pop("state", False):
        leaves["initial_state"] = torch.randn(5, 3, taps - 1, dtype=torch.float64)

    def gradients(wanted: tuple[str, ...], backend: str) -> list[torch.Tensor]:
        tensors = {name: x.detach().requires_grad_(name in wanted) for name, x in leaves.items()}
        y = fft_conv(**tensors, **options, backend=backend)
        return [y.detach(), *torch.autograd.grad(y, [tensors[name] for name in wanted], dy)]

    for wanted in (tuple(leaves), ("u",), ("post_gate",), ("k", "skip"), ("skip",)):
        expected = gradients(wanted, "reference")
        for least in (64, 2):
            monkeypatch.setattr(portable_rows, "_LEAST_TRANSFORMS", least)
            monkeypatch.setattr(portable_rows, "workspace", lambda u: 0)
            for x, y in zip(gradients(wanted, "torch"), expected, strict=True):
                torch.testing.assert_close(x, y)

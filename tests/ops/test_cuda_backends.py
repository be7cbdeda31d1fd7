"""What holds of backend ``cuda`` whatever the operator: one graph under ``torch.compile``; what is missing is named."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from iokernels import UnsupportedError, fft_conv, flash_attention, flash_rnn, lean_attention, linear_attention
from iokernels.runtime import device as devices
from iokernels.testing.case import load

from .backends import needs_cuda

# Dynamo makes an instance of every autograd.Function that it traces, and PyTorch warns of instances.
pytestmark = pytest.mark.filterwarnings("ignore:.*Function'> should not be instantiated:DeprecationWarning")


def normal(*shape: int, dtype: torch.dtype = torch.float16) -> Callable[[int, str], Tensor]:
    """Makes a tensor of the shape, in which -1 stands for the length of the sequence."""
    return lambda length, device: torch.randn([length if n < 0 else n for n in shape], device=device).to(dtype)


def decode(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    lengths = torch.full((2,), k.shape[2], dtype=torch.int32, device=k.device)
    return lean_attention(q, k, v, cache_seqlens=lengths, backend="cuda")


CALLS: dict[str, tuple[Callable[..., Tensor], list[Callable[[int, str], Tensor]]]] = {
    "flash_attention": (
        lambda q, k, v: flash_attention(q, k, v, causal=True, backend="cuda"),
        [normal(1, 4, -1, 16), normal(1, 2, -1, 16), normal(1, 2, -1, 16)],
    ),
    "lean_attention": (decode, [normal(2, 4, 1, 16), normal(2, 2, -1, 16), normal(2, 2, -1, 16)]),
    "linear_attention": (
        lambda q, k, v: linear_attention(q, k, v, backend="cuda"),
        [normal(1, 2, -1, 16), normal(1, 2, -1, 16), normal(1, 2, -1, 24)],
    ),
    "fft_conv": (
        lambda u, k, gate: fft_conv(u, k, pre_gate=gate, backend="cuda"),
        [normal(2, 2, -1), normal(2, 9, dtype=torch.float32), normal(2, 2, -1)],
    ),
    "flash_rnn": (
        lambda gates, recurrent, bias: flash_rnn(gates, recurrent, bias, cell="gru", backend="cuda"),
        [normal(2, -1, 3, 1, 16), normal(3, 1, 16, 16), normal(3, 1, 16)],
    ),
}


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@needs_cuda
@pytest.mark.parametrize("operator", CALLS)
def test_one_graph_for_every_length(operator: str, device: str) -> None:
    """With gradients where the kernels have them."""
    function, makers = CALLS[operator]
    gradients = load(operator).differentiates("cuda")
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    for length in (21, 34):
        given = [make(length, device) for make in makers]
        found = []
        for call in (compiled, function):
            leaves = [x.detach().requires_grad_(gradients) for x in given]
            with torch._dynamo.config.patch(error_on_recompile=length != 21):
                out = call(*leaves)
                found.append([out, *torch.autograd.grad(out.float().square().sum(), leaves)] if gradients else [out])
        assert found[1][0].abs().max() > 0.01
        for actual, expected in zip(*found, strict=True):
            torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("operator", CALLS)
def test_what_is_missing_is_named(operator: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """CuPy for a GPU, g++ for the emulator; tensors that nobody looks at stand in for those on a GPU."""
    function, makers = CALLS[operator]
    monkeypatch.setattr(devices, "has_cupy", lambda: False)
    monkeypatch.setattr(devices, "EMULATE", True)
    monkeypatch.setattr(devices, "cxx", lambda: None)
    for device, missing in (("cuda", r'CuPy.* is not installed: pip install "iokernels'), ("cpu", "there is none")):
        with FakeTensorMode():
            given = [make(20, device) for make in makers]
            with pytest.raises(UnsupportedError, match=rf"backend 'cuda' cannot run this call: .*{missing}"):
                function(*given)

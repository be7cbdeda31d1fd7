"""The CUDA kernels of linear_attention, in the emulator: their tilings, their segments, and what they refuse."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch

from iokernels import UnsupportedError, autotune, linear_attention, linear_attention_state, linear_attention_step
from iokernels.ops.linear_attention.cuda import tuning as tuning_cuda
from iokernels.ops.linear_attention.cuda.tuning import KERNELS, TUNABLES, Config, Problem
from iokernels.ops.linear_attention.refusals import MAX_CUDA_WIDTH as MAX_WIDTH
from iokernels.runtime.device import KNOWN
from iokernels.testing import inputs
from iokernels.testing.case import load
from iokernels.testing.case.proof import prove_point

from ..backends import needs_cuda
from .calls import draw, packed, prove

CASE = load("linear_attention")
CUDA_POINTS = [
    point
    for point in CASE.check_points()
    if not (point.shape.taylor or point.shape.normalize) and max(point.shape.d, point.shape.dv) <= MAX_WIDTH
]


def config(chunk: int = 16, num_warps: int = 2) -> Any:
    return autotune.override(**dict.fromkeys(KERNELS, Config(chunk, num_warps)))


@needs_cuda
@pytest.mark.parametrize("point", CUDA_POINTS, ids=lambda point: point.name)
def test_every_point_of_the_operator(point: Any, device: str) -> None:
    """With its default configuration; float16 has the narrower limit."""
    prove_point(CASE, "cuda", point.shape, torch.float16, device)


@needs_cuda
@pytest.mark.parametrize(
    ("tile", "widths", "dtype", "decay"),
    [
        ((16, 1), (24, 40), torch.bfloat16, "token"),
        ((32, 3), (20, 40), torch.float16, "head"),
        ((32, 3), (20, 40), torch.float16, "token"),
        ((64, 2), (16, 24), torch.bfloat16, "head"),
    ],
    ids=str,
)
def test_every_tiling(
    tile: tuple[int, int], widths: tuple[int, int], dtype: torch.dtype, decay: str | None, device: str
) -> None:
    given = draw(2, 4, 70, *widths, key_heads=2, dtype=dtype, decay=decay, state=True, device=device)
    with config(*tile):
        prove(given, "cuda")


@needs_cuda
def test_layouts_of_states_and_decays(device: str) -> None:
    """Every element beside q, k and v is NaN, and the emulator sees who reads it."""
    q, k, v = inputs.attention(6, 2, 2, 2, 20, 20, 24, dtype=torch.bfloat16, device=device, layout="padded")
    state = torch.randn(2, 2, 24, 24, device=device).transpose(2, 3)
    decay = -torch.rand(2, 20, 2, device=device, dtype=torch.float64).transpose(1, 2)
    with config():
        found = prove({"q": q, "k": k, "v": v, "log_decay": decay, "initial_state": state}, "cuda")
    assert found["dlog_decay"].dtype == torch.float64


@needs_cuda
@pytest.mark.parametrize("decay", ["head", "token"])
def test_packed(decay: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sequences of length 0 and 1 among longer ones, some of which end where a segment does, and rows of none."""
    monkeypatch.setattr(tuning_cuda, "SEGMENT", 48)
    lengths = (49, 0, 1, 48, 130, 96)
    drawn = draw(1, 2, sum(lengths) + 5, 10, 16, dtype=torch.bfloat16, decay=decay, state=True, device=device)
    given = packed(drawn, lengths)
    with config():
        found = prove(given, "cuda")
    assert all((found[name][sum(lengths) :] == 0).all() for name in ("out", "dq", "dk", "dv"))
    if decay == "token":
        assert (found["dlog_decay"][sum(lengths) :] == 0).all()
    assert torch.equal(found["state"][1], given["initial_state"][1])


@needs_cuda
def test_no_sequences(device: str) -> None:
    given = draw(1, 2, 5, 8, 8, dtype=torch.float16, decay="token", device=device)
    flat = {name: given[name].squeeze(0).transpose(0, 1).requires_grad_() for name in ("q", "k", "v", "log_decay")}
    offsets = torch.zeros(1, dtype=torch.int32, device=device)
    out = linear_attention(**flat, cu_seqlens=offsets, backend="cuda")
    gradients = torch.autograd.grad(out.sum(), list(flat.values()))
    assert out.shape == flat["v"].shape
    assert all((x == 0).all() for x in (out, *gradients))


@pytest.mark.parametrize(
    ("reason", "arguments"),
    [
        ("its kernels take float16 and bfloat16, not float32", {"dtype": torch.float32}),
        ("its kernels have no feature map.*triton", {"taylor": True}),
        ("its kernels have no normaliser.*triton", {"normalize": True}),
        ("K is 129, and its kernels hold widths up to 128", {"key_width": 129}),
        ("V is 136, and its kernels hold widths up to 128", {"value_width": 136}),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_what_it_refuses(reason: str, arguments: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedError, match=rf"backend 'cuda' cannot run this call: {reason}"):
        linear_attention(**draw(1, 1, 4, **{"dtype": torch.float16, **arguments}), backend="cuda")


def test_the_step_is_refused() -> None:
    given = draw(1, 1, 1, 8, 8, dtype=torch.float16)
    with pytest.raises(UnsupportedError, match=r"linear_attention_step: backend 'cuda' .* take whole sequences"):
        linear_attention_step(**given, state=linear_attention_state(1, 1, 8, 8), backend="cuda")


@pytest.mark.parametrize("device_name", KNOWN)
def test_the_default_is_in_the_space(device_name: str) -> None:
    spec = KNOWN[device_name]
    for kernel, tunable in TUNABLES.items():
        for block_y, block_z in product(range(16, MAX_WIDTH + 1, 16), repeat=2):
            for heads, crossing in product((0, 1, 64, 4096), (False, True)):
                memory = spec.smem_block, spec.smem_sm
                problem = Problem(block_y, block_z, crossing, spec.sm, spec.sms, *memory, heads)
                default = tunable.default(problem)
                assert tunable.space.refusal(problem, spec, default) is None, (kernel, problem, default)

"""The CUDA kernel of linear_attention, in the emulator: its options, its tilings, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from iokernels import UnsupportedError, autotune, linear_attention, linear_attention_state, linear_attention_step
from iokernels.bench.case import load
from iokernels.bench.proof import Proof
from iokernels.ops.linear_attention import cuda
from iokernels.ops.linear_attention.options import Options
from iokernels.ops.linear_attention.tuning_cuda import MAX_WIDTH, TUNABLE, Config, Problem
from iokernels.runtime.device import KNOWN, cxx
from iokernels.testing import inputs
from iokernels.testing.budget import check_relative_rms

from .linear_attention_calls import LIMITS, draw

emulated = pytest.mark.skipif(cxx() is None, reason="the emulator needs g++")
CASE = load("linear_attention")
CUDA_POINTS = [
    point
    for point in CASE.check_points()
    if not (point.shape.taylor or point.shape.normalize) and max(point.shape.d, point.shape.dv) <= MAX_WIDTH
]


def config(chunk: int = 16, num_warps: int = 2) -> Any:
    return autotune.override(linear_attention_cuda=Config(chunk, num_warps))


def call(given: dict[str, Any], backend: str = "cuda") -> tuple[Tensor, Tensor]:
    return linear_attention(**given, return_state=True, backend=backend)


def truth(given: dict[str, Any]) -> tuple[Tensor, Tensor]:
    wide = {name: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for name, x in given.items()}
    return call(wide, "reference")


def prove(given: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Hold out and the state to the limits of the operator, over each head, and return them."""
    found, expected = call(given), truth(given)
    assert expected[0].abs().max() > 0.05, "the inputs prove nothing"
    for name, x, y in zip(("out", "state"), found, expected, strict=True):
        check_relative_rms(x.flatten(2), y.flatten(2), limit=LIMITS[given["v"].dtype], what=name)
    return found


@emulated
@pytest.mark.parametrize("point", CUDA_POINTS, ids=lambda point: point.name)
def test_every_point_of_the_operator(point: Any, device: str) -> None:
    """With its default configuration; float16 has the narrower limit."""
    proof = Proof(CASE, point.shape, torch.float16, torch.device(device))
    verdict = proof.judge(lambda given: CASE.run(given, "cuda"), gradients_too=False)
    assert verdict.status == "ok", verdict


@emulated
@pytest.mark.parametrize("decay", [None, "head", "token"])
@pytest.mark.parametrize(
    ("tile", "widths", "dtype"),
    [((16, 1), (24, 40), torch.bfloat16), ((32, 3), (20, 40), torch.float16), ((64, 2), (16, 24), torch.bfloat16)],
    ids=str,
)
def test_every_tiling(
    tile: tuple[int, int], widths: tuple[int, int], dtype: torch.dtype, decay: str | None, device: str
) -> None:
    given = draw(2, 4, 70, *widths, key_heads=2, dtype=dtype, decay=decay, state=True, log_decay=-0.5, device=device)
    with config(*tile):
        prove(given)


@emulated
@pytest.mark.parametrize("layout", ["bnhd", "padded", "strided", "expanded"])
def test_layouts(layout: Any, device: str) -> None:
    """Every element beside the tensors is NaN, and the emulator sees who reads it."""
    q, k, v = inputs.attention(6, 2, 2, 2, 20, 20, 24, dtype=torch.bfloat16, device=device, layout=layout)
    state = torch.randn(2, 2, 24, 24, device=device).transpose(2, 3)
    decay = -torch.rand(2, 20, 2, device=device, dtype=torch.float64).transpose(1, 2)
    out, _ = prove({"q": q, "k": k, "v": v, "log_decay": decay, "initial_state": state})
    in_order = out.transpose(1, 2) if v.stride(1) < v.stride(2) else out
    assert in_order.is_contiguous(), "out follows the memory order of v"


@emulated
def test_states_chain(device: str) -> None:
    """Two halves, with the state handed on, are the whole."""
    given = draw(1, 2, 50, 16, 16, dtype=torch.float16, decay="token", state=True, device=device)
    whole, last = call(given)
    state, outs = given["initial_state"], []
    for rows in (slice(0, 23), slice(23, None)):
        part = {name: given[name][:, :, rows] for name in ("q", "k", "v", "log_decay")}
        out, state = call({**given, **part, "initial_state": state})
        outs.append(out)
    check_relative_rms(torch.cat(outs, 2).flatten(2), whole.flatten(2), limit=2e-3, what="out")
    check_relative_rms(state.flatten(2), last.flatten(2), limit=2e-3, what="state")


@emulated
def test_no_tokens_and_no_sequences(device: str) -> None:
    given = draw(2, 2, 0, dtype=torch.float16, decay="token", state=True, device=device)
    assert torch.equal(call(given)[1], given["initial_state"])
    assert call(draw(2, 2, 0, dtype=torch.float16, device=device))[1].eq(0).all()
    assert call(draw(0, 2, 5, dtype=torch.float16, decay="head", device=device))[0].shape == (0, 2, 5, 24)


@emulated
@pytest.mark.parametrize("offsets", [[0, 99, 40], [-5, 20, 10], [30, 10, 2**30], [0, 0, -(2**31)]], ids=str)
def test_offsets_out_of_range_do_no_harm(offsets: list[int], device: str) -> None:
    """On a GPU nobody reads them before the kernel does."""
    q = torch.randn(1, 2, 40, 16, device=device).half()
    options = Options(cu_seqlens=torch.tensor(offsets, dtype=torch.int32, device=device))
    out, state, _ = cuda.forward(q, q, q, options)
    assert out.isfinite().all()
    assert state.isfinite().all()


@emulated
@pytest.mark.parametrize("scale", [0.0, 1.0, -0.3])
def test_scale(scale: float, device: str) -> None:
    given = draw(1, 1, 40, 8, 16, dtype=torch.float16, state=True, device=device) | {"scale": scale}
    found, expected = call(given), truth(given)
    for x, y in zip(found, expected, strict=True):
        check_relative_rms(x.flatten(), y.flatten(), limit=2e-3, what="result")
    assert (found[0] == 0).all() == (scale == 0.0)


@pytest.mark.parametrize(
    ("reason", "arguments"),
    [
        ("its kernel takes float16 and bfloat16, not float32", {"dtype": torch.float32}),
        ("its kernel has no feature map.*triton", {"taylor": True}),
        ("its kernel has no normaliser.*triton", {"normalize": True}),
        ("K is 129, and its kernel holds widths up to 128", {"key_width": 129}),
        ("V is 136, and its kernel holds widths up to 128", {"value_width": 136}),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_what_it_refuses(reason: str, arguments: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedError, match=rf"backend 'cuda' cannot run this call: {reason}"):
        call(draw(1, 1, 4, **{"dtype": torch.float16, **arguments}))


@emulated
@pytest.mark.parametrize("name", ["q", "k", "v", "log_decay", "initial_state"])
def test_gradients_are_refused_and_nothing_else(name: str) -> None:
    given = draw(1, 1, 4, dtype=torch.float16, decay="token", state=True)
    given[name].requires_grad_()
    with pytest.raises(UnsupportedError, match="its kernels have no backward pass, and an input requires a gradient"):
        call(given)
    with torch.no_grad():
        out, _ = call(given)
    assert not out.requires_grad


def test_the_step_is_refused() -> None:
    given = draw(1, 1, 1, 8, 8, dtype=torch.float16)
    with pytest.raises(UnsupportedError, match=r"linear_attention_step: backend 'cuda' .* takes whole sequences"):
        linear_attention_step(**given, state=linear_attention_state(1, 1, 8, 8), backend="cuda")


@pytest.mark.parametrize("device_name", KNOWN)
def test_the_default_is_in_the_space(device_name: str) -> None:
    spec = KNOWN[device_name]
    for block_k in range(16, MAX_WIDTH + 1, 16):
        for block_v in range(16, MAX_WIDTH + 1, 16):
            for heads in (0, 1, 64, 4096):
                problem = Problem(block_k, block_v, spec.sm, spec.sms, spec.smem_block, spec.smem_sm, heads)
                default = TUNABLE.default(problem)
                assert TUNABLE.space.refusal(problem, spec, default) is None, (problem, default)

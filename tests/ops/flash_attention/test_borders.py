"""flash_attention at the borders of its numbers: scales that are not positive, NaN and inf, large masks."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from iokernels import flash_attention, flash_attention_varlen, scaled_dot_product_attention
from iokernels.ops.flash_attention import portable

from ..backends import BACKENDS, runs, usual

INF, NAN = math.inf, math.nan
REFERENCE = [("reference", torch.float16), ("reference", torch.bfloat16), ("reference", torch.float32)]


def leaves(*tensors: Tensor) -> list[Tensor]:
    return [x.detach().clone().requires_grad_() for x in tensors]


def exact(q: Tensor, k: Tensor, v: Tensor, dout: Tensor, scale: float, causal: bool) -> list[Tensor]:
    """Out, dq, dk, dv by the formula in float64: scores first, the mask after."""
    inputs = leaves(q.double(), k.double(), v.double())
    scores = scale * (inputs[0] @ inputs[1].mT)
    if causal:
        scores = scores.masked_fill(~torch.ones(scores.shape[-2:], dtype=torch.bool).tril(), -INF)
    out = torch.softmax(scores, -1) @ inputs[2]
    return [out.detach(), *torch.autograd.grad(out, inputs, dout.double())]


def assert_near(actual: list[Tensor], wanted: list[Tensor]) -> None:
    for mine, theirs in zip(actual, wanted, strict=True):
        size = theirs.abs().max().item() + 1e-3
        limit = {2: 3e-2, 4: 1e-5, 8: 1e-12}[mine.dtype.itemsize]
        assert (mine.double() - theirs).abs().max().item() < limit * size


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("scale", [-0.7, 0.0, 5e-324, -1e-40])
@pytest.mark.parametrize(("backend", "dtype"), [*REFERENCE, *runs(torch.float32, torch.bfloat16)])
def test_any_scale_comes_before_the_mask(backend: str, dtype: torch.dtype, scale: float, causal: bool) -> None:
    q, k, v, dout = (torch.randn(1, 2, 20, 16).to(dtype) for _ in range(4))
    wanted = exact(q, k, v, dout, scale, causal)
    inputs = leaves(q, k, v)
    out = flash_attention(*inputs, scale=scale, causal=causal, backend=backend)
    assert_near([out.detach(), *torch.autograd.grad(out, inputs, dout)], wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_scale_comes_before_the_mask_packed_and_by_torch_own_name(dtype: torch.dtype) -> None:
    q, k, v, dout = (torch.randn(1, 2, 6, 16).to(dtype) for _ in range(4))
    wanted = exact(q, k, v, dout, -0.7, True)
    inputs = leaves(q, k, v)
    q, k, v = inputs
    out = scaled_dot_product_attention(q, k, v, is_causal=True, scale=-0.7)
    assert_near([out.detach(), *torch.autograd.grad(out, inputs, dout)], wanted)
    packed = leaves(*(x.detach()[0].transpose(0, 1) for x in inputs))
    offsets = torch.tensor([0, 6], dtype=torch.int32)
    out = flash_attention_varlen(
        *packed, cu_seqlens_q=offsets, cu_seqlens_k=offsets, max_seqlen_q=6, max_seqlen_k=6, causal=True, scale=-0.7
    )
    found = [out.detach(), *torch.autograd.grad(out, packed, dout[0].transpose(0, 1))]
    assert_near([x.transpose(0, 1)[None] for x in found], wanted)


def test_the_mean_of_what_a_row_sees_at_scale_0() -> None:
    v = torch.arange(1.0, 5.0)[:, None].expand(1, 1, 4, 8)
    out = flash_attention(torch.randn(1, 1, 4, 8), torch.randn(1, 1, 4, 8), v, scale=0.0, causal=True)
    torch.testing.assert_close(out[0, 0, :, 0], torch.tensor([1.0, 1.5, 2.0, 2.5]))


ROWS = 40
"""More than a vector of PyTorch's CPU kernel holds, which takes another way there."""


def call(backend: str, dtype: torch.dtype, changed: str, at: int, value: float, **options: Any) -> Any:
    tensors = {n: torch.rand(1, 1, ROWS, 16).to(dtype) + 0.1 for n in "qkv"}
    tensors[changed][0, 0, at] = (
        value if changed == "q" else tensors[changed][0, 0, at].index_fill(0, torch.tensor(3), value)
    )
    return flash_attention(**tensors, **options, return_lse=True, backend=backend)


def is_nan(made: Any) -> tuple[list[int], list[int]]:
    """The rows where out and where lse are NaN, each wholly."""
    out, lse = made[0][0, 0], made[1][0, 0]
    assert torch.equal(out.isnan().any(-1), out.isnan().all(-1))
    return out.isnan().all(-1).nonzero().flatten().tolist(), lse.isnan().nonzero().flatten().tolist()


ALL = [*REFERENCE, *runs(torch.float16, torch.float32), ("torch", torch.bfloat16), ("torch", torch.float64)]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("value", [NAN, INF])
@pytest.mark.parametrize(("backend", "dtype"), ALL)
def test_a_score_that_is_nan_or_inf_is_seen_by_the_rows_that_see_it_and_no_other(
    backend: str, dtype: torch.dtype, value: float, causal: bool
) -> None:
    row, later = [7], list(range(7, ROWS))
    assert is_nan(call(backend, dtype, "q", 7, value, causal=causal)) == (row, row)
    seen = later if causal else list(range(ROWS))
    assert is_nan(call(backend, dtype, "k", 7, value, causal=causal)) == (seen, seen)


@pytest.mark.parametrize(("backend", "dtype"), ALL)
def test_a_row_whose_scores_are_all_minus_inf_has_no_key(backend: str, dtype: torch.dtype) -> None:
    out, lse = call(backend, dtype, "q", 7, -INF, causal=True)
    assert not out[0, 0, 7].any()
    assert lse[0, 0, 7] == -INF
    assert out.isfinite().all()
    assert lse.isfinite().sum() == ROWS - 1


@pytest.mark.parametrize("backend", ["reference", "torch", "triton"])
def test_a_mask_hides_a_key_of_nan(backend: str) -> None:
    mask = torch.ones(ROWS, dtype=torch.bool)
    mask[7] = False
    assert is_nan(call(backend, torch.float32, "k", 7, NAN, mask=mask)) == ([], [])


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_gradients_of_a_row_of_nan_are_nan(backend: str) -> None:
    """Not 0, as PyTorch's kernel has them: a training step has to see it."""
    q, k, v = leaves(*(torch.rand(1, 1, 12, 16, dtype=usual(backend)) for _ in range(3)))
    with torch.no_grad():
        q[0, 0, 11, 3] = NAN
    dq, dk, dv = torch.autograd.grad(flash_attention(q, k, v, causal=True, backend=backend).sum(), [q, k, v])
    assert dq[0, 0, 11].isnan().all()
    assert dq[0, 0, :11].isfinite().all()
    assert dk.isnan().all()
    assert dv.isnan().all()


def test_a_token_of_zeros_keeps_pytorch_own_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its LSE is 0, which is also what the kernel makes of NaN."""
    q, k, v = (torch.randn(1, 2, 6, 16) for _ in range(3))
    q[:, :, 0] = 0.0
    assert flash_attention(q, k, v, causal=True, return_lse=True)[1][0, 0, 0] == 0.0
    monkeypatch.setattr(portable, "Tiles", None)
    torch.testing.assert_close(flash_attention(q, k, v, causal=True)[:, :, 0], v[:, :, 0])


PADS = [(dtype, pad) for dtype in (torch.float32, torch.float64) for pad in (-1e9, 1e9, torch.finfo(dtype).min)]
PADS += [(dtype, torch.finfo(dtype).min) for dtype in (torch.float16, torch.bfloat16)]


@pytest.mark.parametrize(("bias_dtype", "pad"), PADS)
@pytest.mark.parametrize(
    ("backend", "dtype"), [*REFERENCE, *((b, d) for b in ("torch", "triton") for d in (torch.float16, torch.float32))]
)
@pytest.mark.parametrize("packed", [False, True])
def test_a_row_wholly_padded_with_a_large_number_is_the_mean(
    backend: str, dtype: torch.dtype, bias_dtype: torch.dtype, pad: float, packed: bool
) -> None:
    """Softmax is shift-invariant: results and gradients are those of a bias of 0."""
    q = torch.zeros(1, 1, 2, 16, dtype=dtype)
    k = torch.randn(1, 1, 8, 16).to(dtype)
    v = torch.arange(8.0).to(dtype)[:, None].expand(1, 1, 8, 16)

    def run(number: float) -> list[Tensor]:
        bias = torch.zeros(1, 1, 2, 8, dtype=bias_dtype)
        bias[..., 0, :] = number
        inputs = leaves(q, k, v, bias)
        if packed:
            ends = [torch.tensor([0, n], dtype=torch.int32) for n in (2, 8)]
            out = flash_attention_varlen(
                *(x[0].transpose(0, 1) for x in inputs[:3]), bias=inputs[3], cu_seqlens_q=ends[0],
                cu_seqlens_k=ends[1], max_seqlen_q=2, max_seqlen_k=8, backend=backend,
            ).transpose(0, 1)[None]  # fmt: skip
        else:
            out = flash_attention(*inputs[:3], bias=inputs[3], backend=backend)
        return [out.detach(), *torch.autograd.grad(out[:, :, 0].sum(), inputs)]

    out, dq, dk, dv, dbias = run(pad)
    assert out[0, 0, 0].eq(3.5).all()
    torch.testing.assert_close(dv, torch.full_like(dv, 0.125))
    for actual, wanted in zip((dq, dk, dbias), run(0.0)[1:3] + run(0.0)[4:], strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-3, atol=1e-5)
    assert dq.abs().max() > 0
    torch.testing.assert_close(dbias[0, 0, 0].float() * 8 / 16, torch.arange(8.0) - 3.5, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("pad", [-1e9, torch.finfo(torch.float32).min])
@pytest.mark.parametrize("backend", ["reference", "torch", "triton"])
def test_a_large_number_hides_a_key_as_a_mask_does(backend: str, pad: float) -> None:
    q, k, v = (torch.randn(2, 2, 20, 16) for _ in range(3))
    shown = torch.rand(2, 1, 20, 20) > 0.4
    shown[..., 0] = True

    def run(**options: Any) -> list[Tensor]:
        inputs = leaves(q, k, v)
        out, lse = flash_attention(*inputs, **options, return_lse=True, backend=backend)
        return [out, lse, *torch.autograd.grad(out.square().sum() + lse.sum(), inputs)]

    for actual, wanted in zip(run(bias=torch.zeros(()).where(shown, pad)), run(mask=shown), strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", ["reference", "torch", "triton"])
def test_a_sink_shares_a_padded_row_as_far_down(backend: str) -> None:
    q, k, v, sinks = leaves(
        torch.zeros(1, 1, 1, 16), torch.randn(1, 1, 7, 16), torch.ones(1, 1, 7, 16), torch.tensor([-1e9])
    )
    out = flash_attention(q, k, v, sinks=sinks, bias=torch.full((1, 7), -1e9), backend=backend)
    torch.testing.assert_close(out, torch.full_like(out, 7 / 8))
    dv, dsinks = torch.autograd.grad(out.sum(), [v, sinks])
    torch.testing.assert_close(dv, torch.full_like(dv, 1 / 8))
    torch.testing.assert_close(dsinks, torch.tensor([-16 * 7 / 64]))


@pytest.mark.parametrize("backend", ["reference", "torch", "triton"])
def test_steep_slopes_keep_their_gradients(backend: str) -> None:
    """Where the nearest keys are hidden, an ALiBi slope is a large number added to all that are seen."""
    q, k, v = leaves(torch.zeros(1, 1, 3, 16), torch.randn(1, 1, 40, 16), torch.randn(1, 1, 40, 16))
    mask = torch.zeros(40, dtype=torch.bool)
    mask[3] = True
    out = flash_attention(q, k, v, mask=mask, alibi_slopes=torch.tensor([1e5 / 3]), backend=backend)
    dv = torch.autograd.grad(out.sum(), v)[0]
    torch.testing.assert_close(dv[0, 0, 3], torch.full((16,), 3.0), rtol=1e-6, atol=0)

"""flash_attention against its oracle: every option, and the edges where attention kernels have broken before.

The kernels run with small tiles, so that short sequences cross many of them; the check command proves the same points
with the tiles that a GPU would get.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from iokernels import flash_attention, flash_attention_varlen
from iokernels.ops.flash_attention import reference
from iokernels.ops.flash_attention.case import CASE
from iokernels.ops.flash_attention.cuda import tuning as tuning_cuda
from iokernels.ops.flash_attention.options import Options
from iokernels.ops.flash_attention.triton import launch as triton_launch
from iokernels.ops.flash_attention.triton.tuning import Config
from iokernels.runtime.registration.precision import eagerly
from iokernels.testing import budget, inputs
from iokernels.testing.case import Point
from iokernels.testing.case.proof import Proof

from ..backends import BACKENDS, CUDA, HALF_AND_SINGLE, runs, usual

PYTHON = ("torch", "triton")
"""The backends with every option, and with float32."""

SMALL_TILES = {
    "flash_attention_fwd": Config(32, 64, 4, 2),
    "flash_attention_bwd_dq": Config(64, 32, 4, 2),
    "flash_attention_bwd_dkv": Config(32, 64, 4, 2),
    "flash_attention_bwd_dbias": Config(32, 32, 4, 1),
    **dict.fromkeys(tuning_cuda.KERNELS, tuning_cuda.Config(block=16, warps=2)),
}


pytestmark = pytest.mark.tiles(**SMALL_TILES)


def results(backend: str, q: Tensor, k: Tensor, v: Tensor, dout: Tensor | None = None, **options: Any) -> list[Tensor]:
    """out, lse, dq, dk, dv of one call. The gradient of the LSE is 1 where it is finite."""
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    out, lse = flash_attention(q, k, v, **options, return_lse=True, backend=backend)
    if dout is None:
        generator = torch.Generator().manual_seed(1)
        dout = torch.randn(out.shape, generator=generator).to(out)
    gradients = torch.autograd.grad([out, lse], [q, k, v], [dout.to(out.dtype), lse.isfinite().to(lse)])
    return [out.detach(), lse.detach(), *gradients]


def prove(backend: str, q: Tensor, k: Tensor, v: Tensor, dout: Tensor | None = None, **options: Any) -> list[Tensor]:
    """Hold the results of ``backend`` to the error budget, and return them."""
    found = results(backend, q, k, v, dout, **options)
    truth = results("reference", q.double(), k.double(), v.double(), dout, **_double(options))
    with eagerly():
        low = results("reference", q, k, v, dout, **options)
    factors = (budget.FORWARD, budget.FORWARD, *(budget.GRADIENT,) * 3)
    for what, factor, x, y, z in zip(("out", "lse", "dq", "dk", "dv"), factors, found, truth, low, strict=True):
        budget.check(x, y, z, factor=factor, what=what, may_vanish=True)
    assert sum(bool(x.abs().max() > 0.01) for x in truth if x.numel()) >= 2, "the inputs prove nothing"
    return found


def _double(options: dict[str, Any]) -> dict[str, Any]:
    return {name: x.double() if name in ("bias", "sinks") else x for name, x in options.items()}


NOT_CUDA = {"mask": "mask", "bias": "bias", "alibi": "alibi_slopes", "sinks": "sinks", "dropout": "dropout_p"}
"""The dimensions of a shape that ask for an option which the CUDA kernels do not have, and the option's name."""


@pytest.mark.parametrize("point", CASE.check_points(), ids=lambda point: point.name)
@pytest.mark.parametrize(
    ("backend", "dtype"), [(name, dtype) for name in PYTHON for dtype in CASE.implementations[name].dtypes]
    + [pytest.param("cuda", dtype, marks=CUDA.marks) for dtype in CASE.implementations["cuda"].dtypes], ids=str
)  # fmt: skip
def test_every_option(backend: str, point: Point, dtype: torch.dtype, device: str) -> None:
    verdict = Proof(CASE, point.shape, dtype, torch.device(device)).judge(lambda given: CASE.run(given, backend))
    missing = [option for name, option in NOT_CUDA.items() if getattr(point.shape, name)] if backend == "cuda" else []
    if missing:
        assert verdict.status == "refused", verdict
        assert f"its kernels have no {missing[0]}. Backends that can: triton" in verdict.reason
    else:
        verdict.require_ok(f"{backend}, {dtype}, {point.shape}")


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    "lengths", [(1, 1), (3, 3), (1, 147), (239, 1), (113, 203), (108, 256), (128, 128), (129, 127)], ids=str
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_lengths(backend: str, lengths: tuple[int, int], causal: bool, device: str) -> None:
    q, k, v = inputs.attention(3, 1, 2, 1, *lengths, 32, dtype=torch.bfloat16, device=device)
    prove(backend, q, k, v, causal=causal)


@pytest.mark.parametrize(("backend", "dtype"), runs(*HALF_AND_SINGLE), ids=str)
def test_rows_without_keys(backend: str, dtype: torch.dtype, device: str) -> None:
    q, k, v = inputs.attention(4, 2, 2, 2, 70, 33, 16, dtype=dtype, device=device)
    out, lse, dq, _, _ = prove(backend, q, k, v, causal=True)
    blind = slice(0, 70 - 33)
    assert (out[:, :, blind] == 0).all()
    assert (lse[:, :, blind] == float("-inf")).all()
    assert (dq[:, :, blind] == 0).all()
    assert lse[:, :, 70 - 33 :].isfinite().all()


@pytest.mark.parametrize("shape", [(0, 2, 5, 5), (1, 2, 0, 5), (1, 2, 5, 0), (1, 2, 0, 0)], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_empty(backend: str, shape: tuple[int, int, int, int], device: str) -> None:
    batch, heads, seqlen_q, seqlen_k = shape
    q = torch.randn(batch, heads, seqlen_q, 16, dtype=usual(backend), device=device)
    k, v = (torch.randn(batch, heads, seqlen_k, 16, dtype=usual(backend), device=device) for _ in range(2))
    out, lse, dq, dk, dv = results(backend, q, k, v)
    assert out.shape == q.shape
    assert (out == 0).all()
    assert (lse == float("-inf")).all()
    assert all((gradient == 0).all() for gradient in (dq, dk, dv))


@pytest.mark.parametrize("backend", PYTHON)
def test_bias_gradient_of_empty_calls(backend: str, device: str) -> None:
    q, k = torch.randn(1, 2, 5, 16, device=device), torch.randn(1, 2, 0, 16, device=device)
    bias = torch.randn(1, 2, 5, 1, device=device, requires_grad=True)
    flash_attention(q, k, k, bias=bias, backend=backend).sum().backward()
    assert bias.grad is not None
    assert (bias.grad == 0).all()


@pytest.mark.parametrize(
    "widths", [(16, 16), (40, 40), (59, 59), (96, 40), (111, 192), (192, 128), (256, 256)], ids=str
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_widths(backend: str, widths: tuple[int, int], device: str) -> None:
    q, k, v = inputs.attention(5, 1, 1, 1, 45, 50, *widths, dtype=torch.float16, device=device, layout="padded")
    prove(backend, q, k, v, causal=True)


@pytest.mark.parametrize("layout", ["contiguous", "bnhd", "seq_major", "padded", "strided", "expanded", "packed_qkv"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_layouts(backend: str, layout: Any, device: str) -> None:
    """Every element beside the tensors is NaN: whoever reads it shows it."""
    q, k, v = inputs.attention(6, 2, 4, 2, 70, 70, 24, dtype=torch.bfloat16, device=device, layout=layout)
    out, *_ = prove(backend, q, k, v, causal=True)
    in_order = out.transpose(1, 2) if q.stride(1) < q.stride(2) else out
    assert in_order.is_contiguous(), "out follows the memory order of q"


@pytest.mark.parametrize("form", ["expanded", "transposed", "every other"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_layouts_of_the_gradient(backend: str, form: str, device: str) -> None:
    q, k, v = inputs.attention(7, 1, 2, 2, 50, 60, 16, dtype=usual(backend), device=device)
    dout = {
        "expanded": torch.tensor(0.5, device=device).expand(1, 2, 50, 16),
        "transposed": torch.randn(1, 2, 16, 50, device=device).transpose(2, 3),
        "every other": torch.randn(1, 2, 50, 32, device=device)[..., ::2],
    }[form]
    prove(backend, q, k, v, dout)


@pytest.mark.parametrize(("heads", "kv_heads"), [(3, 1), (10, 2), (7, 1), (16, 1), (64, 1)], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_grouped_heads(backend: str, heads: int, kv_heads: int, device: str) -> None:
    q, k, v = inputs.attention(8, 1, heads, kv_heads, 20, 37, 16, dtype=torch.float16, device=device)
    prove(backend, q, k, v, causal=True)


@pytest.mark.parametrize("lengths", [(70, 70), (40, 90), (90, 40)], ids=str)
@pytest.mark.parametrize("window", [(0, 0), (5, 0), (0, 5), (-1, 3), (3, -1), (33, 17), (64, 64)], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_windows(backend: str, window: tuple[int, int], lengths: tuple[int, int], device: str) -> None:
    q, k, v = inputs.attention(9, 1, 2, 2, *lengths, 16, dtype=torch.float16, device=device, kind="flat")
    prove(backend, q, k, v, window=window)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_window_as_long_as_the_sequence_is_none(backend: str, device: str) -> None:
    q, k, v = inputs.attention(10, 1, 2, 2, 50, 70, 16, dtype=usual(backend), device=device)
    windowed = results(backend, q, k, v, window=(2**31 - 1, 2**40))
    for one, other in zip(windowed, results(backend, q, k, v), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("kind", ["flat", "large", "constant"])
@pytest.mark.parametrize(("backend", "dtype"), runs(*HALF_AND_SINGLE), ids=str)
def test_logits(backend: str, dtype: torch.dtype, kind: Any, device: str) -> None:
    q, k, v = inputs.attention(11, 1, 2, 2, 70, 90, 32, dtype=dtype, device=device, kind=kind)
    prove(backend, q, k, v, causal=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_saturated_softcap(backend: str, device: str) -> None:
    q, k, v = inputs.attention(12, 1, 2, 2, 50, 70, 32, dtype=usual(backend), device=device, kind="large")
    prove(backend, q, k, v, softcap=3.0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_negative_and_zero_scale(backend: str, device: str) -> None:
    q, k, v = inputs.attention(13, 1, 2, 2, 50, 70, 32, dtype=usual(backend), device=device)
    prove(backend, q, k, v, scale=-0.2, causal=True)
    prove(backend, q, k, v, scale=0.0, causal=True)


@pytest.mark.parametrize("backend", PYTHON)
def test_bias_of_minus_infinity_is_a_mask(backend: str, device: str) -> None:
    q, k, v = inputs.attention(14, 1, 2, 2, 50, 70, 16, dtype=torch.float32, device=device)
    mask = torch.rand(1, 1, 50, 70, device=device) < 0.5
    mask[:, :, 3] = False
    bias = torch.zeros(mask.shape, device=device).masked_fill(~mask, float("-inf")).requires_grad_()
    by_bias = results(backend, q, k, v, bias=bias)
    for one, other in zip(by_bias, results(backend, q, k, v, mask=mask), strict=True):
        torch.testing.assert_close(one, other)
    assert (by_bias[0][:, :, 3] == 0).all()
    flash_attention(q, k, v, bias=bias, backend=backend).sum().backward()
    assert bias.grad is not None
    assert bias.grad.isfinite().all()


@pytest.mark.parametrize("shape", [(2, 4, 1, 1), (1, 4, 1, 70), (2, 1, 50, 1), (50, 70), (70,), (1, 1)], ids=str)
@pytest.mark.parametrize("backend", PYTHON)
def test_broadcast_bias_and_mask(backend: str, shape: tuple[int, ...], device: str) -> None:
    q, k, v = inputs.attention(15, 2, 4, 2, 50, 70, 16, dtype=torch.float32, device=device, kind="flat")
    gradients = []
    mask = torch.rand(shape, device=device) < 0.8
    for name, dtype in ((backend, torch.float32), ("reference", torch.float64)):
        bias = torch.randn(shape, generator=torch.Generator().manual_seed(2)).to(device, dtype).requires_grad_()
        given = [x.to(dtype) for x in (q, k, v)]
        flash_attention(*given, bias=bias, mask=mask, causal=True, backend=name).square().sum().backward()
        gradients.append(bias.grad)
    assert gradients[1].abs().max() > 1e-3 or shape[-1] == 1  # one bias for all keys of a row changes nothing
    torch.testing.assert_close(gradients[0].double(), gradients[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", PYTHON)
def test_dropout_drops_what_it_should(backend: str, device: str) -> None:
    """With v the identity, out shows the weights themselves."""
    n, p = 64, 0.3
    q = torch.zeros(2, 2, n, 16, device=device)
    v = torch.eye(n, device=device).expand(2, 2, n, n)
    torch.manual_seed(0)
    weights = flash_attention(q, torch.zeros_like(q), v, dropout_p=p, backend=backend)
    kept = weights > 0
    torch.testing.assert_close(weights[kept], torch.full_like(weights[kept], 1 / n / (1 - p)))
    assert abs(kept.float().mean().item() - (1 - p)) < 0.02
    assert not torch.equal(kept[0, 0], kept[0, 1])
    assert not torch.equal(kept[0, 0], kept[1, 0])
    torch.manual_seed(0)
    assert torch.equal(weights, flash_attention(q, torch.zeros_like(q), v, dropout_p=p, backend=backend))
    assert not torch.equal(weights, flash_attention(q, torch.zeros_like(q), v, dropout_p=p, backend=backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_packed_is_each_sequence_alone(backend: str, device: str) -> None:
    lengths_q, lengths_k = (20, 0, 37, 5), (33, 12, 0, 5)
    q, k, v, cu_q, cu_k = inputs.packed(16, lengths_q, lengths_k, 4, 2, 16, dtype=usual(backend), device=device)
    out, lse = flash_attention_varlen(
        q, k, v, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, max_seqlen_q=37, max_seqlen_k=40, causal=True, return_lse=True,
        backend=backend,
    )  # fmt: skip
    for index in range(len(lengths_q)):
        rows, keys = slice(*cu_q[index : index + 2].tolist()), slice(*cu_k[index : index + 2].tolist())
        alone = [x.transpose(0, 1).unsqueeze(0) for x in (q[rows], k[keys], v[keys])]
        expected, expected_lse = flash_attention(*alone, causal=True, return_lse=True, backend=backend)
        torch.testing.assert_close(out[rows], expected.squeeze(0).transpose(0, 1))
        torch.testing.assert_close(lse[:, rows], expected_lse.squeeze(0))


@pytest.mark.parametrize("backend", PYTHON)
def test_strided_sinks_and_offsets(backend: str, device: str) -> None:
    q, k, v, cu_q, cu_k = inputs.packed(22, (20, 7), (20, 7), 4, 2, 16, dtype=torch.float32, device=device)
    sinks = torch.linspace(-1.0, 2.0, 4, device=device)
    common = {"max_seqlen_q": 20, "max_seqlen_k": 20, "backend": backend}
    expected = flash_attention_varlen(q, k, v, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, sinks=sinks, **common)

    def strided(x: Tensor) -> Tensor:
        return torch.stack([x, x + 1], dim=1)[:, 0]

    found = flash_attention_varlen(
        q, k, v, cu_seqlens_q=strided(cu_q), cu_seqlens_k=strided(cu_k), sinks=strided(sinks), **common
    )
    assert torch.equal(found, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_of_no_sequence(backend: str, device: str) -> None:
    q, k, v, cu_q, cu_k = inputs.packed(17, (20, 10), (20, 10), 2, 2, 16, dtype=usual(backend), device=device)
    q, k, v = (torch.cat([x, torch.full_like(x[:7], float("nan"))]).requires_grad_() for x in (q, k, v))
    out, lse = flash_attention_varlen(
        q, k, v, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, max_seqlen_q=20, max_seqlen_k=20, return_lse=True,
        backend=backend,
    )  # fmt: skip
    assert out.isfinite().all()
    assert (out[30:] == 0).all()
    assert (lse[:, 30:] == float("-inf")).all()
    for gradient in torch.autograd.grad(out.sum(), [q, k, v]):
        assert gradient.isfinite().all()
        assert (gradient[30:] == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_same_bits_every_time(backend: str, device: str) -> None:
    q, k, v = inputs.attention(18, 2, 4, 2, 70, 90, 16, dtype=torch.float16, device=device)
    first = results(backend, q, k, v, causal=True)
    for _ in range(2):
        assert all(torch.equal(x, y) for x, y in zip(first, results(backend, q, k, v, causal=True), strict=True))


def test_a_row_does_not_depend_on_its_batch(device: str) -> None:
    q, k, v = inputs.attention(19, 3, 4, 2, 70, 90, 16, dtype=torch.float16, device=device)
    together = results("triton", q, k, v, causal=True, dout=torch.ones(3, 4, 70, 16, device=device))
    alone = results("triton", q[1:2], k[1:2], v[1:2], causal=True, dout=torch.ones(1, 4, 70, 16, device=device))
    for x, y in zip(together, alone, strict=True):
        assert torch.equal(x[1:2], y)


@pytest.mark.parametrize("wanted", ["q", "k", "v", "qk", "kv", "qv"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_only_some_gradients(backend: str, wanted: str, device: str) -> None:
    q, k, v = inputs.attention(20, 1, 2, 2, 50, 50, 16, dtype=usual(backend), device=device)
    everything = results(backend, q, k, v, torch.ones(1, 2, 50, 16, device=device))[2:]
    for name, x in zip("qkv", (q, k, v), strict=True):
        x.requires_grad_(name in wanted)
    out, lse = flash_attention(q, k, v, return_lse=True, backend=backend)
    (out.sum() + lse.sum()).backward()
    for name, x, expected in zip("qkv", (q, k, v), everything, strict=True):
        if name in wanted:
            torch.testing.assert_close(x.grad, expected)
        else:
            assert x.grad is None


def test_64_bit_offsets_change_nothing(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = inputs.attention(21, 2, 2, 1, 50, 70, 16, dtype=torch.float16, device=device, layout="seq_major")
    narrow = results("triton", q, k, v, causal=True)
    monkeypatch.setattr(triton_launch, "is_wide", lambda *_: True)
    for x, y in zip(narrow, results("triton", q, k, v, causal=True), strict=True):
        assert torch.equal(x, y)


def test_when_offsets_are_wide() -> None:
    small = torch.empty(1, 1, 4, 8, device="meta")
    assert not triton_launch.is_wide(128, small)
    # A sequence-major tensor of many heads: 127 rows apart is past 2^31 elements, 63 rows is not.
    rows = torch.empty_strided((1, 1, 128, 8), (1, 1, 2**31 // 100, 1), device="meta")
    assert triton_launch.is_wide(128, small, rows)
    assert not triton_launch.is_wide(64, rows)
    columns = torch.empty_strided((1, 1, 4, 256), (1, 1, 1, 2**24), device="meta")
    assert triton_launch.is_wide(16, columns)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU with 12 GB to spare")
def test_tensors_past_2_to_the_31_elements() -> None:
    heads, n, width = 16, 2**31 // (16 * 64) + 4096, 64
    x = torch.randn(n, heads, width, device="cuda", dtype=torch.bfloat16)
    last = x[-512:].transpose(0, 1)[None]  # the part that 32-bit offsets would not reach
    q = x.transpose(0, 1)[None]
    found = flash_attention(q, q, q, window=(63, 0), backend="triton")[:, :, -256:]
    options = Options(scale=width**-0.5, window_left=63, window_right=0)
    end = last.double()
    expected, _ = reference.attend(end, end, end, options)
    assert (found - expected[:, :, -256:]).abs().max() < 0.02

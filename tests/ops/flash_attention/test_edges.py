"""Kernels of flash_attention where a tile ends: windows at every place in a tile, and sums over many tiles."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from iokernels import flash_attention, flash_attention_varlen
from iokernels.ops.flash_attention.cuda import tuning as tuning_cuda
from iokernels.ops.flash_attention.triton.tuning import KERNELS, Config

from ..backends import BACKENDS, CUDA, usual

BLOCK = 16


pytestmark = pytest.mark.tiles(
    **dict.fromkeys(map(str, KERNELS), Config(BLOCK, BLOCK, 4, 2)),
    **dict.fromkeys(map(str, tuning_cuda.KERNELS), tuning_cuda.Config(block=BLOCK, warps=1)),
)


def seen(n: int, nk: int, left: int, right: int) -> Tensor:
    """Which keys the formula shows to a row, [n, nk]."""
    distance = torch.arange(n)[:, None] + (nk - n) - torch.arange(nk)
    return ((distance <= left) | (left < 0)) & ((distance >= -right) | (right < 0))


def expected(tensors: list[Tensor], dout: Tensor, shown: Tensor, bias: Tensor | None) -> list[Tensor]:
    """Out and gradients in float64, by the formula."""
    q, k, v = (x.double().requires_grad_() for x in tensors)
    scores = q.shape[-1] ** -0.5 * (q @ k.mT) + (0.0 if bias is None else bias.double())
    weights = torch.softmax(scores.masked_fill(~shown, -1e300), -1) * shown
    out = weights @ v
    return [out.detach(), *torch.autograd.grad(out, [q, k, v], dout.double())]


def assert_close(actual: list[Tensor], wanted: list[Tensor]) -> None:
    for mine, theirs in zip(actual, wanted, strict=True):
        limit = 2e-2 if mine.dtype.itemsize == 2 else 2e-5
        assert (mine - theirs).abs().max().item() < limit * theirs.abs().max().item()


EDGES = [("triton", place, "both") for place in range(BLOCK)]
EDGES += [("triton", place, side) for place in (0, 11, 14, 15) for side in ("causal", "left", "right")]
EDGES += [("torch", place, "both") for place in (0, 1, 14, 15)]
EDGES += [pytest.param("cuda", *x, marks=CUDA.marks) for x in ((1, "both"), (14, "causal"), (15, "both"))]


@pytest.mark.parametrize(("backend", "place", "side"), EDGES)
def test_a_window_that_ends_anywhere_in_a_tile(backend: str, place: int, side: str) -> None:
    """``place`` is where in a tile the first row's edge falls."""
    left, right = {"causal": (-1, 0), "left": (9, -1), "right": (-1, 3), "both": (17, 2)}[side]
    n, nk = 37, 37 + BLOCK + place
    q, k, v, dout = (torch.randn(1, 1, rows, 16).to(usual(backend)) for rows in (n, nk, nk, n))
    inputs = [x.clone().requires_grad_() for x in (q, k, v)]
    out = flash_attention(*inputs, window=(left, right), backend=backend)
    grads = torch.autograd.grad(out, inputs, dout)
    assert_close([out.detach(), *grads], expected([q, k, v], dout, seen(n, nk, left, right), None))


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_an_edge_beside_what_is_added_to_scores(backend: str) -> None:
    """Tiles of a bias, a mask and a window, packed, with sequences that end anywhere in a tile."""
    lengths = ((19, 33), (16, 18), (5, 32))
    parts = [[torch.randn(1, 1, rows, 16) for rows in (n, nk, nk, n)] for n, nk in lengths]
    bias, mask = torch.randn(3, 1, 19, 33), torch.rand(3, 1, 19, 33) > 0.2
    mask[..., :19, 3:20] |= torch.eye(19, 17, dtype=torch.bool)
    packed = [torch.cat([p[i][0].transpose(0, 1) for p in parts]).requires_grad_() for i in range(3)]
    dout = torch.cat([p[3][0].transpose(0, 1) for p in parts])
    ends = [torch.tensor([0, *x], dtype=torch.int32).cumsum(0).int() for x in zip(*lengths, strict=True)]
    out = flash_attention_varlen(
        *packed, cu_seqlens_q=ends[0], cu_seqlens_k=ends[1], max_seqlen_q=19, max_seqlen_k=33, window=(20, 1),
        bias=bias, mask=mask, backend=backend,
    )  # fmt: skip
    grads = torch.autograd.grad(out, packed, dout)
    for i, (n, nk) in enumerate(lengths):
        shown = seen(n, nk, 20, 1) & mask[i, 0, :n, :nk]
        q, k, v, own = parts[i]
        rows, keys = (slice(int(e[i]), int(e[i + 1])) for e in ends)
        found = [
            x[part].transpose(0, 1)[None]
            for x, part in zip((out.detach(), *grads), (rows, rows, keys, keys), strict=True)
        ]
        assert_close(found, expected([q, k, v], own, shown, bias[i, 0, :n, :nk]))


LARGE, SMALL, TILES = 128.0, 0.06, 24
"""A first tile whose sum is 2048, where fp16 counts by 2, and tiles whose sums of 0.96 it cannot add to that."""


def ramp(large_rows: int = BLOCK) -> Tensor:
    """[TILES * BLOCK]: one tile of large numbers, then small ones."""
    return torch.cat([torch.full((large_rows,), LARGE), torch.full(((TILES - 1) * BLOCK,), SMALL)])


@pytest.mark.parametrize("backend", BACKENDS)
def test_small_terms_beside_a_large_sum_are_kept(backend: str) -> None:
    """Sums over tiles are float32, forward and backward: half the dtype of the inputs would lose them one by one."""
    keys = TILES * BLOCK
    terms = ramp().half()
    total = terms.double().sum().item()

    def near(actual: Tensor, wanted: float) -> None:
        assert actual.dtype == torch.float16
        assert (actual.double() - wanted).abs().max().item() < 1.2e-3 * abs(wanted)

    def made(*leaves: Tensor, dout: Tensor | None = None) -> tuple[Tensor, ...]:
        inputs = [x.half().requires_grad_() for x in leaves]
        out = flash_attention(*inputs, scale=1.0, backend=backend)
        return (out.detach(), *torch.autograd.grad(out, inputs, torch.ones_like(out) if dout is None else dout))

    column = terms[None, None, :, None].expand(1, 1, keys, 16)
    zeros = torch.zeros(1, 1, keys, 16)
    # out: equal weights of many values.
    near(made(zeros[:, :, :1], zeros, column)[0], total / keys)
    # dv: one key, many rows. dk: two keys of opposite values, so that dS is half of dout.
    two = torch.tensor([1.0, -1.0])[None, None, :, None].expand(1, 1, 2, 16) / 16
    _, _, dk, dv = made(torch.ones_like(zeros) / 8, zeros[:, :, :2], two, dout=column.half() / 8)
    near(dv, total / 16)
    near(dk[:, :, 0], total / 128)
    # dq: each tile of keys meets one of opposite values and no key, so that delta is 0.
    values = torch.stack([column.unflatten(2, (TILES, BLOCK)), -column.unflatten(2, (TILES, BLOCK))], 3)
    ones = torch.stack([torch.ones(1, 1, TILES, BLOCK, 16), torch.zeros(1, 1, TILES, BLOCK, 16)], 3)
    dq = made(zeros[:, :, :1], ones.flatten(2, 4), values.flatten(2, 4))[1]
    near(dq, 16 * total / (2 * keys))

"""A result of flash_attention never depends on how its arguments lie in memory, on any path that a call may take.

A call with laid-out arguments is compared with the same call with contiguous copies of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from iokernels import flash_attention, flash_attention_varlen, scaled_dot_product_attention
from iokernels.nn import FlashAttention

from ..backends import BACKENDS, CUDA, usual

Layout = Callable[[Tensor], Tensor]


def _every_other(x: Tensor) -> Tensor:
    return torch.stack([x, torch.full_like(x, 7)], dim=-1).flatten(-2)[..., ::2]


def _permuted(x: Tensor) -> Tensor:
    order = tuple(reversed(range(x.dim())))
    return x.permute(order).contiguous().permute(order)


def _heads_inside(x: Tensor) -> Tensor:
    """Of [B, H, N, D]: [B, N, H, D] in memory."""
    return x.transpose(-3, -2).contiguous().transpose(-3, -2) if x.dim() > 2 else _permuted(x)


def _behind_an_odd_offset(x: Tensor) -> Tensor:
    return torch.cat([x.new_ones(3), x.flatten()])[3:].view(x.shape)


def _gaps_between_rows(x: Tensor) -> Tensor:
    return torch.cat([x, torch.full_like(x, 7)], dim=-1)[..., : x.shape[-1]]


def _negative(x: Tensor) -> Tensor:
    return torch._neg_view(-x)  # pyright: ignore[reportPrivateImportUsage]


def _imaginary(x: Tensor) -> Tensor:
    """The imaginary part of a conjugate: a negative bit and a last stride of 2."""
    if x.dtype.itemsize == 2:  # torch has no complex numbers of two such: the pairs are made by hand
        return torch._neg_view(_every_other(-x))  # pyright: ignore[reportPrivateImportUsage]
    return torch.complex(torch.zeros_like(x), -x).conj().imag


def _one_column(x: Tensor) -> Tensor:
    return x[..., :1].expand(x.shape)


def _one_row(x: Tensor) -> Tensor:
    return x[..., :1, :].expand(x.shape)


def _one_head(x: Tensor) -> Tensor:
    return x[..., :1, :, :].expand(x.shape) if x.dim() > 2 else _one_row(x)


def _overlapping(x: Tensor) -> Tensor:
    """Rows that begin one element after one another."""
    return x.flatten(-2)[..., : x.shape[-1] + x.shape[-2] - 1].unfold(-1, x.shape[-1], 1)


LAYOUTS: dict[str, Layout] = {
    f.__name__.strip("_"): f
    for f in (
        _every_other, _permuted, _heads_inside, _behind_an_odd_offset, _gaps_between_rows, _negative, _imaginary,
        _one_column, _one_row, _one_head, _overlapping,
    )
}  # fmt: skip
OF_SCORES = ("every_other", "one_head")

PATHS: dict[str, dict[str, Any]] = {
    "causal": {"n": 5, "nk": 5, "causal": True},
    "one row": {"n": 1, "nk": 6, "causal": True},
    "all": {"n": 5, "nk": 6},
    "wide values": {"n": 5, "nk": 6, "dv": 24},
    "window": {"n": 5, "nk": 6, "window": (2, 1), "softcap": 2.0},
}


def contiguous(x: Any) -> Any:
    return x.detach().clone(memory_format=torch.contiguous_format).resolve_neg() if isinstance(x, Tensor) else x


def results(call: Callable[..., Any], tensors: dict[str, Tensor], dout: Tensor, dlse: Tensor | None) -> list[Tensor]:
    """Out, lse where there is a gradient for it, and the gradients of all that is floating."""
    leaves = {name: x.detach() for name, x in tensors.items()}
    wants = [x.requires_grad_() for n, x in leaves.items() if x.is_floating_point() and n != "alibi_slopes"]
    made = call(**leaves)
    made = [made] if isinstance(made, Tensor) else list(made)
    given = [dout] if dlse is None else [dout, dlse]
    return [*made, *torch.autograd.grad(made[: len(given)], wants, given)]


def assert_same(
    call: Callable[..., Any], tensors: dict[str, Tensor], dout: Tensor, dlse: Tensor | None = None
) -> None:  # fmt: skip
    expected = results(call, {n: contiguous(x) for n, x in tensors.items()}, contiguous(dout), contiguous(dlse))
    half = tensors["q"].dtype.itemsize == 2 if "q" in tensors else False
    rtol, atol = (4e-3, 4e-3) if half else (1e-5, 2e-6)
    for actual, wanted in zip(results(call, tensors, dout, dlse), expected, strict=True):
        assert wanted.abs().max() > 0
        torch.testing.assert_close(actual, wanted, rtol=rtol, atol=atol)


# The backend "torch" hands some paths to PyTorch's kernel; the others have one path, whose options make no difference.
DENSE = [("torch", path, layout) for path in PATHS for layout in LAYOUTS]
DENSE += [("reference", "window", layout) for layout in LAYOUTS]
DENSE += [("triton", "window", x) for x in ("every_other", "permuted", "negative", "one_column", "overlapping")]
DENSE += [
    pytest.param("cuda", "wide values", layout, marks=CUDA.marks)
    for layout in ("every_other", "behind_an_odd_offset", "overlapping")
]


@pytest.mark.parametrize(("backend", "path", "layout"), DENSE)
def test_dense_calls(backend: str, path: str, layout: str) -> None:
    lay, options = LAYOUTS[layout], dict(PATHS[path])
    n, nk, dv = options.pop("n"), options.pop("nk"), options.pop("dv", 16)
    dtype = usual(backend)
    q, k, v = (torch.randn(size, dtype=dtype) for size in ((2, 4, n, 16), (2, 2, nk, 16), (2, 2, nk, dv)))
    dout = lay(torch.randn(2, 4, n, dv, dtype=dtype))
    dlse = lay(torch.randn(2, 4, n)) if path in ("one row", "window") else None

    def call(**tensors: Tensor) -> Any:
        return flash_attention(**tensors, **options, return_lse=True, backend=backend)

    assert_same(call, {"q": lay(q), "k": lay(k), "v": lay(v)}, dout, dlse)


@pytest.mark.parametrize("layout", ["every_other", "behind_an_odd_offset", "one_head"])
@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_packed_calls(backend: str, layout: str) -> None:
    dtype = usual(backend)
    lay = LAYOUTS[layout]
    q, k, v = (torch.randn(size, dtype=dtype) for size in ((9, 4, 16), (11, 2, 16), (11, 2, 16)))
    offsets = [torch.tensor(x, dtype=torch.int32) for x in ([0, 4, 9], [0, 5, 11])]
    if layout in ("every_other", "behind_an_odd_offset"):
        offsets = [lay(x[None])[0] for x in offsets]

    def call(q: Tensor, k: Tensor, v: Tensor) -> Any:
        return flash_attention_varlen(
            q, k, v, cu_seqlens_q=offsets[0], cu_seqlens_k=offsets[1], max_seqlen_q=5, max_seqlen_k=6, causal=True,
            backend=backend, return_lse=True,
        )  # fmt: skip

    assert_same(call, {"q": lay(q), "k": lay(k), "v": lay(v)}, lay(torch.randn(9, 4, 16, dtype=dtype)))


@pytest.mark.parametrize("layout", OF_SCORES)
@pytest.mark.parametrize("backend", ["reference", "torch", "triton"])
def test_what_changes_scores(backend: str, layout: str) -> None:
    lay = LAYOUTS[layout]
    q, k, v = (torch.randn(2, 4, 6, 16) for _ in range(3))
    mask = torch.rand(2, 4, 6, 6) > 0.3
    mask[..., 0] = True
    tensors = {
        "q": q, "k": k, "v": v, "mask": lay(mask.byte()).view(torch.bool), "bias": lay(torch.randn(2, 4, 6, 6)),
        "sinks": lay(torch.randn(1, 4))[0], "alibi_slopes": lay(torch.rand(2, 4)),
    }  # fmt: skip
    assert_same(lambda **t: flash_attention(**t, backend=backend), tensors, torch.randn(2, 4, 6, 16))


@pytest.mark.parametrize("backend", ["reference", "torch", "triton"])
def test_negative_views_of_what_changes_scores(backend: str) -> None:
    q, k, v = (torch.randn(2, 4, 6, 16) for _ in range(3))
    tensors = {
        "q": q, "k": k, "v": v, "bias": _negative(torch.randn(2, 1, 6, 6)), "sinks": _imaginary(torch.randn(4)),
        "alibi_slopes": _imaginary(torch.rand(2, 4)),
    }  # fmt: skip
    assert_same(lambda **t: flash_attention(**t, backend=backend), tensors, _imaginary(torch.randn(2, 4, 6, 16)))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_torch_own_signature_and_the_module(layout: str) -> None:
    lay = LAYOUTS[layout]
    q, k, v = (lay(torch.randn(2, 3, 5, 8)) for _ in range(3))
    dout = lay(torch.randn(2, 3, 5, 8))
    assert_same(lambda q, k, v: scaled_dot_product_attention(q, k, v, is_causal=True), {"q": q, "k": k, "v": v}, dout)
    module = FlashAttention(8, 2, batch_first=True)
    assert_same(lambda x: module(x, x, x, need_weights=False)[0], {"x": q[0]}, dout[0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_saved_results_may_come_back_in_another_layout(backend: str) -> None:
    """Hooks on what autograd saves (offloading, compression) give equal tensors, not equal strides."""
    q, k, v = (torch.randn(2, 2, 5, 16, dtype=usual(backend), requires_grad=True) for _ in range(3))
    expected = torch.autograd.grad(flash_attention(q, k, v, backend=backend).sum(), [q, k, v])
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: _permuted(_every_other(x))):
        again = torch.autograd.grad(flash_attention(q, k, v, backend=backend).sum(), [q, k, v])
    for actual, wanted in zip(again, expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=4e-3, atol=1e-5)

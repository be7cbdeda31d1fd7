"""``iokernels.scaled_dot_product_attention`` against torch's, in float64: the same function, values and gradients."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import iokernels
from iokernels.ops.flash_attention.sdpa import top_left_causal
from iokernels.testing.budget import FORWARD, check

EXACT: dict[str, Any] = {"rtol": 1e-10, "atol": 1e-12}


def leaf(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed + 7 * sum(shape))
    return torch.randn(*shape, dtype=dtype, generator=generator).requires_grad_()


def assert_same(q, k, v, mask=None, **options) -> torch.Tensor:
    """Values and the gradient of every input that takes one; returns our output."""
    leaves = [x for x in (q, k, v, mask) if x is not None and x.requires_grad]
    with sdpa_kernel(SDPBackend.MATH):
        expected = F.scaled_dot_product_attention(q, k, v, mask, **options)
    actual = iokernels.scaled_dot_product_attention(q, k, v, mask, **options)
    assert actual.shape == expected.shape
    assert actual.dtype == expected.dtype
    torch.testing.assert_close(actual, expected, **EXACT)
    dout = torch.randn(expected.shape, dtype=expected.dtype, generator=torch.Generator().manual_seed(99))
    for mine, theirs in zip(
        torch.autograd.grad(actual, leaves, dout), torch.autograd.grad(expected, leaves, dout), strict=True
    ):
        assert theirs.abs().sum() > 0 or theirs.numel() == 0
        torch.testing.assert_close(mine, theirs, **EXACT)
    return actual


def test_signature_is_that_of_torch():
    """torch's is a builtin: its documentation holds the signature."""
    ours = inspect.signature(iokernels.scaled_dot_product_attention)
    assert [*ours.parameters] == [
        "query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa",
    ]  # fmt: skip
    documented = " ".join((F.scaled_dot_product_attention.__doc__ or "").split("->")[0].split())
    written = ", ".join(
        str(p).split(":")[0] + ("" if p.default is p.empty else f"={p.default}") for p in ours.parameters.values()
    )
    assert f"({written})" in documented
    assert {p.name for p in ours.parameters.values() if p.kind is p.KEYWORD_ONLY} == {"scale", "enable_gqa"}


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(("seqlen_q", "seqlen_k"), [(9, 9), (5, 11), (11, 5), (1, 6), (6, 1)])
def test_lengths(seqlen_q: int, seqlen_k: int, is_causal: bool):
    q, k, v = leaf(2, 3, seqlen_q, 8), leaf(2, 3, seqlen_k, 8, seed=1), leaf(2, 3, seqlen_k, 16, seed=2)
    if (seqlen_q, seqlen_k, is_causal) in {(1, 6, True), (6, 1, True), (6, 1, False)}:
        # One visible key a row: its weight is 1 whatever q and k are.
        q, k = q.detach(), k.detach()
    assert_same(q, k, v, is_causal=is_causal)


def test_top_left_causal_needs_no_mask_and_no_copy():
    k, v = leaf(1, 1, 7, 8), leaf(1, 1, 7, 8, seed=1)
    shorter, values, options = top_left_causal(k, v, 4)
    assert options == {"causal": True}
    assert shorter.shape[2] == values.shape[2] == 4
    assert shorter.data_ptr() == k.data_ptr()
    assert top_left_causal(k, v, 10)[2] == {"window": (-1, 3)}


SHAPES = {
    "2d": ((5, 8), (7, 8), (7, 4)),
    "3d": ((3, 5, 8), (3, 7, 8), (3, 7, 4)),
    "5d": ((2, 3, 2, 5, 8), (2, 3, 2, 7, 8), (2, 3, 2, 7, 4)),
    "6d": ((2, 1, 3, 2, 5, 8), (2, 1, 3, 2, 7, 8), (2, 1, 3, 2, 7, 4)),
    "one head of keys": ((2, 3, 5, 8), (2, 1, 7, 8), (2, 1, 7, 4)),
    "one head of values": ((2, 3, 5, 8), (2, 3, 7, 8), (2, 1, 7, 4)),
    "one head of queries": ((2, 1, 5, 8), (2, 3, 7, 8), (2, 3, 7, 4)),
    "one batch of queries": ((1, 3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 4)),
    "one batch of keys": ((2, 3, 5, 8), (1, 3, 7, 8), (1, 3, 7, 4)),
    "ranks differ": ((3, 5, 8), (2, 3, 7, 8), (7, 4)),
    "5d, batch broadcast": ((2, 1, 2, 5, 8), (1, 3, 2, 7, 8), (2, 3, 1, 7, 4)),
}


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)
def test_ranks_and_broadcasting(shapes: tuple[tuple[int, ...], ...], is_causal: bool):
    q, k, v = (leaf(*shape, seed=i) for i, shape in enumerate(shapes))
    assert_same(q, k, v, is_causal=is_causal, scale=0.4)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("lead", [(), (2,), (2, 3)])
def test_grouped_heads(lead: tuple[int, ...], is_causal: bool):
    q, k, v = leaf(*lead, 6, 5, 8), leaf(*lead, 2, 7, 8, seed=1), leaf(*lead, 2, 7, 8, seed=2)
    assert_same(q, k, v, enable_gqa=True, is_causal=is_causal)


MASKS = {
    4: [(5, 7), (1, 7), (5, 1), (1, 1), (3, 5, 7), (3, 1, 7), (2, 1, 1, 7), (2, 3, 5, 7), (1, 3, 5, 1)],
    3: [(5, 7), (3, 5, 7), (3, 1, 7)],
    2: [(5, 7), (1, 7)],
    5: [(5, 7), (3, 1, 7), (4, 1, 5, 7), (1, 4, 3, 5, 7), (2, 1, 1, 1, 7), (2, 4, 3, 5, 7)],
}


@pytest.mark.parametrize("kind", ["bool", "float", "float without gradient"])
@pytest.mark.parametrize(("rank", "shape"), [(rank, shape) for rank, shapes in MASKS.items() for shape in shapes])
def test_masks(rank: int, shape: tuple[int, ...], kind: str):
    lead = {4: (2, 3), 3: (3,), 2: (), 5: (2, 4, 3)}[rank]
    q, k, v = leaf(*lead, 5, 8), leaf(*lead, 7, 8, seed=1), leaf(*lead, 7, 8, seed=2)
    mask = leaf(*shape, seed=3)
    if kind == "bool":
        mask = mask.detach() > -0.7
        mask[..., 0] = True
    elif kind != "float" or shape[-1] == 1:  # a constant along a row changes nothing: its gradient is 0
        mask = mask.detach()
    assert_same(q, k, v, mask)


@pytest.mark.parametrize("kind", ["bool", "float"])
def test_a_row_without_keys_is_zero(kind: str):
    q, k, v = leaf(1, 2, 4, 8), leaf(1, 2, 6, 8, seed=1), leaf(1, 2, 6, 8, seed=2)
    mask = torch.ones(4, 6, dtype=torch.bool)
    mask[2] = False
    mask[3, 1:] = False
    if kind == "float":
        mask = torch.zeros(4, 6, dtype=torch.float64).masked_fill(~mask, float("-inf"))
    out = assert_same(q, k, v, mask)
    assert not out[:, :, 2].any()
    again = iokernels.scaled_dot_product_attention(q, k, v, mask)
    assert not torch.autograd.grad(again.sum(), q)[0][:, :, 2].any()


def test_no_keys_and_no_rows():
    empty = leaf(1, 2, 0, 8)
    assert not iokernels.scaled_dot_product_attention(leaf(1, 2, 3, 8), empty, empty).any()
    assert not iokernels.scaled_dot_product_attention(leaf(1, 2, 3, 8), empty, empty, is_causal=True).any()
    full = leaf(1, 2, 3, 8)
    assert iokernels.scaled_dot_product_attention(empty, full, full, is_causal=True).shape == (1, 2, 0, 8)


def test_dropout_keeps_the_mean_and_repeats_with_the_seed():
    q, k, v = leaf(2, 2, 8, 8), leaf(2, 2, 32, 8, seed=1), torch.ones(2, 2, 32, 1, dtype=torch.float64)
    torch.manual_seed(5)
    first = iokernels.scaled_dot_product_attention(q, k, v, dropout_p=0.25)
    second = iokernels.scaled_dot_product_attention(q, k, v, dropout_p=0.25)
    torch.manual_seed(5)
    assert torch.equal(first, iokernels.scaled_dot_product_attention(q, k, v, dropout_p=0.25))
    assert not torch.equal(first, second)
    assert first.std() > 0.02
    assert abs(first.mean().item() - 1.0) < 0.1


def test_dropout_of_everything_is_zero():
    q, k, v = leaf(1, 2, 3, 8), leaf(1, 2, 5, 8, seed=1), leaf(1, 2, 5, 8, seed=2)
    out = iokernels.scaled_dot_product_attention(q, k, v, dropout_p=1.0)
    assert not out.any()
    assert not torch.autograd.grad(out.sum(), v)[0].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_float32_mask_on_low_precision(dtype: torch.dtype):
    q, k, v = (leaf(1, 2, 16, 8, seed=i, dtype=dtype).detach() for i in range(3))
    mask = leaf(16, 16, dtype=torch.float32).detach()
    out = iokernels.scaled_dot_product_attention(q, k, v, mask)
    exact = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), mask.double())
    eager = torch.softmax(q @ k.mT * 8**-0.5 + mask.to(dtype), -1) @ v
    assert out.dtype == dtype
    check(out, exact, eager, factor=FORWARD, what="output")


def test_use_backend_reaches_it():
    q = leaf(1, 1, 3, 8)
    with iokernels.use_backend("cuda"), pytest.raises(iokernels.UnsupportedError, match="'cuda' cannot run this call"):
        iokernels.scaled_dot_product_attention(q, q, q)


# Dynamo makes an instance of every autograd.Function that it traces, and torch warns of that.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_whole(dynamic: bool):
    compiled = torch.compile(
        iokernels.scaled_dot_product_attention, fullgraph=True, dynamic=dynamic, backend="aot_eager"
    )
    for seqlen_q, seqlen_k in ((6, 6), (4, 6), (6, 4)):
        q, k, v = leaf(2, 2, seqlen_q, 8), leaf(2, 2, seqlen_k, 8, seed=1), leaf(2, 2, seqlen_k, 8, seed=2)
        expected = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        actual = compiled(q, k, v, is_causal=True)
        torch.testing.assert_close(actual, expected, **EXACT)
        (mine,), (theirs,) = (torch.autograd.grad(out.square().sum(), [k]) for out in (actual, expected))
        torch.testing.assert_close(mine, theirs, **EXACT)
    torch.compiler.reset()


def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.zeros(*shape, dtype=dtype)


X = zeros(2, 4, 5, 8)
REFUSED = {
    "one dimension": ((zeros(8), X, X), {}, ValueError, "query has 1 dimensions"),
    "not a tensor": ((X, [1.0], X), {}, TypeError, "key is list"),
    "head counts": ((X, zeros(2, 2, 5, 8), zeros(2, 2, 5, 8)), {}, ValueError, "enable_gqa=True"),
    "groups of unequal size": (
        (X, zeros(2, 3, 5, 8), zeros(2, 3, 5, 8)), {"enable_gqa": True}, ValueError, "must divide"
    ),
    "heads of keys and values": (
        (X, zeros(2, 2, 5, 8), zeros(2, 4, 5, 8)), {"enable_gqa": True}, ValueError, "key has 2 heads and value 4"
    ),
    "batches": ((X, zeros(3, 4, 5, 8), zeros(3, 4, 5, 8)), {}, ValueError, "must broadcast"),
    "lengths of keys and values": ((X, X, zeros(2, 4, 6, 8)), {}, ValueError, "v has shape"),
    "widths": ((X, zeros(2, 4, 5, 16), X), {}, ValueError, "k has shape"),
    "dtypes": ((X, X.double(), X), {}, TypeError, "k is float64"),
    "mask of one dimension": ((X, X, X, zeros(5)), {}, ValueError, "attn_mask has 1 dimensions"),
    "mask of integers": ((X, X, X, zeros(5, 5, dtype=torch.int64)), {}, TypeError, "must be bool or floating"),
    "mask of five dimensions": ((X, X, X, zeros(1, 2, 4, 5, 5)), {}, ValueError, "at most 4"),
    "mask that does not fit": ((X, X, X, zeros(5, 6)), {}, ValueError, "shape"),
    "mask of another batch": (
        (X[None], X[None], X[None], zeros(3, 2, 4, 5, 5)), {}, ValueError, "must broadcast to"
    ),
    "mask and is_causal": ((X, X, X, zeros(5, 5)), {"is_causal": True}, ValueError, "pass one of them"),
    "dropout above 1": ((X, X, X), {"dropout_p": 1.5}, ValueError, "dropout_p is 1.5"),
    "scale": ((X, X, X), {"scale": float("nan")}, ValueError, "scale is nan"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_refused_by_name(case: str):
    arguments, options, error, message = REFUSED[case]
    with pytest.raises(error, match=message):
        iokernels.scaled_dot_product_attention(*arguments, **options)

"""The input generators give what they say, and surround it with poison."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from torch import Tensor

from iokernels.testing import inputs

SHAPE = (2, 6, 2, 19, 23, 24, 16)
LAYOUTS = get_args(inputs.Layout)


def surroundings(*views: Tensor) -> Tensor:
    """The elements of the views' storage that belong to none of them."""
    storage = views[0].as_strided((views[0].untyped_storage().nbytes() // views[0].element_size(),), (1,), 0)
    outside = torch.ones(storage.shape, dtype=torch.bool)
    for view in views:
        outside.as_strided(view.shape, view.stride(), view.storage_offset()).fill_(False)
    return storage[outside]


def weights(q: Tensor, k: Tensor) -> Tensor:
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    return (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int32, torch.bool])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(2, 3, 5, 8), (1, 1, 1, 1), (2, 3, 0, 8), (3, 1, 4, 0)])
def test_poisoned_view_is_equal_and_surrounded(dtype, layout, shape):
    x = torch.randint(0, 2, shape).to(dtype) if dtype in (torch.int32, torch.bool) else torch.randn(shape).to(dtype)
    view = inputs.poisoned_view(x, layout)
    expected = x[:, :1].expand_as(x) if layout == "expanded" else x
    assert view.shape == x.shape
    assert view.dtype == dtype
    assert torch.equal(view, expected)
    around = surroundings(view)
    assert around.numel() >= 128
    if dtype.is_floating_point:
        assert around.isnan().all()
    else:
        assert (around == (True if dtype == torch.bool else torch.iinfo(dtype).max)).all()


def test_layouts_have_the_strides_they_name():
    x = torch.randn(2, 3, 5, 8)
    strides = {layout: inputs.poisoned_view(x, layout).stride() for layout in LAYOUTS}
    assert strides == {
        "contiguous": (120, 40, 8, 1),
        "bnhd": (120, 8, 24, 1),
        "seq_major": (24, 8, 48, 1),
        "padded": (195, 65, 13, 1),
        "strided": (240, 80, 16, 2),
        "expanded": (40, 0, 8, 1),
    }
    assert inputs.poisoned_view(x, "padded").data_ptr() % 8 == 4, "aligned, where it must not be"
    assert inputs.poisoned_view(x).data_ptr() % 16 == 0


@pytest.mark.parametrize("shape", [(), (7,), (3, 4)])
def test_poisoned_view_takes_any_rank(shape):
    x = torch.randn(shape)
    for layout in ("contiguous", "padded", "strided"):
        assert torch.equal(inputs.poisoned_view(x, layout), x)
    with pytest.raises(ValueError, match="needs 3"):
        inputs.poisoned_view(x, "bnhd")


@pytest.mark.parametrize("kind", get_args(inputs.Kind))
def test_seed_fixes_the_values_for_every_dtype_and_layout(kind):
    q, k, v = inputs.attention(5, *SHAPE, kind=kind)
    assert (q.shape, k.shape, v.shape) == ((2, 6, 19, 24), (2, 2, 23, 24), (2, 2, 23, 16))
    again = inputs.attention(torch.Generator().manual_seed(5), *SHAPE, kind=kind, layout="seq_major")
    low = inputs.attention(5, *SHAPE, kind=kind, dtype=torch.bfloat16, layout="padded")
    for x, same, rounded in zip((q, k, v), again, low, strict=True):
        assert torch.equal(x, same)
        assert torch.equal(x.bfloat16(), rounded)
    assert not torch.equal(q, inputs.attention(6, *SHAPE, kind=kind)[0])


def test_kinds_are_what_they_say():
    drawn = {kind: inputs.attention(1, 2, 6, 2, 64, 256, 32, kind=kind) for kind in get_args(inputs.Kind)}
    largest = {kind: weights(q, k).amax(-1) for kind, (q, k, _) in drawn.items()}
    assert 0.2 < largest["peaked"].median() < 0.8
    assert largest["flat"].max() < 2.0 / 256
    q, k, _ = drawn["large"]
    assert 10.0 < (q @ k[:, :1].mT * 32**-0.5).std() < 20.0
    assert largest["constant"].allclose(torch.tensor(1.0 / 256), rtol=1e-4)
    assert drawn["constant"][1].std(2).amin() > 0.5


def test_packed_qkv_is_three_views_of_one_storage():
    q, k, v = inputs.attention(3, 2, 6, 2, 9, 9, 24, 16, layout="packed_qkv")
    assert q.untyped_storage().data_ptr() == k.untyped_storage().data_ptr() == v.untyped_storage().data_ptr()
    for x, plain in zip((q, k, v), inputs.attention(3, 2, 6, 2, 9, 9, 24, 16), strict=True):
        assert torch.equal(x, plain)
    assert surroundings(q, k, v).isnan().all()
    with pytest.raises(ValueError, match="seqlen_q == seqlen_k"):
        inputs.attention(3, *SHAPE, layout="packed_qkv")


@pytest.mark.parametrize("layout", ["contiguous", "bnhd", "padded", "expanded"])
def test_packed_sequences(layout):
    lengths_q, lengths_k = [3, 0, 5, 1], [4, 2, 0, 7]
    q, k, v, cu_q, cu_k = inputs.packed(2, lengths_q, lengths_k, 6, 2, 24, 16, dtype=torch.float16, layout=layout)
    assert (q.shape, k.shape, v.shape) == ((9, 6, 24), (13, 2, 24), (13, 2, 16))
    assert cu_q.tolist() == [0, 3, 3, 8, 9]
    assert cu_k.tolist() == [0, 4, 6, 6, 13]
    assert cu_q.dtype == cu_k.dtype == torch.int32
    for x in (q, k, v):
        assert x.isfinite().all()
        assert surroundings(x).isnan().all()
    assert k.stride(1) == 0 if layout == "expanded" else k.stride(1) > 0
    none = inputs.packed(2, [], [], 6, 2, 24)
    assert [x.shape[0] for x in none] == [0, 0, 0, 1, 1]


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="kind is 'round'"):
        inputs.attention(0, *SHAPE, kind="round")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="layout is 'round'"):
        inputs.attention(0, *SHAPE, layout="round")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="lengths_q has 1 sequences and lengths_k 2"):
        inputs.packed(0, [1], [1, 2], 6, 2, 24)

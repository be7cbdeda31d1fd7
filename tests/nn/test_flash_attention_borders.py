"""nn.FlashAttention where other modules put it: in torch's own encoder, with nested tensors, under large masks."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from iokernels.nn import FlashAttention

PADDING = torch.tensor([[0, 0, 0, 0, 0], [0, 0, 0, 1, 1], [0, 1, 1, 1, 1]], dtype=torch.bool)
NESTED = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")


@NESTED
@pytest.mark.parametrize("kind", ["none", "bool", "float", "finfo.min"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")
@pytest.mark.filterwarnings("ignore:Support for mismatched")
def test_it_takes_the_place_of_the_attention_of_an_existing_encoder(norm_first: bool, causal: bool, kind: str) -> None:
    """In evaluation torch's encoder makes padded sequences nested before it calls its layers."""
    theirs = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, norm_first=norm_first), 2)
    theirs.eval()
    ours = copy.deepcopy(theirs)
    for layer in ours.layers:
        attention = FlashAttention(16, 2, batch_first=True)
        assert isinstance(layer.self_attn, nn.Module)
        attention.load_state_dict(layer.self_attn.state_dict())
        layer.self_attn = attention.eval()
    padding: Tensor | None = None if kind == "none" else PADDING
    if kind in ("float", "finfo.min"):
        padding = torch.zeros(3, 5).masked_fill(PADDING, -torch.inf if kind == "float" else torch.finfo().min)
    call: dict[str, Any] = {"src_key_padding_mask": padding}
    if causal:
        call |= {"mask": nn.Transformer.generate_square_subsequent_mask(5), "is_causal": True}
    x = torch.randn(3, 5, 16)
    real = ~PADDING if kind != "none" else torch.ones_like(PADDING)
    with torch.no_grad():
        torch.testing.assert_close(ours(x, **call)[real], theirs(x, **call)[real])
    torch.testing.assert_close(ours(x, **call)[real], theirs(x, **call)[real])


@NESTED
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged], ids=str)
@pytest.mark.parametrize("changes", [{}, {"causal": True}, {"add_bias_kv": True, "num_kv_heads": 1}], ids=str)
def test_a_nested_tensor_is_its_sequences_one_by_one(layout: Any, changes: dict[str, Any]) -> None:
    module = FlashAttention(16, 2, batch_first=True, **changes)
    parts = [torch.randn(n, 16) for n in (3, 1, 5)]
    nested = torch.nested.nested_tensor(parts, layout=layout)
    out, weights = module(nested, nested, nested)
    residual = nested + out
    assert weights is not None
    for i, part in enumerate(parts):
        expected, expected_weights = module(part, part, part)
        torch.testing.assert_close(out[i], expected)
        torch.testing.assert_close(residual[i], part + expected)
        assert expected_weights is not None
        shown = [*range(len(part)), *range(5, weights.shape[2])]
        torch.testing.assert_close(weights[i, : len(part)][:, shown], expected_weights)
        assert not weights[i, len(part) :].any()
        assert not weights[i, :, len(part) : 5].any()


@NESTED
def test_nested_tensors_that_do_not_fit_are_refused_by_name() -> None:
    x, y = (torch.nested.nested_tensor([torch.randn(n, 16) for n in lengths]) for lengths in ((3, 5), (4, 5)))
    module = FlashAttention(16, 2, batch_first=True)
    dense = torch.randn(2, 5, 16)
    with pytest.raises(TypeError, match=r"must all be nested tensors .*; key is not nested"):
        module(x, dense, dense)
    with pytest.raises(TypeError, match="batch_first is False"):
        FlashAttention(16, 2)(x, x, x)
    with pytest.raises(ValueError, match="key_padding_mask is given with nested tensors"):
        module(x, x, x, key_padding_mask=torch.zeros(2, 5, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"sequences of \[3, 5\] rows and key of \[4, 5\]"):
        FlashAttention(16, 2, batch_first=True, causal=True)(x, y, y)
    assert len(module(x, y, y)[0].unbind()) == 2


@pytest.mark.parametrize("pad", [-1e9, torch.finfo(torch.float32).min])
def test_weights_of_a_row_wholly_padded_with_a_large_number_sum_to_1(pad: float) -> None:
    module = FlashAttention(16, 2, batch_first=True)
    x = torch.randn(1, 5, 16, requires_grad=True)
    padding = torch.full((1, 5), pad)
    out, weights = module(x, x, x, key_padding_mask=padding)
    assert weights is not None
    torch.testing.assert_close(weights.sum(-1), torch.ones(1, 5))
    theirs = nn.MultiheadAttention(16, 2, batch_first=True)
    theirs.load_state_dict(module.state_dict())
    expected, expected_weights = theirs(x, x, x, key_padding_mask=padding)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(weights, expected_weights)
    (mine,), (wanted,) = (torch.autograd.grad(y.square().sum(), x) for y in (out, expected))
    torch.testing.assert_close(mine, wanted)

"""nn.HiPAttention: dense in training, sparse in evaluation, and decoding from a cache agrees with both."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from iokernels import SelectionCache, UnsupportedError, hip_attention
from iokernels.nn import DecodeAttention, HiPAttention, HiPCache, KVCache

SPARSE: dict[str, Any] = {"budget": 32, "sink": 8, "window": 16, "block_q": 16}


def pair(**options: Any) -> tuple[HiPAttention, DecodeAttention]:
    """The module and its dense twin, with one state_dict."""
    common: dict[str, Any] = {"num_kv_heads": 2, "rotary": 4, "max_positions": 200}
    sparse = HiPAttention(32, 4, **common, **{**SPARSE, **options})
    dense = DecodeAttention(32, 4, **common)
    dense.load_state_dict(sparse.state_dict())
    return sparse, dense


def test_trains_dense_and_evaluates_sparse() -> None:
    sparse, dense = pair()
    x = torch.randn(2, 150, 32)
    assert torch.equal(sparse(x), dense(x))
    everything = sparse.eval()
    out = everything(x)
    assert (out - dense(x)).abs().max() > 0.01
    torch.testing.assert_close(out[:, :16], dense(x[:, :16]))  # the first block of rows sees all there is
    sparse.budget = 200
    assert torch.equal(sparse(x), dense(x))


def test_sparse_training_has_gradients() -> None:
    sparse, dense = pair(sparse_training=True)
    x = torch.randn(1, 150, 32)
    out = sparse(x)
    assert (out - dense(x)).abs().max() > 0.01
    out.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.abs().sum() > 0 for p in sparse.parameters())


@pytest.mark.parametrize("refresh", [(1, 1, 1), None])
def test_decoding_searches_as_the_function_does(refresh: tuple[int, ...] | None) -> None:
    sparse, _ = pair()
    sparse.eval()
    x = torch.randn(2, 150, 32)
    with torch.no_grad():
        cache = sparse.new_cache(2, 160, refresh=refresh)
        cache.extend(128)
        prompt = sparse(x[:, :128], cache)
        torch.testing.assert_close(prompt, sparse(x)[:, :128])
        for step in range(128, 150):
            cache.extend(1)
            out = sparse(x[:, step : step + 1], cache)
            # A row alone is the last row of a call that holds it alone in its block of queries.
            keys, values = cache.held(0)
            projected = torch.nn.functional.linear(x[:, step : step + 1], sparse.in_proj_weight, sparse.in_proj_bias)
            q = projected[..., :32].unflatten(-1, (-1, 8)).transpose(1, 2)
            q = sparse._turned(q, cache.starts)
            expected = sparse.out_proj(hip_attention(q, keys, values, **SPARSE).transpose(1, 2).flatten(2))
            torch.testing.assert_close(out, expected)


def test_lists_are_kept_between_steps_and_forgotten_with_the_keys() -> None:
    sparse, _ = pair()
    sparse.eval()
    x = torch.randn(1, 150, 32)
    with torch.no_grad():
        cache = sparse.new_cache(1, 160, refresh=(4, 2, 1))
        selection = cache.selections[0]
        assert isinstance(selection, SelectionCache)
        cache.extend(100)
        sparse(x[:, :100], cache)
        assert selection.due() == (True, True, True)
        cache.extend(1)
        sparse(x[:, 100:101], cache)
        assert selection.due() == (False, False, True)
        cache.truncate([100])
        assert selection.due() == (True, True, True)


def test_a_trained_cache_step_is_dense() -> None:
    sparse, dense = pair()
    x = torch.randn(1, 110, 32)
    with torch.no_grad():
        caches = sparse.new_cache(1, 120), dense.new_cache(1, 120)
        for cache, module in zip(caches, (sparse, dense), strict=True):
            cache.extend(109)
            module(x[:, :109], cache)
            cache.extend(1)
        assert torch.equal(sparse(x[:, 109:], caches[0]), dense(x[:, 109:], caches[1]))


def test_what_does_not_fit_is_refused() -> None:
    sparse, dense = pair()
    sparse.eval()
    with pytest.raises(ValueError, match="budget is 0"):
        HiPAttention(32, 4, budget=0)
    with pytest.raises(UnsupportedError, match="page"):
        sparse.new_cache(1, 64, page=16)
    with pytest.raises(UnsupportedError, match="quantised"):
        sparse.new_cache(1, 64, dtype=torch.int8)
    with torch.no_grad():
        plain = dense.new_cache(1, 64)
        assert isinstance(plain, KVCache)
        plain.extend(4)
        with pytest.raises(TypeError, match="HiPCache"):
            sparse(torch.randn(1, 4, 32), plain)
        cache = sparse.new_cache(2, 64)
        assert isinstance(cache, HiPCache)
        cache.extend([3, 4])
        with pytest.raises(UnsupportedError, match="one length"):
            sparse(torch.randn(2, 4, 32), cache)

"""nn.HiPAttention at its borders: no rows, no sequences, and a cache that is saved."""

from __future__ import annotations

import io

import pytest
import torch

from iokernels.nn import HiPAttention, HiPCache


def module() -> HiPAttention:
    return HiPAttention(32, 4, budget=16, sink=2, window=4, block_q=16, num_kv_heads=2, rotary=4, max_positions=80)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("shape", [(0, 5), (2, 0), (0, 0)])
def test_no_rows_and_no_sequences(training: bool, shape: tuple[int, int]) -> None:
    x = torch.randn(*shape, 32, requires_grad=True)
    out = module().train(training)(x)
    assert out.shape == x.shape
    out.sum().backward()
    assert x.grad is not None


def test_a_step_of_no_positions_changes_nothing() -> None:
    sparse, x = module().eval(), torch.randn(1, 60, 32)
    with torch.no_grad():
        results = []
        for pause in (False, True):
            cache = sparse.new_cache(1, 64, refresh=(2, 1, 1))
            for start, stop in ((0, 50), (50, 51), (51, 51), (51, 52)):
                if stop == start and not pause:
                    continue
                cache.extend(stop - start)
                out = sparse(x[:, start:stop], cache)
                assert out.shape == (1, stop - start, 32)
            results.append(out)
    assert torch.equal(*results)


def test_every_layer_has_lists_of_its_own() -> None:
    cache = HiPCache(1, 16, 2, 8, layers=2, refresh=[4, 2, 1])
    assert [selection.refresh for selection in cache.selections if selection is not None] == [(4, 2, 1)] * 2
    assert cache.selections[0] is not cache.selections[1]


def test_a_sparse_cache_loads_by_default() -> None:
    sparse, x = module().eval(), torch.randn(1, 52, 32)
    with torch.no_grad():
        cache = sparse.new_cache(1, 64, refresh=(2, 1, 1))
        for start, stop in ((0, 50), (50, 51)):
            cache.extend(stop - start)
            sparse(x[:, start:stop], cache)
        file = io.BytesIO()
        torch.save(cache, file)
        file.seek(0)
        loaded = torch.load(file)
        for each in (cache, loaded):
            each.extend(1)
        assert torch.equal(sparse(x[:, 51:], cache), sparse(x[:, 51:], loaded))

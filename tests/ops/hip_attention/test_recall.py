"""How much of attention the selectors keep, on synthetic keys. Not whether kernels are right: that is exact, and is
asked elsewhere. Nothing here says how well a language model does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import iokernels
from iokernels import BlockIndex, block_sparse_attention, select_exact, select_hip, select_quest
from iokernels.ops.hip_attention.options import Region
from iokernels.ops.hip_attention.portable import Keys, slabs
from iokernels.ops.hip_attention.portable.everywhere import STRIDE_Q, search_units

from .selection import BUDGET, KEYS, SINK, WIDTH, WINDOW, always, listed, mass, named, oracle, text, walk, weights

COMMON: dict[str, Any] = {"budget": BUDGET, "sink": SINK, "window": WINDOW}


def units_of_two(q: Tensor, k: Tensor) -> Tensor:
    """bool ``[keys]``: what the global search finds in units of two keys, finer than a BlockIndex can say."""
    region = Region("kv", 64, SINK, WINDOW, True)
    (slab,) = slabs(q, k, region, STRIDE_Q, 1)
    units, _ = search_units(slab, Keys(q, k, 1), region, 2, BUDGET // 2)
    found = torch.zeros(k.shape[2], dtype=torch.bool)
    found[2 * units.flatten()] = True
    found[2 * units.flatten() + 1] = True
    return found


SELECTORS: dict[str, tuple[float, Callable[[Tensor, Tensor], Tensor]]] = {
    "stages": (0.92, lambda q, k: listed(select_hip(q, k, **COMMON))),
    "global, units of two": (0.96, units_of_two),
    "global, blocks of eight": (0.92, lambda q, k: listed(select_hip(q, k, search="global", **COMMON))),
    "quest, pages of 16": (0.85, lambda q, k: listed(select_quest(q, k, **COMMON))),
    "exact": (0.94, lambda q, k: listed(select_exact(q, k, **COMMON))),
}


@pytest.mark.parametrize("name", SELECTORS)
def test_mass_recall(name: str) -> None:
    """The mass that is kept, relative to that of the best keys of the block, one by one."""
    least, select = SELECTORS[name]
    worst, worst_row, above_random = 1.0, 1.0, float("inf")
    for length in (16, 32, 64):
        for seed in range(4):
            q, k, v = text(length, seed)
            for rows in (1, 64):
                p = weights(q[:, :, -rows:], k)
                kept = select(q[:, :, -rows:], k)
                best, found = mass(p, oracle(p, BUDGET)), mass(p, kept)
                chance = torch.randperm(KEYS, generator=torch.Generator().manual_seed(seed))[:BUDGET]
                random = mass(p, torch.zeros(KEYS, dtype=torch.bool).scatter(0, chance, True))
                worst = min(worst, (found.mean() / best.mean()).item())
                worst_row = min(worst_row, (found / best).min().item())
                above_random = min(above_random, (found.mean() / random.mean()).item())
                assert_identity(p, v, kept)
    print(f"{name}: worst {worst:.3f}, worst row {worst_row:.3f}, {above_random:.2f} times random")
    assert worst >= least
    assert above_random >= 2.0


def assert_identity(p: Tensor, v: Tensor, kept: Tensor) -> None:
    """Dropping a share 1 - m of the mass moves the output by at most ``2 (1 - m) max |v|``."""
    values = v[0, 0].double()
    shown = p * (always(*p.shape) | kept)
    m = shown.sum(-1)
    error = (shown / m[:, None] @ values - p @ values).norm(dim=-1)
    assert (error <= 2.0 * (1.0 - m) * values.norm(dim=-1).max() + 1e-12).all()


def test_the_operator_obeys_the_identity() -> None:
    q, k, v = text(32, 0)
    index = select_hip(q, k, **COMMON)
    out = block_sparse_attention(q, k, v, index)[0, 0].double()
    p = weights(q, k)
    error = (out - p @ v[0, 0].double()).norm(dim=-1)
    lost = 1.0 - mass(p, listed(index))
    assert (error <= 2.0 * lost * v[0, 0].norm(dim=-1).max() + 1e-4).all()
    assert (error > 0.01).any(), "something is lost, or this shows nothing"


def needle(width: int, position: int, keys: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A query, and keys that do not concern it but for ``width`` from ``position``, whose logits are 20."""
    k = torch.randn(keys, WIDTH, generator=generator)
    q = torch.randn(WIDTH, generator=generator)
    k[position : position + width] = q * (20.0 * WIDTH**0.5 / q.square().sum())
    return q[None, None, None], k[None, None]


def hit(index: BlockIndex, width: int, position: int) -> bool:
    """Whether a list has any block of the needle's."""
    blocks = range(position // index.block_k, (position + width - 1) // index.block_k + 1)
    return bool(set(blocks) & set(named(index)))


@pytest.mark.parametrize("keys", [8192, 8192 + 100])
def test_wide_needles_are_found_in_every_chunk(keys: int) -> None:
    """In each chunk of 256, the ragged last one included."""
    generator = torch.Generator().manual_seed(0)
    small: dict[str, Any] = {"budget": 1024, "sink": 64, "window": 128}
    last = keys - 128 - 64
    for start in (*range(64, last, 256), last):
        q, k = needle(64, start, keys, generator)
        assert hit(select_hip(q, k, **small), 64, start), f"stages: {start}"
        assert hit(select_hip(q, k, search="global", **small), 64, start), f"global: {start}"


def test_the_narrowest_needles_are_found_by_those_that_promise_it() -> None:
    generator = torch.Generator().manual_seed(0)
    small: dict[str, Any] = {"budget": 1024, "sink": 64, "window": 128}
    keys, found = 8292, 0
    positions = [*range(64, 8292 - 129, 397), 8292 - 129]
    for position in positions:
        q, k = needle(1, position, keys, generator)
        assert hit(select_quest(q, k, **small), 1, position)
        assert hit(select_exact(q, k, **small), 1, position)
        found += hit(select_hip(q, k, **small), 1, position)
    print(f"hierarchical search found {found} of {len(positions)} needles of one key; it promises none")


@pytest.mark.parametrize("heads", ["kv", "all", "query"])
def test_quest_keeps_its_promise(heads: str) -> None:
    """Every key whose logit, for any row that shares the list, exceeds the bound of the last listed page is listed."""
    generator = torch.Generator().manual_seed(1)
    k = torch.stack([walk(1000, 16, 8.0, generator) for _ in range(2)])[None].double()
    k[:, :, 37::150] *= 8.0
    q = torch.randn(1, 4, 70, 16, generator=generator).double()
    index = select_quest(q, k, budget=160, sink=8, window=48, block_q=32, heads=heads)
    bounds = iokernels.page_bounds(k)
    promised = 0
    for block in range(3):
        rows = torch.arange(32 * block, min(32 * block + 32, 70))
        limits = rows + 1000 - 70 - 48
        for group in range(index.indices.shape[1]):
            members = {"kv": [2 * group, 2 * group + 1], "all": [0, 1, 2, 3], "query": [group]}[heads]
            pages = named(index, group, block)
            scores, logits = [], []
            for head in members:
                rows_q, low, high = q[0, head, rows], bounds.kmin[0, head // 2], bounds.kmax[0, head // 2]
                bound = torch.maximum(rows_q[:, None] * low, rows_q[:, None] * high).sum(-1)
                first = 16 * torch.arange(bound.shape[1])
                scores.append(bound.masked_fill(first > limits[:, None], float("-inf")).amax(0))
                hidden = torch.arange(1000) > limits[:, None]
                logits.append((rows_q @ k[0, head // 2].T).masked_fill(hidden, float("-inf")).amax(0))
            threshold = torch.stack(scores).amax(0)[pages].min()
            for key in (torch.stack(logits).amax(0) > threshold).nonzero().flatten().tolist():
                assert key // 16 in pages or key < 8
                promised += 1
    assert promised > 10

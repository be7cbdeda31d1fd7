"""What the tests of the selectors measure with: keys that resemble their neighbours, needles, and mass that is kept."""

from __future__ import annotations

import math
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from iokernels import BlockIndex


def walk(rows: int, width: int, length: float, generator: torch.Generator) -> Tensor:
    """A stationary AR(1) sequence ``[rows, width]`` of unit variance, whose correlation falls by e in ``length``."""
    keep = math.exp(-1.0 / length)
    steps = torch.randn(rows, width, generator=generator) * math.sqrt(1.0 - keep**2)
    steps[0] = torch.randn(width, generator=generator)
    x = steps.clone()
    for row in range(1, rows):
        torch.add(x[row], x[row - 1], alpha=keep, out=x[row])
    return x


KEYS, WIDTH, BUDGET, SINK, WINDOW = 16384, 128, 2048, 128, 1024
QUERY_LENGTH = 256.0
"""Rows over which queries change: neighbouring queries of a model are alike."""


class Text(NamedTuple):
    """A block of 64 queries at the end of 16384 keys, as ``q [1, 1, 64, D]`` and ``k [1, 1, N, D]``."""

    q: Tensor
    k: Tensor
    v: Tensor


@cache
def text(length: int, seed: int) -> Text:
    """Keys that change over ``length`` positions, and queries three times as long as they are wide (gain 3)."""
    generator = torch.Generator().manual_seed(seed)
    k = walk(KEYS, WIDTH, length, generator)
    q = 3.0 * walk(64, WIDTH, QUERY_LENGTH, generator)
    return Text(*(x[None, None] for x in (q, k, torch.randn(KEYS, WIDTH, generator=generator))))


def weights(q: Tensor, k: Tensor) -> Tensor:
    """The softmax of causal attention, ``[rows, keys]``, of one head."""
    logits = q[0, 0].double() @ k[0, 0].double().T * q.shape[3] ** -0.5
    rows, keys = logits.shape
    hidden = torch.arange(keys) > torch.arange(rows)[:, None] + keys - rows
    return torch.softmax(logits.masked_fill(hidden, float("-inf")), dim=-1)


def always(rows: int, keys: int) -> Tensor:
    """bool ``[rows, keys]``: sink and window, causal."""
    position = torch.arange(rows)[:, None] + keys - rows
    number = torch.arange(keys)
    return ((number < SINK) | (number > position - WINDOW)) & (number <= position)


def mass(p: Tensor, listed: Tensor) -> Tensor:
    """What the keys ``listed [keys]`` or ``[rows, keys]``, sink and window keep of each row of ``p``."""
    return (p * (always(*p.shape) | listed)).sum(-1)


def oracle(p: Tensor, budget: int) -> Tensor:
    """bool ``[keys]``: the ``budget`` keys with the most mass in all rows together, beside sink and window."""
    best = (p * ~always(*p.shape)).sum(0).topk(budget).indices
    return torch.zeros(p.shape[1], dtype=torch.bool).scatter(0, best, True)


def listed(index: BlockIndex) -> Tensor:
    """bool ``[rows, keys]`` of an index for one head."""
    return index.to_mask(causal=True)[0, 0]


def named(index: BlockIndex, head: int = 0, block: int = 0) -> list[int]:
    """The blocks of one list."""
    return index.indices[0, head, block, : int(index.counts[0, head, block])].tolist()


def same_lists(ours: BlockIndex, theirs: BlockIndex) -> None:
    """Assert that two indexes name the same blocks, whatever stands in their tails."""
    assert torch.equal(ours.counts.cpu(), theirs.counts.cpu())
    valid = torch.arange(ours.indices.shape[3]) < ours.counts.cpu()[..., None]
    assert torch.equal(ours.indices.cpu()[valid], theirs.indices.cpu()[valid])
    assert (ours.sink, ours.window, ours.block_q, ours.block_k) == (
        theirs.sink, theirs.window, theirs.block_q, theirs.block_k,
    )  # fmt: skip
    assert ours.counts.sum() > 0, "empty lists are equal to one another"

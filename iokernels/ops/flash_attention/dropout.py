"""Which attention weights dropout keeps: one definition for every backend.

The weight of query row i and key j in head h of sequence b survives where the upper 31 bits of a random word, as a
number, are at least ``round(p * 2^31)``. The word is number ``j % 4`` of the four that Philox-4x32-10 (Salmon et al.,
2011, "Parallel random numbers: as easy as 1, 2, 3") makes of the counter ``(j // 4, i, b * Hq + h, 0)`` and the 64-bit
seed: a function of the position alone, so the backward pass recomputes it and tiles of any shape agree. Rows and keys
count from the start of their own sequence. ``triton_scores.keep_mask`` is the same in Triton.
"""

from __future__ import annotations

import torch
from torch import Tensor

_WORD = 0xFFFFFFFF


def threshold(p: float) -> int:
    """The smallest 31-bit number that survives dropout with probability ``p``."""
    return min(round(p * 2**31), 2**31 - 1)


def keep_mask(seed: Tensor, p: float, sequence_heads: Tensor, rows: Tensor, keys: Tensor) -> Tensor:
    """True where a weight survives: bool, of the broadcast shape of the three int64 index tensors.

    ``seed`` is int64 ``[1]``; ``sequence_heads`` holds ``b * Hq + h``. All stay on their device.
    """
    w0, w1, w2, w3 = _philox(seed, keys // 4, rows, sequence_heads)
    lane = keys % 4
    word = torch.where(lane < 2, torch.where(lane == 0, w0, w1), torch.where(lane == 2, w2, w3))
    return (word >> 1) >= threshold(p)


def keep_tile(seed: Tensor, p: float, sequence_heads: Tensor, rows: slice, keys: slice) -> Tensor:
    """:func:`keep_mask` of consecutive rows and keys, at a quarter of its cost: all four words of a counter are used.

    ``sequence_heads`` is int64 ``[..., 1, 1]``; the result ``[..., rows, keys]``.
    """
    device = sequence_heads.device
    counters = torch.arange(keys.start // 4, (keys.stop + 3) // 4, device=device)
    words = _philox(seed, counters, torch.arange(rows.start, rows.stop, device=device)[:, None], sequence_heads)
    kept = torch.stack([(word >> 1) >= threshold(p) for word in torch.broadcast_tensors(*words)], dim=-1)
    first = keys.start % 4
    return kept.flatten(-2)[..., first : first + keys.stop - keys.start]


def _philox(seed: Tensor, c0: Tensor, c1: Tensor, c2: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Ten rounds of Philox-4x32 on int64 tensors that hold 32-bit words; the fourth counter is 0."""
    key0, key1 = seed & _WORD, (seed >> 32) & _WORD
    c3 = torch.zeros_like(c0)
    for _ in range(10):
        high0, low0 = _wide_product(0xD2511F53, c0)
        high1, low1 = _wide_product(0xCD9E8D57, c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ key0, low1, high0 ^ c3 ^ key1, low0
        key0, key1 = (key0 + 0x9E3779B9) & _WORD, (key1 + 0xBB67AE85) & _WORD
    return c0, c1, c2, c3


def _wide_product(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """The high and low 32-bit halves of a 32 x 32-bit product, without passing 2^63."""
    upper, lower = (a >> 16) * b, (a & 0xFFFF) * b
    return (upper + (lower >> 16)) >> 16, (((upper & 0xFFFF) << 16) + lower) & _WORD

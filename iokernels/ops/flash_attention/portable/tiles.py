"""The tiles of the backend ``torch``: which rows and keys they hold, their scores, and what dropout keeps of them."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from iokernels.ops.flash_attention.dropout import keep_tile
from iokernels.ops.flash_attention.options import Options, narrowed
from iokernels.ops.shared.layout import state_dtype

_TILE_ELEMENTS = 2**20
"""Scores in one tile, all heads together: 4 MiB in float32, which stay in a second-level or shared cache."""


def block_sizes(batch_heads: int, seqlen_q: int, *, windowed: bool) -> tuple[int, int]:
    """Rows m and keys n of a tile.

    Twice as many keys as rows, because running statistics are updated once for each key block; narrower where a window
    or causality lets whole blocks be skipped. Short query sequences get longer key blocks.
    """
    area = max(_TILE_ELEMENTS // max(batch_heads, 1), 64 * 128)
    n = min(max(2 ** int(math.log2(math.sqrt(2 * area))), 128), 512 if windowed else 1024)
    m = min(max(area // n, 64), 512)
    if seqlen_q < m:
        m = max(seqlen_q, 1)
        n = max(n, min(area // m, 4096))
    return m, n


class Tiles:
    """How the scores of one dense batch, or of one packed sequence, are cut up.

    The tensors given to its methods are those of the constructor, or of the same shape. ``sequence`` is the number of
    the packed sequence. ``seqlen_q`` is its length where q holds its first rows only; the last row of that length
    stands at the last key.
    """

    def __init__(
        self, q: Tensor, k: Tensor, v: Tensor, options: Options, sequence: int = 0, seqlen_q: int | None = None
    ) -> None:
        self.options = options
        self.batch, self.heads, self.rows, self.head_dim = q.shape
        self.kv_heads, self.seqlen_k = k.shape[1:3]
        self.value_dim = v.shape[3]
        self.offset = self.seqlen_k - (self.rows if seqlen_q is None else seqlen_q)
        self.device = q.device
        self.dtype = state_dtype(q.dtype)
        self.first_head = sequence * self.heads
        self.windowed = options.window_left >= 0 or options.window_right >= 0
        self.block_m, self.block_n = block_sizes(self.batch * self.heads, self.rows, windowed=self.windowed)

    def row_blocks(self) -> Iterator[slice]:
        """The blocks of query rows; none where there is no batch or no head."""
        if self.batch * self.heads == 0:
            return
        for start in range(0, self.rows, self.block_m):
            yield slice(start, min(start + self.block_m, self.rows))

    def key_blocks(self, rows: slice) -> Iterator[slice]:
        """The blocks of keys that some of the rows see through the window."""
        left, right = self.options.window_left, self.options.window_right
        first = 0 if left < 0 else max(rows.start + self.offset - left, 0)
        stop = self.seqlen_k if right < 0 else min(rows.stop + self.offset + right, self.seqlen_k)
        for start in range(first, stop, self.block_n):
            yield slice(start, min(start + self.block_n, stop))

    def folded(self, x: Tensor, rows: slice) -> Tensor:
        """Rows of x [B, Hq, Nq, width] as [B * Hkv, G * m, width]: the heads of a group are rows of one product."""
        return (
            x[:, :, rows]
            .to(self.dtype)
            .reshape(self.batch * self.kv_heads, self.heads // self.kv_heads * (rows.stop - rows.start), x.shape[3])
        )

    def queries(self, q: Tensor, rows: slice) -> Tensor:
        """Rows of q times scale, [B * Hkv, G * m, D]."""
        return self.folded(q, rows) * self.options.scale

    def block(self, x: Tensor, keys: slice) -> Tensor:
        """Keys of x [B, Hkv, Nk, width] as [B * Hkv, n, width]; a view where dtype and strides allow one."""
        return x[:, :, keys].to(self.dtype).flatten(0, 1)

    def scores(self, q: Tensor, k: Tensor, rows: slice, keys: slice) -> tuple[Tensor, Tensor | None]:
        """The scores [B, Hq, m, n] of scaled queries and a block of keys, -inf where hidden.

        Also the derivative of the softcap at each score, or None without one.
        """
        options = self.options
        scores = self.unfold(torch.bmm(q, k.transpose(1, 2)), rows)
        slope = None
        if options.softcap > 0.0:
            scores.div_(options.softcap).tanh_()
            slope = 1.0 - scores.square()
            scores.mul_(options.softcap)
        if options.bias is not None:
            scores += narrowed(self.part(options.bias, rows, keys), self.dtype)
        sees_all = self._sees_all(rows, keys)
        if options.alibi_slopes is not None or not sees_all:
            distance = self._row_minus_key(rows, keys)
            if options.alibi_slopes is not None:
                scores -= options.alibi_slopes.to(self.dtype)[:, :, None, None] * distance.abs()
            if not sees_all:
                scores.masked_fill_(self._outside_window(distance), float("-inf"))
        if options.mask is not None:
            scores.masked_fill_(self.part(options.mask, rows, keys).logical_not(), float("-inf"))
        return scores, slope

    def may_hide(self, rows: slice, keys: slice) -> bool:
        """Whether some score of the tile can be -inf."""
        return self.options.mask is not None or self.options.bias is not None or not self._sees_all(rows, keys)

    def kept(self, rows: slice, keys: slice) -> Tensor | None:
        """True where dropout keeps a weight, [B, Hq, m, n]; None without dropout."""
        seed = self.options.dropout_seed
        if self.options.dropout_p == 0.0 or seed is None:
            return None
        heads = torch.arange(self.batch * self.heads, device=self.device).view(self.batch, self.heads, 1, 1)
        return keep_tile(seed, self.options.dropout_p, self.first_head + heads, rows, keys)

    def unfold(self, x: Tensor, rows: slice) -> Tensor:
        """[B * Hkv, G * m, width] as [B, Hq, m, width]."""
        return x.view(self.batch, self.heads, rows.stop - rows.start, x.shape[2])

    @staticmethod
    def part(x: Tensor, rows: slice, keys: slice) -> Tensor:
        """The tile's part of a mask or bias whose dimensions may be 1."""
        return x[:, :, rows if x.shape[2] > 1 else slice(None), keys if x.shape[3] > 1 else slice(None)]

    def _sees_all(self, rows: slice, keys: slice) -> bool:
        left, right = self.options.window_left, self.options.window_right
        return (left < 0 or keys.start >= rows.stop - 1 + self.offset - left) and (
            right < 0 or keys.stop - 1 <= rows.start + self.offset + right
        )

    def _row_minus_key(self, rows: slice, keys: slice) -> Tensor:
        """Position of each row among the keys, minus the key's: int64 [m, n]."""
        positions = torch.arange(rows.start + self.offset, rows.stop + self.offset, device=self.device)
        return positions[:, None] - torch.arange(keys.start, keys.stop, device=self.device)

    def _outside_window(self, distance: Tensor) -> Tensor:
        left, right = self.options.window_left, self.options.window_right
        if left < 0:
            return distance < -right
        if right < 0:
            return distance > left
        return (distance > left).logical_or_(distance < -right)

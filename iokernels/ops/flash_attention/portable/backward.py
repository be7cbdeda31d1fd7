"""The backward pass of the backend ``torch``, tile by tile. The maths stands in ``portable``."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from iokernels.ops.flash_attention.options import Needs, Options, of_sequence
from iokernels.ops.shared.layout import state_dtype

from .tiles import Tiles


class Sums(NamedTuple):
    """Gradients that all tiles add to, in the dtype of the tiles and the shape of the input; None where not needed."""

    bias: Tensor | None
    sinks: Tensor | None

    @staticmethod
    def zeros(q: Tensor, options: Options, needs: Needs) -> Sums:
        """Sums of nothing yet."""

        def like(x: Tensor | None, needed: bool) -> Tensor | None:
            return None if x is None or not needed else q.new_zeros(x.shape, dtype=state_dtype(q.dtype))

        return Sums(like(options.bias, needs.bias), like(options.sinks, needs.sinks))

    def of_sequence(self, options: Options, sequence: int, rows: slice, keys: slice) -> Sums:
        """Views of the part that one packed sequence adds to."""
        seqlens = rows.stop - rows.start, keys.stop - keys.start
        part = of_sequence(options._replace(bias=self.bias), sequence, *seqlens)
        return self._replace(bias=part.bias)


def backward_tiles(
    tiles: Tiles, dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    tail: Tensor | None, dq: Tensor | None, dk: Tensor | None, dv: Tensor | None, sums: Sums,
) -> None:  # fmt: skip
    """Fill dq, dk and dv (views of any strides, None where not needed) and add to the sums."""
    blocks = tiles.batch * tiles.kv_heads
    dk_sum = None if dk is None else q.new_zeros((blocks, tiles.seqlen_k, tiles.head_dim), dtype=tiles.dtype)
    dv_sum = None if dv is None else q.new_zeros((blocks, tiles.seqlen_k, tiles.value_dim), dtype=tiles.dtype)
    for rows in tiles.row_blocks():
        block_lse = lse[:, :, rows, None]
        # exp(s - inf) is 0 for any score: a row without a key takes part in nothing, whatever its gradients hold.
        keyless = block_lse == float("-inf")
        block_lse = block_lse.masked_fill(keyless, float("inf"))
        block_tail = None if tail is None else tail[:, :, rows, None]
        block_dout = dout[:, :, rows].to(tiles.dtype)
        delta = (block_dout * out[:, :, rows]).sum(-1, keepdim=True)
        if dlse is not None:
            delta -= dlse[:, :, rows, None]
        delta.masked_fill_(keyless, 0.0)
        if sums.sinks is not None and tiles.options.sinks is not None:
            sink_scores = tiles.options.sinks.to(tiles.dtype).view(1, -1, 1, 1).expand(block_lse.shape).clone()
            sink_weight = _weights(sink_scores, block_lse, block_tail)
            sums.sinks.sub_((sink_weight * delta).sum((0, 2, 3)))
        block_dq = _backward_rows(
            tiles,
            rows,
            tiles.queries(q, rows),
            k,
            v,
            tiles.folded(dout, rows),
            block_lse,
            block_tail,
            delta,
            dq is not None,
            dk_sum,
            dv_sum,
            sums.bias,
        )
        if dq is not None:
            dq[:, :, rows].copy_(tiles.unfold(block_dq, rows))
    for grad, total in ((dk, dk_sum), (dv, dv_sum)):
        if grad is not None and total is not None:
            grad.copy_(total.view(grad.shape))


def _backward_rows(
    tiles: Tiles, rows: slice, q: Tensor, k: Tensor, v: Tensor, dout: Tensor, lse: Tensor, tail: Tensor | None,
    delta: Tensor, wants_dq: bool, dk: Tensor | None, dv: Tensor | None, dbias: Tensor | None,
) -> Tensor:  # fmt: skip
    """Add one block of rows to dk, dv [B * Hkv, Nk, width] and dbias; return its dq [B * Hkv, G * m, D] (else zeros).

    q holds the scaled queries.
    """
    dq = torch.zeros_like(q)
    wants_scores = wants_dq or dk is not None or dbias is not None
    if not wants_scores and dv is None:
        return dq
    flat = (q.shape[0], q.shape[1], -1)
    for keys in tiles.key_blocks(rows):
        k_block = tiles.block(k, keys)
        scores, slope = tiles.scores(q, k_block, rows, keys)
        weights = _weights(scores, lse, tail)
        kept = tiles.kept(rows, keys)
        if dv is not None:
            dropped = weights if kept is None else (weights * kept).div_(1.0 - tiles.options.dropout_p)
            dv[:, keys].baddbmm_(dropped.view(*flat).transpose(1, 2), dout)
        if not wants_scores:
            continue
        dscores = tiles.unfold(torch.bmm(dout, tiles.block(v, keys).transpose(1, 2)), rows)
        if kept is not None:
            dscores.mul_(kept).div_(1.0 - tiles.options.dropout_p)
        dscores.sub_(delta).mul_(weights)
        if tiles.may_hide(rows, keys):
            # A hidden key passes no gradient even where its dP overflowed and 0 * inf made NaN.
            dscores.masked_fill_(weights == 0.0, 0.0)
        if dbias is not None:
            target = tiles.part(dbias, rows, keys)
            target += dscores.sum_to_size(target.shape)
        if slope is not None:
            dscores.mul_(slope)
        dscores = dscores.view(*flat)
        if wants_dq:
            dq.baddbmm_(dscores, k_block, alpha=tiles.options.scale)
        if dk is not None:
            dk[:, keys].baddbmm_(dscores.transpose(1, 2), q)
    return dq


def _weights(scores: Tensor, lse: Tensor, tail: Tensor | None) -> Tensor:
    """``exp(scores - lse - tail)``, in the place of the scores. Two subtractions: the sum would round to the LSE."""
    scores.sub_(lse)
    if tail is not None:
        scores.sub_(tail)
    return scores.exp_()

"""``flash_attention`` in chunked PyTorch: the backend ``torch``, for any device and any dtype.

Maths. Query rows are taken in blocks of m, keys in blocks of n. A row block walks the key blocks with a running
maximum M, sum L and unnormalised output A (online softmax; Dao et al., 2022, arXiv:2205.14135, section 3.1):

    S = scores(Q_i, K_j)    M' = max(M, rowmax S)    P = exp(S - M')    d = exp(M - M')
    L = d L + rowsum P      A = d A + drop(P) V_j    at the end  out = A / L,  lse = M + log L

The backward pass makes every tile again from lse (same paper, section 3.1; Dao, 2023, arXiv:2307.08691, section 3.1):

    P = exp(S - lse)        dV_j += drop(P)^T dO_i   dP = drop(dO_i V_j^T)
    dS = P (dP - delta)     delta = rowsum(dO_i * O_i) - dlse_i
    dbias += dS             dQ_i += scale dS K_j     dK_j += scale dS^T Q_i    dsink = -sum exp(sink - lse) delta

where drop() zeroes the dropped weights and divides by 1 - dropout_p; with a softcap, dS is multiplied by
``1 - tanh^2`` before the last two products. Key blocks that the window hides from all rows of a block are never made.

FLOPs, with P visible (row, key) pairs: ``2 B Hq P (D + Dv)`` forward, ``2 B Hq P (3 D + 2 Dv)`` backward. Bytes: q,
out and lse once, k and v once for each row block, ``ceil(Nq / m)`` times; the backward pass also reads dout once, reads
and writes dq once, and reads and writes dk and dv once for each row block. Extra memory: a few tiles of ``B Hq m n``,
and in the backward pass sums of the shape of dk and dv. Each elementwise step reads and writes its tile of S again: m
and n are chosen so that a tile stays in cache (:func:`.tiles.block_sizes`).

Tiles are float32 (float64 for float64 inputs). Query heads that share a key head are rows of one product, so k and v
are not repeated. PyTorch's own CPU kernel runs the calls for which it is the same function, as exact and faster.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from iokernels.ops.flash_attention.options import (
    Gradients,
    Needs,
    Options,
    empty_out,
    empty_statistics,
    lse_and_tail,
    of_sequence,
)
from iokernels.ops.shared.layout import empty_in_order_of

from .backward import Sums, backward_tiles
from .tiles import Tiles

_ATEN_FORWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_ATEN_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


def forward(q: Tensor, k: Tensor, v: Tensor, options: Options) -> tuple[Tensor, Tensor]:
    """Attention as :class:`Options` defines it: out [B, Hq, Nq, Dv] and :func:`empty_statistics`.

    Packed sequences are run one after the other; their offsets are read on the host.
    """
    out, statistics = empty_out(q, v), empty_statistics(q, options)
    lse, tail = lse_and_tail(statistics)
    if runs_in_aten(q, k, v, options):
        for member in _members(q, k):
            made, made_lse = _ATEN_FORWARD(q[:, member], k, v, 0.0, _causal(q, options), scale=options.scale)
            out[:, member].copy_(made)
            lse[:, member].copy_(made_lse)
        if not _aten_may_err(q, k, lse, options):
            return out, statistics
    if options.cu_seqlens_q is None:
        _forward_tiles(Tiles(q, k, v, options), q, k, v, out, lse, tail)
    else:
        out.zero_()
        lse.fill_(float("-inf"))
        if tail is not None:
            tail.zero_()
        for part in _sequences(q, k, options):
            rows, keys = part.rows, part.keys
            q_part, k_part, v_part = q[:, :, rows], k[:, :, keys], v[:, :, keys]
            tiles = Tiles(q_part, k_part, v_part, part.options, part.index, part.seqlen_q)
            tail_part = None if tail is None else tail[:, :, rows]
            _forward_tiles(tiles, q_part, k_part, v_part, out[:, :, rows], lse[:, :, rows], tail_part)
    return out, statistics


def backward(
    dout: Tensor, dstatistics: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, statistics: Tensor,
    options: Options, needs: Needs,
) -> Gradients:  # fmt: skip
    """The gradients that ``needs`` names, given those of out and, where the loss uses it, of lse."""
    lse, tail = lse_and_tail(statistics)
    dlse = None if dstatistics is None else lse_and_tail(dstatistics)[0]
    if dlse is None and runs_backward_in_aten(q, k, v, options) and not _aten_may_err(q, k, lse, options):
        dout, out = (x if _rows_are_contiguous(x) else x.contiguous() for x in (dout, out))
        return _backward_in_aten(dout, q, k, v, out, lse, options, needs)

    dq, dk, dv = (
        empty_in_order_of(x, x.shape[3]) if need else None for x, need in zip((q, k, v), needs[:3], strict=True)
    )
    sums = Sums.zeros(q, options, needs)
    if options.cu_seqlens_q is None:
        backward_tiles(Tiles(q, k, v, options), dout, dlse, q, k, v, out, lse, tail, dq, dk, dv, sums)
    else:
        for grad in (dq, dk, dv):
            if grad is not None:
                grad.zero_()
        for part in _sequences(q, k, options):
            rows, keys = part.rows, part.keys
            q_part, k_part, v_part = q[:, :, rows], k[:, :, keys], v[:, :, keys]
            backward_tiles(
                Tiles(q_part, k_part, v_part, part.options, part.index, part.seqlen_q),
                dout[:, :, rows],
                None if dlse is None else dlse[:, :, rows],
                q_part,
                k_part,
                v_part,
                out[:, :, rows],
                lse[:, :, rows],
                None if tail is None else tail[:, :, rows],
                None if dq is None else dq[:, :, rows],
                None if dk is None else dk[:, :, keys],
                None if dv is None else dv[:, :, keys],
                sums.of_sequence(options, part.index, rows, keys),
            )
    dbias = None if sums.bias is None or options.bias is None else sums.bias.to(options.bias.dtype)
    dsinks = None if sums.sinks is None or options.sinks is None else sums.sinks.to(options.sinks.dtype)
    return Gradients(dq, dk, dv, dbias, dsinks)


def runs_in_aten(q: Tensor, k: Tensor, v: Tensor, options: Options) -> bool:
    """Whether PyTorch's CPU flash kernel computes the same function of these arguments.

    It knows no windows, aligns a causal mask at the start, masks before it scales (which a scale that is not positive
    turns over), and takes rows for contiguous and apart without looking at their strides. Every row must have a key.
    Grouped heads are one call a member (:func:`_members`).
    """
    seqlen_q, seqlen_k = q.shape[2], k.shape[2]
    return (
        q.device.type == "cpu"
        and not any(isinstance(x, Tensor) for x in options)
        and options.softcap == 0.0
        and options.window_left == -1
        and (options.window_right == -1 or (options.window_right == 0 and seqlen_q in (1, seqlen_k)))
        and (options.scale > 1e-30 or not _causal(q, options))  # which is 0 to a kernel in float32
        and q.shape[3] == v.shape[3]
        and q.numel() > 0
        and seqlen_k > 0
        and all(_rows_are_contiguous(x) for x in (q, k, v))
    )


def _members(q: Tensor, k: Tensor) -> Iterator[slice]:
    """Query heads with one of each group, in the order of the key heads: the kernel wants as many of both."""
    group = q.shape[1] // k.shape[1]
    return (slice(member, None, group) for member in range(group))


def _backward_in_aten(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, options: Options, needs: Needs
) -> Gradients:
    """The kernel's backward pass, in which the members of a group add up to dk and dv."""
    dq, dk, dv = (
        empty_in_order_of(x, x.shape[3]) if need else None for x, need in zip((q, k, v), needs[:3], strict=True)
    )
    for index, member in enumerate(_members(q, k)):
        made = _ATEN_BACKWARD(
            dout[:, member], q[:, member], k, v, out[:, member], lse[:, member].contiguous(), 0.0,
            _causal(q, options), scale=options.scale,
        )  # fmt: skip
        if dq is not None:
            dq[:, member].copy_(made[0])
        for grad, part in ((dk, made[1]), (dv, made[2])):
            if grad is not None:
                grad.copy_(part) if index == 0 else grad.add_(part)
    return Gradients(dq, dk, dv)


def runs_backward_in_aten(q: Tensor, k: Tensor, v: Tensor, options: Options) -> bool:
    """Whether its backward pass does too. In half precision it adds up dk and dv in that precision, and the error grows
    with the length."""
    return q.dtype in (torch.float32, torch.float64) and runs_in_aten(q, k, v, options)


def _aten_may_err(q: Tensor, k: Tensor, lse: Tensor, options: Options) -> bool:
    """Whether the kernel may have met a score that is not finite, of which it makes 0 or a finite number in silence.

    It then leaves an LSE that is 0 or not finite (found by trying, in every dtype); an LSE of 0 is also that of one key
    whose score is 0. So the rows are looked at first, two passes over the LSE, and q and k only where one of them is
    such: no product can pass the range of float32 where the largest magnitudes do not.
    """
    if math.isfinite((lse / lse).sum().item()):
        return False
    largest = [x.abs().amax().double().item() for x in (q, k)]
    return not largest[0] * largest[1] * q.shape[3] * max(abs(options.scale), 1.0) < torch.finfo(torch.float32).max


def _causal(q: Tensor, options: Options) -> bool:
    """A single row at the end of the keys sees them all."""
    return options.window_right == 0 and q.shape[2] > 1


def _rows_are_contiguous(x: Tensor) -> bool:
    return x.stride(3) == 1 and x.stride(2) >= x.shape[3]


def _forward_tiles(
    tiles: Tiles, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, tail: Tensor | None
) -> None:  # fmt: skip
    """Fill out [B, Hq, Nq, Dv], lse [B, Hq, Nq] and what rounding takes from it, views of any strides."""
    for rows in tiles.row_blocks():
        block_out, highest, above = _forward_rows(tiles, tiles.queries(q, rows), k, v, rows)
        out[:, :, rows].copy_(block_out)
        block_lse = highest + above
        lse[:, :, rows].copy_(block_lse)
        if tail is not None:
            lost = (highest - block_lse).add_(above)
            tail[:, :, rows].copy_(lost.masked_fill_(block_lse == float("-inf"), 0.0))


def _forward_rows(tiles: Tiles, q: Tensor, k: Tensor, v: Tensor, rows: slice) -> tuple[Tensor, Tensor, Tensor]:
    """Online softmax of one block of rows, q [B * Hkv, G * m, D].

    Returns out [B, Hq, m, Dv], and two terms [B, Hq, m] whose sum is the lse: the highest score, and log of the sum.
    """
    shape = (tiles.batch, tiles.heads, rows.stop - rows.start, 1)
    sinks = tiles.options.sinks
    if sinks is None:
        highest = q.new_full(shape, float("-inf"))
        total = q.new_zeros(shape)
    else:
        highest = sinks.to(q.dtype).view(1, -1, 1, 1).expand(shape)
        total = (highest > float("-inf")).to(q.dtype)  # exp(sink - sink), and nothing of a sink that is -inf
    flat = (q.shape[0], q.shape[1], -1)
    acc = None
    for keys in tiles.key_blocks(rows):
        scores, _ = tiles.scores(q, tiles.block(k, keys), rows, keys)
        raised = torch.maximum(highest, scores.amax(-1, keepdim=True))
        # A row without a key so far: exp(-inf - 0) is 0 where exp(-inf - -inf) is NaN.
        base = raised.masked_fill(raised == float("-inf"), 0.0)
        weights = scores.sub_(base).exp_()
        decay = torch.exp(highest - base)
        total = total * decay + weights.sum(-1, keepdim=True)
        highest = raised
        kept = tiles.kept(rows, keys)
        if kept is not None:
            weights.mul_(kept)
        values = tiles.block(v, keys)
        if acc is None:
            acc = torch.bmm(weights.view(*flat), values)
        else:
            acc.mul_(decay.reshape(flat)).baddbmm_(weights.view(*flat), values)
    highest, above = highest.squeeze(-1), torch.log(total).squeeze(-1)
    if acc is None:
        return q.new_zeros((1, 1, 1, 1)).expand(*shape[:3], v.shape[3]), highest, above
    total = total.masked_fill(total == 0.0, 1.0).mul_(1.0 - tiles.options.dropout_p)
    return acc.view(*shape[:3], -1).div_(total), highest, above


class _Sequence(NamedTuple):
    """One packed sequence: where its rows and keys lie, and its options as those of a dense batch of one."""

    index: int
    rows: slice
    keys: slice
    seqlen_q: int  # rows holds fewer where the sequence is longer than max_seqlen_q
    options: Options


def _sequences(q: Tensor, k: Tensor, options: Options) -> Iterator[_Sequence]:
    """The sequences that have rows. Offsets outside the tensors are clamped; a negative length is none."""
    assert options.cu_seqlens_q is not None
    assert options.cu_seqlens_k is not None

    def bounds(offsets: Tensor, total: int) -> list[tuple[int, int]]:
        clamped = [min(max(offset, 0), total) for offset in offsets.tolist()]
        return [(start, max(start, stop)) for start, stop in pairwise(clamped)]

    pairs = zip(bounds(options.cu_seqlens_q, q.shape[2]), bounds(options.cu_seqlens_k, k.shape[2]), strict=True)
    for index, ((start_q, stop_q), (start_k, stop_k)) in enumerate(pairs):
        seqlen_q = stop_q - start_q
        rows = min(seqlen_q, options.max_seqlen_q)
        if rows == 0:
            continue
        yield _Sequence(
            index,
            slice(start_q, start_q + rows),
            slice(start_k, stop_k),
            seqlen_q,
            of_sequence(options, index, rows, stop_k - start_k),
        )

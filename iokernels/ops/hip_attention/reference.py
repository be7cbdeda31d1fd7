"""The oracle of the selectors: their definitions in Python loops, one block of rows, head and chunk after the other.

Computes in float32, in float64 for float64 inputs, on any device. Equal scores: the lower chunk comes first. A
score that is not a number, of one key and one row, counts as -inf, which is never selected.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from iokernels.runtime.errors import UnsupportedError
from iokernels.runtime.registration.precision import at_least_single

from .options import Region, Stage, block_end, empty_lists, query_blocks, searched_heads


def stage(
    q: Tensor, k: Tensor, ids: Tensor | None, counts: Tensor | None, region: Region, stage: Stage
) -> tuple[Tensor, Tensor]:
    """One stage of the search: ``(ids, counts)`` of the best ``stage.slots`` chunks, ascending."""
    kv_len = k.shape[2]

    def score(keys: Tensor, rows: Tensor, limits: Tensor, left: int, right: int) -> float:
        best = float("-inf")
        while True:
            centre = (left + right) // 2
            halves = ((left + centre) // 2, (centre + right) // 2)
            first, second = (_scores(rows @ keys[key], limits < key).max().item() for key in halves)
            best = max(best, first, second)
            if right - left <= 2:
                return best
            left, right = (left, centre) if first > second else (centre, right)

    def candidates(batch: int, head: int, block: int) -> list[int]:
        if ids is None or counts is None:
            return list(range(-(-kv_len // stage.chunk)))
        ratio = stage.parent // stage.chunk
        head = min(head, ids.shape[1] - 1)
        listed = ids[batch, head, block, : int(counts[batch, head, block])].tolist()
        return [parent * ratio + part for parent in listed for part in range(ratio)]

    def scored(batch: int, head: int, block: int) -> dict[int, float]:
        rows, limits = pooled(q, k, region, stage.stride_q, batch, head, block)
        end, found = block_end(block, q.shape[2], kv_len, region), {}
        for chunk in candidates(batch, head, block):
            left, right = max(chunk * stage.chunk, region.sink), min((chunk + 1) * stage.chunk, end)
            if left < right:
                found[chunk] = score(_keys(q, k, region, batch, head), rows, limits, left, right)
        return found

    return _lists(q, k, region, int(stage.slots), scored)


def pages(q: Tensor, k: Tensor, region: Region, page: int, slots: int) -> tuple[Tensor, Tensor]:
    """The pages whose largest possible logit is highest: ``(ids, counts)``.

    ``sum_d max(q_d kmin_d, q_d kmax_d)`` bounds ``q . k`` for every key of a page from above.
    """

    def scored(batch: int, head: int, block: int) -> dict[int, float]:
        rows, limits = pooled(q, k, region, 1, batch, head, block)
        end, found = block_end(block, q.shape[2], k.shape[2], region), {}
        for number, keys in enumerate(_keys(q, k, region, batch, head).split(page)):
            first = number * page
            if first < end and first + page > region.sink:
                # max(q low, q high) in each column; of an infinite key and no query there it is no number.
                bounds = rows.clamp(min=0.0) @ keys.amax(0) + rows.clamp(max=0.0) @ keys.amin(0)
                found[number] = _scores(bounds, limits < first).max().item()
        return found

    return _lists(q, k, region, slots, scored)


def exact(q: Tensor, k: Tensor, region: Region, block_k: int, slots: int) -> tuple[Tensor, Tensor]:
    """The blocks that hold the largest logits: ``(ids, counts)``."""

    def scored(batch: int, head: int, block: int) -> dict[int, float]:
        rows, limits = pooled(q, k, region, 1, batch, head, block)
        keys = _keys(q, k, region, batch, head)
        numbers = torch.arange(keys.shape[0], device=q.device)
        logits = _scores(rows @ keys.T, (numbers > limits[:, None]) | (numbers < region.sink))
        return {number: part.max().item() for number, part in enumerate(logits.split(block_k, dim=1))}

    return _lists(q, k, region, slots, scored)


def _scores(scores: Tensor, hidden: Tensor) -> Tensor:
    """``scores`` as far as they are reasons to select: -inf where hidden, and where not a number."""
    return scores.masked_fill(hidden | scores.isnan(), float("-inf"))


def pooled(
    q: Tensor, k: Tensor, region: Region, stride: int, batch: int, head: int, block: int
) -> tuple[Tensor, Tensor]:
    """``(rows [R, D], limits [R])``: means of ``stride`` neighbouring rows of every query head that is searched with
    ``head``, rounded to the dtype of q, and the last key that counts for any row of each mean."""
    group = q.shape[1] // searched_heads(region.heads, q.shape[1], k.shape[1])
    off = k.shape[2] - q.shape[2]
    stop = min((block + 1) * region.block_q, q.shape[2])
    dtype = at_least_single(q.dtype)
    rows, limits = [], []
    for member in range(head * group, (head + 1) * group):
        for first in range(block * region.block_q, stop, stride):
            last = min(first + stride, stop)
            rows.append(q[batch, member, first:last].to(dtype).sum(0) / (last - first))
            limits.append(last - 1 + off - region.window if region.causal else k.shape[2] - 1)
    return torch.stack(rows).to(q.dtype).to(dtype), torch.tensor(limits, device=q.device)


def _keys(q: Tensor, k: Tensor, region: Region, batch: int, head: int) -> Tensor:
    searched = searched_heads(region.heads, q.shape[1], k.shape[1])
    return k[batch, head * k.shape[1] // searched].to(at_least_single(q.dtype))


def _lists(
    q: Tensor, k: Tensor, region: Region, slots: int, scored: Callable[[int, int, int], dict[int, float]]
) -> tuple[Tensor, Tensor]:
    """The ``slots`` best of what ``scored(batch, head, block)`` found, for every list."""
    if q.is_meta:
        raise UnsupportedError(
            "hip_attention: backend 'reference' searches in Python, and meta tensors have no values to compare. "
            "Backends that can: torch, triton."
        )
    ids, counts = empty_lists(q, k.shape[1], slots, region)
    ids.zero_()
    searched = searched_heads(region.heads, q.shape[1], k.shape[1])
    for batch in range(q.shape[0]):
        for block in range(query_blocks(q.shape[2], region.block_q)):
            for head in range(ids.shape[1]):
                sharing = range(searched) if region.heads == "all" else (head,)
                best: dict[int, float] = {}
                for member in sharing:
                    for chunk, value in scored(batch, member, block).items():
                        best[chunk] = max(best.get(chunk, float("-inf")), value)
                best = {chunk: value for chunk, value in best.items() if value > float("-inf")}
                chosen = sorted(sorted(best, key=lambda chunk: (-best[chunk], chunk))[:slots])
                counts[batch, head, block] = len(chosen)
                ids[batch, head, block, : len(chosen)] = torch.tensor(chosen, dtype=torch.int32)
    return ids, counts

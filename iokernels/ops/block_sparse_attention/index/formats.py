"""Other libraries' formats of block-sparse attention, to and from :class:`.BlockIndex`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from iokernels.ops.block_sparse_attention.arguments import UNBOUNDED, keys, one_of
from iokernels.runtime.contracts import short
from iokernels.runtime.contracts.plain import flag, whole

if TYPE_CHECKING:
    from . import BlockIndex

KEY_BLOCKS = (8, 16, 32, 64, 128)
"""Sizes that a block of keys may have."""


def from_mask(
    mask: Tensor, *, block_q: int, block_k: int, sink: int | Tensor = 0, window: int | Tensor = 0,
    q_len: int | None = None, kv_len: int | None = None,
) -> BlockIndex:  # fmt: skip
    """An index from a mask of keys or of blocks. Nothing is read on the host; the lists have room for all blocks.

    Args:
        mask: bool ``[B, Hm, q_len, kv_len]``: a block is listed where any of its elements is True. Or, where ``q_len``
            and ``kv_len`` are given, a mask of blocks ``[B, Hm, Mq, Mk]``.
        block_q, block_k, sink, window: as in the class.
        q_len, kv_len: both (a mask of blocks) or neither.

    Raises:
        TypeError: mask is not bool, or has not 4 dimensions.
        ValueError: sizes that do not fit.
    """
    from . import BlockIndex

    if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.dim() != 4:
        raise TypeError("BlockIndex.from_mask: mask must be a bool tensor of 4 dimensions")
    block_q, block_k, q_len, kv_len = _sizes("BlockIndex.from_mask", block_q, block_k, q_len, kv_len)
    if (q_len is None) != (kv_len is None):
        raise ValueError("BlockIndex.from_mask: q_len and kv_len go together; give both for a mask of blocks")
    if q_len is None or kv_len is None:
        q_len, kv_len = mask.shape[2:]
        rows, columns = max(-(-q_len // block_q), 1), -(-kv_len // block_k)
        each = min(block_q, max(q_len, 1))
        padded = mask.new_zeros((*mask.shape[:2], rows * each, columns * block_k))
        padded[:, :, :q_len, :kv_len] = mask
        mask = padded.view(*mask.shape[:2], rows, each, columns, block_k).any(-1).any(3)
    elif mask.shape[3] != -(-kv_len // block_k):
        raise ValueError(
            f"BlockIndex.from_mask: mask has {mask.shape[3]} key blocks; {kv_len} keys in blocks of {block_k} are "
            f"{-(-kv_len // block_k)}"
        )
    # A stable sort puts the listed blocks first, in ascending order.
    order = torch.sort((~mask).to(torch.uint8), dim=-1, stable=True).indices.to(torch.int32)
    return BlockIndex(order, mask.sum(-1, dtype=torch.int32), block_q, block_k, sink, window, q_len, kv_len)


def from_bsr(
    crow_indices: Tensor, col_indices: Tensor, *, block_q: int, block_k: int, q_len: int, kv_len: int,
    sink: int | Tensor = 0, window: int | Tensor = 0,
) -> BlockIndex:  # fmt: skip
    """An index from compressed rows of blocks, as ``torch.sparse_bsr_tensor`` and FlashInfer have them.

    Args:
        crow_indices: integers ``[..., Mq + 1]``: row i has the entries from ``crow_indices[i]`` to the next. Up to two
            leading dimensions, ``[B, Hm]``; missing ones are 1.
        col_indices: integers ``[..., entries]``: key blocks, in any order in a row.

    Nothing is read on the host; a list has room for as many blocks as a row can have.

    Raises:
        ValueError: dimensions that do not fit.
    """
    from . import BlockIndex

    where = "BlockIndex.from_bsr"
    for name, x in (("crow_indices", crow_indices), ("col_indices", col_indices)):
        if not isinstance(x, Tensor) or x.dtype not in (torch.int32, torch.int64):
            kind = short(x.dtype) if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(f"{where}: {name} is {kind}; it must be a tensor of int32 or int64")
    q_len, kv_len = whole(where, "q_len", q_len, least=0), whole(where, "kv_len", kv_len, least=0)
    block_q, block_k, q_len, kv_len = _sizes(where, block_q, block_k, q_len, kv_len)
    if not 1 <= crow_indices.dim() == col_indices.dim() <= 3:
        raise ValueError(
            f"BlockIndex.from_bsr: crow_indices and col_indices have {crow_indices.dim()} and {col_indices.dim()} "
            "dimensions; both must have the same number, 1 to 3"
        )
    crow, col = (
        x.reshape((1,) * (3 - x.dim()) + tuple(x.shape)).long() for x in (crow_indices, col_indices)
    )  # fmt: skip
    blocks = -(-kv_len // block_k)
    room = min(col.shape[2], blocks)
    counts = crow[..., 1:] - crow[..., :-1]
    slots = torch.arange(room, device=crow.device)
    at = (crow[..., :-1, None] + slots).clamp(max=max(col.shape[2] - 1, 0))
    ids = col.gather(2, at.flatten(2)).view(at.shape)
    # What is not listed is sorted to the end.
    ids = torch.where(slots < counts[..., None], ids, blocks).sort(-1).values
    return BlockIndex(ids.to(torch.int32), counts.to(torch.int32), block_q, block_k, sink, window, q_len, kv_len)


def from_flex(block_mask: Any, *, sink: int | Tensor = 0, window: int | Tensor = 0) -> BlockIndex:
    """An index that lists every block of a ``torch.nn.attention.flex_attention.BlockMask``, partial and full.

    ``mask_mod`` is not part of it: of a partial block all keys are seen, but for what ``causal`` of the operator
    hides. Blocks must have a size that :class:`BlockIndex` takes.
    """
    from torch.nn.attention.flex_attention import BlockMask

    if not isinstance(block_mask, BlockMask):
        raise TypeError(f"BlockIndex.from_flex: block_mask is {type(block_mask).__name__}; it must be a BlockMask")
    given: Any = block_mask  # whose lists are there, though its class says that they may not be
    block_q, block_k = given.BLOCK_SIZE
    q_len, kv_len = given.seq_lengths
    mask = _table(given.kv_num_blocks, given.kv_indices)
    if given.full_kv_num_blocks is not None:
        mask = mask | _table(given.full_kv_num_blocks, given.full_kv_indices)
    # Their lists have a block for every 128 rows that a mask was made for; ours end with the sequence.
    rows, columns = -(-q_len // block_q), -(-kv_len // block_k)
    return from_mask(
        mask[:, :, :rows, :columns], block_q=block_q, block_k=block_k, sink=sink, window=window, q_len=q_len,
        kv_len=kv_len,
    )  # fmt: skip


def to_flex(index: BlockIndex, heads: int, *, causal: bool, block: int = 128) -> Any:
    """A ``torch.nn.attention.flex_attention.BlockMask`` of the same pairs of rows and keys.

    Args:
        heads: how many query heads there are; a multiple of the number of lists.
        causal: rows see keys up to their position.
        block: size of the mask's blocks, for queries and keys.

    Blocks that any pair of lies in are partial ones, and ``mask_mod`` says which pairs, from a table of all blocks of
    the index: fit for comparisons, at a price in memory of ``B * Hm * Mq * Mk`` bytes.

    Raises:
        ValueError: heads is not a multiple of the number of lists.
    """
    from torch.nn.attention.flex_attention import BlockMask

    where = "BlockIndex.to_flex"
    heads, block = keys(where, "heads", heads), one_of(where, "block", block, KEY_BLOCKS)
    causal = flag(where, "causal", causal)
    _, lists, query_blocks, _ = index.indices.shape
    if not 1 <= heads <= 2**16 or heads % lists:
        raise ValueError(f"{where}: heads is {heads}; it must be a multiple of the {lists} lists, at most {2**16}")
    table = _table(index.counts.clamp(min=0), index.indices, index.key_blocks) | (index.counts < 0)[..., None]
    device, of_list = index.device, heads // lists
    shift = index.kv_len - index.q_len
    sinks, windows = (
        x.to(device) if isinstance(x, Tensor) else torch.full((lists,), min(x, UNBOUNDED), device=device)
        for x in (index.sink, index.window)
    )  # fmt: skip
    rows_of = min(index.block_q, max(index.q_len, 1))

    def mask_mod(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        of = h // of_list
        position = q_idx + shift
        # Blocks of the mask may reach past the last row and key.
        row, column = (
            (q_idx // rows_of).clamp(max=query_blocks - 1),
            (kv_idx // index.block_k).clamp(max=index.key_blocks - 1),
        )
        seen = table[b, of, row, column] | (kv_idx < sinks[of])
        seen = seen | ((kv_idx <= position) & (kv_idx > position - windows[of]))
        return seen & (kv_idx <= position) if causal else seen

    pairs = index.to_mask(causal=causal).repeat_interleave(of_list, 1)
    coarse = from_mask(pairs, block_q=block, block_k=block)
    return BlockMask.from_kv_blocks(
        coarse.counts, coarse.indices, BLOCK_SIZE=block, mask_mod=mask_mod, seq_lengths=(index.q_len, index.kv_len)
    )


def _sizes(where: str, block_q: Any, block_k: Any, q_len: Any, kv_len: Any) -> tuple[int, int, Any, Any]:
    """Check the sizes of blocks and, where they are given, of the index."""
    q_len, kv_len = (None if x is None else keys(where, name, x) for name, x in (("q_len", q_len), ("kv_len", kv_len)))
    return keys(where, "block_q", block_q, least=1), one_of(where, "block_k", block_k, KEY_BLOCKS), q_len, kv_len


def _table(counts: Tensor, indices: Tensor, blocks: int | None = None) -> Tensor:
    """bool ``[B, H, Mq, Mk]``: which blocks the lists name."""
    blocks = indices.shape[3] if blocks is None else blocks
    listed = torch.arange(indices.shape[3], device=indices.device) < counts[..., None]
    ids = torch.where(listed, indices, blocks).long()
    table = torch.zeros((*counts.shape, blocks + 1), dtype=torch.bool, device=indices.device)
    return table.scatter_(-1, ids, True)[..., :-1]

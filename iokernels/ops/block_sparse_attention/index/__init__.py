"""Which keys each block of queries attends to: lists of key blocks, and keys that every row sees.

The layout is FlexAttention's (padded lists with counts), with two additions: the first keys of the sequence (``sink``)
and each row's latest keys (``window``) are numbers, not entries, and a count of -1 stands for all blocks. Selectors
return a :class:`BlockIndex`; :func:`iokernels.block_sparse_attention` consumes one.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from iokernels.ops.block_sparse_attention.arguments import UNBOUNDED
from iokernels.ops.block_sparse_attention.values import check_lists, check_not_negative
from iokernels.runtime.contracts import Contract, Spec
from iokernels.runtime.contracts.plain import flag, whole

from . import formats
from .formats import KEY_BLOCKS
from .transposed import TransposedLists, transposed_lists

_CONTRACT = Contract(
    "BlockIndex",
    indices=Spec("B Hm Mq S", (torch.int32,)),
    counts=Spec("B Hm Mq", (torch.int32,)),
    sink=Spec("Hm", (torch.int32,), optional=True),
    window=Spec("Hm", (torch.int32,), optional=True),
)


@dataclass(frozen=True)
class BlockIndex:
    """The keys of every query row, as lists of key blocks. Immutable.

    Row i of ``q_len`` stands at position ``i + kv_len - q_len`` of the keys. It sees the blocks that its block of
    queries lists, the first ``sink`` keys and its ``window`` latest, those at ``(position - window, position]``; each
    key once, however often it was named. ``causal`` is an argument of the operator, not of the index.

    Attributes:
        indices: int32 ``[B, Hm, Mq, S]``: key blocks of ``block_k`` keys that the query block lists, ascending and
            unique. What stands from ``counts`` on is never read. Hm is 1 (one list for all heads), Hkv (one for the
            query heads of a key head) or Hq. Any strides: a list for all sequences is an ``expand``.
        counts: int32 ``[B, Hm, Mq]``: how many entries are valid; -1: all blocks (a dense row, which needs no sink
            and no window).
        block_q: rows of a query block: a multiple of 16 up to 128; or at least ``q_len``, with Mq = 1 (decoding).
        block_k: keys of a key block: 8, 16, 32, 64 or 128.
        sink: how many of the first keys every row sees: an int, or int32 ``[Hm]`` where heads differ; 0: none.
        window: how many of the latest keys, its own position included, a row sees; likewise.
        q_len: how many query rows there are.
        kv_len: how many keys there are.

    Raises:
        TypeError: a field of a wrong type or dtype.
        ValueError: shapes or sizes that do not fit. The values of tensors are not read; for that see :meth:`validate`.
            A call on a CPU reads them and refuses what has no right answer.
    """

    indices: Tensor
    counts: Tensor
    block_q: int
    block_k: int
    sink: int | Tensor = 0
    window: int | Tensor = 0
    q_len: int = 0
    kv_len: int = 0

    def __post_init__(self) -> None:
        for name in ("block_q", "block_k", "q_len", "kv_len", "sink", "window"):
            value = getattr(self, name)
            if not isinstance(value, (int, torch.SymInt, Tensor)) and hasattr(type(value), "__index__"):
                object.__setattr__(self, name, whole("BlockIndex", name, value, least=0))  # NumPy's integers
        self.validate()

    def validate(self, deep: bool = False) -> BlockIndex:
        """Check types, shapes and sizes; return self.

        Args:
            deep: also check that counts are within -1 and S, that listed blocks exist, ascend and are unique, and
                that sinks and windows are not negative. Reads the device (it waits for it).

        Raises:
            TypeError, ValueError: as the class; of values, the message names the first wrong entry.
        """
        sizes = _CONTRACT.check(
            indices=self.indices,
            counts=self.counts,
            sink=self.sink if isinstance(self.sink, Tensor) else None,
            window=self.window if isinstance(self.window, Tensor) else None,
        )
        for name in ("block_q", "block_k", "q_len", "kv_len", "sink", "window"):
            _check_int(name, getattr(self, name))
        if self.block_k not in KEY_BLOCKS:
            raise ValueError(f"BlockIndex: block_k is {self.block_k}; it must be one of {KEY_BLOCKS}")
        if self.block_q >= self.q_len:
            blocks = 1
        else:
            if self.block_q > 128 or self.block_q % 16 != 0 or self.block_q == 0:
                raise ValueError(
                    f"BlockIndex: block_q is {self.block_q}; it must be a multiple of 16 from 16 to 128, "
                    f"or at least q_len, {self.q_len}"
                )
            blocks = -(-self.q_len // self.block_q)
        if sizes["Mq"] != blocks:
            raise ValueError(
                f"BlockIndex: indices lists {sizes['Mq']} blocks of queries; "
                f"{self.q_len} rows in blocks of {self.block_q} are {blocks}"
            )
        if flag("BlockIndex.validate", "deep", deep):
            self._check_values()
        return self

    def _check_values(self) -> None:
        check_lists(_CONTRACT, self.indices.cpu(), self.counts.cpu(), self.key_blocks, strict=True)
        for name, value in (("sink", self.sink), ("window", self.window)):
            if isinstance(value, Tensor):
                check_not_negative(_CONTRACT, name, value)

    @property
    def key_blocks(self) -> int:
        """How many blocks the keys have, the ragged last one included."""
        return -(-self.kv_len // self.block_k)

    @property
    def device(self) -> torch.device:
        """Where the lists are."""
        return self.indices.device

    def to(self, device: torch.device | str, non_blocking: bool = False) -> BlockIndex:
        """The same index on another device."""
        if not isinstance(device, (torch.device, str)):
            raise TypeError(f"BlockIndex.to: device is {type(device).__name__}; it must be a torch.device or a str")

        def moved(x: Any) -> Any:
            return x.to(device, non_blocking=non_blocking) if isinstance(x, Tensor) else x

        return replace(
            self,
            indices=moved(self.indices),
            counts=moved(self.counts),
            sink=moved(self.sink),
            window=moved(self.window),
        )

    def to_mask(self, *, causal: bool = False) -> Tensor:
        """bool ``[B, Hm, q_len, kv_len]``: True where a row sees a key, with ``causal`` only up to its position."""
        causal = flag("BlockIndex.to_mask", "causal", causal)
        return key_mask(
            self.indices, self.counts, self.block_q, self.block_k, self.sink, self.window, self.q_len, self.kv_len,
            causal,
        )  # fmt: skip

    def transpose(self) -> TransposedLists:
        """Which blocks of queries list each block of keys; made on the device, without waiting for it."""
        return transposed_lists(self.indices, self.counts, self.key_blocks)

    @staticmethod
    def from_mask(mask: Tensor, *, block_q: int, block_k: int, **fields: Any) -> BlockIndex:
        """An index from a mask of keys or of blocks; see :func:`.formats.from_mask`."""
        return formats.from_mask(mask, block_q=block_q, block_k=block_k, **fields)

    @staticmethod
    def from_bsr(crow_indices: Tensor, col_indices: Tensor, **fields: Any) -> BlockIndex:
        """An index from compressed rows of blocks; see :func:`.formats.from_bsr`."""
        return formats.from_bsr(crow_indices, col_indices, **fields)

    @staticmethod
    def from_flex(block_mask: Any, **fields: Any) -> BlockIndex:
        """An index from FlexAttention's BlockMask; see :func:`.formats.from_flex`."""
        return formats.from_flex(block_mask, **fields)

    def to_flex(self, heads: int, *, causal: bool, block: int = 128) -> Any:
        """FlexAttention's BlockMask for ``heads`` query heads; see :func:`.formats.to_flex`."""
        return formats.to_flex(self, heads, causal=causal, block=block)


def _check_int(name: str, value: Any) -> None:
    if isinstance(value, Tensor) and name in ("sink", "window"):
        return
    hint = " or an int32 tensor" if name in ("sink", "window") else ""
    whole("BlockIndex", name, value, least=0, hint=hint)


def bounded(value: Any) -> Any:
    """A number of an index as one that fits an operator: all that are more than there can be are alike."""
    return value if isinstance(value, Tensor) or value <= UNBOUNDED else UNBOUNDED


def key_mask(
    indices: Tensor, counts: Tensor, block_q: int, block_k: int, sink: int | Tensor, window: int | Tensor, q_len: int,
    kv_len: int, causal: bool, cache_seqlens: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """bool ``[B, Hm, q_len, kv_len]``, True where a row sees a key; see :class:`BlockIndex`.

    ``cache_seqlens`` int32 ``[B]``: how many of the keys each sequence has; None: all.
    """
    device = indices.device
    blocks = -(-kv_len // block_k)
    listed = torch.arange(indices.shape[3], device=device) < counts[..., None]
    listed = listed & (indices >= 0) & (indices < blocks)
    ids = torch.where(listed, indices, blocks).long()  # one column past the last takes what is not listed
    of_blocks = torch.zeros((*counts.shape, blocks + 1), dtype=torch.bool, device=device).scatter_(-1, ids, True)
    of_blocks = of_blocks[..., :-1] | (counts < 0)[..., None]
    row_block = torch.arange(q_len, device=device) // max(block_q, 1)
    keys = torch.arange(kv_len, device=device)
    mask = of_blocks[:, :, row_block][..., keys // block_k]

    lengths = torch.full((1,), kv_len, device=device) if cache_seqlens is None else cache_seqlens
    lengths = lengths.clamp(0, kv_len).long().view(-1, 1, 1, 1)
    position = torch.arange(q_len, device=device)[:, None] + (lengths - q_len)  # [B|1, 1, q_len, 1]
    sink, window = (x.view(1, -1, 1, 1) if isinstance(x, Tensor) else bounded(x) for x in (sink, window))
    mask = mask | (keys < sink) | ((keys <= position) & (keys > position - window))
    mask = mask & (keys < lengths)
    return mask & (keys <= position) if causal else mask

"""BlockIndex: what it accepts, what it means, and other libraries' formats."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, create_mask

from iokernels import BlockIndex
from iokernels.ops.block_sparse_attention.index.transposed import transposed_lists


def ints(*values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def small(**changes: Any) -> BlockIndex:
    """Two query blocks of 16 rows, three key blocks of 8 keys."""
    given: dict[str, Any] = {
        "indices": ints([[[0, 2], [1, 99]]]), "counts": ints([[2, 1]]), "block_q": 16, "block_k": 8, "q_len": 20,
        "kv_len": 20,
    }  # fmt: skip
    return BlockIndex(**(given | changes))


def by_hand(index: BlockIndex, causal: bool) -> Tensor:
    """The definition, one pair at a time."""
    batch, lists, _, _ = index.indices.shape
    seen = torch.zeros(batch, lists, index.q_len, index.kv_len, dtype=torch.bool)
    sink, window = (
        x.tolist() if isinstance(x, Tensor) else [x] * lists for x in (index.sink, index.window)
    )  # fmt: skip
    for b in range(batch):
        for h in range(lists):
            for i in range(index.q_len):
                block = 0 if index.block_q >= index.q_len else i // index.block_q
                count = int(index.counts[b, h, block])
                listed = index.indices[b, h, block, :count].tolist() if count >= 0 else range(index.key_blocks)
                p = i + index.kv_len - index.q_len
                for j in range(index.kv_len):
                    shown = j // index.block_k in listed or j < sink[h] or p - window[h] < j <= p
                    seen[b, h, i, j] = shown and not (causal and j > p)
    return seen


@pytest.mark.parametrize("causal", [False, True])
def test_the_mask_is_the_definition(causal: bool) -> None:
    torch.manual_seed(0)
    for sizes in ((40, 50), (50, 40), (7, 30)):
        mask = torch.rand(2, 3, *sizes) < 0.01
        index = BlockIndex.from_mask(mask, block_q=16, block_k=8, sink=ints(0, 3, 60), window=ints(5, 0, 1))
        index.validate(deep=True).counts[1, 2, 0] = -1
        assert index.to_mask(causal=causal).equal(by_hand(index, causal))


def test_a_mask_comes_back() -> None:
    blocks = torch.rand(2, 2, 3, 5, generator=torch.Generator().manual_seed(1)) < 0.5
    index = BlockIndex.from_mask(blocks, block_q=16, block_k=8, q_len=40, kv_len=37)
    elements = blocks.repeat_interleave(16, 2).repeat_interleave(8, 3)[:, :, :40, :37]
    assert index.to_mask().equal(elements)
    again = BlockIndex.from_mask(elements, block_q=16, block_k=8)
    assert again.indices.equal(index.indices)
    assert again.counts.equal(index.counts)
    # One element is enough to list a block.
    corners = torch.zeros_like(elements)
    corners[:, :, ::16, ::8] = elements[:, :, ::16, ::8]
    assert BlockIndex.from_mask(corners, block_q=16, block_k=8).to_mask().equal(elements)


def test_bsr() -> None:
    rows = ints(0, 2, 2, 5)
    index = BlockIndex.from_bsr(rows, ints(3, 0, 4, 1, 2), block_q=16, block_k=8, q_len=48, kv_len=37, window=2)
    index.validate(deep=True)
    assert [ids[:count].tolist() for ids, count in zip(index.indices[0, 0], index.counts[0, 0], strict=True)] == [
        [0, 3], [], [1, 2, 4]
    ]  # fmt: skip
    assert index.window == 2
    with pytest.raises(ValueError, match="col_indices have 1 and 2"):
        BlockIndex.from_bsr(rows, ints([1]), block_q=16, block_k=8, q_len=48, kv_len=37)


def test_flex_attention() -> None:
    def chessboard(b: Any, h: Any, i: Any, j: Any) -> Any:
        return ((i // 128 + j // 128 + h) % 2 == 0) & (j <= i)

    made = create_block_mask(chessboard, 1, 2, 300, 300, device="cpu")
    index = BlockIndex.from_flex(made).validate(deep=True)
    assert index.block_q == index.block_k == 128
    assert index.to_mask(causal=True).equal(create_mask(chessboard, 1, 2, 300, 300, device="cpu"))

    mask = torch.rand(2, 2, 70, 150, generator=torch.Generator().manual_seed(2)) < 0.002
    index = BlockIndex.from_mask(mask, block_q=32, block_k=16, sink=ints(0, 5), window=20)
    for causal in (False, True):
        back = index.to_flex(4, causal=causal)
        assert back.seq_lengths == (70, 150)
        expected = index.to_mask(causal=causal).repeat_interleave(2, 1)
        assert create_mask(back.mask_mod, 2, 4, 70, 150, device="cpu").equal(expected)
        blocks = BlockIndex.from_flex(back).to_mask()
        assert not (expected & ~blocks).any(), "a block that holds a pair is listed"
    with pytest.raises(ValueError, match="heads is 3"):
        index.to_flex(3, causal=True)


@pytest.mark.parametrize(("ratio", "joined"), [(1, 1), (4, 1), (4, 2)])
def test_the_transpose(ratio: int, joined: int) -> None:
    mask = torch.rand(2, 4, 6, 11, generator=torch.Generator().manual_seed(3)) < 0.4
    index = BlockIndex.from_mask(mask, block_q=16, block_k=8, q_len=96, kv_len=85)
    index.counts[1, 2, 3] = -1
    mask[1, 2, 3] = False
    slots = torch.arange(11)
    poisoned = torch.where(slots < index.counts[..., None], index.indices, 2**30)
    found = transposed_lists(poisoned, index.counts, 11, ratio=ratio, joined=joined)
    tiles = -(-11 // ratio)
    for b in range(2):
        for p in range(4 // joined):
            for t in range(tiles):
                span = slice(int(found.starts[b, p, t]), int(found.starts[b, p, t + 1]))
                own = [
                    (entry, [t * ratio + i for i in range(ratio) if bits >> i & 1])
                    for entry, bits in zip(
                        found.entries[b, p, span].tolist(), found.listed[b, p, span].tolist(), strict=True
                    )
                ]
                expected = []
                for entry in range(joined * 6):
                    row = mask[b, p * joined + entry // 6, entry % 6]
                    blocks = [j for j in range(t * ratio, min((t + 1) * ratio, 11)) if row[j]]
                    if blocks:
                        expected.append((entry, blocks))
                assert own == expected
    assert int(found.dense_counts.sum()) == 1
    assert found.dense[1, 2 // joined, 0] == 2 % joined * 6 + 3
    if ratio == joined == 1:
        direct = transposed_lists(index.indices, index.counts, 11)
        assert all(x.equal(y) for x, y in zip(index.transpose(), direct, strict=True))


def test_it_moves() -> None:
    moved = small(sink=ints(3)).to("meta")
    assert moved.device.type == "meta"
    assert isinstance(moved.sink, Tensor)
    assert moved.sink.is_meta
    assert moved.window == 0
    assert moved.key_blocks == 3


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"indices": torch.zeros(1, 1, 2, 2)}, TypeError, "indices is float32; it must be int32"),
        ({"counts": ints([2, 1])}, ValueError, "counts has 2 dimensions"),
        ({"counts": ints([[2, 1, 0]])}, ValueError, "counts has shape"),
        ({"sink": ints(1, 2)}, ValueError, "sink has shape"),
        ({"sink": -1}, ValueError, "sink is -1; it must be at least 0"),
        ({"window": 1.5}, TypeError, "window is float; it must be an int or an int32 tensor"),
        ({"q_len": True}, TypeError, "q_len is bool; it must be an int"),
        ({"block_k": 24}, ValueError, "block_k is 24; it must be one of"),
        ({"block_q": 19}, ValueError, "block_q is 19; it must be a multiple of 16"),
        ({"q_len": 40}, ValueError, "lists 2 blocks of queries; 40 rows in blocks of 16 are 3"),
        ({"block_q": 20}, ValueError, "lists 2 blocks of queries; 20 rows in blocks of 20 are 1"),
    ],
    ids=lambda x: str(x)[:30],
)
def test_wrong_fields(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        small(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"counts": ints([[3, 1]])}, "counts has values outside -1 to 2"),
        ({"counts": ints([[2, 2]])}, "indices lists blocks outside 0 to 2"),
        ({"indices": ints([[[2, 0], [1, 9]]])}, "does not ascend"),
        ({"indices": ints([[[1, 1], [1, 9]]])}, "names a block twice"),
        ({"window": ints(-1)}, "window has negative values"),
    ],
    ids=lambda x: str(x)[:30],
)
def test_wrong_values(changes: dict[str, Any], message: str) -> None:
    index = small(**changes)
    with pytest.raises(ValueError, match=message):
        index.validate(deep=True)


def test_wrong_masks() -> None:
    with pytest.raises(TypeError, match="mask must be a bool tensor of 4 dimensions"):
        BlockIndex.from_mask(torch.ones(2, 2), block_q=16, block_k=8)
    mask = torch.ones(1, 1, 2, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match="go together"):
        BlockIndex.from_mask(mask, block_q=16, block_k=8, q_len=20)
    with pytest.raises(ValueError, match="mask has 3 key blocks; 40 keys in blocks of 8 are 5"):
        BlockIndex.from_mask(mask, block_q=16, block_k=8, q_len=20, kv_len=40)
    assert replace(small(), window=3).window == 3

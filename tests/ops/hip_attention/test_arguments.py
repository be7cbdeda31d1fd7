"""Every argument that is no tensor, of every function of the room: right, or an error that names it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import iokernels
from iokernels import BlockIndex, SelectionCache, hip_attention, mix_heads, page_bounds, select_hip
from iokernels.nn import HiPAttention, HiPCache

from .selection import same_lists

Q, K = torch.randn(1, 4, 20, 16), torch.randn(1, 2, 60, 16)
SMALL: dict[str, Any] = {"budget": 16, "sink": 2, "window": 4}
VALUES: dict[str, Any] = {
    "a string": "x", "bytes": b"x", "a float": 1.5, "16.0": 16.0, "True": True, "NumPy's True": np.bool_(True),
    "NumPy's 16": np.int64(16), "NumPy's 1.5": np.float32(1.5), "-1": -1, "0": 0, "1": 1, "2**63": 2**63,
    "10**400": 10**400, "None": None, "a tensor": torch.tensor(16), "a list": [16], "a tuple": (True, False),
    "nan": float("nan"),
}  # fmt: skip


anything: Any = iokernels  # whose functions are called as their types forbid


def small_index() -> BlockIndex:
    return iokernels.select_window(Q, K, sink=2, window=4, block_q=16)


def call(function: Callable[..., Any], *given: Any, **usual: Any) -> Callable[..., Any]:
    return lambda **changes: function(*given, **{**usual, **changes})


CALLS: dict[str, tuple[Callable[..., Any], tuple[str, ...]]] = {
    "select_hip": (
        call(select_hip, Q, K, **SMALL),
        ("budget", "sink", "window", "causal", "search", "stages", "block_k", "branch", "heads", "block_q"),
    ),
    "select_hip.global": (
        call(select_hip, Q, K, search="global", **SMALL), ("budget", "sink", "window", "block_k", "branch")
    ),
    "select_quest": (
        call(iokernels.select_quest, Q, K, **SMALL), ("bounds", "budget", "page", "heads", "block_q", "sink", "causal")
    ),
    "select_exact": (call(iokernels.select_exact, Q, K, **SMALL), ("budget", "block_k", "heads", "block_q", "window")),
    "select_window": (call(iokernels.select_window, Q, K), ("sink", "window", "block_q", "block_k")),
    "select_dense": (call(iokernels.select_dense, Q, K), ("block_q", "block_k")),
    "page_bounds": (call(page_bounds, K), ("page", "out", "first")),
    "page_bounds.out": (call(page_bounds, K, out=page_bounds(K)), ("first",)),
    "mix_heads": (
        call(mix_heads, chosen=torch.tensor([True, False]), first=small_index(), second=small_index()),
        ("chosen", "first", "second"),
    ),
    "hip_attention": (
        call(hip_attention, Q, K, K, **SMALL),
        ("budget", "sink", "window", "causal", "selection", "heads", "block_q", "return_lse", "backend"),
    ),
    "block_sparse_attention": (
        call(iokernels.block_sparse_attention, Q, K, K, index=small_index()),
        ("index", "causal", "return_lse", "block_table", "cache_seqlens", "backend"),
    ),
    "BlockIndex": (
        call(BlockIndex, indices=small_index().indices, counts=small_index().counts, block_q=16, block_k=8, q_len=20,
             kv_len=60),
        ("indices", "counts", "block_q", "block_k", "sink", "window", "kv_len"),
    ),
    "from_mask": (
        call(BlockIndex.from_mask, mask=torch.ones(1, 1, 20, 60, dtype=torch.bool), block_q=16, block_k=8),
        ("mask", "block_q", "block_k", "sink", "window", "q_len", "kv_len"),
    ),
    "from_bsr": (
        call(BlockIndex.from_bsr, crow_indices=torch.tensor([0, 1]), col_indices=torch.tensor([0]), block_q=32,
             block_k=8, q_len=20, kv_len=60),
        ("crow_indices", "col_indices", "block_q", "block_k", "sink", "window", "q_len", "kv_len"),
    ),
    "from_flex": (BlockIndex.from_flex, ("block_mask",)),
    "to_flex": (call(small_index().to_flex, heads=4, causal=True), ("heads", "causal", "block")),
    "to_mask": (small_index().to_mask, ("causal",)),
    "validate": (small_index().validate, ("deep",)),
    "SelectionCache": (SelectionCache, ("refresh", "stages")),
    "SelectionCache.select": (
        lambda **changes: SelectionCache().select(Q[:, :, :1], K, **{**SMALL, **changes}),
        ("budget", "sink", "window", "heads", "block_q"),
    ),
    "HiPAttention": (
        partial(HiPAttention, 32, 4), ("budget", "sink", "window", "heads", "block_q", "sparse_training")
    ),
    "HiPCache": (partial(HiPCache, 1, 16, 2, 8), ("refresh",)),
}  # fmt: skip


@pytest.mark.parametrize(("name", "argument"), [(name, x) for name, (_, names) in CALLS.items() for x in names])
def test_an_argument_is_right_or_named(name: str, argument: str) -> None:
    function, refused = CALLS[name][0], 0
    for what, value in VALUES.items():
        said = ""
        try:
            function(**{argument: value})
        except (TypeError, ValueError) as error:
            said = str(error)
        # Where a size makes the lists too few, they are what is named.
        assert not said or argument in said or "indices lists" in said, f"{what}: {said}"
        refused += said != ""
    assert refused > 0


def test_numpy_integers_are_integers() -> None:
    whole: dict[str, Any] = {name: np.int64(value) for name, value in (SMALL | {"block_q": 16}).items()}
    same_lists(select_hip(Q, K, **whole), select_hip(Q, K, **SMALL, block_q=16))
    stages: Any = ((np.int32(32), np.int64(4), np.int64(64)), (np.int64(8), np.int64(1)))
    same_lists(select_hip(Q, K, stages=stages, **SMALL), select_hip(Q, K, stages=((32, 4, 64), (8, 1)), **SMALL))
    sizes: Any = (np.int64(16), np.int64(8), np.int32(2), np.int32(4), np.int64(20), np.int64(60))
    index = BlockIndex(small_index().indices, small_index().counts, *sizes)
    out = iokernels.block_sparse_attention(Q, K, K, index)
    assert torch.equal(out, iokernels.block_sparse_attention(Q, K, K, small_index()))


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda q, k: anything.select_window(None, k), "q is None"),
        (lambda q, k: anything.select_dense(q[0], k), "q has 3 dimensions"),
        (lambda q, k: anything.select_window(q, k[..., :8]), "k has shape"),
        (lambda q, k: anything.select_window([], k), "q is list"),
        (lambda q, k: anything.select_hip(q, k, stages="abc"), "stages is str"),
        (lambda q, k: anything.select_hip(q, k, stages=((8, 1.5),)), r"stride_q of stages\[0\] is float"),
        (lambda q, k: anything.page_bounds(k, first=1.5), "first is float"),
        (lambda q, k: anything.hip_attention(q, k, k, selection=lambda q, k: None), "selection returned NoneType"),
        (lambda q, k: anything.hip_attention(q[..., :0], k[..., :0], k), "0 wide"),
        (lambda q, k: HiPAttention(32, 4, scale=-1.0), "scale is -1"),
        (lambda q, k: anything.select_window(q, k).to(1.5), "device is float"),
    ],
)
def test_what_is_wrong_is_named(function: Callable[[Tensor, Tensor], Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        function(Q, K)


def test_indexes_of_different_calls_do_not_mix() -> None:
    first, second = (iokernels.select_window(*(x.expand(b, -1, -1, -1) for x in (Q, K))) for b in (1, 2))
    with pytest.raises(ValueError, match="second has lists for 2 sequences and first for 1"):
        mix_heads(torch.tensor([True, False]), first, second)
    with pytest.raises(ValueError, match="second is on meta; it must be on cpu"):
        mix_heads(torch.tensor([True, False]), first, first.to("meta"))
    mixed = mix_heads(torch.tensor([True, False]), iokernels.select_window(Q, K, window=10**400), first)
    assert iokernels.block_sparse_attention(Q, K, K, mixed).isfinite().all()

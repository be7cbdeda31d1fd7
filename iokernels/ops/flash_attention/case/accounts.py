"""The IO accounts of flash_attention: its model, the naive formula and the lower bound, by shape."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch

from iokernels.ops.flash_attention.triton.tuning import KERNELS, Config
from iokernels.testing.case.accounts import Account, Accounts, Bound, Configs, OnChip
from iokernels.testing.case.shape import Shape

from . import compile as kernels
from . import traffic as model
from .shapes import VOCABULARY, lengths


def problem(shape: Shape, dtype: torch.dtype) -> model.Problem:
    """What the model needs to know of a shape."""
    sides = lengths(shape)
    return model.Problem(
        lengths=tuple(sides),
        heads=shape.h,
        kv_heads=shape.hkv,
        head_dim=shape.d,
        value_dim=shape.dv,
        itemsize=dtype.itemsize,
        window_left=shape.left,
        window_right=0 if shape.causal else shape.right,
        packed=bool(shape.packed),
        longest=(shape.n, shape.nk),
        dlse=bool(shape.lse),
        mask=bool(shape.mask),
        bias_batch=(0, shape.b, 1)[shape.bias],
        alibi=bool(shape.alibi),
        sinks=bool(shape.sinks),
        dropout=shape.dropout > 0,
    )


def accounts(shape: Shape, dtype: torch.dtype, configs: Configs) -> dict[str, Account]:
    """The account of every kernel."""
    return model.accounts(problem(shape, dtype), dict(configs))


NAIVE = (
    "S = q k^T, P = softmax(S), out = P v; then dv = P^T dO, dP = dO v^T, dS = P (dP - delta), dq = dS k, dk = dS^T q. "
    "Each product and each softmax reads its operands and writes its result once, in the inputs' dtype, for hidden "
    "scores too; whatever changes scores (bias, mask, a soft cap, dropout) is taken to happen within the softmax"
)


def naive_bytes(shape: Shape, dtype: torch.dtype, which: Literal["fwd", "bwd"]) -> int:
    """The bytes of :data:`NAIVE`: 4 matrices of scores cross memory forward, 7 backward (8 with the gradient of a bias
    that all sequences share). A lower estimate, because elementwise steps are free and P is kept for backward."""
    known = problem(shape, dtype)
    scores = known.itemsize * known.heads * sum(n * nk for n, nk in known.lengths)
    q, out = (known.itemsize * known.rows * width for width in (shape.d, shape.dv))
    k, v = (known.itemsize * known.keys * width for width in (shape.d, shape.dv))
    if which == "fwd":
        return 4 * scores + q + k + v + out + known.options_once
    # dv reads dO; dP reads dO and v; dq reads k; dk reads q; three gradients are written.
    products = 2 * out + v + k + q + (q + k + v)
    return 7 * scores + products + (scores + known.bias_bytes if shape.bias == 2 else known.bias_bytes)


def on_chip_bytes(shape: Shape, dtype: torch.dtype, configs: Configs) -> int:
    """What a block of the forward kernel holds: tiles of q, k and v, and in float32 the scores and the output."""
    config = configs["flash_attention_fwd"]
    tiles = config.block_m * shape.d + config.block_n * (shape.d + shape.dv)
    return dtype.itemsize * tiles + 4 * config.block_m * (config.block_n + shape.dv)


def tilings(shape: Shape, dtype: torch.dtype) -> Iterator[Configs]:
    """Tiles from 16 x 16 up to the whole sequence, powers of two. Their shape is all that counts here."""
    rows, keys = (
        [2**power for power in range(4, 20) if 2**power < 2 * max(length, 16)] for length in (shape.n, shape.nk)
    )
    for block_m in rows:
        for block_n in keys:
            yield dict.fromkeys(KERNELS, Config(block_m, block_n, num_warps=4, num_stages=1))


def lower_bound(shape: Shape, dtype: torch.dtype, nbytes: int) -> Bound:
    """Saha & Ye (2024), "The I/O Complexity of Attention, or How Optimal is FlashAttention?", arXiv:2402.07443.

    A head of N queries and keys with M elements of fast memory moves Theta(N^2 d^2 / M) elements where M >= d^2, and
    Theta(N^2 d / sqrt(M)) where M < d^2, as many as a product of matrices (there for algorithms that multiply them in
    the ordinary way). With Nq queries, N^2 stands for Nq Nk; the sum is over heads and sequences, in bytes. Options and
    windows are left out.
    """
    elements = nbytes / dtype.itemsize
    scores = shape.h * sum(n * nk for n, nk in lengths(shape))
    if elements >= shape.d**2:
        moved, formula = scores * shape.d**2 / elements, "N^2 d^2 / M  (M >= d^2)"
    else:
        moved, formula = scores * shape.d / elements**0.5, "N^2 d / sqrt(M)  (M < d^2)"
    return Bound(moved * dtype.itemsize, formula, "Saha & Ye 2024, forward pass, all keys visible")


_TILES = {
    "flash_attention_fwd": Config(16, 32, 4, 2),
    "flash_attention_bwd_dq": Config(32, 16, 4, 2),
    "flash_attention_bwd_dkv": Config(16, 32, 4, 2),
    "flash_attention_bwd_dbias": Config(16, 32, 4, 1),
}

_PLAIN = "b=1,h=4,hkv=2,n=70,nk=90,d=24,dv=40"

_SHAPES = (
    (_PLAIN, torch.float16),
    ("b=2,h=4,hkv=2,n=64,d=24,dv=40", torch.float32),
    (f"{_PLAIN},causal=1", torch.float16),
    ("b=1,h=4,hkv=2,n=90,nk=40,d=24,dv=40,causal=1", torch.float16),
    (f"{_PLAIN},causal=1,left=20", torch.float16),
    ("b=1,h=2,n=70,nk=90,d=24,dv=40,left=7,right=9", torch.float16),
    ("b=1,h=4,hkv=2,n=33,nk=100,d=24,dv=40,left=0,right=40", torch.float16),
    ("b=4,h=4,hkv=2,n=50,nk=41,d=24,dv=40,causal=1,packed=1,empty=1", torch.float16),
    ("b=1,h=4,hkv=2,n=1,nk=77,d=24,dv=40,softcap=2,lse=1", torch.float16),
    ("b=1,h=2,n=5,nk=0,d=16", torch.float16),
    # Options that read beside q, k and v, alone and together.
    ("b=2,h=2,n=50,nk=70,d=16,mask=1,causal=1", torch.bfloat16),
    ("b=2,h=2,n=50,nk=70,d=16,bias=1,left=20,right=5", torch.bfloat16),
    ("b=3,h=2,n=50,nk=40,d=16,bias=2", torch.float32),
    ("b=2,h=4,hkv=2,n=50,nk=70,d=16,alibi=1,left=9", torch.float16),
    ("b=2,h=2,n=50,nk=33,d=16,sinks=1,causal=1", torch.float16),
    ("b=1,h=4,hkv=2,n=40,nk=50,d=16,dropout=0.2,right=3", torch.float16),
    (
        "b=2,h=2,hkv=1,n=40,nk=50,d=20,causal=1,left=20,softcap=2,mask=1,bias=1,alibi=1,sinks=1,dropout=0.1,lse=1",
        torch.float16,
    ),
    (
        "b=3,h=2,hkv=1,n=40,nk=50,d=20,packed=1,causal=1,left=40,mask=1,bias=2,alibi=1,sinks=1,dropout=0.1,lse=1",
        torch.float16,
    ),
)

ACCOUNTS = Accounts(
    model=accounts,
    configs=kernels.configs,
    naive_bytes=naive_bytes,
    naive=NAIVE,
    shapes=tuple((VOCABULARY.parse(text), dtype) for text, dtype in _SHAPES),
    test_configs=_TILES,
    on_chip=OnChip(nbytes=on_chip_bytes, tilings=tilings, lower_bound=lower_bound),
)

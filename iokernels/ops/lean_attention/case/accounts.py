"""The IO accounts of lean_attention: its model and the naive formula, by shape."""

from __future__ import annotations

from typing import Any, Literal

import torch

from iokernels import autotune
from iokernels.ops.lean_attention.triton import tuning
from iokernels.ops.lean_attention.triton.tuning import KERNEL, Config
from iokernels.testing.case.accounts import Account, Accounts, Configs
from iokernels.testing.case.shape import Shape

from . import compile as kernels
from . import traffic as model
from .shapes import SCHEDULES, VOCABULARY, cache_dtype, lengths


def sizes(shape: Shape, dtype: torch.dtype) -> dict[str, Any]:
    """The fields of a problem that follow from the call alone, whatever the backend."""
    return {
        "lengths": tuple(lengths(shape)),
        "rows": shape.n,
        "heads": shape.h,
        "kv_heads": shape.hkv,
        "head_dim": shape.d,
        "value_dim": shape.dv,
        "itemsize": dtype.itemsize,
        "cache_itemsize": cache_dtype(shape, dtype).itemsize,
        "window_left": shape.left,
        "page": shape.page,
        "prefix": shape.prefix,
        "head_scales": shape.scales == 1,
        "key_scales": shape.scales == 2,
        "sinks": bool(shape.sinks),
    }


def problem(shape: Shape, dtype: torch.dtype, configs: Configs) -> model.Problem:
    """What the model needs to know of a shape, and what the launcher decides of it."""
    from iokernels.ops.lean_attention.triton import launch as triton_launch

    with autotune.override(**configs):
        q, k_cache, v_cache, options = kernels.meta_call(shape, dtype)
        own: Any = triton_launch.Launch(q, k_cache, v_cache, options)
        readers: Any = triton_launch.Launch(q, k_cache, v_cache, options, all_sequences=True)
    config = configs[KERNEL]
    prefix_tiles = -(-shape.prefix // config.block_n)
    return model.Problem(
        **sizes(shape, dtype),
        block_m=(own.block_m, readers.block_m),
        part_tiles=(
            tuning.part_tiles(own.problem, config, own.items, own.tiles),
            tuning.part_tiles(readers.problem, config, readers.items, prefix_tiles),
        ),
        most_tiles=own.tiles,
        least=triton_launch.LEAST_TILES,
        most_parts=triton_launch.MOST_PARTS,
    )


def accounts(shape: Shape, dtype: torch.dtype, configs: Configs) -> dict[str, Account]:
    """The account of every kernel."""
    config: Config = configs[KERNEL]
    stream_k = {"auto": bool(config.stream_k), "lean": True}.get(SCHEDULES[shape.schedule], False)
    return model.accounts(problem(shape, dtype, configs), config, stream_k)


NAIVE = (
    "keys and values of every sequence, its prefix among them, are made one tensor of the dtype of q, as long as the "
    "longest sequence (read and written, unless the caches are that tensor); then S = q k^T, P = softmax(S), "
    "out = P v, each of which reads its operands and writes its result once"
)


def naive_bytes(shape: Shape, dtype: torch.dtype, which: Literal["fwd", "bwd"]) -> int:
    """The bytes of :data:`NAIVE`: what a cache, a page table and a common prefix cost without a kernel of their own."""
    rows, keys = shape.b * shape.n * shape.h, shape.b * (shape.prefix + shape.nk)
    width = shape.d + shape.dv
    stored, used = cache_dtype(shape, dtype).itemsize * width, dtype.itemsize * width
    gathered = shape.hkv * keys * used
    copied = shape.page or shape.prefix or shape.cache or shape.scales
    copies = shape.hkv * shape.b * shape.nk * stored + shape.hkv * shape.b * shape.prefix * stored + gathered
    scores = dtype.itemsize * shape.h * shape.n * keys
    products = rows * width * dtype.itemsize + gathered + 4 * scores
    return products + (copies if copied else 0)


_PLAIN = "b=3,h=4,hkv=2,nk=150,shortest=20,spare=7,d=24,dv=40"

_SHAPES = (
    (_PLAIN, torch.float16),
    ("b=1,h=4,hkv=2,nk=100,d=16", torch.float32),
    ("b=4,h=4,hkv=2,nk=70,shortest=0,n=3,d=16", torch.float16),
    ("b=2,h=4,hkv=2,nk=0,spare=9,d=16,sinks=1", torch.float16),
    (f"{_PLAIN},n=2,left=40", torch.float16),
    (f"{_PLAIN},n=3,left=0,sinks=1,page=16", torch.bfloat16),
    ("b=2,h=64,hkv=1,nk=70,n=2,d=16", torch.float16),
    (f"{_PLAIN},page=6", torch.float16),
    (f"{_PLAIN},cache=1,scales=1", torch.float16),
    (f"{_PLAIN},cache=2,scales=2,page=16", torch.float16),
    (f"{_PLAIN},prefix=90", torch.float16),
    ("b=9,h=8,hkv=1,nk=40,shortest=0,n=1,d=16,prefix=50,left=60,sinks=1,cache=1,scales=1", torch.float32),
    (f"{_PLAIN},schedule=2", torch.float16),
    (f"{_PLAIN},schedule=2,prefix=90,n=2,left=100,page=5", torch.float16),
    (f"{_PLAIN},schedule=3,sinks=1", torch.float16),
    ("b=1,h=2,hkv=1,nk=2100,d=16,schedule=3,prefix=1100", torch.float16),
)

ACCOUNTS = Accounts(
    model=accounts,
    configs=kernels.configs,
    naive_bytes=naive_bytes,
    naive=NAIVE,
    shapes=tuple((VOCABULARY.parse(text), dtype) for text, dtype in _SHAPES),
    test_configs={KERNEL: Config(block_n=16, blocks=7, stream_k=1, num_warps=4, num_stages=2)},
)

"""hip_attention: inputs, costs and the points that prove it. Its backward pass is block_sparse_attention's, whose case
has it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch

from iokernels.ops.block_sparse_attention.triton.tuning import FWD, Config
from iokernels.ops.hip_attention import hip_attention
from iokernels.ops.hip_attention.options import STAGES
from iokernels.ops.hip_attention.select.call import MAX_HEAD_DIM
from iokernels.ops.hip_attention.triton.tuning import BEST, STAGE, SelectConfig
from iokernels.runtime.errors import UnsupportedError
from iokernels.testing.case import Case, Implementation, Inputs, Outputs, Pass, Point, Prepare, load
from iokernels.testing.case.accounts import Account, Accounts, Configs
from iokernels.testing.case.shape import Shape

from . import select as selection
from .compile import COMPILATION, attention_configs, listed, plan
from .shapes import SELECT, VOCABULARY, chunk_searches, drawn, smaller
from .traffic import attention_accounts, stage_accounts

BLOCK = STAGES[-1].chunk


def make_inputs(shape: Shape, dtype: torch.dtype, device: torch.device, seed: int) -> Inputs:
    """Normal values; every four rows of a query head are alike (:func:`.hip_attention_shapes.drawn`)."""
    return drawn(shape, dtype, device, seed, shape.dv)


def run(inputs: Inputs, backend: str) -> Outputs:
    """The public function."""
    found = hip_attention(**inputs.tensors, **inputs.options, return_lse=bool(inputs.shape.lse), backend=backend)
    return dict(zip(("out", "lse"), found, strict=True)) if inputs.shape.lse else {"out": found}


def is_dense(shape: Shape) -> bool:
    """Whether there is nothing to select."""
    return shape.budget + shape.sink + (shape.window if shape.causal else 0) >= shape.nk


def attended(shape: Shape) -> int:
    """Pairs of a row and a key that are attended to, of one head of one sequence, at most."""
    total = 0
    for row in range(shape.n):
        position = shape.nk - shape.n + row
        there = min(max(position + 1, 0), shape.nk) if shape.causal else shape.nk
        total += min(there, shape.budget + shape.sink + shape.window)
    return total


def flops(shape: Shape, which: Pass) -> int:
    """The two products of attention with what was selected, and those of the search."""
    attention = 2 * (shape.d + shape.dv) * shape.b * shape.h * attended(shape)
    return attention + (0 if is_dense(shape) else selection.flops(_select_shape(shape), "fwd"))


def _select_shape(shape: Shape) -> Shape:
    return SELECT.shape(**{name: value for name, value in shape.items() if name not in ("dv", "lse")})


def accounts(shape: Shape, dtype: torch.dtype, configs: Configs) -> dict[str, Account]:
    """The account of every kernel: of a search and what follows, or of flash_attention where there is room for all."""
    if is_dense(shape):
        return {"flash_attention_fwd_kernel": _flash_account(shape, dtype)}
    call = selection.call(shape, dtype)
    search, choice = stage_accounts(call, plan(shape), configs[STAGE], {})
    found = {"hip_attention_stage_kernel": search, "hip_attention_best_kernel": choice}
    return found | attention_accounts(call, shape.dv, BLOCK, listed(shape), configs[FWD])


def floor_bytes(shape: Shape, dtype: torch.dtype, which: Pass) -> int:
    """Queries and results once, and of the keys what one list has: as if all blocks of queries wanted the same."""
    rows, pair = shape.b * shape.h * shape.n, dtype.itemsize * (shape.d + shape.dv)
    seen = min(shape.nk, shape.budget + shape.sink + shape.window + shape.n)
    statistics = rows * (8 if dtype == torch.float64 else 4)
    return rows * pair + shape.b * shape.hkv * seen * pair + statistics


NAIVE = (
    "dense attention: S = q k^T, P = softmax(S), out = P v; each reads its operands and writes its result once, in the "
    "inputs' dtype"
)


def naive_bytes(shape: Shape, dtype: torch.dtype, which: Literal["fwd", "bwd"]) -> int:
    """The bytes of :data:`NAIVE`."""
    scores = shape.b * shape.h * shape.n * shape.nk
    rows = shape.b * (shape.h * shape.n + shape.hkv * shape.nk) * (shape.d + shape.dv)
    return dtype.itemsize * (4 * scores + rows)


def dense_bytes(shape: Shape, dtype: torch.dtype) -> int:
    """What dense attention moves on a GPU for the same call, by the model of its kernels: the least of flash_attention
    with its own tiles, and of reading each key once, which is what decoding does."""
    rows, pair = shape.b * shape.h * shape.n, dtype.itemsize * (shape.d + shape.dv)
    once = rows * pair + shape.b * shape.hkv * shape.nk * pair + 4 * rows
    if shape.n <= 16:
        return once
    return _flash_account(shape, dtype).model.total


def _flash_account(shape: Shape, dtype: torch.dtype) -> Account:
    case = load("flash_attention")
    assert case.accounts is not None
    words = {name: shape[name] for name in ("b", "h", "hkv", "n", "nk", "d", "dv", "causal")}
    dense = case.vocabulary.shape(**words)
    found = case.accounts.model(dense, dtype, case.accounts.configs(dense, dtype))
    return found["flash_attention_fwd_kernel"]


def peers(device: torch.device) -> Mapping[str, Prepare | str]:
    """Dense attention is not the same function unless the budget has room for everything; its time is what counts."""
    return {"sdpa": _dense}


def _dense(inputs: Inputs) -> Callable[[], Outputs]:
    shape = inputs.shape
    if not is_dense(shape):
        raise UnsupportedError(
            "it attends to all keys, which is another function; time flash_attention at the same lengths beside this"
        )
    if shape.lse or (shape.causal and shape.n not in (1, shape.nk)):
        raise UnsupportedError("it has no log-sum-exp, and its causal mask starts at the first key")
    causal = bool(shape.causal) and shape.n > 1
    q, k, v = (inputs.tensors[name] for name in "qkv")

    def call() -> Outputs:
        out = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=causal, enable_gqa=shape.h != shape.hkv
        )  # fmt: skip
        return {"out": out}

    return call


def _point(name: str, *, quick: bool = False, **given: Any) -> Point:
    small = {"b": 2, "h": 4, "hkv": 2, "n": 40, "nk": 301, "d": 32, "budget": 48, "sink": 5, "window": 24, "bq": 16}
    return Point(name, VOCABULARY.shape(**(small | given)), quick)


def check_points() -> tuple[Point, ...]:
    """Every option. Lengths straddle chunks and blocks of queries."""
    return (
        _point("plain", quick=True),
        _point("one row", n=1, lse=1),
        _point("one list for all heads", heads=1, lse=1),
        _point("a list for each query head", heads=2),
        _point("not causal", causal=0, n=20),
        _point("neither sink nor window", sink=0, window=0),
        _point("tensors [b, n, h, d], v wider", bnhd=1, dv=40, quick=True),
        _point("room for everything", budget=304, lse=1),
    )


_SHAPES = (
    ("b=2,h=4,hkv=2,n=40,nk=301,d=24,dv=40,budget=48,sink=8,window=24,bq=16", torch.float16),
    ("b=1,h=4,hkv=2,n=1,nk=900,d=16,budget=48,sink=16,window=24,heads=1", torch.bfloat16),
    ("b=1,h=4,hkv=2,n=40,nk=300,d=16,budget=48,sink=8,window=40,heads=2,bq=32", torch.float32),
)


def _shapes(*texts: str) -> tuple[Shape, ...]:
    return tuple(VOCABULARY.parse(text) for text in texts)


_HALVES = (torch.float16, torch.bfloat16)
_LLAMA = "b=1,h=32,hkv=8,d=128"

CASE = Case(
    operator="hip_attention",
    functions=("hip_attention",),
    vocabulary=VOCABULARY,
    implementations={
        "reference": Implementation((*_HALVES, torch.float32, torch.float64), "any", "fwd"),
        "torch": Implementation((*_HALVES, torch.float32, torch.float64), "any", "fwd"),
        "triton": Implementation((*_HALVES, torch.float32), f"1-{MAX_HEAD_DIM}", "fwd"),
    },
    suites={
        "quick": _shapes("b=1,h=4,hkv=2,n=4k,d=64,budget=512,window=256", "b=1,h=4,hkv=2,n=1,nk=16k,d=64,budget=512"),
        "prefill": _shapes(*(f"{_LLAMA},n={n}" for n in ("32k", "64k", "128k"))),
        "decode": _shapes(*(f"{_LLAMA},n=1,nk={nk}" for nk in ("32k", "64k", "128k"))),
    },
    make_inputs=make_inputs,
    run=run,
    flops=flops,
    floor_bytes=floor_bytes,
    reference_bytes=lambda shape: 10_000 * chunk_searches(shape),
    smaller=smaller,
    check_points=check_points,
    peers=peers,
    accounts=Accounts(
        model=accounts,
        configs=attention_configs,
        naive_bytes=naive_bytes,
        naive=NAIVE,
        shapes=tuple((VOCABULARY.parse(text), dtype) for text, dtype in _SHAPES),
        test_configs={
            STAGE: SelectConfig(16, 16, 4), BEST: SelectConfig(1, 1, 4), FWD: Config(32, 32, 2, 4, 2),
        },
    ),
    compilation=COMPILATION,
    passes=("fwd",),
)  # fmt: skip

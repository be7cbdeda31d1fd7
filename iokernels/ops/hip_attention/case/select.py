"""The selectors of hip_attention on their own: inputs, costs and the points that prove their kernels."""

from __future__ import annotations

from typing import Any, Literal

import torch

from iokernels.ops.hip_attention import select_hip, select_quest
from iokernels.ops.hip_attention.select.call import MAX_HEAD_DIM
from iokernels.ops.hip_attention.triton.tuning import BEST, BOUNDS, PAGES, STAGE, SelectConfig
from iokernels.testing.case import Case, Implementation, Inputs, Limit, Outputs, Pass, Point
from iokernels.testing.case.accounts import Account, Accounts, Configs
from iokernels.testing.case.shape import Shape

from .compile import PAGE, SELECT_COMPILATION, configs, plan, quest_slots, region_of
from .select_cuda import COMPILATION as CUDA_COMPILATION
from .select_cuda import accounts_of
from .select_tuning import TUNING
from .shapes import SELECT, chunk_searches, drawn, smaller
from .traffic import Call, page_accounts, stage_accounts


def make_inputs(shape: Shape, dtype: torch.dtype, device: torch.device, seed: int) -> Inputs:
    """As those of hip_attention, without values."""
    return drawn(shape, dtype, device, seed)


def run(inputs: Inputs, backend: str) -> Outputs:
    """The public function; its lists as numbers, -1 past the end of each."""
    select = select_quest if inputs.shape.quest else select_hip
    index = select(**inputs.tensors, **inputs.options, backend=backend)
    number = torch.arange(index.indices.shape[3], device=index.device)
    blocks = index.indices.masked_fill(number >= index.counts[..., None], -1)
    return {"blocks": blocks.to(torch.float64 if inputs.dtype == torch.float64 else torch.float32)}


def call(shape: Shape, dtype: torch.dtype) -> Call:
    """What the model needs to know."""
    return Call(shape.b, shape.h, shape.hkv, shape.n, shape.nk, shape.d, dtype.itemsize, region_of(shape))


def accounts(shape: Shape, dtype: torch.dtype, configs: Configs) -> dict[str, Account]:
    """The account of every kernel."""
    if shape.quest:
        return page_accounts(call(shape, dtype), PAGE, quest_slots(shape), configs[PAGES])
    search, choice = stage_accounts(call(shape, dtype), plan(shape), configs[STAGE], {})
    return {"hip_attention_stage_kernel": search, "hip_attention_best_kernel": choice}


def looked_at(shape: Shape) -> int:
    """Keys, or bounds of pages, that the searches of one head look at, over all blocks of queries."""
    region, total = region_of(shape), 0
    if shape.quest:
        for block in range(-(-shape.n // shape.bq)):
            last = min((block + 1) * shape.bq, shape.n) + shape.nk - shape.n
            total += 2 * max(last - region.window if region.causal else shape.nk, 0) // PAGE
        return total
    found: dict[int, int] = {}
    stage_accounts(call(shape, torch.float16), plan(shape), SelectConfig(16, 64, 4), found)
    return sum(found.values())


def flops(shape: Shape, which: Pass) -> int:
    """The products of mean queries with the keys that are looked at, a stride of one for all stages."""
    return 2 * shape.d * shape.b * shape.h * min(shape.bq, shape.n) * looked_at(shape)


def floor_bytes(shape: Shape, dtype: torch.dtype, which: Pass) -> int:
    """What the kernels would move if all blocks of queries looked at the same keys, once."""
    found = accounts(shape, dtype, configs(shape, dtype))
    return sum(account.floor.total for account in found.values())


NAIVE = "S = q k^T, read by a top-k; both read their operands and write their result once"


def naive_bytes(shape: Shape, dtype: torch.dtype, which: Literal["fwd", "bwd"]) -> int:
    """The bytes of :data:`NAIVE`: exact selection with the scores in memory."""
    rows = shape.b * (shape.h * shape.n + shape.hkv * shape.nk) * shape.d
    return dtype.itemsize * (rows + 2 * shape.b * shape.h * shape.n * shape.nk)


def _point(name: str, *, quick: bool = False, **given: Any) -> Point:
    small = {"b": 2, "h": 4, "hkv": 2, "n": 40, "nk": 301, "d": 32, "budget": 48, "sink": 5, "window": 24, "bq": 16}
    return Point(name, SELECT.shape(**(small | given)), quick)


def check_points() -> tuple[Point, ...]:
    """Every option. Lengths straddle chunks, pages and blocks of queries."""
    return (
        _point("search", quick=True),
        _point("search, one row", n=1),
        _point("search, one list for all heads", heads=1),
        _point("search, a list for each query head, [b, n, h, d]", heads=2, bnhd=1),
        _point("search, not causal", causal=0, n=20),
        _point("search, neither sink nor window", sink=0, window=0),
        _point("search, more rows than keys", nk=30),
        _point("quest", quest=1, quick=True),
        _point("quest, one row, one list", quest=1, n=1, heads=1),
        _point("quest, not causal, a list for each query head", quest=1, causal=0, heads=2, bq=32),
    )


def limit(name: str, dtype: torch.dtype) -> Limit:
    """Lists are equal or they are wrong: less than the last of their numbers is worth."""
    return Limit(1e-9, over=0)


_SHAPES = (
    ("b=2,h=4,hkv=2,n=40,nk=301,d=24,budget=48,sink=5,window=24,bq=16", torch.float16),
    ("b=1,h=4,hkv=2,n=1,nk=900,d=16,budget=48,sink=5,window=24,heads=1", torch.bfloat16),
    ("b=1,h=4,hkv=2,n=40,nk=301,d=16,budget=48,sink=5,window=24,heads=2,bq=32", torch.float32),
    ("b=1,h=8,hkv=1,n=32,nk=700,d=16,budget=48,sink=5,window=24,bq=32", torch.float16),
    ("b=2,h=4,hkv=2,n=40,nk=301,d=24,budget=48,sink=5,window=24,bq=16,quest=1", torch.float16),
    ("b=1,h=8,hkv=2,n=1,nk=600,d=16,budget=48,sink=35,window=24,heads=1,quest=1", torch.float32),
)

ACCOUNTS = Accounts(
    model=accounts,
    configs=configs,
    naive_bytes=naive_bytes,
    naive=NAIVE,
    shapes=tuple((SELECT.parse(text), dtype) for text, dtype in _SHAPES),
    test_configs={
        STAGE: SelectConfig(16, 16, 4), PAGES: SelectConfig(16, 16, 4), BOUNDS: SelectConfig(1, 4, 4),
        BEST: SelectConfig(1, 1, 4),
    },
)  # fmt: skip

_HALVES = (torch.float16, torch.bfloat16)

CASE = Case(
    operator="select_hip",
    functions=("select_hip", "select_quest"),
    vocabulary=SELECT,
    implementations={
        "reference": Implementation((*_HALVES, torch.float32, torch.float64), "any", "fwd"),
        "torch": Implementation((*_HALVES, torch.float32, torch.float64), "any", "fwd"),
        "triton": Implementation((*_HALVES, torch.float32), f"1-{MAX_HEAD_DIM}", "fwd"),
        "cuda": Implementation(_HALVES, f"1-{MAX_HEAD_DIM}", "fwd"),
    },
    suites={
        "quick": tuple(SELECT.parse(f"b=1,h=4,hkv=2,d=64,{text}") for text in ("n=4k", "n=1,nk=16k", "n=4k,quest=1")),
        "prefill": tuple(SELECT.parse(f"b=1,h=32,hkv=8,d=128,{text}") for text in ("n=32k", "n=128k", "n=32k,quest=1")),
        "decode": tuple(
            SELECT.parse(f"b=1,h=32,hkv=8,n=1,d=128,{text}") for text in ("nk=32k", "nk=128k", "nk=128k,quest=1")
        ),
    },
    make_inputs=make_inputs,
    run=run,
    flops=flops,
    floor_bytes=floor_bytes,
    reference_bytes=lambda shape: 10_000 * chunk_searches(shape),
    smaller=smaller,
    check_points=check_points,
    accounts=ACCOUNTS,
    compilation=SELECT_COMPILATION,
    cuda_accounts=accounts_of(call, naive_bytes, NAIVE),
    cuda_compilation=CUDA_COMPILATION,
    tuning=TUNING,
    passes=("fwd",),
    limit=limit,
    documented="hip_attention",
)

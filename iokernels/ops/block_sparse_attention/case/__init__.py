"""block_sparse_attention: inputs, costs, peers and the points that prove every option."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache, partial
from typing import Any, Literal

import torch
from torch import Tensor

from iokernels.ops.block_sparse_attention import block_sparse_attention
from iokernels.ops.block_sparse_attention.api import MAX_HEAD_DIM
from iokernels.ops.block_sparse_attention.triton.tuning import DKV, DQ, FWD, Config
from iokernels.runtime.errors import UnsupportedError
from iokernels.testing.case import Case, Implementation, Inputs, Outputs, Pass, Point, Prepare
from iokernels.testing.case.accounts import Accounts
from iokernels.testing.case.shape import Shape

from . import traffic as model
from .compile import COMPILATION, TUNING, configs
from .shapes import VOCABULARY, index_of, list_heads


def make_inputs(shape: Shape, dtype: torch.dtype, device: torch.device, seed: int) -> Inputs:
    """Normal values, rounded to ``dtype``; lists of blocks drawn with the same seed."""
    index = index_of(shape, seed)
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*size: int, of: torch.dtype = dtype) -> Tensor:
        return torch.randn(size, generator=generator, device=device).to(of)

    def heads(sequence: int, count: int, width: int) -> Tensor:
        if shape.bnhd:
            return normal(shape.b, sequence, count, width).transpose(1, 2)
        return normal(shape.b, count, sequence, width)

    tensors = {
        "q": heads(shape.n, shape.h, shape.d) * shape.gain,
        "k": heads(shape.nk, shape.hkv, shape.d),
        "v": heads(shape.nk, shape.hkv, shape.dv),
    }
    gradients = {"out": heads(shape.n, shape.h, shape.dv)}
    if shape.lse:
        statistics = torch.float64 if dtype == torch.float64 else torch.float32
        gradients["lse"] = normal(shape.b, shape.h, shape.n, of=statistics)
    options: dict[str, Any] = {"index": index.to(device), "causal": bool(shape.causal)}
    leaves = {name: x.detach().requires_grad_() for name, x in tensors.items()}
    return Inputs(shape, leaves, options, gradients, seed)


def run(inputs: Inputs, backend: str) -> Outputs:
    """The public function."""
    found = block_sparse_attention(
        **inputs.tensors, **inputs.options, return_lse=bool(inputs.shape.lse), backend=backend
    )
    return dict(zip(("out", "lse"), found, strict=True)) if inputs.shape.lse else {"out": found}


def flops(shape: Shape, which: Pass) -> int:
    """Two matrix products forward, five backward (the scores are computed again), over the pairs that see
    each other."""
    forward = 2 * (shape.d + shape.dv)
    backward = 2 * (3 * shape.d + 2 * shape.dv)
    return model.pairs(shape) * {"fwd": forward, "bwd": backward, "both": forward + backward}[which]


def floor_bytes(shape: Shape, dtype: torch.dtype, which: Pass) -> int:
    """Each input read once, as far as a row sees it, each output written once; the log-sum-exp counts, since backward
    needs it."""
    known = model.Problem(shape, dtype.itemsize)
    statistics = known.all_rows * (8 if dtype == torch.float64 else 4)
    queries, out = (known.all_rows * width * known.size for width in (shape.d, shape.dv))
    seen = model.seen_keys(known) * known.widths
    forward = queries + seen + model.list_bytes(known) + out + statistics
    gradients = queries + shape.b * shape.hkv * shape.nk * known.widths
    # Backward reads the inputs again, out and its gradient, lse (and its gradient), and writes the gradients.
    backward = queries + seen + model.list_bytes(known) + 2 * out + statistics * (1 + bool(shape.lse)) + gradients
    return {"fwd": forward, "bwd": backward, "both": forward + backward}[which]


def reference_bytes(shape: Shape) -> int:
    """About eight float64 matrices of scores live at once in the reference's backward pass."""
    return 8 * 8 * shape.b * shape.h * shape.n * shape.nk


def smaller(shape: Shape) -> Shape:
    """One sequence instead of many, then one group of heads, then half the length and the lists."""
    if shape.b > 1:
        return shape.replace(b=1)
    if shape.hkv > 1:
        return shape.replace(h=shape.h // shape.hkv, hkv=1)
    if shape.nk < 512:
        return shape
    rows = shape.n // 2 if shape.n >= 512 else shape.n
    return shape.replace(n=rows, nk=max(shape.nk // 2, rows), budget=max(shape.budget // 2, shape.bk))


def peers(device: torch.device) -> Mapping[str, Prepare | str]:
    """SDPA with the expanded mask, and FlexAttention with the same blocks where it is compiled."""
    flex = _flex if device.type == "cuda" else "FlexAttention is timed compiled, on a GPU only"
    return {"sdpa": _sdpa, "flex": flex}


def _refuse_lse(shape: Shape) -> None:
    if shape.lse:
        raise UnsupportedError("it has no equivalent of lse=1 here")


def _sdpa(inputs: Inputs) -> Callable[[], Outputs]:
    shape, index = inputs.shape, inputs.options["index"]
    _refuse_lse(shape)
    mask = index.to_mask(causal=bool(shape.causal)).repeat_interleave(shape.h // list_heads(shape), 1)
    if not bool(mask.any(-1).all()):
        raise UnsupportedError("a row sees no key, for which it gives NaN")
    q, k, v = (inputs.tensors[name] for name in "qkv")
    sdpa = partial(torch.nn.functional.scaled_dot_product_attention, q, k, v, enable_gqa=shape.h != shape.hkv)
    return lambda: {"out": sdpa(attn_mask=mask)}


@cache
def _compiled_flex() -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def _flex(inputs: Inputs) -> Callable[[], Outputs]:
    shape, index = inputs.shape, inputs.options["index"]
    _refuse_lse(shape)
    blocks = index.to_flex(shape.h, causal=bool(shape.causal))
    q, k, v = (inputs.tensors[name] for name in "qkv")
    return lambda: {"out": _compiled_flex()(q, k, v, block_mask=blocks, enable_gqa=shape.h != shape.hkv)}


NAIVE = (
    "dense attention with a mask: S = q k^T, P = softmax(S) where a mask of b x lists x n x nk bytes shows, "
    "out = P v; then dv = P^T dO, dP = dO v^T, dS = P (dP - delta), dq = dS k, dk = dS^T q. Each product and "
    "each softmax reads its operands and writes its result once, in the inputs' dtype, for hidden scores too"
)


def naive_bytes(shape: Shape, dtype: torch.dtype, which: Literal["fwd", "bwd"]) -> int:
    """The bytes of :data:`NAIVE`: 4 matrices of scores and a mask cross memory forward, 7 matrices backward."""
    size = dtype.itemsize
    scores = size * shape.b * shape.h * shape.n * shape.nk
    q, out = (size * shape.b * shape.h * shape.n * width for width in (shape.d, shape.dv))
    k, v = (size * shape.b * shape.hkv * shape.nk * width for width in (shape.d, shape.dv))
    if which == "fwd":
        return 4 * scores + q + k + v + out + shape.b * list_heads(shape) * shape.n * shape.nk
    return 7 * scores + 2 * out + v + k + q + (q + k + v)


def _point(name: str, *, quick: bool = False, **given: float) -> Point:
    usual = {"b": 1, "h": 2, "hkv": 1, "n": 80, "d": 16, "bq": 32, "bk": 16, "budget": 32, "sink": 5, "window": 20}
    return Point(name, VOCABULARY.shape(**(usual | given)), quick)


def check_points() -> tuple[Point, ...]:
    """Every option alone, its edges, and all together. Lengths straddle the kernels' tiles."""
    return (
        _point("plain", b=2, h=4, hkv=2, n=100, quick=True),
        _point("one list for all heads", lists=0, h=4, hkv=2),
        _point("one list a query head", lists=2),
        _point("lists of all lengths", ragged=1, lse=1, quick=True),
        _point("lists alone", sink=0, window=0, ragged=1, lse=1),
        _point("sink and window alone", budget=0),
        _point("dense rows", dense=1),
        _point("all blocks listed", budget=90, n=90),
        _point("not causal", causal=0, nk=110, ragged=1),
        _point("fewer queries than keys", n=40, nk=150, lse=1),
        _point("rows without keys", n=90, nk=40, lse=1),
        _point("blocks of 8 keys", bk=8),
        _point("blocks of 128 keys", bk=128, n=150, budget=128, bq=48),
        _point("query blocks of 16 rows", bq=16, lists=2, n=50),
        _point("one query (decoding)", n=1, nk=200, bq=16),
        _point("5 queries (decoding)", n=5, nk=200, bq=16, b=2, lists=0, bk=64, budget=128),
        _point("eight query heads a key head", h=8, n=40),
        _point("a head each", h=2, hkv=2, n=50, lists=2),
        _point("tensors [b, n, h, d]", bnhd=1, b=2, n=50),
        _point("v wider than q", d=24, dv=40, n=50),
        _point("width 128", d=128, n=50),
        _point("width 256", d=256, n=40),
        _point(
            "all options",
            b=2,
            h=4,
            hkv=2,
            n=50,
            nk=70,
            d=24,
            dv=40,
            lists=2,
            ragged=1,
            dense=1,
            lse=1,
            bnhd=1,
            gain=2.0,
            quick=True,
        ),
    )


def _shapes(*texts: str) -> tuple[Shape, ...]:
    return tuple(VOCABULARY.parse(text) for text in texts)


SUITES: Mapping[str, tuple[Shape, ...]] = {
    # Seconds on two CPU cores.
    "quick": _shapes("b=1,h=4,hkv=2,n=1k,d=64,budget=256,window=128,sink=64"),
    "train": _shapes(
        "b=1,h=32,hkv=8,n=16k,d=128", "b=1,h=32,hkv=8,n=32k,d=128", "b=1,h=16,n=16k,d=64,bk=128,budget=2048"
    ),
    # Prompts, with the small blocks that selectors of single keys return.
    "long": _shapes(*(f"b=1,h=32,hkv=8,n={n},d=128,bk=8,sink=256" for n in ("32k", "64k", "128k"))),
    "decode": _shapes(*(f"b={b},h=32,hkv=8,n=1,nk=128k,d=128,bk=8,sink=256" for b in (1, 8))),
}

_HALVES = (torch.float16, torch.bfloat16)

_PLAIN = "b=1,h=4,hkv=2,n=70,nk=90,d=24,dv=40,bq=32,bk=16,budget=32,sink=5,window=20"

_COUNTED = (
    (f"{_PLAIN}", torch.float16),
    (f"{_PLAIN},ragged=1,dense=1,lse=1", torch.float16),
    ("b=2,h=4,hkv=2,n=70,nk=90,d=24,bq=32,bk=16,budget=32,sink=5,window=20,lists=0,causal=0", torch.float32),
    ("b=1,h=4,hkv=2,n=70,nk=90,d=16,bq=32,bk=8,budget=32,sink=5,window=20,lists=2,ragged=1,dense=1", torch.bfloat16),
    ("b=1,h=4,hkv=2,n=90,nk=40,d=16,bq=48,bk=64,budget=64,sink=0,window=20", torch.float16),
    ("b=2,h=4,hkv=2,n=3,nk=150,d=16,bk=32,budget=64,sink=20,window=30,lists=2", torch.float16),
)

CASE = Case(
    operator="block_sparse_attention",
    functions=("block_sparse_attention",),
    vocabulary=VOCABULARY,
    implementations={
        "reference": Implementation((*_HALVES, torch.float32, torch.float64), "any"),
        "torch": Implementation((*_HALVES, torch.float32, torch.float64), "any"),
        "triton": Implementation((*_HALVES, torch.float32), f"1-{MAX_HEAD_DIM}"),
    },
    suites=SUITES,
    make_inputs=make_inputs,
    run=run,
    flops=flops,
    floor_bytes=floor_bytes,
    reference_bytes=reference_bytes,
    smaller=smaller,
    check_points=check_points,
    peers=peers,
    accounts=Accounts(
        model=model.accounts,
        configs=configs,
        naive_bytes=naive_bytes,
        naive=NAIVE,
        shapes=tuple((VOCABULARY.parse(text), dtype) for text, dtype in _COUNTED),
        test_configs={FWD: Config(32, 32, 2, 4, 2), DQ: Config(32, 32, 1, 4, 2), DKV: Config(32, 32, 1, 4, 2)},
    ),
    compilation=COMPILATION,
    tuning=TUNING,
)

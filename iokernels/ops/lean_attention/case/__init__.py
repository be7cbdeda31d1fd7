"""lean_attention: inputs, costs, peers and the points that prove every option."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from iokernels.ops.lean_attention import lean_attention
from iokernels.ops.lean_attention.api import MAX_HEAD_DIM
from iokernels.testing.case import Case, Implementation, Inputs, Outputs, Pass, Point
from iokernels.testing.case.shape import Shape, UsageError
from iokernels.testing.poison import poison_

from .accounts import ACCOUNTS
from .compile import COMPILATION
from .cuda import ACCOUNTS as CUDA_ACCOUNTS
from .cuda import COMPILATION as CUDA_COMPILATION
from .peers import peers
from .shapes import VOCABULARY, cache_dtype, cache_size, first_visible, lengths, most_pages, pages, run_options
from .tuning import TUNING

NOWHERE = 2**31 - 1
"""What the block table holds where no length reaches: a page that does not exist."""


def make_inputs(shape: Shape, dtype: torch.dtype, device: torch.device, seed: int) -> Inputs:
    """Normal values, rounded to the caches' dtype, NaN past every length, and pages in random order."""
    if shape.h % shape.hkv:
        raise UsageError(f"shape: hkv={shape.hkv} does not divide h={shape.h}")
    if shape.shortest > shape.nk:
        raise UsageError(f"shape: shortest={shape.shortest} is more than nk={shape.nk}")
    generator = torch.Generator(device).manual_seed(seed)
    of_cache = cache_dtype(shape, dtype)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=device)

    def heads(sequences: int, count: int, rows: int, width: int) -> Tensor:
        if shape.bnhd:
            return normal(sequences, rows, count, width).transpose(1, 2)
        return normal(sequences, count, rows, width)

    # What belongs to the dtype of q follows it into float64; quantised caches and their factors stay what they are.
    tensors = {"q": heads(shape.b, shape.h, shape.n, shape.d).to(dtype) * shape.gain}
    options = run_options(shape)
    options["cache_seqlens"] = torch.tensor(lengths(shape), dtype=torch.int32, device=device)
    table = None
    if shape.page:
        table = options["block_table"] = _block_table(shape, generator, device)
    for name, width in (("k", shape.d), ("v", shape.dv)):
        stored = options if shape.cache else tensors
        cache = quantised(heads(*cache_size(shape), width), of_cache)
        _poison_past_lengths(cache, shape, table)
        stored[f"{name}_cache"] = cache
        if shape.prefix:
            stored[f"{name}_prefix"] = quantised(normal(shape.hkv, shape.prefix, width), of_cache)
        if shape.scales:
            factors = normal(*(cache_size(shape) if shape.scales == 2 else (shape.hkv,))).abs() + 0.5
            options[f"{name}_scale"] = factors / _UNITS.get(of_cache, 1.0)
    if shape.sinks:
        tensors["sinks"] = normal(shape.h).to(dtype)
    return Inputs(shape, tensors, options, {}, seed)


_UNITS = {torch.int8: 32.0, torch.float8_e4m3fn: 16.0}
"""How many units of a quantised cache a standard deviation of the keys takes."""


def quantised(x: Tensor, dtype: torch.dtype) -> Tensor:
    """``x`` in a cache's dtype; in a quantised one, counted in its units."""
    x = x * _UNITS.get(dtype, 1.0)
    return x.round().clamp(-127, 127).to(dtype) if dtype == torch.int8 else x.to(dtype)


def _block_table(shape: Shape, generator: torch.Generator, device: torch.device) -> Tensor:
    counts = pages(shape)
    order = torch.randperm(sum(counts) + 1, generator=generator, device=device).to(torch.int32)
    table = torch.full((shape.b, most_pages(shape)), NOWHERE, dtype=torch.int32, device=device)
    for row, count, some in zip(table, counts, order[:-1].split(counts), strict=True):
        row[:count] = some
    return table


def _poison_past_lengths(cache: Tensor, shape: Shape, table: Tensor | None) -> None:
    for index, length in enumerate(lengths(shape)):
        if table is None:
            poison_(cache[index, :, length:])
        elif length % shape.page:
            poison_(cache[int(table[index, length // shape.page]), :, length % shape.page :])


def run(inputs: Inputs, backend: str) -> Outputs:
    """The public function."""
    found = lean_attention(**inputs.tensors, **inputs.options, return_lse=bool(inputs.shape.lse), backend=backend)
    return dict(zip(("out", "lse"), found, strict=True)) if inputs.shape.lse else {"out": found}


def pairs(shape: Shape) -> int:
    """Query-key pairs of one head inside the causal and window limits, over the batch."""
    right = 0 if shape.causal else shape.right
    count = 0
    for length in lengths(shape):
        total = shape.prefix + length
        for row in range(shape.n):
            position = total - shape.n + row
            first = max(position - shape.left, 0) if shape.left >= 0 else 0
            last = min(position + right, total - 1) if right >= 0 else total - 1
            count += max(last - first + 1, 0)
    return count


def flops(shape: Shape, which: Pass) -> int:
    """Two matrix products over the visible pairs."""
    return 2 * (shape.d + shape.dv) * shape.h * pairs(shape)


def visible_keys(shape: Shape) -> tuple[int, int]:
    """Keys that any row sees, of one head: of the prefix, and of the sequences' own."""
    first = [first_visible(shape, length) for length in lengths(shape)]
    own = sum(length - max(f - shape.prefix, 0) for f, length in zip(first, lengths(shape), strict=True))
    return shape.prefix - min([*first, shape.prefix]), own


def floor_bytes(shape: Shape, dtype: torch.dtype, which: Pass) -> int:
    """Each visible key, each row of q, each page number and each length read once, out and lse written once."""
    rows = shape.b * shape.n * shape.h
    prefix, own = visible_keys(shape)
    pair = cache_dtype(shape, dtype).itemsize * (shape.d + shape.dv)
    scales = {0: 0, 1: 2 * 4 * shape.hkv, 2: 2 * 4 * shape.hkv * own}[shape.scales]
    table = 0
    if shape.page:
        first = [max(first_visible(shape, length) - shape.prefix, 0) for length in lengths(shape)]
        table = 4 * sum(count - f // shape.page for count, f in zip(pages(shape), first, strict=True))
    read = rows * shape.d * dtype.itemsize + shape.hkv * (prefix + own) * pair + scales + table + 4 * shape.b
    statistic = 8 if dtype == torch.float64 else 4
    return read + shape.sinks * shape.h * dtype.itemsize + rows * (shape.dv * dtype.itemsize + statistic)


def reference_bytes(shape: Shape) -> int:
    """Keys and values of one sequence for every query head in float64, and about six matrices of its scores."""
    total = shape.prefix + shape.nk
    caches = 3 * 8 * cache_size(shape)[0] * cache_size(shape)[2] * shape.hkv * (shape.d + shape.dv)
    return caches + 8 * shape.h * total * (2 * (shape.d + shape.dv) + 6 * shape.n)


def smaller(shape: Shape) -> Shape:
    """Fewer sequences, then one group of heads, then half the keys."""
    if shape.b > 3:
        return shape.replace(b=3)
    if shape.hkv > 1:
        return shape.replace(h=shape.h // shape.hkv, hkv=1)
    if shape.nk + shape.prefix >= 512:
        halves = {name: shape[name] // 2 for name in ("nk", "shortest", "spare", "prefix")}
        return shape.replace(**halves)
    return shape.replace(b=1, shortest=shape.nk)


def _point(name: str, *, quick: bool = False, **given: float) -> Point:
    small = {"b": 3, "h": 4, "hkv": 2, "nk": 150, "shortest": 20, "spare": 7, "d": 32}
    return Point(name, VOCABULARY.shape(**(small | given)), quick)


_EVERYTHING: dict[str, Any] = {
    "n": 3, "d": 40, "dv": 24, "left": 60, "softcap": 2.0, "sinks": 1, "lse": 1, "bnhd": 1, "gain": 2.0,
}  # fmt: skip


def check_points() -> tuple[Point, ...]:
    """Every option alone, its edges, and all together. Lengths straddle the kernels' tiles."""
    return (
        _point("plain", quick=True),
        _point("one key, no room for more", b=1, nk=1, shortest=1, spare=0, lse=1),
        _point("an empty sequence", shortest=0, n=2, lse=1),
        _point("several new positions", n=5, quick=True),
        _point("not causal", n=5, causal=0),
        _point("fewer keys than new positions", n=16, nk=20, shortest=3, lse=1),
        _point("window", n=3, left=40),
        _point("window to both sides", n=4, causal=0, left=20, right=1),
        _point("a window of one key", left=0, lse=1),
        _point("softcap", softcap=1.5, gain=2.0),
        _point("sinks", sinks=1, lse=1),
        _point("sinks, an empty sequence", sinks=1, shortest=0, lse=1),
        _point("one key head (MQA)", h=5, hkv=1),
        _point("a head of keys for each of queries", h=3, hkv=3, n=2),
        _point("64 heads of queries to one of keys, several row tiles", h=64, hkv=1, n=2),
        _point("tensors [b, n, h, d]", bnhd=1, n=2),
        _point("peaked attention", gain=8.0),
        _point("v narrower than q", d=64, dv=24),
        _point("width 256", b=1, d=256, shortest=150),
        _point("width 20, not a multiple of 8", d=20, dv=48),
        _point("pages of 16", page=16, quick=True),
        _point("pages of 1", page=1, n=2, nk=40),
        _point("pages of 48, tensors [b, n, h, d]", page=48, bnhd=1),
        _point("float8 cache", cache=1, n=2),
        _point("float8 cache, scales of heads, pages", cache=1, scales=1, page=16, lse=1),
        _point("int8 cache, scales of keys", cache=2, scales=2, n=2, lse=1),
        _point("int8 cache, scales of keys, pages", cache=2, scales=2, page=16),
        _point("scales without quantisation", scales=2),
        _point("prefix", prefix=70, quick=True),
        _point("prefix, an empty sequence", prefix=70, shortest=0, n=3, lse=1),
        _point("prefix and window", prefix=70, n=3, left=50, lse=1),
        _point("prefix of a float8 cache", prefix=70, cache=1, scales=1),
        _point("lean", schedule=1, n=2, lse=1),
        _point("split", schedule=2, n=2, lse=1),
        _point("batch-invariant", schedule=3, n=2, lse=1),
        _point("all options", cache=2, scales=2, page=16, quick=True, **_EVERYTHING),
        _point("all options, prefix", cache=1, scales=1, page=16, prefix=70, schedule=2, **_EVERYTHING),
    )


def _shapes(*texts: str) -> tuple[Shape, ...]:
    return tuple(VOCABULARY.parse(text) for text in texts)


_LLAMA = "h=64,hkv=8,d=128"

SUITES: Mapping[str, tuple[Shape, ...]] = {
    # Seconds on two CPU cores.
    "quick": _shapes(
        "b=1,h=8,hkv=2,nk=2k,d=64",
        "b=4,h=8,hkv=2,nk=1k,shortest=64,d=64",
        "b=4,h=8,hkv=2,nk=1k,shortest=64,d=64,page=16",
        "b=4,h=8,hkv=2,nk=128,d=64,prefix=512",
    ),
    # One new token, eight query heads to a key head: one user and many, short and long.
    "decode": _shapes(
        *(f"b=1,nk={nk},{_LLAMA}" for nk in ("1k", "4k", "16k", "64k", "128k")),
        *(f"b={b},nk={nk},{_LLAMA}" for b, nk in ((4, "16k"), (4, "64k"), (8, "64k"), (16, "4k"), (16, "64k"))),
        f"b=32,nk=4k,{_LLAMA}",
        f"b=32,nk=64k,{_LLAMA}",
        f"b=8,n=4,nk=16k,{_LLAMA}",
        f"b=8,nk=64k,page=16,{_LLAMA}",
        f"b=8,nk=64k,cache=1,scales=1,{_LLAMA}",
    ),
    # Users of very different lengths at once, where a fixed split waits for the longest.
    "ragged": _shapes(
        f"b=32,nk=65000,shortest=6000,{_LLAMA}",
        f"b=32,nk=65000,shortest=6000,schedule=1,{_LLAMA}",
        f"b=32,nk=65000,shortest=6000,schedule=2,{_LLAMA}",
        f"b=32,nk=65000,shortest=6000,page=16,{_LLAMA}",
        f"b=4,nk=128k,shortest=1k,schedule=1,{_LLAMA}",
        f"b=4,nk=128k,shortest=1k,schedule=2,{_LLAMA}",
    ),
    # A long system prompt that all users share, and the same keys without saying so.
    "shared-prefix": _shapes(
        f"b=16,nk=1k,prefix=16k,{_LLAMA}",
        f"b=16,nk=17k,{_LLAMA}",
        f"b=32,nk=4k,shortest=256,prefix=8k,{_LLAMA}",
    ),
}

_HALVES = (torch.float16, torch.bfloat16)

CASE = Case(
    operator="lean_attention",
    functions=("lean_attention",),
    vocabulary=VOCABULARY,
    implementations={
        "reference": Implementation((*_HALVES, torch.float32, torch.float64), "any"),
        "torch": Implementation((*_HALVES, torch.float32, torch.float64), "any", "fwd"),
        "triton": Implementation((*_HALVES, torch.float32), f"1-{MAX_HEAD_DIM}", "fwd"),
        "cuda": Implementation(_HALVES, f"1-{MAX_HEAD_DIM}", "fwd"),
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
    accounts=ACCOUNTS,
    compilation=COMPILATION,
    cuda_accounts=CUDA_ACCOUNTS,
    cuda_compilation=CUDA_COMPILATION,
    tuning=TUNING,
    passes=("fwd",),
)

"""append_kv: inputs, costs, peers and the points that prove it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from iokernels.ops.append_kv.api import MAX_HEAD_DIM, append_kv
from iokernels.ops.append_kv.rotary import rotary_table
from iokernels.runtime.errors import UnsupportedError
from iokernels.testing.case import Case, Implementation, Inputs, Limit, Outputs, Pass, Point
from iokernels.testing.case.shape import Shape

from .compile import COMPILATION
from .shapes import CACHE_DTYPES, VOCABULARY, angles, counts, first, lengths
from .traffic import ACCOUNTS, floor_bytes


def make_inputs(shape: Shape, dtype: torch.dtype, device: torch.device, seed: int) -> Inputs:
    """New keys, and caches of random numbers, none of which may change but where keys go."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int, of: torch.dtype = dtype) -> torch.Tensor:
        return torch.randn(size, generator=generator).to(device, of)

    def new(width: int) -> torch.Tensor:
        if shape.bnhd:
            return normal(shape.b, shape.n, shape.h, width).transpose(1, 2)
        return normal(shape.b, shape.h, shape.n, width)

    def integers(values: list[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32, device=device)

    held = first(shape)
    tensors = {"k_new": new(shape.d), "v_new": new(shape.dv)}
    options: dict[str, Any] = {"cache_seqlens": integers(lengths(shape))}
    caches = options if shape.cache else tensors
    for name, width in (("k_cache", shape.d), ("v_cache", shape.dv)):
        caches[name] = normal(*held, width, of=CACHE_DTYPES[shape.cache] or dtype)
    if shape.page:
        numbers = torch.randperm(held[0], generator=generator).view(shape.b, -1)
        options["block_table"] = numbers.to(device, torch.int32)
    if shape.ragged:
        options["new_seqlens"] = integers(counts(shape))
    if shape.rot:
        options["rotary"] = rotary_table(angles(shape), shape.rot, device=device)
        options["interleaved"] = bool(shape.interleaved)
        if shape.positions:
            options["positions"] = integers([length + 7 for length in lengths(shape)])
    if shape.scales:
        for name in ("k_scale", "v_scale"):
            size = (shape.h,) if shape.scales == 1 else held
            options[name] = (torch.rand(size, generator=generator) * 0.05 + 0.01).to(device)
    return Inputs(shape, tensors, options, {}, seed)


def run(inputs: Inputs, backend: str) -> Outputs:
    """The public function, on copies of what it writes; caches of 8 bits times their scales."""
    given: dict[str, Any] = {**inputs.tensors, **inputs.options}
    written = ["k_cache", "v_cache"] + ["k_scale", "v_scale"] * (inputs.shape.scales == 2)
    given |= {name: given[name].clone() for name in written}
    append_kv(**given, backend=backend)
    if not inputs.shape.cache:
        return {"k": given["k_cache"], "v": given["v_cache"]}
    wide = torch.float64 if inputs.dtype == torch.float64 else torch.float32
    found = {f"{name}_8bit": given[f"{name}_cache"].to(wide) for name in "kv"}
    if inputs.shape.scales == 2:
        found = {f"{name}_8bit": found[f"{name}_8bit"] * given[f"{name}_scale"][..., None].to(wide) for name in "kv"}
    return found


def limit(name: str, dtype: torch.dtype) -> Limit:
    """One rounding of a key. In 8 bits a number that lies between two may go to either: 2^-4 of the key at most."""
    if name.endswith("8bit"):
        return Limit(2.0**-4)
    return Limit(4 * torch.finfo(dtype).eps)


def flops(shape: Shape, which: Pass) -> int:
    """Six a pair that is turned, one an element that is divided."""
    return shape.h * sum(counts(shape)) * (3 * shape.rot + bool(shape.scales) * (shape.d + shape.dv))


def reference_bytes(shape: Shape) -> int:
    """Caches in float64, twice."""
    sequences, heads, keys = first(shape)
    return 16 * sequences * heads * keys * (shape.d + shape.dv)


def smaller(shape: Shape) -> Shape:
    """Half the sequences, then half the keys."""
    if shape.b > 1:
        return shape.replace(b=shape.b // 2)
    if shape.nk >= 64:
        return shape.replace(nk=shape.nk // 2, shortest=min(shape.shortest, shape.nk // 2))
    return shape


def peers(device: torch.device) -> dict[str, Callable[[Inputs], Callable[[], Outputs]] | str]:
    """What a user types in PyTorch: turned keys, then an assignment to a slice."""

    def prepare(inputs: Inputs) -> Callable[[], Outputs]:
        shape = inputs.shape
        if shape.page or shape.ragged or shape.shortest != shape.nk or shape.cache or shape.scales:
            raise UnsupportedError("an assignment to a slice takes dense caches of equal lengths without scales")
        k, v, k_cache, v_cache = (inputs.tensors[name] for name in ("k_new", "v_new", "k_cache", "v_cache"))
        at = slice(shape.nk, shape.nk + shape.n)
        start = shape.nk + 7 * shape.positions
        turns = [x[start : start + shape.n] for x in inputs.options.get("rotary", ())]
        pairs = (shape.n, -1)

        def append() -> Outputs:
            turned = k
            if shape.rot:
                cos, sin = (x.view(pairs).to(k.dtype) for x in turns)
                head = k[..., : shape.rot]
                even, odd = (head[..., ::2], head[..., 1::2]) if shape.interleaved else head.chunk(2, -1)
                new = (even * cos - odd * sin, odd * cos + even * sin)
                joined = torch.stack(new, -1).flatten(-2) if shape.interleaved else torch.cat(new, -1)
                turned = torch.cat((joined, k[..., shape.rot :]), -1)
            k_cache[:, :, at] = turned
            v_cache[:, :, at] = v
            return {"k": k_cache, "v": v_cache}

        return append

    return {"eager": prepare}


def _point(name: str, *, quick: bool = False, **given: float) -> Point:
    return Point(name, VOCABULARY.shape(**({"b": 3, "h": 2, "n": 1, "nk": 21, "d": 16} | given)), quick)


def check_points() -> tuple[Point, ...]:
    """Every option."""
    return (
        _point("one key each", quick=True),
        _point("a prompt in an empty cache", n=19, nk=0),
        _point("sequences of different lengths", shortest=4, spare=5),
        _point("different numbers of keys", n=19, ragged=1, shortest=0),
        _point("pages", page=4, n=7, shortest=3, quick=True),
        _point("rotary", rot=16, n=3),
        _point("rotary of the first elements, interleaved", rot=8, interleaved=1, n=3),
        _point("rotary with positions", rot=16, positions=1),
        _point("scales of heads", scales=1, n=3),
        _point("float8, scales of heads", cache=1, scales=1, n=3),
        _point("float8, a scale for each key", cache=1, scales=2, n=3),
        _point("int8, a scale for each key, pages, rotary", cache=2, scales=2, page=4, rot=16, n=5, quick=True),
        _point("tensors [b, n, h, d], values narrower", bnhd=1, n=5, dv=12),
    )


_HALVES = (torch.float16, torch.bfloat16)

CASE = Case(
    operator="append_kv",
    functions=("append_kv",),
    vocabulary=VOCABULARY,
    implementations={
        "reference": Implementation((*_HALVES, torch.float32, torch.float64), "any", "fwd"),
        "torch": Implementation((*_HALVES, torch.float32, torch.float64), "any", "fwd"),
        "triton": Implementation((*_HALVES, torch.float32), f"1-{MAX_HEAD_DIM}", "fwd"),
    },
    suites={
        "quick": tuple(VOCABULARY.parse(f"b=8,h=8,nk=1k,d=64,{text}") for text in ("rot=64", "page=16,rot=64")),
        "decode": tuple(
            VOCABULARY.parse(f"b={b},h=8,nk=8k,d=128,page=16,rot=128{text}")
            for b in (1, 16, 64)
            for text in ("", ",cache=1,scales=2")
        ),
        "prefill": (VOCABULARY.parse("b=4,h=8,n=4k,nk=0,d=128,page=16,rot=128"),),
    },
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
    passes=("fwd",),
    limit=limit,
)

"""flash_attention and flash_attention_varlen: inputs, costs, peers and the points that prove every option."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from iokernels.ops.flash_attention import flash_attention, flash_attention_varlen
from iokernels.ops.flash_attention.api import MAX_HEAD_DIM
from iokernels.testing.case import Case, Implementation, Inputs, Outputs, Pass, Point
from iokernels.testing.case.peers import attention_peers
from iokernels.testing.case.shape import Shape, UsageError

from .accounts import ACCOUNTS
from .compile import COMPILATION
from .cuda import ACCOUNTS as CUDA_ACCOUNTS
from .cuda import COMPILATION as CUDA_COMPILATION
from .shapes import VOCABULARY, lengths
from .tuning import TUNING


def make_inputs(shape: Shape, dtype: torch.dtype, device: torch.device, seed: int) -> Inputs:
    """Normal values, rounded to ``dtype``. Scores have a standard deviation of about ``gain``."""
    if shape.h % shape.hkv:
        raise UsageError(f"shape: hkv={shape.hkv} does not divide h={shape.h}")
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*size: int, of: torch.dtype = dtype) -> Tensor:
        return torch.randn(size, generator=generator, device=device).to(of)

    def heads(sequence: int, count: int, width: int) -> Tensor:
        if shape.packed:
            return normal(sequence, count, width)
        if shape.bnhd:
            return normal(shape.b, sequence, count, width).transpose(1, 2)
        return normal(shape.b, count, sequence, width)

    sides = lengths(shape)
    rows, keys = (sum(side) for side in zip(*sides, strict=True)) if shape.packed else (shape.n, shape.nk)
    tensors = {
        "q": heads(rows, shape.h, shape.d) * shape.gain,
        "k": heads(keys, shape.hkv, shape.d),
        "v": heads(keys, shape.hkv, shape.dv),
    }
    if shape.bias:
        tensors["bias"] = normal(shape.b if shape.bias == 1 else 1, shape.h, shape.n, shape.nk)
    if shape.sinks:
        tensors["sinks"] = normal(shape.h)
    gradients = {"out": heads(rows, shape.h, shape.dv)}
    if shape.lse:
        statistics = torch.float64 if dtype == torch.float64 else torch.float32
        size = (shape.h, rows) if shape.packed else (shape.b, shape.h, rows)
        gradients["lse"] = normal(*size, of=statistics)

    options: dict[str, Any] = {"causal": bool(shape.causal), "softcap": shape.softcap, "dropout_p": shape.dropout}
    if shape.left >= 0 or shape.right >= 0:
        options["window"] = (shape.left, shape.right)
    if shape.mask:
        options["mask"] = torch.rand((shape.b, shape.h, shape.n, shape.nk), generator=generator, device=device) < 0.9
        options["mask"][:, :, :1] = False  # a row without keys
    if shape.alibi:
        options["alibi_slopes"] = 2.0 ** (-8.0 * torch.arange(1, shape.h + 1, device=device) / shape.h)
    if shape.packed:
        for name, longest, side in zip("qk", (shape.n, shape.nk), zip(*sides, strict=True), strict=True):
            ends = torch.tensor((0, *side)).cumsum(0)
            options[f"cu_seqlens_{name}"] = ends.to(device, torch.int32)
            options[f"max_seqlen_{name}"] = longest
    leaves = {name: x.detach().requires_grad_() for name, x in tensors.items()}
    return Inputs(shape, leaves, options, gradients, seed)


def run(inputs: Inputs, backend: str) -> Outputs:
    """The public function, dense or packed."""
    function = flash_attention_varlen if inputs.shape.packed else flash_attention
    found = function(**inputs.tensors, **inputs.options, return_lse=bool(inputs.shape.lse), backend=backend)
    return dict(zip(("out", "lse"), found, strict=True)) if inputs.shape.lse else {"out": found}


def pairs(shape: Shape) -> int:
    """Query-key pairs of one head inside the causal and window limits, over the batch.

    A mask lowers the count by nothing: which pairs it hides is known only after it was read.
    """
    right = 0 if shape.causal else shape.right
    counted = {side: _visible(*side, shape.left, right) for side in set(lengths(shape))}
    return sum(counted[side] for side in lengths(shape))


def _visible(n: int, nk: int, left: int, right: int) -> int:
    position = torch.arange(n, dtype=torch.int64) + nk - n
    first = (position - left).clamp(min=0) if left >= 0 else torch.zeros_like(position)
    last = (position + right).clamp(max=nk - 1) if right >= 0 else torch.full_like(position, nk - 1)
    return int((last - first + 1).clamp(min=0).sum())


def flops(shape: Shape, which: Pass) -> int:
    """Two matrix products forward, five backward (the scores are computed again), over the visible pairs only."""
    forward = 2 * (shape.d + shape.dv)
    backward = 2 * (3 * shape.d + 2 * shape.dv)
    return shape.h * pairs(shape) * {"fwd": forward, "bwd": backward, "both": forward + backward}[which]


def floor_bytes(shape: Shape, dtype: torch.dtype, which: Pass) -> int:
    """Each input read once, each output written once; the log-sum-exp counts, since backward needs it."""
    rows, keys = (sum(side) for side in zip(*lengths(shape), strict=True)) if shape.b else (0, 0)
    size = dtype.itemsize
    statistic = 8 if dtype == torch.float64 else 4
    scores = shape.h * shape.n * shape.nk
    differentiable = size * (
        rows * shape.h * shape.d
        + keys * shape.hkv * (shape.d + shape.dv)
        + (0, shape.b, 1)[shape.bias] * scores
        + bool(shape.sinks) * shape.h
    )
    constant = bool(shape.mask) * shape.b * scores + bool(shape.alibi) * shape.h * 4
    out, lse = rows * shape.h * shape.dv * size, rows * shape.h * statistic
    forward = differentiable + constant + out + lse
    # Backward reads the inputs again, out and its gradient, lse (and its gradient), and writes the other gradients.
    backward = 2 * differentiable + constant + 2 * out + lse * (1 + bool(shape.lse))
    return {"fwd": forward, "bwd": backward, "both": forward + backward}[which]


def reference_bytes(shape: Shape) -> int:
    """About eight float64 matrices of scores live at once in the reference's backward pass."""
    return 8 * 8 * shape.b * shape.h * shape.n * shape.nk


def smaller(shape: Shape) -> Shape:
    """One sequence instead of many (as far as packing makes sense), then one group of heads, then half the length."""
    if shape.b > (3 if shape.packed else 1):
        return shape.replace(b=3 if shape.packed else 1)
    if shape.hkv > 1:
        return shape.replace(h=shape.h // shape.hkv, hkv=1)
    if min(shape.n, shape.nk) >= 512:
        return shape.replace(n=shape.n // 2, nk=shape.nk // 2)
    return shape


def _point(name: str, *, quick: bool = False, **given: float) -> Point:
    return Point(name, VOCABULARY.shape(**({"b": 1, "h": 2, "n": 130, "d": 32} | given)), quick)


_EVERYTHING: dict[str, float] = {
    "h": 4, "hkv": 2, "causal": 1, "left": 40, "softcap": 2.0, "mask": 1, "bias": 1, "alibi": 1, "sinks": 1,
    "dropout": 0.1, "lse": 1, "gain": 2.0,
}  # fmt: skip


def check_points() -> tuple[Point, ...]:
    """Every option alone, its edges, and all together. Lengths straddle the kernels' tiles."""
    return (
        _point("plain", nk=150, b=2, quick=True),
        _point("causal", n=150, causal=1, quick=True),
        _point("causal, fewer queries than keys", n=33, nk=150, causal=1),
        _point("causal, rows without keys", n=90, nk=33, causal=1, lse=1),
        _point("one query", n=1, nk=77, causal=1),
        # Without a sink the true gradients of q and k would be zero, and no error would be allowed.
        _point("one query, one key", n=1, b=4, h=4, sinks=1),
        _point("no keys at all", n=5, nk=0),
        _point("window", nk=150, left=20, right=5),
        _point("window and causal", n=150, causal=1, left=16),
        _point("window, rows without keys", n=90, nk=20, left=3, right=3),
        _point("softcap", softcap=1.5, gain=2.0),
        _point("mask with a row without keys", mask=1),
        _point("bias and its gradient", bias=1, b=2, n=70),
        _point("bias of the whole batch", bias=2, b=2, n=70, causal=1),
        _point("ALiBi", alibi=1, nk=150),
        _point("sinks and their gradient", sinks=1),
        _point("sinks, rows without keys", sinks=1, n=90, nk=33, causal=1),
        _point("dropout", dropout=0.2),
        _point("grouped heads", h=6, hkv=2, n=70, causal=1),
        _point("one key head (MQA)", h=5, hkv=1, n=70),
        _point("gradient of the LSE", lse=1),
        _point("gradient of the LSE with sinks", lse=1, sinks=1, causal=1, n=90, nk=70),
        _point("tensors [b, n, h, d]", bnhd=1, b=2, n=70, causal=1),
        _point("peaked attention", gain=8.0, causal=1),
        _point("v narrower than q", d=64, dv=24, n=70),
        _point("v wider than q", d=16, dv=48, n=70),
        _point("width 40", d=40, n=70, causal=1),
        _point("width 20, not a multiple of 8", d=20, n=70),
        _point("width 128", d=128, n=70, causal=1),
        _point("width 256", d=256, n=40),
        _point("packed", packed=1, b=3, nk=150),
        _point("packed, causal, grouped heads", packed=1, b=3, h=4, hkv=2, causal=1),
        _point("packed with empty sequences", packed=1, b=4, empty=1, causal=1, n=70, lse=1),
        _point("all options", n=70, nk=90, quick=True, **_EVERYTHING),
        _point("all options, packed", packed=1, b=3, n=60, nk=70, quick=True, **_EVERYTHING),
    )


def _shapes(*texts: str) -> tuple[Shape, ...]:
    return tuple(VOCABULARY.parse(text) for text in texts)


SUITES: Mapping[str, tuple[Shape, ...]] = {
    # Seconds on two CPU cores.
    "quick": _shapes("b=1,h=4,n=512,d=64", "b=1,h=4,n=512,d=64,causal=1", "b=1,h=4,hkv=2,n=512,d=64,causal=1"),
    # 16k tokens and 2048 channels, as FlashAttention's papers report them.
    "train": _shapes(
        "b=16,h=16,n=1k,d=128,causal=1",
        "b=4,h=16,n=4k,d=128",
        "b=4,h=16,n=4k,d=128,causal=1",
        "b=1,h=16,n=16k,d=128",
        "b=1,h=16,n=16k,d=128,causal=1",
        "b=4,h=32,n=4k,d=64,causal=1",
    ),
    "long": _shapes(*(f"b=1,h=16,n={n},d=128,causal=1" for n in ("16k", "32k", "64k"))),
    # Grouped heads, a window, a softcap, sinks and packed prompts, as current models have them.
    "llm": _shapes(
        "b=1,h=32,hkv=8,n=8k,d=128,causal=1",
        "b=1,h=32,hkv=8,n=8k,d=128,causal=1,left=4095",
        "b=1,h=16,hkv=8,n=8k,d=256,causal=1,softcap=50",
        "b=1,h=64,hkv=8,n=8k,d=64,causal=1,left=127,sinks=1",
        "b=8,h=32,hkv=8,n=4k,d=128,causal=1,packed=1",
    ),
    # One new token against its past, for one user and for many; then a few at once, as speculation verifies them.
    "decode": _shapes(
        "b=1,h=32,hkv=8,n=1,nk=8k,d=128,causal=1",
        "b=1,h=32,hkv=8,n=1,nk=64k,d=128,causal=1",
        "b=16,h=32,hkv=8,n=1,nk=8k,d=128,causal=1",
        "b=64,h=32,hkv=8,n=1,nk=4k,d=128,causal=1",
        "b=1,h=32,hkv=8,n=8,nk=16k,d=128,causal=1",
        "b=16,h=32,hkv=8,n=8,nk=4k,d=128,causal=1",
    ),
}

_HALVES = (torch.float16, torch.bfloat16)

CASE = Case(
    operator="flash_attention",
    functions=("flash_attention", "flash_attention_varlen"),
    vocabulary=VOCABULARY,
    implementations={
        "reference": Implementation((*_HALVES, torch.float32, torch.float64), "any"),
        "torch": Implementation((*_HALVES, torch.float32, torch.float64), "any"),
        "triton": Implementation((*_HALVES, torch.float32), f"1-{MAX_HEAD_DIM}"),
        "cuda": Implementation(_HALVES, f"1-{MAX_HEAD_DIM}"),
    },
    suites=SUITES,
    make_inputs=make_inputs,
    run=run,
    flops=flops,
    floor_bytes=floor_bytes,
    reference_bytes=reference_bytes,
    smaller=smaller,
    check_points=check_points,
    peers=attention_peers,
    accounts=ACCOUNTS,
    compilation=COMPILATION,
    cuda_accounts=CUDA_ACCOUNTS,
    cuda_compilation=CUDA_COMPILATION,
    tuning=TUNING,
)

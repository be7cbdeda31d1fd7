"""short_conv: inputs, costs, peers and the points that prove every option."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from iokernels.ops.short_conv import short_conv
from iokernels.ops.short_conv.api import MAX_WIDTH
from iokernels.ops.short_conv.triton.tuning import ShortConfig
from iokernels.runtime.errors import UnsupportedError
from iokernels.testing.case import Case, Implementation, Inputs, Limit, Outputs, Pass, Point, Prepare
from iokernels.testing.case.accounts import Account, Accounts, Configs
from iokernels.testing.case.shape import Shape, UsageError

from . import traffic as model
from .compile import COMPILATION, TUNING, configs
from .shapes import PADDINGS, VOCABULARY, lengths, outputs, sides


def make_inputs(shape: Shape, dtype: torch.dtype, device: torch.device, seed: int) -> Inputs:
    """Normal values, rounded to ``dtype``; the filter is scaled so that outputs have the variance of inputs."""
    if (shape.state and shape.padding) or (shape.packed and shape.padding == 2):
        raise UsageError("shape: state=1 needs padding=0, and packed=1 padding=0 or padding=1")
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=device).to(dtype)

    def rows(count: int) -> Tensor:
        if shape.packed:
            return normal(count, shape.h)
        return normal(shape.b, count, shape.h).transpose(1, 2) if shape.bnh else normal(shape.b, shape.h, count)

    tensors = {
        "x": rows(sum(lengths(shape)) if shape.packed else shape.n),
        "weight": normal(shape.h, shape.w) * shape.w**-0.5,
    }
    gradients = {"out": rows(outputs(shape) if shape.packed else shape.n + sum(sides(shape)) - (shape.w - 1))}
    if shape.bias:
        tensors["bias"] = normal(shape.h)
    if shape.state:
        tensors["initial_state"] = normal(shape.b, shape.h, shape.w - 1)
        gradients["final_state"] = normal(shape.b, shape.h, shape.w - 1)
    options: dict[str, Any] = {"activation": "silu" if shape.silu else None, "padding": PADDINGS[shape.padding]}
    if shape.packed:
        options["cu_seqlens"] = torch.tensor((0, *lengths(shape))).cumsum(0).to(device, torch.int32)
    leaves = {name: x.detach().requires_grad_() for name, x in tensors.items()}
    return Inputs(shape, leaves, options, gradients, seed)


def run(inputs: Inputs, backend: str) -> Outputs:
    """The public function."""
    found = short_conv(**inputs.tensors, **inputs.options, return_state=bool(inputs.shape.state), backend=backend)
    return dict(zip(("out", "final_state"), found, strict=True)) if inputs.shape.state else {"out": found}


def flops(shape: Shape, which: Pass) -> int:
    """A multiply-add for each tap of an output; backward the same for the rows and again for the filter."""
    forward = 2 * shape.w * shape.h * outputs(shape)
    return {"fwd": forward, "bwd": 2 * forward, "both": 3 * forward}[which]


def floor_bytes(shape: Shape, dtype: torch.dtype, which: Pass) -> int:
    """Each input read once, each output written once."""
    known = problem(shape, dtype)
    arguments = known.inputs_bytes + known.filter_bytes + known.bias_bytes + known.state * known.state_bytes
    results = known.outputs_bytes + known.state * known.state_bytes
    forward, backward = arguments + results, 2 * arguments + results
    return {"fwd": forward, "bwd": backward, "both": forward + backward}[which]


def problem(shape: Shape, dtype: torch.dtype) -> model.Problem:
    """What the model of bytes needs to know of a shape."""
    left, right = sides(shape)
    return model.Problem(
        tuple(lengths(shape)), shape.h, shape.w, left, right, dtype.itemsize, bool(shape.silu), bool(shape.bias),
        bool(shape.state), bool(shape.packed),
    )  # fmt: skip


def reference_bytes(shape: Shape) -> int:
    """The windows of all outputs in float64, and their gradient."""
    return 2 * 8 * shape.b * shape.h * shape.n * shape.w


def smaller(shape: Shape) -> Shape:
    """Fewer sequences, then fewer channels, then half the length."""
    if shape.b > (3 if shape.packed else 1):
        return shape.replace(b=3 if shape.packed else 1)
    if shape.h > 64:
        return shape.replace(h=64)
    return shape.replace(n=shape.n // 2) if shape.n >= 512 else shape


def limit(name: str, dtype: torch.dtype) -> Limit:
    """Outputs and the gradient of x by sequences, since a row of one or two numbers may be off by their rounding alone;
    the few numbers of the other gradients together, twice as much: they are sums whose terms cancel."""
    allowed = {torch.float16: 1.5e-3, torch.bfloat16: 3e-3, torch.float32: 2e-6, torch.float64: 1e-14}[dtype]
    return Limit(allowed, 2) if name in ("out", "dx") else Limit(2 * allowed, 0)


def _point(name: str, *, quick: bool = False, **given: float) -> Point:
    return Point(name, VOCABULARY.shape(**({"b": 2, "h": 5, "n": 70, "w": 4} | given)), quick)


def check_points() -> tuple[Point, ...]:
    """Every option alone, its edges, and all together. Lengths straddle the kernels' tiles."""
    everything: dict[str, Any] = {"silu": 1, "bias": 1, "state": 1}
    return (
        _point("plain", quick=True),
        _point("silu and bias", silu=1, bias=1, quick=True),
        *(_point(f"width {w}", w=w, silu=1, bias=1, n=45) for w in (1, 2, 3, 5, 8)),
        *(_point(f"wide, {w} taps", w=w, silu=1, bias=1, n=90) for w in (9, 33)),
        _point("widest", w=128, h=2, n=150),
        _point("same padding", padding=1, silu=1),
        _point("same padding of an odd filter", padding=1, w=7),
        _point("same padding of a wide filter", padding=1, w=20, silu=1),
        _point("no padding", padding=2, silu=1, bias=1),
        _point("no padding of a wide filter", padding=2, w=20),
        _point("states", state=1),
        _point("states of a wide filter", state=1, w=12, silu=1),
        _point("fewer rows than taps", n=2, w=6, **everything),
        _point("fewer rows than taps of a wide filter", n=5, w=12, h=16, **everything),
        _point("no rows", n=0, state=1),
        _point("one row", n=1, h=32, silu=1),
        _point("tensors [b, n, h]", bnh=1, h=19, n=40, silu=1, bias=1),
        _point("tensors [b, n, h], a wide filter", bnh=1, h=7, w=10, silu=1, bias=1),
        _point("packed", packed=1, b=3),
        _point("packed, same padding", packed=1, b=3, padding=1, silu=1, w=5),
        _point("packed with an empty sequence", packed=1, b=4, empty=1, **everything),
        _point("packed, a wide filter", packed=1, b=3, w=17, n=100, **everything),
        _point("all options", quick=True, bnh=1, **everything),
        _point("all options, packed", packed=1, b=4, empty=1, w=3, h=9, n=40, quick=True, **everything),
    )


def peers(device: torch.device) -> Mapping[str, Prepare | str]:
    """What else computes it: PyTorch's grouped convolution, and the package causal-conv1d."""
    found: dict[str, Prepare | str] = {"conv1d": _conv1d}
    if find_spec("causal_conv1d") is None:
        found["causal-conv1d"] = "causal-conv1d is not installed"
    else:
        found["causal-conv1d"] = _causal_conv1d if device.type == "cuda" else "causal-conv1d needs a CUDA device"
    return found


def _refuse(shape: Shape, *words: str) -> None:
    for word in words:
        if shape[word]:
            raise UnsupportedError(f"it has no equivalent of {word}={shape[word]} here")


def _conv1d(inputs: Inputs) -> Callable[[], Outputs]:
    shape = inputs.shape
    _refuse(shape, "state", "packed")
    left, right = sides(shape)

    def call() -> Outputs:
        given = inputs.tensors
        padded = F.pad(given["x"], (left, right))
        out = F.conv1d(padded, given["weight"].unsqueeze(1), given.get("bias"), groups=shape.h)
        return {"out": F.silu(out) if shape.silu else out}

    return call


def _causal_conv1d(inputs: Inputs) -> Callable[[], Outputs]:
    shape = inputs.shape
    _refuse(shape, "state", "packed", "padding")
    if not 2 <= shape.w <= 4:
        raise UnsupportedError(f"it takes 2 to 4 taps, not {shape.w}")
    function = import_module("causal_conv1d").causal_conv1d_fn
    call = partial(function, **inputs.tensors, activation="silu" if shape.silu else None)
    return lambda: {"out": call()}


def _accounts(shape: Shape, dtype: torch.dtype, given: Configs) -> dict[str, Account]:
    return model.accounts(problem(shape, dtype), given)


def _naive_bytes(shape: Shape, dtype: torch.dtype, which: Literal["fwd", "bwd"]) -> int:
    known = problem(shape, dtype)
    x, out, taps = known.inputs_bytes, known.outputs_bytes, known.filter_bytes
    padded = x + shape.b * shape.h * (shape.w - 1) * dtype.itemsize
    steps = 2 * out  # a pass over the output: read and written
    forward = (x + padded) + (padded + taps + out) + (shape.bias + shape.silu) * steps
    backward = (out + taps + padded) + (padded + out + taps) + (padded + x) + shape.bias * out + shape.silu * 3 * out
    return forward if which == "fwd" else backward


_TILES: dict[str, ShortConfig] = {
    "short_conv_fwd": ShortConfig(16, 4, 1),
    "short_conv_bwd": ShortConfig(16, 4, 1),
    "short_conv_wide_fwd": ShortConfig(256, 2, 4),
    "short_conv_wide_bwd": ShortConfig(256, 2, 4),
    "short_conv_wide_dweight": ShortConfig(512, 2, 4),
}

_ACCOUNTED = (
    ("b=2,h=5,n=37,w=4", torch.float16),
    ("b=1,h=5,n=37,w=4,silu=1,bias=1,bnh=1", torch.float32),
    ("b=2,h=3,n=20,w=5,padding=1,silu=1", torch.float16),
    ("b=1,h=3,n=33,w=3,padding=2,bias=1", torch.bfloat16),
    ("b=2,h=6,n=18,w=4,silu=1,bias=1,state=1", torch.float16),
    ("b=2,h=3,n=2,w=6,silu=1,state=1", torch.float32),
    ("b=4,h=6,n=35,w=4,silu=1,bias=1,state=1,packed=1,empty=1", torch.float16),
    ("b=3,h=3,n=35,w=2,padding=1,packed=1", torch.float16),
    ("b=1,h=3,n=300,w=12,silu=1,bias=1", torch.float16),
    ("b=1,h=3,n=40,w=20,padding=2", torch.float32),
    ("b=1,h=3,n=290,w=12,silu=1,state=1", torch.bfloat16),
    ("b=3,h=3,n=270,w=17,bias=1,state=1,packed=1,empty=1", torch.float16),
)

ACCOUNTS = Accounts(
    model=_accounts,
    configs=configs,
    naive_bytes=_naive_bytes,
    naive="padding, a convolution, the bias and silu, each through memory",
    shapes=tuple((VOCABULARY.parse(text), dtype) for text, dtype in _ACCOUNTED),
    test_configs=_TILES,
)


def _shapes(*texts: str) -> tuple[Shape, ...]:
    return tuple(VOCABULARY.parse(text) for text in texts)


SUITES: Mapping[str, tuple[Shape, ...]] = {
    # Seconds on two CPU cores.
    "quick": _shapes("b=2,h=256,n=2k,w=4,silu=1,bias=1", "b=2,h=256,n=2k,w=4,silu=1,bias=1,bnh=1"),
    # As models have them: Mamba's, and the wider ones of FlashFFTConv's table.
    "train": _shapes(
        "b=8,h=4k,n=2k,w=4,silu=1,bias=1",
        "b=8,h=4k,n=2k,w=4,silu=1,bias=1,bnh=1",
        "b=8,h=4k,n=2k,w=4,silu=1,bias=1,bnh=1,packed=1",
        "b=16,h=768,n=1k,w=5,padding=1,bnh=1",
        "b=16,h=2k,n=4k,w=5,padding=1,bnh=1",
        "b=8,h=2k,n=4k,w=8,silu=1",
    ),
    "wide": _shapes(*(f"b=4,h=2k,n=8k,w={w}" for w in (16, 32, 64, 128))),
    # On a CPU, beside PyTorch's own.
    "cpu": _shapes(*(f"b=4,h=512,n=1k,w={w},silu=1,bias=1,bnh={bnh}" for w in (4, 8, 32) for bnh in (0, 1))),
}

_HALVES = (torch.float16, torch.bfloat16)

CASE = Case(
    operator="short_conv",
    functions=("short_conv",),
    vocabulary=VOCABULARY,
    implementations={
        "reference": Implementation((*_HALVES, torch.float32, torch.float64), "any"),
        "torch": Implementation((*_HALVES, torch.float32, torch.float64), "any"),
        "triton": Implementation((*_HALVES, torch.float32), f"1-{MAX_WIDTH} taps"),
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
    tuning=TUNING,
    limit=limit,
)

"""gated_delta_rule: inputs, costs and the points that prove every option."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from iokernels.ops.gated_delta_rule.api import MAX_HEAD_DIM, gated_delta_rule
from iokernels.ops.shared.layout import state_dtype
from iokernels.runtime.errors import UnsupportedError
from iokernels.testing.case import Case, Implementation, Inputs, Limit, Outputs, Pass, Point, Prepare
from iokernels.testing.case.shape import Shape, UsageError

from .compile import COMPILATION, TUNING
from .shapes import VOCABULARY, lengths
from .traffic import ACCOUNTS, floor_bytes


def drawn(shape: Shape, dtype: torch.dtype, device: torch.device, seed: int) -> tuple[dict[str, Tensor], Any]:
    """q, k, v, beta and log_decay, and what draws more: normal values, keys of length 1, gates evenly spread."""
    if shape.h % shape.hk:
        raise UsageError(f"shape: hk={shape.hk} does not divide h={shape.h}")
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=device)

    def even(*size: int) -> Tensor:
        return torch.rand(size, generator=generator, device=device)

    packed = shape.get("packed")
    rows = sum(lengths(shape)) if packed else shape.n

    def heads(count: int, width: int) -> Tensor:
        if packed:
            return normal(rows, count, width)
        if shape.bnhd:
            return normal(shape.b, rows, count, width).transpose(1, 2)
        return normal(shape.b, count, rows, width)

    accurate = state_dtype(dtype)
    gates = (rows, shape.h) if packed else (shape.b, shape.h, rows)
    tensors = {
        "q": heads(shape.hk, shape.d).to(dtype),
        "k": F.normalize(heads(shape.hk, shape.d), dim=-1).to(dtype),
        "v": heads(shape.h, shape.dv).to(dtype),
        "beta": shape.beta * even(*gates).to(accurate),
    }
    if shape.decay:
        tensors["log_decay"] = -shape.gate * even(*(gates if shape.decay == 1 else (shape.h,))).to(accurate)
    return tensors, (heads, normal)


def make_inputs(shape: Shape, dtype: torch.dtype, device: torch.device, seed: int) -> Inputs:
    """Normal values, keys of length 1, beta and log decays evenly spread over their ranges."""
    tensors, (heads, normal) = drawn(shape, dtype, device, seed)
    gradients = {"out": heads(shape.h, shape.dv).to(dtype)}
    options: dict[str, Any] = {}
    if shape.state:
        states = (shape.b, shape.h, shape.d, shape.dv)
        tensors["initial_state"] = normal(*states).to(state_dtype(dtype))
        gradients["final_state"] = normal(*states).to(state_dtype(dtype))
    if shape.packed:
        options["cu_seqlens"] = torch.tensor((0, *lengths(shape))).cumsum(0).to(device, torch.int32)
    leaves = {name: x.detach().requires_grad_() for name, x in tensors.items()}
    return Inputs(shape, leaves, options, gradients, seed)


def run(inputs: Inputs, backend: str) -> Outputs:
    """The public function."""
    out, state = gated_delta_rule(**inputs.tensors, **inputs.options, return_state=True, backend=backend)
    return {"out": out, "final_state": state}


def flops(shape: Shape, which: Pass) -> int:
    """Those of the recurrence: two products of the state with a vector and one outer product a token; twice that
    backward, and the forward pass again."""
    forward = 6 * shape.h * sum(lengths(shape)) * shape.d * shape.dv
    return {"fwd": forward, "bwd": 3 * forward, "both": 4 * forward}[which]


def reference_bytes(shape: Shape) -> int:
    """Autograd keeps about four float64 states for every token."""
    return 4 * 8 * shape.h * sum(lengths(shape)) * shape.d * shape.dv


def smaller(shape: Shape) -> Shape:
    """One sequence instead of many (as far as packing makes sense), then one group of heads, then half the length."""
    least = 3 if shape.packed else 1
    if shape.b > least:
        return shape.replace(b=least)
    if shape.hk > 1:
        return shape.replace(h=shape.h // shape.hk, hk=1)
    return shape.replace(n=shape.n // 2) if shape.n >= 256 else shape


LIMITS = {torch.float16: 2e-3, torch.bfloat16: 8e-3, torch.float32: 1e-5, torch.float64: 1e-11}


def limit(name: str, dtype: torch.dtype) -> Limit:
    """Over the whole tensor: a single row may cancel to nothing.

    The gradient of the decays is a sum of terms that mostly cancel.
    """
    if name == "dlog_decay":
        return Limit({torch.float32: 1e-4, torch.float64: 1e-10}.get(dtype, 2e-2), 0)
    return Limit(LIMITS[dtype], 0)


def peers(device: torch.device) -> Mapping[str, Prepare | str]:
    """fla-org's kernels for the same function, where they are installed and there is a GPU."""
    if device.type != "cuda":
        return {"fla": "its kernels run on GPUs only"}
    try:
        from fla.ops.gated_delta_rule import chunk_gated_delta_rule  # pyright: ignore[reportMissingImports]
    except ImportError:
        return {"fla": "flash-linear-attention is not installed"}

    def prepare(inputs: Inputs) -> Callable[[], Outputs]:
        given = dict(inputs.tensors)
        if inputs.shape.hk != inputs.shape.h or inputs.shape.packed or inputs.shape.decay != 1:
            raise UnsupportedError("it is timed with one key head a head, unpacked, and a decay for every token")
        initial = given.pop("initial_state", None)
        g, beta = given.pop("log_decay").transpose(1, 2), given.pop("beta").transpose(1, 2)
        q, k, v = (x.transpose(1, 2) for x in given.values())

        def call() -> Outputs:
            out, state = chunk_gated_delta_rule(q, k, v, g=g, beta=beta, initial_state=initial, output_final_state=True)
            return {"out": out.transpose(1, 2), "final_state": state}

        return call

    return {"fla": prepare}


def _point(name: str, *, quick: bool = False, **given: float) -> Point:
    return Point(name, VOCABULARY.shape(**({"b": 1, "h": 2, "n": 100, "d": 16} | given)), quick)


def check_points() -> tuple[Point, ...]:
    """Every option alone, its edges, and all together. Lengths straddle the kernels' chunks."""
    return (
        _point("plain", b=2, n=130, d=32, quick=True),
        _point("the delta rule", decay=0, quick=True),
        _point("a decay for each head", decay=2),
        _point("no decay at all, by value", gate=0.0),
        _point("tiny decay", gate=1e-4),
        _point("strong decay", gate=20.0),
        _point("beta up to 1", beta=1.0),
        _point("states at both ends", state=1, n=70, quick=True),
        _point("one token", n=1, b=3, state=1),
        _point("15 tokens", n=15),
        _point("a chunk", n=64),
        _point("a chunk and a token", n=65, state=1),
        _point("shared keys", h=6, hk=2, n=70),
        _point("tensors [b, n, h, d]", bnhd=1, b=2, n=70),
        _point("width 60, v wider", d=60, dv=100, n=70),
        _point("width 64, v narrower", d=64, dv=24, n=70),
        _point("width 128", d=128, n=66, h=1),
        _point("width 256", d=256, n=40, h=1),
        _point("packed", packed=1, b=3, n=80),
        _point("packed with an empty sequence and one of a token", packed=1, b=4, empty=1, n=70, state=1),
        _point("all options", packed=1, b=4, empty=1, n=70, h=4, hk=2, d=24, dv=40, state=1, gate=3.0, quick=True),
    )


def _shapes(*texts: str) -> tuple[Shape, ...]:
    return tuple(VOCABULARY.parse(text) for text in texts)


SUITES: Mapping[str, tuple[Shape, ...]] = {
    # Seconds on two CPU cores.
    "quick": _shapes("b=1,h=4,n=512,d=64", "b=1,h=4,n=512,d=64,decay=0"),
    "train": _shapes(
        "b=8,h=8,n=1k,d=64", "b=8,h=16,n=2k,d=128", "b=4,h=16,n=4k,d=128", "b=4,h=32,n=4k,d=64", "b=2,h=8,n=4k,d=256"
    ),
    "long": _shapes(*(f"b=1,h=32,n={n},d=128" for n in ("16k", "32k", "64k")), "b=4,h=32,n=16k,d=128"),
    # Shared keys and packed prompts, as current hybrid models have them.
    "llm": _shapes("b=1,h=32,hk=16,n=8k,d=128", "b=8,h=32,hk=16,n=4k,d=128,packed=1"),
}

HALVES = (torch.float16, torch.bfloat16)

CASE = Case(
    operator="gated_delta_rule",
    functions=("gated_delta_rule",),
    vocabulary=VOCABULARY,
    implementations={
        "reference": Implementation((*HALVES, torch.float32, torch.float64), "any"),
        "torch": Implementation((*HALVES, torch.float32, torch.float64), "any"),
        "triton": Implementation((*HALVES, torch.float32), f"1-{MAX_HEAD_DIM}"),
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

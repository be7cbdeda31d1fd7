"""linear_attention: inputs, costs, peers and the points that prove every option."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from iokernels.ops.linear_attention.api import lightning_attention, linear_attention
from iokernels.ops.linear_attention.options import columns, features
from iokernels.ops.linear_attention.refusals import MAX_CUDA_WIDTH, MAX_WIDTH
from iokernels.ops.shared.layout import state_dtype
from iokernels.runtime.errors import UnsupportedError
from iokernels.testing.case import Case, Implementation, Inputs, Limit, Outputs, Pass, Point, Prepare
from iokernels.testing.case.shape import Shape, UsageError

from .accounts import ACCOUNTS, floor_bytes
from .compile import COMPILATION
from .cuda import ACCOUNTS as CUDA_ACCOUNTS
from .cuda import COMPILATION as CUDA_COMPILATION
from .shapes import VOCABULARY, lengths
from .tuning import TUNING

Draw = Callable[..., Tensor]


def drawn(shape: Shape, dtype: torch.dtype, device: torch.device, seed: int) -> tuple[dict[str, Tensor], Draw, Draw]:
    """q, k, v and log_decay, and what draws more: values of heads, and normal values of a size.

    Values are normal, log decays evenly spread. Where weights are divided by their sum and no feature map makes them
    positive, q and k are.
    """
    if shape.h % shape.hk:
        raise UsageError(f"shape: hk={shape.hk} does not divide h={shape.h}")
    generator = torch.Generator(device).manual_seed(seed)
    packed = shape.get("packed")
    rows = sum(lengths(shape)) if packed else shape.n

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=device)

    def heads(count: int, width: int) -> Tensor:
        if packed:
            return normal(rows, count, width)
        if shape.bnhd:
            return normal(shape.b, rows, count, width).transpose(1, 2)
        return normal(shape.b, count, rows, width)

    tensors = {"q": heads(shape.hk, shape.d), "k": heads(shape.hk, shape.d), "v": heads(shape.h, shape.dv)}
    if shape.normalize and not shape.taylor:
        tensors |= {name: tensors[name].abs() for name in "qk"}
    tensors = {name: x.to(dtype) for name, x in tensors.items()}
    if shape.decay:
        gates = ((rows, shape.h) if packed else (shape.b, shape.h, rows)) if shape.decay == 1 else (shape.h,)
        spread = torch.rand(gates, generator=generator, device=device)
        tensors["log_decay"] = -shape.gate * spread.to(state_dtype(dtype))
    return tensors, heads, normal


def options_of(shape: Shape) -> dict[str, Any]:
    """The keywords that the shape's flags stand for."""
    return {"feature_map": "taylor" if shape.taylor else None, "normalize": bool(shape.normalize)}


def state_shape(shape: Shape) -> tuple[int, int, int, int]:
    """The shape of the states of all sequences."""
    return shape.b, shape.h, features(shape.d, bool(shape.taylor)), columns(shape.dv, bool(shape.normalize))


def drawn_state(shape: Shape, normal: Draw, dtype: torch.dtype) -> Tensor:
    """A state as past tokens leave it; one that divides by a sum holds the sum of positive weights."""
    if not shape.normalize:
        return normal(*state_shape(shape)).to(state_dtype(dtype))
    past = normal(shape.b, shape.h, 8, shape.d)
    past = past if shape.taylor else past.abs()
    rows = past
    if shape.taylor:
        rows = torch.cat([torch.ones_like(past[..., :1]), past, (past[..., None] * past[..., None, :]).flatten(3)], 3)
    values = normal(shape.b, shape.h, 8, shape.dv)
    values = torch.cat([values, torch.ones_like(values[..., :1])], 3)
    return (rows.transpose(2, 3) @ values).to(state_dtype(dtype))


def make_inputs(shape: Shape, dtype: torch.dtype, device: torch.device, seed: int) -> Inputs:
    """Normal values, and log decays evenly spread over their range.

    The gradient of one decay a head sums up all tokens. Of normal values most of it cancels, and what is left is
    rounding; so where it is wanted q and k are positive, and v and the gradient of out grow along the sequence.
    """
    tensors, heads, normal = drawn(shape, dtype, device, seed)
    gradients = {"out": heads(shape.h, shape.dv).to(dtype)}
    if shape.decay == 2 and shape.learn:
        tensors |= {name: tensors[name].abs() for name in "qk"}
        tensors["v"], gradients["out"] = (_growing(x, shape) for x in (tensors["v"], gradients["out"]))
    options = options_of(shape)
    if shape.decay and not shape.learn:
        options["log_decay"] = tensors.pop("log_decay")
    if shape.state:
        tensors["initial_state"] = drawn_state(shape, normal, dtype)
        gradients["final_state"] = normal(*state_shape(shape)).to(state_dtype(dtype))
    if shape.packed:
        options["cu_seqlens"] = torch.tensor((0, *lengths(shape))).cumsum(0).to(device, torch.int32)
    leaves = {name: x.detach().requires_grad_() for name, x in tensors.items()}
    return Inputs(shape, leaves, options, gradients, seed)


def _growing(x: Tensor, shape: Shape) -> Tensor:
    """x plus 0 to 2 along its rows; minus 1 to 1 where an average is taken, in which a common part would cancel."""
    rows = 0 if shape.packed else 2
    ramp = torch.linspace(0.0, 2.0, x.shape[rows], dtype=x.dtype, device=x.device) - shape.normalize
    return x + ramp.view(-1, *[1] * (x.dim() - 1 - rows))


def run(inputs: Inputs, backend: str) -> Outputs:
    """The public function: for one decay a head without feature map and normaliser, under its own name."""
    given = {**inputs.tensors, **inputs.options}
    if inputs.shape.decay == 2 and not (inputs.shape.taylor or inputs.shape.normalize):
        del given["feature_map"], given["normalize"]
        slopes = -given.pop("log_decay")
        out, state = lightning_attention(**given, slopes=slopes, return_state=True, backend=backend)
    else:
        out, state = linear_attention(**given, return_state=True, backend=backend)
    return {"out": out, "final_state": state}


def flops(shape: Shape, which: Pass) -> int:
    """Those of the recurrence. Forward each token is added to the state and reads it; backward the state and its
    gradient run once more, and q, k and v read one each. k (x) k has half as many different products as places."""
    rows = 1 + shape.d + shape.d * (shape.d + 1) // 2 if shape.taylor else shape.d
    product = 2 * shape.h * sum(lengths(shape)) * rows * columns(shape.dv, bool(shape.normalize))
    return product * {"fwd": 2, "bwd": 5, "both": 7}[which]


def reference_bytes(shape: Shape) -> int:
    """About eight float64 matrices of weights live at once in the reference's backward pass."""
    return 8 * 8 * shape.h * (max(lengths(shape)) ** 2 if shape.packed else shape.b * shape.n**2)


def smaller(shape: Shape) -> Shape:
    """One sequence instead of many (as far as packing makes sense), then one group of heads, then half the length."""
    least = 3 if shape.packed else 1
    if shape.b > least:
        return shape.replace(b=least)
    if shape.hk > 1:
        return shape.replace(h=shape.h // shape.hk, hk=1)
    return shape.replace(n=shape.n // 2) if shape.n >= 256 else shape


LIMITS = {torch.float16: 2e-3, torch.bfloat16: 8e-3, torch.float32: 1e-5, torch.float64: 1e-11}
DECAY_LIMITS = {torch.float16: 2e-2, torch.bfloat16: 2e-2, torch.float32: 1e-3, torch.float64: 1e-8}


def limit(name: str, dtype: torch.dtype) -> Limit:
    """Over the whole tensor: a single row may cancel to nothing. The gradient of the decays is a sum of terms that
    mostly cancel."""
    return Limit((DECAY_LIMITS if name == "dlog_decay" else LIMITS)[dtype], 0)


def peers(device: torch.device) -> Mapping[str, Prepare | str]:
    """fla-org's kernels for the same function, where they are installed and there is a GPU."""
    found: dict[str, Prepare | str] = {
        "sdpa-flash": "computes another function: time it by `iokernels bench flash_attention` with causal=1"
    }
    if device.type != "cuda":
        return found | {"fla": "its kernels run on GPUs only"}
    try:
        from fla.ops.simple_gla import chunk_simple_gla  # pyright: ignore[reportMissingImports]
    except ImportError:
        return found | {"fla": "flash-linear-attention is not installed"}

    def prepare(inputs: Inputs) -> Callable[[], Outputs]:
        shape, given = inputs.shape, {**inputs.tensors, **inputs.options}
        if shape.taylor or shape.normalize or shape.packed or shape.hk != shape.h:
            raise UnsupportedError("it has no equivalent of taylor, normalize, packed or fewer heads of keys here")
        decay = {} if not shape.decay else {"g": given["log_decay"]}
        if shape.decay == 1:
            decay = {"g": given["log_decay"].transpose(1, 2)}
        elif shape.decay == 2:
            decay = {"g_gamma": given["log_decay"]}
        q, k, v = (given[name].transpose(1, 2) for name in "qkv")
        initial = given.get("initial_state")

        def call() -> Outputs:
            out, state = chunk_simple_gla(q, k, v, **decay, initial_state=initial, output_final_state=True)
            return {"out": out.transpose(1, 2), "final_state": state}

        return call

    return found | {"fla": prepare}


def _point(name: str, *, quick: bool = False, **given: Any) -> Point:
    return Point(name, VOCABULARY.shape(**({"b": 1, "h": 2, "n": 100, "d": 16} | given)), quick)


_PACKED: dict[str, Any] = {"packed": 1, "b": 4, "empty": 1, "n": 70}


def check_points() -> tuple[Point, ...]:
    """Every option alone, its edges, and all together. Lengths straddle the kernels' chunks."""
    return (
        _point("a decay for each head", b=2, n=130, d=32, quick=True),
        _point("a fixed decay for each head", b=2, learn=0),
        _point("a decay for each token", b=2, n=130, d=32, decay=1, quick=True),
        _point("no decay", decay=0),
        _point("no decay, by value", gate=0.0, decay=1),
        _point("tiny decay", gate=1e-4, decay=1),
        _point("strong decay", gate=20.0, decay=1),
        _point("strong decay for each head", gate=20.0),
        _point("decay past what float32 holds", gate=300.0, decay=1),
        _point("states at both ends", state=1, decay=1, n=70, quick=True),
        _point("one token", n=1, b=3, state=1),
        _point("15 tokens", n=15),
        _point("63 tokens", n=63, decay=1),
        _point("64 tokens", n=64, decay=1),
        _point("65 tokens", n=65, decay=1, state=1),
        _point("long enough to be cut", n=500, b=1, h=1, decay=1),
        _point("shared keys", h=6, hk=2, n=70, decay=1),
        _point("tensors [b, n, h, d]", bnhd=1, b=2, n=70),
        _point("width 60, v wider", d=60, dv=100, n=70),
        _point("width 64, v narrower", d=64, dv=24, n=70, decay=1),
        _point("width 128", d=128, n=66, h=1),
        _point("width 256", d=256, n=40, h=1, decay=1),
        _point("normalised", normalize=1, decay=1),
        _point("normalised, with states", normalize=1, state=1, n=70),
        _point("Taylor map", taylor=1, decay=0, n=70),
        _point("Taylor map, normalised (BASED)", taylor=1, normalize=1, decay=0, dv=32, n=70, quick=True),
        _point("Taylor map, all else", taylor=1, normalize=1, decay=1, state=1, h=4, hk=2, d=12, dv=20, n=70),
        _point("packed", packed=1, b=3, n=80, decay=1),
        _point("packed with an empty sequence and one of a token", **_PACKED, state=1),
        _point("all options", **_PACKED, state=1, h=4, hk=2, d=24, dv=40, decay=1, normalize=1, quick=True),
        _point("all options, Taylor map", **_PACKED, state=1, h=4, hk=2, d=12, dv=40, decay=1, normalize=1, taylor=1),
    )


def _shapes(*texts: str) -> tuple[Shape, ...]:
    return tuple(VOCABULARY.parse(text) for text in texts)


SUITES: Mapping[str, tuple[Shape, ...]] = {
    # Seconds on two CPU cores.
    "quick": _shapes(
        "b=1,h=4,n=512,d=64,learn=0",
        "b=1,h=4,n=512,d=64,decay=1",
        "b=1,h=4,n=512,d=16,dv=64,decay=0,taylor=1,normalize=1",
    ),
    # Lightning Attention-2's own lengths; then a short batch, gates for every token, and BASED.
    "train": _shapes(
        *(f"b=4,h=32,n={n},d=128,learn=0" for n in ("2k", "4k", "8k", "16k")),
        "b=8,h=8,n=1k,d=64,learn=0",
        "b=4,h=32,n=4k,d=128,decay=1",
        "b=4,h=16,n=4k,d=16,dv=64,decay=0,taylor=1,normalize=1",
    ),
    "long": _shapes(*(f"b=1,h=16,n={n},d=128,learn=0" for n in ("16k", "64k", "256k"))),
    # Mamba-2 (one group of keys), MiniMax-01's heads, packed prompts.
    "llm": _shapes(
        "b=4,h=64,hk=1,n=4k,d=128,dv=64,decay=1", "b=1,h=64,n=8k,d=128,learn=0", "b=8,h=32,n=4k,d=128,packed=1,decay=1"
    ),
}

HALVES = (torch.float16, torch.bfloat16)

CASE = Case(
    operator="linear_attention",
    functions=("linear_attention", "lightning_attention"),
    vocabulary=VOCABULARY,
    implementations={
        "reference": Implementation((*HALVES, torch.float32, torch.float64), "any"),
        "torch": Implementation((*HALVES, torch.float32, torch.float64), "any"),
        "triton": Implementation((*HALVES, torch.float32), f"1-{MAX_WIDTH}"),
        "cuda": Implementation(HALVES, f"1-{MAX_CUDA_WIDTH}"),
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
    limit=limit,
)

"""fft_conv: inputs, costs, peers and the points that prove every option."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from iokernels.ops.fft_conv import fft_conv
from iokernels.ops.fft_conv.options import CAUSAL, CIRCULAR
from iokernels.runtime.errors import UnsupportedError
from iokernels.testing.case import Case, Implementation, Inputs, Limit, Outputs, Pass, Point, Prepare
from iokernels.testing.case.shape import Shape, UsageError

from .accounts import ACCOUNTS
from .compile import COMPILATION, mode
from .cuda import ACCOUNTS as CUDA_ACCOUNTS
from .cuda import COMPILATION as CUDA_COMPILATION
from .shapes import VOCABULARY
from .tuning import TUNING


def make_inputs(shape: Shape, dtype: torch.dtype, device: torch.device, seed: int) -> Inputs:
    """Normal values; filters decay to a tenth over their length and have unit energy, so outputs are about as large as
    inputs."""
    if not shape.causal and shape.nk > shape.n and shape.nk != 2 * shape.n - 1:
        raise UsageError(f"shape: with causal=0 nk={shape.nk} must be up to n={shape.n} or 2 n - 1")
    if shape.state and (not shape.causal or shape.keep < 1.0):
        raise UsageError("shape: state=1 goes with causal=1 and keep=1 only")
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*size: int, of: torch.dtype = dtype) -> Tensor:
        return torch.randn(size, generator=generator, device=device).to(of)

    def signal() -> Tensor:
        if shape.bnh:
            return normal(shape.b, shape.n, shape.h).transpose(1, 2)
        return normal(shape.b, shape.h, shape.n)

    factor = torch.full((shape.b, 1, 1), shape.amp, device=device)
    if shape.uneven:
        factor *= 10.0 ** -torch.arange(shape.b, device=device)[:, None, None]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    k = normal(shape.h, shape.nk, of=wide) * torch.logspace(0, -1, shape.nk, device=device)
    tensors = {"u": (signal().float() * factor).to(dtype), "k": (k / k.norm(dim=1, keepdim=True)).to(wide)}
    if shape.gated:
        tensors |= {"pre_gate": signal(), "post_gate": signal()}
    if shape.skip:
        tensors["skip"] = normal(shape.h, of=wide)
    if shape.state:
        tensors["initial_state"] = normal(shape.b, shape.h, shape.nk - 1, of=wide) * shape.amp
    gradients = {"y": signal()}
    options: dict[str, Any] = {"causal": bool(shape.causal), "batch_invariant": bool(shape.invariant)}
    if shape.keep < 1.0:
        options["freq_keep"] = shape.keep
    if shape.state:
        options["return_state"] = True
        gradients["state"] = normal(shape.b, shape.h, shape.nk - 1, of=wide)
    leaves = {name: x.detach().requires_grad_() for name, x in tensors.items()}
    return Inputs(shape, leaves, options, gradients, seed)


def run(inputs: Inputs, backend: str) -> Outputs:
    """The public function."""
    found = fft_conv(**inputs.tensors, **inputs.options, backend=backend)
    return dict(zip(("y", "state"), found, strict=True)) if inputs.shape.state else {"y": found}


def flops(shape: Shape, which: Pass) -> int:
    """Real transforms of the padded length, ``2.5 L log2 L`` each: 2 a row forward, 4 backward (of u again, of the
    gradient, and back for u and for the filter's sum), one more for a post gate's gradient, one for each filter."""
    if shape.n == 0:
        return 0
    length = shape.n if mode(shape) == CIRCULAR else shape.n + min(shape.n, shape.nk)
    one = 2.5 * length * max(math.log2(length), 1.0)
    rows = shape.b * shape.h
    forward = one * (2 * rows + shape.h)
    backward = one * ((3 + bool(shape.gated)) * rows + 2 * shape.h)
    return int({"fwd": forward, "bwd": backward, "both": forward + backward}[which])


def floor_bytes(shape: Shape, dtype: torch.dtype, which: Pass) -> int:
    """Each input read once, each output written once."""
    tensor = shape.b * shape.h * shape.n * dtype.itemsize
    wide = 8 if dtype == torch.float64 else 4
    small = shape.h * (shape.nk + bool(shape.skip)) * wide
    past = shape.b * shape.h * (shape.nk - 1) * wide if shape.state else 0
    gates = 2 * tensor if shape.gated else 0
    forward = 2 * tensor + gates + small + 2 * past
    backward = 3 * tensor + 2 * gates + 2 * small + 3 * past
    return {"fwd": forward, "bwd": backward, "both": forward + backward}[which]


def reference_bytes(shape: Shape) -> int:
    """About three float64 Toeplitz matrices a channel, with those of the past."""
    return 3 * 8 * shape.h * shape.n * (shape.n + (shape.nk if shape.state or shape.keep < 1.0 else 0))


def smaller(shape: Shape) -> Shape:
    """Few sequences and channels, then half the length."""
    if shape.b > 3:
        return shape.replace(b=3)
    if shape.h > 4:
        return shape.replace(h=4)
    if shape.n >= 512:
        halved = {"nk": 2 * (shape.n // 2) - 1} if shape.nk == 2 * shape.n - 1 else {"nk": max(1, shape.nk // 2)}
        return shape.replace(n=shape.n // 2, **halved)
    return shape


_RELATIVE_RMS = {torch.float16: 1.5e-3, torch.bfloat16: 3e-3, torch.float32: 2e-6, torch.float64: 1e-12}


def limit(name: str, dtype: torch.dtype) -> Limit:
    """Relative error of a row (sequence and channel), and of a gradient as a whole, of which a row may be small because
    its terms cancel. float32 that is rounded to tf32 is held to float16's.

    The skip weight's gradient is one sum of N products for a channel, which cancel most: it may be off by four times as
    much.
    """
    allowed = _RELATIVE_RMS[dtype]
    if dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest" and torch.cuda.is_available():
        allowed = _RELATIVE_RMS[torch.float16]
    if name.startswith("d"):
        return Limit(4 * allowed if name == "dskip" else allowed, 0)
    return Limit(allowed)


def _point(name: str, *, quick: bool = False, **given: float) -> Point:
    return Point(name, VOCABULARY.shape(**({"b": 3, "h": 2, "n": 100} | given)), quick)


def check_points() -> tuple[Point, ...]:
    """Every option alone, its edges, and together; lengths around the transforms'."""
    return (
        _point("plain", quick=True),
        _point("gated, with skip", n=300, gated=1, skip=1, quick=True),
        _point("one sequence", b=1, n=255),
        _point("one step", n=1),
        _point("one tap", n=63, nk=1),
        _point("seven steps, more taps than steps", n=7, nk=13, gated=1),
        _point("a transform's length", n=256, nk=32),
        _point("one more", n=257, gated=1),
        _point("short filter, many blocks", h=1, n=1000, nk=30, gated=1, skip=1),
        _point("state", n=300, nk=40, state=1, gated=1, skip=1, quick=True),
        _point("state longer than the sequence", n=20, nk=60, state=1),
        _point("state, many blocks", h=1, n=700, nk=20, state=1),
        _point("circular", n=100, nk=60, causal=0, gated=1),
        _point("circular, a transform's length", n=256, causal=0, skip=1),
        _point("circular, many blocks", h=1, n=700, nk=20, causal=0, gated=1),
        _point("two-sided", n=100, nk=199, causal=0, gated=1, skip=1, quick=True),
        _point("two-sided, half blocks", n=300, nk=599, causal=0),
        _point("low frequencies", n=2048, nk=300, keep=0.2, gated=1, b=2, h=1),
        _point("low frequencies, with skip", n=300, keep=0.4, skip=1),
        _point("low frequencies, circular", n=300, keep=0.4, causal=0),
        _point("batch invariant", invariant=1, gated=1, quick=True),
        _point("tensors [b, n, h]", bnh=1, gated=1),
        _point("small", amp=1e-4, n=300),
        _point("large", amp=1e3, n=300),
        _point("uneven amplitudes", uneven=1, b=4, n=300, gated=1),
    )


def peers(device: torch.device) -> Mapping[str, Prepare | str]:
    """``torch.fft`` as users write it, and the packages of fused kernels."""
    found: dict[str, Prepare | str] = {"torch-rfft": _rfft}
    for name, package in (("flashfftconv", "flashfftconv"), ("subquadratic-ops", "subquadratic_ops_torch")):
        missing = find_spec(package) is None
        found[name] = f"{name} is not installed" if missing else f"{name} is not compared with yet"
    return found


def _rfft(inputs: Inputs) -> Callable[[], Outputs]:
    """The usual code: everything padded to twice the length, in float32."""
    shape = inputs.shape
    if shape.state or shape.keep < 1.0 or mode(shape) not in (CAUSAL, CIRCULAR):
        raise UnsupportedError("the usual code has no state, keeps all frequencies, and is causal or circular")
    length = shape.n if mode(shape) == CIRCULAR else 2 * shape.n
    u, k = inputs.tensors["u"], inputs.tensors["k"]
    pre, post, skip = (inputs.tensors.get(name) for name in ("pre_gate", "post_gate", "skip"))
    wide = torch.float64 if u.dtype == torch.float64 else torch.float32

    def call() -> Outputs:
        v = u if pre is None else u * pre
        product = torch.fft.rfft(v.to(wide), n=length) * torch.fft.rfft(k[:, : shape.n], n=length)
        w = torch.fft.irfft(product, n=length)[..., : shape.n]
        if skip is not None:
            w = w + skip[:, None] * v
        y = w.to(u.dtype)
        return {"y": y if post is None else y * post}

    return call


def _shapes(*texts: str) -> tuple[Shape, ...]:
    return tuple(VOCABULARY.parse(text) for text in texts)


SUITES: Mapping[str, tuple[Shape, ...]] = {
    # Seconds on two CPU cores.
    "quick": _shapes("b=2,h=64,n=1k", "b=2,h=64,n=4k,gated=1,skip=1", "b=2,h=8,n=64k,nk=128"),
    # The shapes of FlashFFTConv's tables.
    "train": _shapes(*(f"b=64,h=768,n={n},gated={gated}" for n in ("256", "1k", "4k") for gated in (0, 1))),
    "long": _shapes(*(f"b=4,h=256,n={n}" for n in ("8k", "16k", "64k")), "b=1,h=256,n=1024k"),
    # Partial convolution: the filter is much shorter than the sequence.
    "partial": _shapes(*(f"b=2,h=256,n={n},nk={nk},gated=1" for n in ("16k", "256k") for nk in ("128", "2k"))),
    "sparse": _shapes(*(f"b=64,h=768,n=4k,keep={keep}" for keep in ("1.0", "0.5", "0.25"))),
    # On a CPU, beside the usual code.
    "cpu": _shapes(*(f"b=4,h={2**20 // n},n={n}" for n in (1024, 4096, 16384, 65536))),
}

_HALVES = (torch.float16, torch.bfloat16)

CASE = Case(
    operator="fft_conv",
    functions=("fft_conv",),
    vocabulary=VOCABULARY,
    implementations={
        "reference": Implementation((*_HALVES, torch.float32, torch.float64), "any"),
        "torch": Implementation((*_HALVES, torch.float32, torch.float64), "any"),
        "triton": Implementation((*_HALVES, torch.float32), "N or Nk up to 4194304"),
        "cuda": Implementation(_HALVES, "N or Nk up to 16384"),
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

"""The IO accounts of fft_conv: its model and the naive formula, by shape."""

from __future__ import annotations

from typing import Literal

import torch

from iokernels.ops.fft_conv.options import effective_taps
from iokernels.ops.fft_conv.triton.tuning import OUTER_KERNEL, Blocks, Config, OuterConfig, Through, fitted, hoists
from iokernels.testing.case.accounts import Account, Accounts, Configs
from iokernels.testing.case.shape import Shape

from . import compile as kernels
from . import through
from . import traffic as model
from .shapes import VOCABULARY


def accounts(shape: Shape, dtype: torch.dtype, configs: Configs) -> dict[str, Account]:
    """The account of every kernel."""
    launch = kernels.launcher(shape, dtype)

    def problem(cover: Blocks | Through) -> model.Problem:
        rows = cover.n1 // 2 if isinstance(cover, Blocks) and cover.half else cover.n1
        return model.Problem(
            batch=shape.b,
            heads=shape.h,
            seqlen=shape.n,
            taps=effective_taps(shape.n, shape.nk, launch.options),
            itemsize=dtype.itemsize,
            gated=bool(shape.gated),
            state=bool(shape.state),
            columns=launch.columns(cover),
            members=1 if shape.invariant or shape.b == 1 else 2,
            hoisted=hoists(launch.problem("fft_conv_fwd"), cover.n1, rows, cover.n2),
        )

    found: dict[str, Account] = {}
    for name, on_chip, step_by_step in (
        ("fwd", model.forward, through.forward),
        ("bwd", model.backward, through.backward),
    ):
        config: Config = configs[f"fft_conv_{name}"]
        cover = launch.blocks(config)
        if isinstance(cover, Through):
            tile = fitted(configs[OUTER_KERNEL], cover.outer, cover.n1 * cover.n2)
            found |= step_by_step(through.Sizes(problem(cover), config, cover, tile))
        else:
            found[f"fft_conv_{name}_kernel"] = on_chip(problem(cover), config, cover)
    return found


NAIVE = (
    "gate, cast to float32, rfft of both zero-padded to 2 n (n if circular), product, irfft, cut, gate and cast back, "
    "each of which reads its operands and writes its result once; backward the same steps in reverse, with the "
    "spectrum of u kept. A transform is taken to read its input and write its result once, and no zero is read"
)


def naive_bytes(shape: Shape, dtype: torch.dtype, which: Literal["fwd", "bwd"]) -> int:
    """The bytes of :data:`NAIVE`."""
    rows = shape.b * shape.h
    tensor, single = rows * shape.n * dtype.itemsize, rows * shape.n * 4
    padded = 1 if kernels.mode(shape) == kernels.CIRCULAR else 2
    spectrum = rows * (padded * shape.n // 2 + 1) * 8
    filters = shape.h * (shape.nk * 4 + (padded * shape.n // 2 + 1) * 8)
    gates = 3 * tensor if shape.gated else 0
    # cast; rfft; product of two spectra, one of them the filter's; irfft, whose whole period is written; cut and cast.
    forward = gates + tensor + single + single + spectrum + 2 * spectrum + filters + spectrum + padded * single
    forward += single + tensor + gates
    if which == "fwd":
        return forward
    # cast; rfft of dy; its products with both spectra; irfft of two; the filter's is summed over the batch first.
    products = 2 * (2 * spectrum) + spectrum + filters
    return 2 * gates + tensor + single + single + spectrum + products + spectrum + padded * single + single + tensor


# With transforms of 1024 points: half blocks, many blocks, the past, both kinds of circular filter, two-sided.
_SHAPES = (
    ("b=3,h=2,n=100", torch.float16),
    ("b=3,h=2,n=300,gated=1,skip=1", torch.bfloat16),
    ("b=2,h=1,n=300,nk=599,causal=0", torch.float32),
    ("b=3,h=1,n=2100,nk=40,gated=1", torch.float16),
    ("b=2,h=1,n=1100,nk=20,state=1", torch.float16),
    ("b=1,h=1,n=1100,nk=60,causal=0,gated=1", torch.bfloat16),
    ("b=2,h=1,n=1024,causal=0,invariant=1", torch.float16),
    ("b=3,h=1,n=1100,nk=20,gated=1", torch.float32),
)
_TEST_CONFIG = Config(length=1024, units=2, num_warps=4, num_stages=1)

ACCOUNTS = Accounts(
    model=accounts,
    configs=kernels.configs,
    naive_bytes=naive_bytes,
    naive=NAIVE,
    shapes=tuple((VOCABULARY.parse(text), dtype) for text, dtype in _SHAPES),
    test_configs={
        "fft_conv_fwd": _TEST_CONFIG,
        "fft_conv_bwd": _TEST_CONFIG,
        OUTER_KERNEL: OuterConfig(rows=16, columns=64, depth=16, num_warps=4, num_stages=1),
    },
)

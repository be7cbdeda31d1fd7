"""The CUDA kernels of fft_conv: their configurations, their IO account, and compiling them without a GPU.

Counted as threads request bytes, whatever the caches serve. The model is exact. Filters are transformed, and their
gradient brought back to taps, by ``torch.fft``: that is not in here.
"""

from __future__ import annotations

from typing import Any

import torch

from iokernels.ops.fft_conv.cuda.tuning import TUNABLES, Config, Cover, refusal
from iokernels.ops.fft_conv.options import Needs, effective_taps
from iokernels.runtime.device import spec_of
from iokernels.testing.case import Compilation, Pass
from iokernels.testing.case.accounts import Account, Accounts, Bytes, Configs
from iokernels.testing.case.shape import Shape

from .accounts import NAIVE, naive_bytes
from .compile import meta_call
from .shapes import VOCABULARY

FORWARD, BACKWARD = TUNABLES
_SUM = 4  # bytes of a float32: a state, a scale, a part of the filter's gradient
_FREQUENCY = 4  # bytes of a frequency of the filter: two float16


def launcher(shape: Shape, dtype: torch.dtype) -> Any:
    """What the launcher knows of a call."""
    from iokernels.ops.fft_conv.cuda import launch as cuda

    u, k, options = meta_call(shape, dtype)
    return cuda.Launch(u, k, [], options, spec_of(u.device))


def configs(shape: Shape, dtype: torch.dtype) -> dict[str, Config]:
    """The configuration that each kernel would be launched with."""
    launch = launcher(shape, dtype)
    return {kernel: launch.config(kernel.removesuffix("_cuda")) for kernel in TUNABLES}


def _positions(shape: Shape, cover: Cover, length: int) -> tuple[int, int, int]:
    """Of the blocks of one sequence: positions loaded from u, from the past, and from the gradient for dv."""
    n, past, before, after = shape.n, (shape.nk - 1) * bool(shape.state), 0, 0
    inputs = 0
    for chunk in range(cover.chunks):
        now = chunk * cover.step
        start, stop = now - cover.lead, now - cover.lead + length
        first = start + length // 2 if cover.half else start
        inputs += max(0, min(stop, n) - max(first, 0))
        before += max(0, min(stop, 0) - max(start, -past)) if past else 0
        if cover.periodic:
            inputs += max(0, min(stop, 0) - max(start, -n))
        end = now + (length // 2 if cover.half else length)
        after += min(end, 2 * n if cover.periodic else n) - now
    return inputs, before, after


def accounts(shape: Shape, dtype: torch.dtype, configs: Configs) -> dict[str, Account]:
    """The account of every kernel."""
    launch = launcher(shape, dtype)
    rows, tensors = shape.b * shape.h, 2 if shape.gated else 1
    tensor = rows * shape.n * dtype.itemsize
    taps = effective_taps(shape.n, shape.nk, launch.options)
    filters = shape.h * taps * _SUM
    past = rows * (taps - 1) * _SUM if shape.state else 0

    def sizes(config: Config) -> tuple[Cover, int, int, int, int, int]:
        cover = launch.cover(config)
        grid = launch.blocks(config, cover)
        inputs, before, after = _positions(shape, cover, config.length)
        read = rows * (inputs * dtype.itemsize * tensors + before * _SUM)
        units = shape.h * launch.pairs * cover.chunks
        return cover, grid, units, read, rows * after * dtype.itemsize * tensors, units * config.num_warps * _SUM

    forward, backward = configs[FORWARD], configs[BACKWARD]
    _, _, units, inputs, _, scale = sizes(forward)
    model = Bytes(inputs + (tensor if shape.gated else 0) + units * forward.length * _FREQUENCY + scale, tensor)
    floor = Bytes(tensor * (3 if shape.gated else 1) + filters + past, tensor)
    found = {"fft_conv_fwd_kernel": Account("fwd", floor, model)}

    _, grid, units, inputs, after, scale = sizes(backward)
    sums = 2 * backward.length * _SUM
    # For the exponents and twice for the halves of dK: v, and g of what a block makes. Then g for dv; what gates it;
    # for dpost v and dy.
    read = 3 * (inputs + tensors * tensor) + after + units * backward.length * _FREQUENCY
    if shape.gated:
        read += 2 * tensor + inputs + tensor + units * backward.length * _FREQUENCY + scale
    read += (units - grid) * sums + scale
    written = tensor * (3 if shape.gated else 1)
    floor = Bytes(tensor * (4 if shape.gated else 2) + filters + past, written + filters)
    found["fft_conv_bwd_kernel"] = Account("bwd", floor, Bytes(read, written + units * sums))
    return found


def launch(shape: Shape, dtype: torch.dtype, which: Pass) -> None:
    """Launch the kernels of a pass with meta tensors."""
    from iokernels.ops.fft_conv.cuda import launch as cuda

    u, k, options = meta_call(shape, dtype)
    taps = effective_taps(shape.n, shape.nk, options)
    if refusal(shape.n, taps, options.mode, bool(shape.state), spec_of(u.device).smem_block) is not None:
        return  # as the public function does, where no transform fits
    if which != "bwd":
        cuda.forward(u, k, [], options)
    if which != "fwd":
        needs = Needs(True, True, bool(shape.gated), bool(shape.gated), bool(shape.skip), bool(shape.state))
        cuda.backward(u, u, k, [], options, needs)


COMPILATION = Compilation(
    launch=launch,
    points=tuple(
        (VOCABULARY.parse(f"b=64,h=64,{text}"), dtype)
        for text, dtype in (
            ("n=2k", torch.float16),
            ("n=4k,gated=1", torch.bfloat16),
            ("n=8k,gated=1", torch.bfloat16),
            ("n=16k,gated=1", torch.bfloat16),
            ("n=4k,causal=0", torch.bfloat16),
            ("n=16k,causal=0", torch.bfloat16),
            ("n=64k,nk=1k,gated=1", torch.float16),
            ("n=4001,gated=1,state=1", torch.float16),
        )
    ),
    # The backward kernel of 32768 points as NVRTC compiles it for sm_80; nvcc spills nothing.
    spills=16,
)

# With transforms of 4096 points: half blocks, several blocks, the past, circular filters, and lengths that no vector
# divides.
_SHAPES = (
    ("b=3,h=2,n=100", torch.float16),
    ("b=3,h=2,n=301,gated=1,skip=1", torch.bfloat16),
    ("b=2,h=1,n=4100,nk=40,gated=1", torch.float16),
    ("b=2,h=1,n=4099,nk=20,state=1", torch.float16),
    ("b=1,h=1,n=4200,nk=60,causal=0,gated=1", torch.bfloat16),
    ("b=2,h=1,n=4096,causal=0,invariant=1", torch.float16),
)

ACCOUNTS = Accounts(
    model=accounts,
    configs=configs,
    naive_bytes=naive_bytes,
    naive=NAIVE,
    shapes=tuple((VOCABULARY.parse(text), dtype) for text, dtype in _SHAPES),
    test_configs=dict.fromkeys((FORWARD, BACKWARD), Config(4096, 2, 8)),
)

"""Every kernel, in its default configuration, compiled for real GPUs: shared memory, registers and spills. No GPU."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

from iokernels.runtime.device import named
from iokernels.testing.case import load

KERNELS = {"fft_conv_fwd_kernel", "fft_conv_bwd_kernel"}
THROUGH = {
    f"fft_conv_{name}_kernel"
    for name in ("outer_fwd_in", "fwd_inner", "outer_fwd_out", "outer_bwd_in", "bwd_inner", "outer_bwd_out")
}
"""Of transforms through memory."""

SHAPES = {
    "h100-sxm": ("--points",),
    # What holds the most, and what fills tensor memory in another way.
    "b200": tuple(
        word
        for text in ("n=2k,keep=0.25,gated=1", "n=4k", "n=32k,nk=8k,gated=1,state=1")
        for word in ("--shape", f"b=64,h=64,{text}")
    ),
}


@pytest.mark.parametrize("gpu", SHAPES)
def test_default_configurations_fit(gpu: str, compiled_apart: Callable[..., str]) -> None:
    # A process of its own, because the tests' process interprets its kernels.
    command = ("-m", "iokernels", "inspect", "fft_conv", "--gpu", gpu, *SHAPES[gpu], "--json", "-")
    kernels = json.loads(compiled_apart(*command))["rows"]
    assert {kernel["kernel"] for kernel in kernels} == KERNELS | THROUGH
    vocabulary = load("fft_conv").vocabulary
    for kernel in kernels:
        assert kernel["shared_bytes"] <= named(gpu).smem_block, kernel
        assert kernel["blocks_per_sm"] >= 1, kernel
        # A kernel that ran out of tensor memory would be compiled to nothing.
        assert set(kernel["matrix"]) & {"HMMA", "HGMMA", "UTCHMMA"}, kernel
        if kernel["kernel"] in THROUGH or ("fwd" in kernel["kernel"] and vocabulary.parse(kernel["shape"]).n < 4096):
            # Transforms of 8192 points keep part of what they need in local memory, as the command says.
            assert kernel["spill_bytes"] <= 192, kernel  # none or a word or two with Triton 3.6, more with 3.7


INTEGERS = """
import json
import torch
from triton.runtime.jit import JITFunction
from iokernels import autotune
from iokernels.autotune.resources import compiling_for
from iokernels.ops.fft_conv.case import CASE
from iokernels.ops.fft_conv.triton.tuning import Config, OuterConfig
from iokernels.runtime.device import named

rows, run = [], JITFunction.run

def binaries(kernel):
    # What Triton remembers of a kernel on a device starts with its variants.
    return sum(len(device[0]) for device in kernel.device_caches.values())

def with_other_integers(self, *args, **options):
    found, before = run(self, *args, **options), binaries(self)
    for value in (1, 10, 16, 17):
        run(self, *(value if type(x) is int else x for x in args), **options)
    rows.append([self.__name__, sum(type(x) is int for x in args), binaries(self) - before])
    return found

JITFunction.run = with_other_integers
on_chip, through = Config(256, 2, 4, 1), Config(256, 2, 4, 1, 16)
tile = OuterConfig(rows=16, columns=128, depth=16, num_warps=4, num_stages=1)
for config, words in ((on_chip, "n=700,nk=20"), (through, "n=2k,nk=1k")):
    found = autotune.override(fft_conv_fwd=config, fft_conv_bwd=config, fft_conv_outer=tile)
    with compiling_for(named("h100-sxm")), found:
        CASE.compilation.launch(CASE.vocabulary.parse(f"b=3,h=2,{words},gated=1,state=1"), torch.float16, "both")
print(json.dumps(rows))
"""


def test_no_integer_is_compiled_in(compiled_apart: Callable[..., str]) -> None:
    """One binary serves every length, batch, overlap and number of transforms."""
    rows = json.loads(compiled_apart("-c", INTEGERS))
    assert {kernel for kernel, _, _ in rows} == KERNELS | THROUGH
    for kernel, integers, more in rows:
        assert integers >= 3, kernel
        assert more == 0, kernel

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

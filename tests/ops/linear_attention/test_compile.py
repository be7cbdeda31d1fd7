"""Every kernel, in its default configuration, compiled for real GPUs: shared memory, registers and spills. No GPU."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

from iokernels.runtime.device import named

COMPILE = """
import json, sys
from iokernels.autotune.resources import compiling_for
from iokernels.ops.linear_attention.case.compile import COMPILATION, launch, launch_step
from iokernels.runtime.device import named
found = []
for index in json.loads(sys.argv[2]):
    shape, dtype = COMPILATION.points[index]
    with compiling_for(named(sys.argv[1])) as compiled:
        launch(shape, dtype, "both")
        launch_step(shape, dtype)
    found += [[index, x.kernel, x.registers, x.spill_bytes, x.shared_bytes] for x in compiled]
print(json.dumps(found))
"""


@pytest.mark.parametrize(("gpu", "points"), [("a100-sxm", [0, 1]), ("h100-sxm", [0, 1, 2, 4, 6])])
def test_default_configurations_fit(gpu: str, points: list[int], compiled_apart: Callable[..., str]) -> None:
    # A process of its own, because the tests' process interprets its kernels.
    kernels = json.loads(compiled_apart("-c", COMPILE, gpu, json.dumps(points)))
    assert len({kernel for _, kernel, *_ in kernels}) == (10 if gpu == "h100-sxm" else 5)
    for index, kernel, _, spills, shared in kernels:
        assert shared <= named(gpu).smem_block, (index, kernel)
        # What models are trained with stays in registers, whatever the release of Triton: all but a few bytes at most.
        if index in (0, 1):
            assert spills <= 32, (index, kernel, spills)


VARIANTS = """
import json, sys, torch
from iokernels.autotune.resources import compiling_for
from iokernels.ops.linear_attention.case.compile import forward, launch_step
from iokernels.ops.linear_attention.case.shapes import VOCABULARY
from iokernels.ops.linear_attention.triton.forward import linear_attention_fwd_kernel
from iokernels.ops.linear_attention.triton.step import linear_attention_step_kernel
from iokernels.runtime.device import named
for text in json.loads(sys.argv[1]):
    shape = VOCABULARY.parse(f"bnhd=1,d=16,decay=0,learn=0,{text}")
    with compiling_for(named("h100-sxm")):
        forward(shape, torch.bfloat16)
        launch_step(shape, torch.bfloat16)
kernels = (linear_attention_fwd_kernel, linear_attention_step_kernel)
# What Triton remembers of a kernel on a device starts with its variants.
print(json.dumps([len(device[0]) for kernel in kernels for device in kernel.device_caches.values()]))
"""


def test_one_kernel_for_all_lengths_batches_and_heads(compiled_apart: Callable[..., str]) -> None:
    """1, 10, 16 and 17 of whatever varies between calls are one variant, though Triton specialises integers by them."""
    shapes = ["b=2,h=2,n=1", "b=10,h=10,hk=1,n=10", "b=16,h=16,hk=16,n=16", "b=17,h=17,n=17"]
    assert json.loads(compiled_apart("-c", VARIANTS, json.dumps(shapes))) == [1, 1]

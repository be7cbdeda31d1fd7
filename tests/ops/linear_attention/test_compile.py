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

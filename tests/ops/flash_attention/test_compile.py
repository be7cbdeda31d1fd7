"""Every kernel, in its default configuration, compiled for real GPUs: shared memory, registers and spills. No GPU."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
import torch

from iokernels.runtime.device import named
from iokernels.testing.case import load

COMPILE = """
import json, sys
from iokernels.autotune.resources import compiling_for
from iokernels.ops.flash_attention.case.compile import COMPILATION
from iokernels.runtime.device import named
gpu = named(sys.argv[1])
found = []
for index in json.loads(sys.argv[2]):
    with compiling_for(gpu) as compiled:
        COMPILATION.launch(*COMPILATION.points[index], "both")
    found += [
        [index, x.kernel, x.shared_bytes, x.spill_bytes, x.blocks_per_sm(gpu)[0], list(x.matrix_instructions())]
        for x in compiled
    ]
print(json.dumps(found))
"""

CASE = load("flash_attention")
assert CASE.compilation is not None
POINTS = CASE.compilation.points
POINTS_OF = {
    "h100-sxm": list(range(len(POINTS))),
    # Beyond that every branch compiles: what models use, and what holds the most of what a GPU has least of.
    "a100-sxm": [1, 3],
    "b200": [3, 5, 6],
    "rtx-5090": [3, 6, 8],
}


@pytest.mark.parametrize("gpu", POINTS_OF)
def test_default_configurations_fit(gpu: str, compiled_apart: Callable[..., str]) -> None:
    # A process of its own, because the tests' process interprets its kernels.
    compiled = json.loads(compiled_apart("-c", COMPILE, gpu, json.dumps(POINTS_OF[gpu])))
    instruction = {"h100-sxm": "HGMMA", "b200": "UTCHMMA"}.get(gpu, "HMMA")
    seen = set()
    for index, kernel, shared, spills, blocks, matrix in compiled:
        (shape, dtype), name = POINTS[index], kernel.removeprefix("flash_attention_").removesuffix("_kernel")
        seen.add((index, name))
        what = str(shape), dtype, name
        assert shared <= named(gpu).smem_block, what
        assert blocks >= 1, what
        # With every option at once a few registers may go to memory; the command that inspects kernels says how many.
        if max(shape.d, shape.dv) <= (128 if name == "fwd" else 64) and not shape.bias:
            assert spills == 0, what
        if dtype != torch.float32 and name != "bwd_delta" and not shape.bias:
            assert instruction in matrix, what
    expected = {(index, name) for index in POINTS_OF[gpu] for name in ("fwd", "bwd_delta", "bwd_dq", "bwd_dkv")}
    assert seen == expected | {(index, "bwd_dbias") for index in POINTS_OF[gpu] if POINTS[index][0].bias}

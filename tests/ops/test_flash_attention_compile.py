"""Every kernel, in its default configuration, compiled for real GPUs: shared memory, registers and spills. No GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from iokernels.bench.case import load
from iokernels.runtime.device import named

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("gpu", ["a100-sxm", "h100-sxm", "b200", "rtx-5090"])
def test_default_configurations_fit(gpu: str, tmp_path: Path) -> None:
    # A process of its own, because the tests' process interprets its kernels.
    environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-m", "iokernels", "inspect", "flash_attention", "--gpu", gpu, "--points", "--json", "-"]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
    kernels = json.loads(run.stdout)["rows"]
    assert {kernel["kernel"].removesuffix("_kernel").removeprefix("flash_attention_") for kernel in kernels} == {
        "fwd", "bwd_delta", "bwd_dq", "bwd_dkv", "bwd_dbias"
    }  # fmt: skip
    vocabulary = load("flash_attention").vocabulary
    shapes = [vocabulary.parse(kernel["shape"]) for kernel in kernels]
    for kernel, shape in zip(kernels, shapes, strict=True):
        assert kernel["shared_bytes"] <= named(gpu).smem_block, kernel
        assert kernel["blocks_per_sm"] >= 1, kernel
        widest = 128 if kernel["kernel"] == "flash_attention_fwd_kernel" else 64
        # With every option at once a few registers may go to memory; the command that inspects kernels says how many.
        if max(shape.d, shape.dv) <= widest and not shape.bias:
            assert kernel["spill_bytes"] == 0, kernel
    instruction = {"h100-sxm": "HGMMA", "b200": "UTCHMMA"}.get(gpu, "HMMA")
    missing = [
        kernel
        for kernel, shape in zip(kernels, shapes, strict=True)
        if kernel["dtype"] != "fp32" and "delta" not in kernel["kernel"] and not shape.bias
        if instruction not in kernel["matrix"]
    ]
    assert not missing

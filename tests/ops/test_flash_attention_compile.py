"""Every kernel, in its default configuration, compiled for real GPUs: shared memory, registers and spills. No GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from iokernels.runtime.device import named

SCRIPT = Path(__file__).with_name("compile_flash_attention.py")
ROOT = SCRIPT.parents[2]


@pytest.mark.parametrize("gpu", ["a100-sxm", "h100-sxm", "b200", "rtx-5090"])
def test_default_configurations_fit(gpu: str, tmp_path: Path) -> None:
    environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    environment.pop("TRITON_INTERPRET", None)
    run = subprocess.run([sys.executable, SCRIPT, gpu], env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
    kernels = [json.loads(line) for line in run.stdout.splitlines()]
    assert {kernel["kernel"].removesuffix("_kernel").removeprefix("flash_attention_") for kernel in kernels} == {
        "fwd", "bwd_delta", "bwd_dq", "bwd_dkv", "bwd_dbias"
    }  # fmt: skip
    for kernel in kernels:
        assert kernel["shared_bytes"] <= named(gpu).smem_block, kernel
        widest = 128 if kernel["kernel"] == "flash_attention_fwd_kernel" else 64
        # With every option at once a few registers may go to memory; the command that inspects kernels says how many.
        if kernel["width"] <= widest and kernel["options"] != "everything":
            assert kernel["spill_bytes"] == 0, kernel
    halves = [kernel for kernel in kernels if kernel["dtype"] != "float32" and "delta" not in kernel["kernel"]]
    instruction = {"h100-sxm": "HGMMA", "b200": "UTCHMMA"}.get(gpu, "HMMA")
    missing = [kernel for kernel in halves if instruction not in kernel["matrix"] and kernel["options"] != "everything"]
    assert not missing

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


@pytest.mark.parametrize("gpu", ["h100-sxm", "b200"])
def test_default_configurations_fit(gpu: str, tmp_path: Path) -> None:
    # A process of its own, because the tests' process interprets its kernels.
    environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-m", "iokernels", "inspect", "fft_conv", "--gpu", gpu, "--points", "--json", "-"]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
    kernels = json.loads(run.stdout)["rows"]
    assert {kernel["kernel"] for kernel in kernels} == {"fft_conv_fwd_kernel", "fft_conv_bwd_kernel"}
    vocabulary = load("fft_conv").vocabulary
    for kernel in kernels:
        assert kernel["shared_bytes"] <= named(gpu).smem_block, kernel
        assert kernel["blocks_per_sm"] >= 1, kernel
        # A kernel that ran out of tensor memory would be compiled to nothing.
        assert set(kernel["matrix"]) & {"HMMA", "HGMMA", "UTCHMMA"}, kernel
        if vocabulary.parse(kernel["shape"]).n < 4096 and "fwd" in kernel["kernel"]:
            # Longer transforms keep part of their constants in local memory, as the command says.
            assert kernel["spill_bytes"] <= 64, kernel  # a word or two, with some compilers

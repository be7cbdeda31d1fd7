"""The block-sparse kernels, in their default configuration, compiled for real GPUs. No GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from iokernels.runtime.device import named

ROOT = Path(__file__).resolve().parents[2]
KERNELS = {"fwd", "bwd_dq", "bwd_dkv"}


@pytest.mark.parametrize(
    ("gpu", "shape", "kernels"),
    [
        ("a100-sxm", "n=16k,bk=8", KERNELS),
        ("h100-sxm", "n=16k,bk=64", KERNELS),
        ("b200", "n=16k,bk=8", KERNELS),
        ("rtx-5090", "n=1,nk=64k,bk=8", KERNELS | {"combine"}),
    ],
)
def test_default_configurations_fit(gpu: str, shape: str, kernels: set[str], tmp_path: Path) -> None:
    # A process of its own, because the tests' process interprets its kernels.
    environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    environment.pop("TRITON_INTERPRET", None)
    command = [
        sys.executable, "-m", "iokernels", "inspect", "block_sparse_attention", "--gpu", gpu, "--shape",
        f"b=1,h=32,hkv=8,d=128,{shape}", "--json", "-",
    ]  # fmt: skip
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
    rows = json.loads(run.stdout)["rows"]
    assert {row["kernel"].removesuffix("_kernel").removeprefix("block_sparse_") for row in rows} == kernels
    for row in rows:
        assert row["shared_bytes"] <= named(gpu).smem_block, row
        assert row["blocks_per_sm"] >= 1, row
        assert row["spill_bytes"] == 0, row
        if "combine" not in row["kernel"]:
            # Tiles of fewer than 64 rows, or 64 keys, are too small for a warpgroup.
            instructions = {"h100-sxm": {"HGMMA"}, "b200": {"UTCHMMA", "HMMA"}}.get(gpu, {"HMMA"})
            assert instructions & set(row["matrix"]), row

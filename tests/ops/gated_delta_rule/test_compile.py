"""Every kernel of gated_delta_rule, in its default configuration, compiled for real GPUs. No GPU."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

from iokernels.runtime.device import named

PASSES = ("gated_delta_rule", "b=4,h=32,n=1k,d=128", {"inverse", "fwd", "bwd_states", "bwd_walk", "bwd_grads"})
STEP = ("gated_delta_rule_step", "b=4,h=32,n=1,d=128", {"step"})


@pytest.mark.parametrize(
    ("gpu", "case", "shape", "kernels"),
    [("a100-sxm", *PASSES), ("h100-sxm", *PASSES), ("b200", *PASSES), ("h100-sxm", *STEP)],
)
def test_default_configurations_fit(
    gpu: str, case: str, shape: str, kernels: set[str], compiled_apart: Callable[..., str]
) -> None:
    # A process of its own, because the tests' process interprets its kernels.
    command = ("-m", "iokernels", "inspect", case, "--gpu", gpu, "--shape", shape, "--json", "-")
    rows = json.loads(compiled_apart(*command))["rows"]
    assert {row["kernel"].removesuffix("_kernel").removeprefix("gated_delta_rule_") for row in rows} == kernels
    for row in rows:
        assert row["shared_bytes"] <= named(gpu).smem_block, row
        assert row["blocks_per_sm"] >= 1, row
        # A block holds a state and all that a chunk makes of it; some of that goes to memory, how much depends on the
        # version of the compiler.
        assert row["spill_bytes"] <= 640, row
        if case == "gated_delta_rule":
            instruction = {"h100-sxm": "HGMMA", "b200": "UTCHMMA"}.get(gpu, "HMMA")
            assert instruction in row["matrix"], row

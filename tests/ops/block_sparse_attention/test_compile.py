"""The block-sparse kernels, in their default configuration, compiled for real GPUs. No GPU."""

from __future__ import annotations

import json
from collections.abc import Callable

from iokernels.runtime.device import named

# One process for all GPUs, because starting one takes as long as compiling three kernels; not that of the tests, which
# interprets its kernels.
PROGRAM = """
import json
import torch
from iokernels.autotune.resources import compiling_for
from iokernels.ops.block_sparse_attention.case.compile import VOCABULARY, launch
from iokernels.runtime.device import named

POINTS = [
    ("a100-sxm", "n=16k,d=128,bk=8", torch.bfloat16, "both"),
    ("h100-sxm", "n=16k,d=128,bk=64", torch.bfloat16, "both"),
    ("h100-sxm", "n=16k,d=256,bk=16,lists=2,causal=0", torch.float16, "fwd"),
    ("h100-sxm", "n=4k,d=128", torch.float32, "bwd"),
    ("b200", "n=16k,d=128,bk=8,lse=1", torch.bfloat16, "both"),
    ("rtx-5090", "n=1,nk=64k,d=128,bk=8", torch.bfloat16, "fwd"),
]
rows = []
for gpu, text, dtype, which in POINTS:
    with compiling_for(named(gpu)) as compiled:
        launch(VOCABULARY.parse(f"b=1,h=32,hkv=8,{text}"), dtype, which)
    for one in compiled:
        found = {"gpu": gpu, "half": dtype != torch.float32, "kernel": one.kernel.removeprefix("block_sparse_")}
        found |= {"spill_bytes": one.spill_bytes, "shared_bytes": one.shared_bytes}
        rows.append(found | {"matrix": list(one.matrix_instructions()), "blocks": one.blocks_per_sm(named(gpu))[0]})

# Lengths, batches, budgets, sinks and windows are no reason to compile again.
from iokernels.ops.block_sparse_attention.triton.backward_kv import block_sparse_bwd_dkv_kernel
from iokernels.ops.block_sparse_attention.triton.forward import block_sparse_fwd_kernel

def count():
    kernels = (block_sparse_fwd_kernel, block_sparse_bwd_dkv_kernel)
    return sum(len(caches[0]) for kernel in kernels for caches in kernel.device_caches.values())

with compiling_for(named("a100-sxm")):
    before = count()
    for text in ("n=16k", "b=3,n=32k,budget=512", "n=4k,sink=1,window=77", "n=8k,b=2,sink=0,window=0,budget=1k"):
        launch(VOCABULARY.parse(f"h=32,hkv=8,d=128,bk=8,{text}"), torch.bfloat16, "both")
assert count() == before, count() - before
print(json.dumps(rows))
"""


def test_default_configurations_fit(compiled_apart: Callable[..., str]) -> None:
    rows = json.loads(compiled_apart("-c", PROGRAM).splitlines()[-1])
    assert {row["kernel"] for row in rows} == {"fwd_kernel", "bwd_dq_kernel", "bwd_dkv_kernel", "combine_kernel"}
    assert {row["gpu"] for row in rows} == {"a100-sxm", "h100-sxm", "b200", "rtx-5090"}
    for row in rows:
        assert row["shared_bytes"] <= named(row["gpu"]).smem_block, row
        assert row["blocks"] >= 1, row
        # Rows that lie apart take registers for their addresses: a few go to memory where an H100 owns keys.
        assert row["spill_bytes"] <= (128 if row["kernel"] == "bwd_dkv_kernel" else 0), row
        if row["half"] and row["kernel"] != "combine_kernel":
            instruction = {"h100-sxm": "HGMMA", "b200": "UTCHMMA"}.get(row["gpu"], "HMMA")
            assert instruction in row["matrix"], row

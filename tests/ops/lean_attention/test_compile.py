"""The Triton kernels of lean_attention compiled for real GPUs, without one: what they take, and how often."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

import pytest

from iokernels.runtime.device import named
from iokernels.testing.case import load


def inspected(compiled_apart: Callable[..., str], gpu: str, *which: str) -> list[dict[str, Any]]:
    """What each kernel takes of ``gpu``, in its default configuration."""
    rows = json.loads(
        compiled_apart("-m", "iokernels", "inspect", "lean_attention", "--gpu", gpu, *which, "--json", "-")
    )
    vocabulary = load("lean_attention").vocabulary
    for kernel in rows["rows"]:
        shape = vocabulary.parse(kernel["shape"])
        assert kernel["shared_bytes"] <= named(gpu).smem_block, kernel
        assert kernel["blocks_per_sm"] >= 1, kernel
        if kernel["dtype"] != "fp32" and "combine" not in kernel["kernel"]:
            assert any("MMA" in name for name in kernel["matrix"]), kernel
            # At the usual widths next to nothing goes to memory; the command that inspects kernels says what else does.
            usual = max(shape.d, shape.dv) <= 128 and not shape.softcap and not shape.prefix
            assert kernel["spill_bytes"] <= 32 or not usual, kernel
    return rows["rows"]


def test_every_branch_of_every_kernel(compiled_apart: Callable[..., str]) -> None:
    assert {kernel["kernel"] for kernel in inspected(compiled_apart, "h100-sxm", "--points")} == {
        "lean_attention_kernel", "lean_attention_split_kernel", "lean_attention_combine_kernel"
    }  # fmt: skip


@pytest.mark.parametrize("gpu", ["a100-sxm", "b200", "rtx-5090"])
def test_default_configurations_fit(gpu: str, compiled_apart: Callable[..., str]) -> None:
    shapes = ("b=4,h=32,hkv=4,nk=4k,d=128", "b=4,h=32,hkv=4,nk=4k,d=128,cache=1,scales=1,page=16")
    words = [word for shape in shapes for word in ("--shape", shape)]
    assert len(inspected(compiled_apart, gpu, *words, "--dtype", "bf16")) == len(shapes)


VARIANTS = """
import json
from iokernels import autotune
from iokernels.autotune.resources import compiling_for
from iokernels.ops.lean_attention.case import CASE
from iokernels.ops.lean_attention.triton.lean import lean_attention_kernel
from iokernels.ops.lean_attention.triton.split import lean_attention_combine_kernel, lean_attention_split_kernel
from iokernels.ops.lean_attention.triton.tuning import Config
from iokernels.runtime.device import named
import torch

config = Config(block_n=64, blocks=264, stream_k=1, num_warps=4, num_stages=2)
for words in json.loads(input()):
    with compiling_for(named("h100-sxm")), autotune.override(lean_attention=config):
        CASE.compilation.launch(CASE.vocabulary.parse(words), torch.bfloat16, "fwd")
kernels = (lean_attention_kernel, lean_attention_split_kernel, lean_attention_combine_kernel)
# What Triton remembers of a kernel on a device starts with its variants.
print(json.dumps([len(device[0]) for kernel in kernels for device in kernel.device_caches.values()]))
"""


def test_one_kernel_for_all_lengths_batches_and_caches(compiled_apart: Callable[..., str]) -> None:
    """Nothing that changes from step to step of a server is compiled in: there is one variant of each kernel."""
    sizes = ("b=1,nk=16", "b=2,nk=1000", "b=3,nk=4k,shortest=100,spare=5", "b=16,nk=17k", "b=300,nk=1", "b=4,nk=64k")
    options = "h=32,hkv=4,d=128,page=16,left=500"
    shapes = [f"{options},{text},schedule={schedule}" for schedule in (1, 2) for text in sizes]
    assert json.loads(compiled_apart("-c", VARIANTS, given=json.dumps(shapes))) == [1, 1, 1]


ARRIVAL = """
import json
from iokernels import autotune
from iokernels.autotune.resources import compiling_for
from iokernels.ops.lean_attention.case import CASE
from iokernels.ops.lean_attention.triton.lean import lean_attention_kernel
from iokernels.ops.lean_attention.triton.tuning import Config
from iokernels.runtime.device import named
import torch

config = Config(block_n=64, blocks=264, stream_k=1, num_warps=4, num_stages=2)
with compiling_for(named(input())), autotune.override(lean_attention=config):
    CASE.compilation.launch(CASE.vocabulary.parse("b=2,h=8,hkv=1,nk=1k,d=64,schedule=1"), torch.bfloat16, "fwd")
found = [kernel.asm["ptx"] for device in lean_attention_kernel.device_caches.values() for kernel in device[0].values()]
print(json.dumps(found))
"""


def test_a_block_counts_itself_in_after_all_its_threads_have_written(compiled_apart: Callable[..., str]) -> None:
    """And releases what they wrote to the one that merges, which acquires it: no interpreter shows that it did not."""
    (ptx,) = json.loads(compiled_apart("-c", ARRIVAL, given="h100-sxm"))
    memory = re.findall(r"\b(?:st\.global|atom|bar\.sync|ld\.global\.cg)\S*", ptx)
    (counted,) = (place for place, name in enumerate(memory) if name.startswith("atom"))
    assert memory[counted] == "atom.global.gpu.acq_rel.add.u32"
    assert memory[counted - 1] == "bar.sync"
    assert memory[counted - 2].startswith("st.global")  # of the partial result
    # The last to arrive reads the others' past the first-level cache, once all its threads know that it is.
    assert memory[counted + 1] == "bar.sync"
    assert any(name.startswith("ld.global.cg") for name in memory[counted + 2 :])

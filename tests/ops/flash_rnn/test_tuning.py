"""What the kernels of flash_rnn are launched with, compiled for real GPUs; and what a kernel in CUDA could hold."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable

import pytest
import torch

from iokernels.autotune.resources import compiling_cuda_for
from iokernels.ops.flash_rnn.case.cuda import COMPILATION
from iokernels.ops.flash_rnn.case.shapes import VOCABULARY
from iokernels.ops.flash_rnn.cells import CELLS
from iokernels.ops.flash_rnn.cuda import tuning as resources
from iokernels.ops.flash_rnn.cuda.tuning import SPACE, Problem, placement, widest
from iokernels.ops.flash_rnn.triton.tuning import KERNELS, TUNABLES, default, max_width
from iokernels.ops.flash_rnn.triton.tuning import Problem as Launch
from iokernels.runtime.device import KNOWN, named


@pytest.mark.parametrize("gpu", KNOWN)
def test_the_default_is_in_the_space(gpu: str) -> None:
    device = named(gpu)
    for kernel in KERNELS:
        for cell in CELLS.values():
            for itemsize, tensor_cores in ((2, True), (4, True), (4, False)):
                for width in (16, 32, 64, 128, 256):
                    if width > max_width(cell.gates, itemsize, device.smem_block):
                        continue
                    problem = Launch(
                        kernel, width, cell.gates, cell.values, len(cell.states), itemsize, tensor_cores, device.sm,
                        device.smem_block, 1,
                    )  # fmt: skip
                    tunable, space = TUNABLES[kernel], TUNABLES[kernel].space
                    assert space.refusal(problem, device, default(problem)) is None, problem
                    assert tunable.problem_of(tunable.key(problem), device) == problem
                    assert space.candidates(problem, device)


@pytest.mark.parametrize(("gpu", "points"), [("h100-sxm", list(range(8))), ("rtx-5090", [1, 4, 6])], ids=str)
def test_default_configurations_fit(gpu: str, points: list[int], compiled_apart: Callable[..., str]) -> None:
    """Every branch for one GPU; for that with the least shared memory what takes most of it."""
    # A process of its own, because the tests' process interprets its kernels.
    program = (
        "import json, sys\n"
        "from iokernels.autotune.resources import compiling_for\n"
        "from iokernels.ops.flash_rnn.case.compile import COMPILATION\n"
        "from iokernels.runtime.device import named\n"
        "shape, dtype = COMPILATION.points[0]\n"
        "with compiling_for(named(sys.argv[1])) as found:\n"
        "    for text in ('b=1', 'b=17,n=1k', 'n=777,h=5', 'n=1,nb=1', 'b=3,h=1'):\n"
        "        COMPILATION.launch(shape.vocabulary.parse(text), dtype, 'both')\n"
        "print(len(found), len({id(one.cubin) for one in found}))\n"
        "for shape, dtype in (COMPILATION.points[index] for index in json.loads(sys.argv[2])):\n"
        "    with compiling_for(named(sys.argv[1])) as found:\n"
        "        COMPILATION.launch(shape, dtype, 'both')\n"
        "    for one in found:\n"
        "        print(json.dumps([str(shape), dtype.itemsize, one.kernel, one.shared_bytes, one.spill_bytes,\n"
        "                          sum(one.matrix_instructions().values())]))\n"
    )
    launches, *lines = compiled_apart("-c", program, gpu, json.dumps(points)).splitlines()
    # Neither steps nor sequences nor heads make another kernel: one forward, one backward.
    assert launches == "10 2"
    rows = [json.loads(line) for line in lines]
    assert {row[2] for row in rows} == {f"{kernel}_kernel" for kernel in KERNELS}
    for shape, itemsize, kernel, shared, spills, products in rows:
        assert shared <= named(gpu).smem_block, (shape, kernel)
        assert spills <= 32, (shape, kernel)
        assert (products > 0) == (itemsize == 2 and not ("cut=1" in shape and "bwd" in kernel)), (shape, kernel)


@pytest.mark.parametrize("gpu", ["a100-sxm", "rtx-4090"])
def test_the_default_of_cuda_is_in_the_space(gpu: str) -> None:
    device = named(gpu)
    for kernel, tunable in resources.TUNABLES.items():
        for cell in CELLS.values():
            for itemsize, tensor_cores in ((2, True), (4, True), (4, False)):
                for width, heads in ((5, 12), (128, 6), (512, 1)):
                    problem = resources.problem_for(kernel, cell, width, heads, 17, itemsize, tensor_cores, device)
                    if resources.fits(problem):
                        config = resources.default(problem)
                        assert tunable.space.refusal(problem, device, config) is None, problem
                    assert resources.fits(problem) or width > 128
                    key = tunable.key(problem)
                    assert tunable.key(tunable.problem_of(key, device)) == key


def test_one_block_holds_a_head_up_to_what_its_memory_and_registers_do() -> None:
    """A byte of R is either in shared memory or in registers, so D is bounded by the sum of both."""
    for name in ("a100-sxm", "h100-sxm", "rtx-4090"):
        device = named(name)
        alone, shared = widest(device, blocks=1), widest(device)
        most = ((device.smem_block + 4 * device.regs_sm) / (4 * 2)) ** 0.5
        assert 128 <= alone <= most
        assert alone < shared
    assert widest(named("rtx-4090"), blocks=1) < widest(named("h100-sxm"), blocks=1)


def test_blocks_that_wait_for_each_other_run_at_once() -> None:
    device = named("h100-sxm")
    config = placement(Problem(width=768, heads=1), device)
    assert config is not None
    assert config.regime == "barrier"
    assert resources.grid(Problem(768, 1), config.blocks, config.tile) <= device.sms
    # Twelve heads of 768 would need more blocks than there are SMs.
    assert placement(Problem(width=768, heads=12), device) is None
    removed = SPACE.explain(Problem(width=768, heads=12), device).removed
    assert removed["registers"] + removed["shared memory"] > 0
    assert removed["one wave"] > 0


@pytest.mark.parametrize("backward", [False, True])
def test_a_head_of_sixty_four_units_needs_one_block(backward: bool) -> None:
    for device in KNOWN.values():
        problem = Problem(width=64, heads=12, backward=backward)
        config = placement(problem, device)
        assert config is not None
        assert config.regime == "block"
        assert config.held(problem) == problem.fragments  # all of R in registers


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc compiles the kernels")
def test_cuda_kernels_keep_what_the_model_says() -> None:
    """No spills, matrix instructions, and the shared memory of the model, within what a small GPU has."""
    device = named("rtx-4090")
    with compiling_cuda_for(device) as found:
        COMPILATION.launch(VOCABULARY.parse("d=128,h=6"), torch.bfloat16, "both")
    assert [one.kernel for one in found] == ["flash_rnn_fwd_cuda", "flash_rnn_bwd_cuda"]
    for one in found:
        assert one.spill_bytes == 0, one.kernel
        assert one.shared_bytes <= device.smem_block, one.kernel
        assert sum(one.matrix_instructions().values()) >= 32, one.kernel  # four gates, eight operands

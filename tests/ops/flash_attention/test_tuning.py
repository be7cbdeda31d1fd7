"""The spaces of flash_attention: the default is inside, whatever is asked; shipped tables hold what can be launched."""

from __future__ import annotations

import warnings
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from iokernels import autotune, ops
from iokernels.autotune import tables
from iokernels.autotune.search import ranked
from iokernels.autotune.select import config_of
from iokernels.ops.flash_attention.options import Options
from iokernels.ops.flash_attention.triton import launch as triton_launch
from iokernels.ops.flash_attention.triton import tuning
from iokernels.ops.flash_attention.triton.tuning import TUNABLES
from iokernels.runtime.device import KNOWN, DeviceSpec, assume, named

WIDTHS = (16, 32, 64, 128, 256)
SHIPPED = Path(tables.__file__).resolve().parent / "tables"
TABLES = sorted(SHIPPED.glob("*/*.json"))


@st.composite
def problems(draw: st.DrawFn) -> tuple[tuning.Problem, DeviceSpec]:
    device = draw(st.sampled_from(list(KNOWN.values())))
    itemsize, tensor_cores = draw(st.sampled_from([(2, True), (4, True), (4, False)]))
    problem = tuning.Problem(
        kernel=draw(st.sampled_from(tuning.KERNELS)),
        block_d=draw(st.sampled_from(WIDTHS)),
        block_v=draw(st.sampled_from(WIDTHS)),
        itemsize=itemsize,
        tensor_cores=tensor_cores,
        extras=draw(st.booleans()),
        sm=device.sm,
        smem_block=device.smem_block,
        causal=draw(st.booleans()),
        window=draw(st.booleans()),
        heads=draw(st.sampled_from([1, 64, 4096])),
        seqlen_q=draw(st.sampled_from([1, 128, 2**20])),
        seqlen_k=draw(st.sampled_from([1, 4096])),
    )
    return problem, device


@settings(max_examples=400, deadline=None)
@given(problems())
def test_the_default_is_inside_the_space(drawn: tuple[tuning.Problem, DeviceSpec]) -> None:
    problem, device = drawn
    space = TUNABLES[problem.kernel].space
    assert space.refusal(problem, device, tuning.default(problem)) is None


@settings(max_examples=20, deadline=None)
@given(problems())
def test_what_is_ranked_is_the_space_from_the_default_on(drawn: tuple[tuning.Problem, DeviceSpec]) -> None:
    problem, device = drawn
    tunable = TUNABLES[problem.kernel]
    found = ranked(tunable, problem, device)
    assert found[0] == tuning.default(problem)
    assert len(set(found)) == len(found) == tunable.space.explain(problem, device).left


@settings(max_examples=50, deadline=None)
@given(problems())
def test_keys_lead_back_to_their_problem(drawn: tuple[tuning.Problem, DeviceSpec]) -> None:
    problem, device = drawn
    tunable = TUNABLES[problem.kernel]
    assert tunable.problem_of(tunable.key(problem), device) == problem


def test_counts_are_rounded_up() -> None:
    assert [autotune.bucket(n) for n in (0, 1, 2, 3, 4, 5, 4096, 4097)] == [1, 1, 2, 4, 4, 8, 4096, 8192]


def test_a_launch_asks_for_its_own_problem(roots: tuple[Path, Path]) -> None:
    """A user's table reaches the kernel: causal half-precision calls of this width take its tiles, others do not."""
    device = named("a100-sxm")
    q = torch.empty(2, 4, 1000, 60, dtype=torch.bfloat16, device="meta")
    k = torch.empty(2, 2, 3000, 60, dtype=torch.bfloat16, device="meta")
    v = torch.empty(2, 2, 3000, 100, dtype=torch.bfloat16, device="meta")
    launch = triton_launch.Launch(q, k, v, Options(window_right=0))
    problem = launch.problem("flash_attention_fwd", q, device)
    assert problem == tuning.Problem(
        "flash_attention_fwd", 64, 128, 2, True, False, 80, 163 * 1024, True, False, 8, 1024, 4096
    )  # fmt: skip
    tuned = tuning.Config(64, 16, 4, 1)
    assert tuning.default(problem) != tuned
    one = tables.Entry(TUNABLES["flash_attention_fwd"].key(problem._replace(seqlen_q=512)), vars(tuned))
    tables.save(TUNABLES["flash_attention_fwd"], device, roots[0], [one])
    with assume(device):
        assert launch.config("flash_attention_fwd", q) == tuned
        plain = triton_launch.Launch(q, k, v, Options())
        assert plain.config("flash_attention_fwd", q) == tuning.default(problem)
        assert launch.config("flash_attention_bwd_dq", q) == tuning.default(
            launch.problem("flash_attention_bwd_dq", q, device)
        )  # fmt: skip


def test_tiles_are_pinned_in_deterministic_mode() -> None:
    assert all(tunable.pinned == ("block_m", "block_n") for tunable in TUNABLES.values())


def faults(path: Path) -> list[str]:
    """What is wrong with a table that is about to be shipped, a sentence each."""
    device = named(path.parent.name)
    kernel, backend = path.name.removesuffix(".json").split(".")
    spaces = Path(ops.__file__).parent.glob("*/triton/tuning.py")
    rooms = [import_module(f"iokernels.ops.{path.parts[-3]}.triton.tuning") for path in spaces]
    owner = next((room for room in rooms if kernel in room.TUNABLES), None)
    if owner is None or owner.TUNABLES[kernel].backend != backend:
        return [f"no room has the kernel {kernel} of {backend}"]
    tunable: autotune.Tunable[Any] = owner.TUNABLES[kernel]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        table = tables.load(tunable, device, path.parent.parent)
    assert table is not None
    found = []
    for entry in table.entries:
        config = config_of(tunable, entry)
        refusal = "its fields are not the axes" if config is None else None
        if config is not None:
            refusal = tunable.space.refusal(tunable.problem_of(entry.key, device), device, config)
        if refusal is not None:
            found.append(f"{path}: {entry.key}: {refusal}")
    return found


def test_every_shipped_table_holds_what_can_be_launched() -> None:
    assert [fault for path in TABLES for fault in faults(path)] == []


def test_a_table_that_must_not_be_shipped_is_found(roots: tuple[Path, Path]) -> None:
    device = named("rtx-3090")
    kernel = TUNABLES["flash_attention_fwd"]
    problem = tuning.Problem("flash_attention_fwd", 256, 256, 2, True, False, device.sm, device.smem_block)
    good = tables.Entry(kernel.key(problem), vars(tuning.default(problem)))
    path = tables.save(kernel, device, roots[1], [good])
    assert faults(path) == []
    too_large = tables.Entry(kernel.key(problem), vars(tuning.Config(128, 128, 8, 4)))
    tables.save(kernel, device, roots[1], [too_large])
    assert ["shared memory" in fault or "registers" in fault for fault in faults(path)] == [True]
    tables.save(kernel, device, roots[1], [replace(good, config={"block_m": 64})])
    assert ["not the axes" in fault for fault in faults(path)] == [True]
    tables.save(replace(kernel, kernel="other"), device, roots[1], [good])
    assert faults(path.with_name("other.triton.json")) == ["no room has the kernel other of triton"]

"""Launch parameters and relations between rows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch

from iokernels import autotune
from iokernels.bench.report.rows import Need, Row, against, config_text, flops_unit
from iokernels.bench.timing.machine import Floor
from iokernels.bench.timing.measure import Timing
from iokernels.ops.flash_attention.case import CASE
from iokernels.runtime.device import named


@dataclass(frozen=True)
class Config:
    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    split: int = 1


def row(name: str, seconds: float | None, floor: Floor | None = None) -> Row:
    need = Need(CASE.vocabulary.parse("n=8"), torch.bfloat16, "fwd", 2 * 10**12, 3 * 10**9, floor)
    timing = None if seconds is None else Timing(seconds / 2, seconds, seconds * 2, 5, "wall")
    return Row(need, name, "backend", "timed" if timing else "refused", timing=timing)


def test_speed_relative_to_the_baseline() -> None:
    found = against([row("a", 1.0), row("b", 4.0), row("c", None)], "b")
    assert [one.speedup for one in found] == [4.0, 1.0, None]
    assert [one.speedup for one in against([row("a", 1.0), row("b", None)], "b")] == [None, None]


def test_figures() -> None:
    one = row("a", 0.5, Floor(0.25, "compute"))
    assert (one.tflops, one.gbytes, one.roofline) == (4.0, 6.0, 0.5)
    assert row("a", None).tflops is None
    flat = one.as_dict()
    assert (flat["ms"], flat["ms_p20"], flat["ms_p80"]) == (500.0, 250.0, 1000.0)
    assert (flat["floor_ms"], flat["floor_bound"]) == (250.0, "compute")
    assert flops_unit([one]) == ("TFLOP/s", 1.0)
    assert flops_unit([row("slow", 5.0)]) == ("GFLOP/s", 1e3)


def test_launch_parameters_as_text() -> None:
    wide, tall = Config(128, 64, 8, 3), Config(64, 32, 4, 2, split=2)
    assert config_text("op", {"op_fwd": wide}) == "128x64 w8 s3 split=1"
    assert config_text("op", {"op_dq": wide, "op_dkv": tall}) == "dq 128x64 w8 s3 split=1; dkv 64x32 w4 s2 split=2"
    assert config_text("op", {}) == "-"


class Anything(NamedTuple):
    """A problem without a key."""


def tunable(kernel: str) -> autotune.Tunable[Any]:
    """A kernel without axes, by default launched with a word and its problem."""
    space: autotune.Space[Any] = autotune.Space("none", 1, (), ())
    return autotune.Tunable(kernel, "triton", space, lambda problem: ("default", problem), Anything)


@pytest.fixture
def nothing_watched() -> Iterator[None]:
    with autotune.watch():
        yield


@pytest.mark.usefixtures("nothing_watched")
def test_watching_sees_what_was_launched() -> None:
    forward, backward, later = (tunable(name) for name in ("op_fwd", "op_bwd", "op_later"))
    gpu = named("h100-sxm")
    with autotune.watch() as seen:
        autotune.select(forward, (3,), gpu)
        with autotune.override(op_bwd="mine"):
            assert autotune.select(backward, (3,), gpu) == "mine"
    autotune.select(later, (3,), gpu)
    assert seen == {"op_fwd": ("default", (3,)), "op_bwd": "mine"}

"""The CUDA kernels of flash_rnn: every way to place a head, any order of warps, rows of any alignment, bytes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from iokernels import UnsupportedError, autotune, flash_rnn
from iokernels.ops.flash_rnn.case import cuda_traffic as model
from iokernels.ops.flash_rnn.case.traffic import Problem
from iokernels.ops.flash_rnn.cells import CELLS
from iokernels.ops.flash_rnn.cuda import launch as cuda
from iokernels.ops.flash_rnn.cuda.tuning import KERNELS, Config
from iokernels.runtime import device as devices
from iokernels.runtime.cuda.emulator import watch
from iokernels.runtime.cuda.kernel import recorded

from ..backends import needs_cuda
from .calls import draw, prove, results

pytestmark = needs_cuda


def everywhere(*config: int) -> dict[str, Config]:
    return dict.fromkeys(KERNELS, Config(*config))


PLACED: dict[str, tuple[tuple[int, ...], dict[str, Any], dict[str, Any]]] = {
    # Name: blocks, tile, split, eighths, stages; then the call.
    "sixteen sequences": ((1, 16, 1, 8, 2), {"batch": 18, "width": 16}, {}),
    "all in shared memory": ((1, 8, 1, 0, 4), {"batch": 3, "width": 32}, {"recompute_gates": True}),
    "half in shared memory": ((1, 8, 1, 4, 2), {"batch": 3, "width": 32, "dtype": torch.float32}, {}),
    "columns split": ((1, 8, 2, 8, 2), {"batch": 9, "width": 64}, {"recompute_gates": True}),
    "two blocks": ((2, 8, 1, 8, 2), {"batch": 9, "width": 32}, {"recurrent_clip": 0.3}),
    "two blocks, split, ragged": (
        (2, 8, 2, 4, 2), {"batch": 3, "width": 64},
        {"lengths": torch.tensor([4, 0, 2], dtype=torch.int32), "recompute_gates": True},
    ),
    "three blocks of odd units": ((3, 16, 1, 8, 2), {"batch": 18, "width": 45, "cell": "gru"}, {}),
}  # fmt: skip


@pytest.mark.parametrize("name", PLACED)
def test_every_way_to_place_a_head(name: str) -> None:
    config, call, options = PLACED[name]
    cell = call.get("cell", "lstm")
    tensors = draw(
        cell, call["batch"], 4, 2, call["width"], dtype=call.get("dtype", torch.bfloat16), time_first=True
    )  # fmt: skip
    with autotune.override(**everywhere(*config)):
        prove(tensors, cell, "cuda", **options)


@pytest.mark.without_gpu
def test_two_blocks_move_what_the_model_says() -> None:
    tensors, heads = draw("lstm", 9, 3, 2, 32, dtype=torch.bfloat16, state=False), 2
    config = Config(2, 8, 1, 8, 2)
    with autotune.override(**everywhere(2, 8, 1, 8, 2)), watch() as launches:
        results(tensors, "lstm", backend="cuda", recompute_gates=True)
    problem = Problem("lstm", (3,) * 9, 3, heads, 32, 2, dstate=True, recompute=True)
    expected = model.accounts(problem, everywhere(2, 8, 1, 8, 2), walkers=4)
    assert [launch.name for launch in launches] == list(expected)
    for launch in launches:
        moved = launch.arguments.values()
        read, written = (sum(one.atomic + getattr(one, way) for one in moved) for way in ("read", "written"))
        assert (read, written) == expected[launch.name].model, launch.name
    assert config.regime == "barrier"


@pytest.mark.parametrize(("width", "time_first", "whole"), [(16, True, True), (16, False, False), (12, True, False)])
def test_whole_rows_travel_as_sixteen_bytes(width: int, time_first: bool, whole: bool) -> None:
    """The others, of an odd width or with a stride of no whole 16 bytes, as elements: both are tested throughout."""
    tensors = draw("lstm", 3, 2, 2, width, dtype=torch.bfloat16, time_first=time_first)
    with recorded() as launches, torch.no_grad():
        flash_rnn(**tensors, backend="cuda")
    assert [dict(launch.kernel.constants)["VECTORS"] for launch in launches] == [whole]


def test_units_that_are_not_neighbours() -> None:
    """Nothing needs to be contiguous: here D is not the innermost dimension."""
    tensors = draw("slstm", 3, 4, 2, 16)
    turned = {name: tensors[name].transpose(-1, -2).contiguous().transpose(-1, -2) for name in ("gates", "recurrent")}
    expected = results(tensors, "slstm", backend="cuda")
    actual = results({**tensors, **turned}, "slstm", backend="cuda")
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name], rtol=0, atol=0)


def test_what_no_gpu_holds_is_refused() -> None:
    gates = torch.zeros(1, 1, 4, 12, 768, dtype=torch.bfloat16)
    recurrent = torch.zeros(4, 12, 768, 1, dtype=torch.bfloat16).expand(-1, -1, -1, 768)
    with pytest.raises(UnsupportedError, match=r"H is 12, D 768 and B 1, .* more than .*Backends that can: torch"):
        flash_rnn(gates, recurrent, backend="cuda")
    with pytest.raises(UnsupportedError, match="not float64"):
        flash_rnn(gates[..., :8].double(), recurrent[..., :8, :8].double(), backend="cuda")


def test_it_is_refused_where_nothing_emulates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "EMULATE", False)
    with pytest.raises(UnsupportedError, match="only under IOKERNELS_EMULATE=1"):
        flash_rnn(torch.zeros(1, 1, 4, 1, 7), torch.zeros(4, 1, 7, 7), backend="cuda")


def test_every_cell_has_its_structure() -> None:
    assert cuda.CELLS.keys() == CELLS.keys()

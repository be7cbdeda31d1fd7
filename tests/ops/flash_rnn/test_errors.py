"""Bad input to flash_rnn: each is refused by an error that names the argument, what it got and what it takes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from iokernels import UnsupportedError, flash_rnn
from iokernels.ops.flash_rnn.triton.tuning import max_width
from iokernels.runtime.device import named


def call(**changes: Any) -> Any:
    """A call of 2 sequences, 5 steps, 3 heads of 8 units, that is accepted but for the changes."""
    arguments = {
        "gates": torch.ones(2, 5, 4, 3, 8),
        "recurrent": torch.ones(4, 3, 8, 8),
        "bias": torch.ones(4, 3, 8),
        "backend": "torch",
    }
    return flash_rnn(**{**arguments, **changes})


def steps(*values: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype)


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"bias": None},
        {"initial_state": torch.zeros(2, 2, 3, 8)},
        {"lengths": steps(0, 5)},
        {"recurrent_clip": 1},
        {"recurrent_cut": True, "recompute_gates": True},
        {"cell": "slstm"},
    ],
    ids=str,
)
def test_accepted(change: dict[str, Any]) -> None:
    assert call(**change).shape == (2, 5, 3, 8)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"cell": "mgu"}, ValueError, "cell is 'mgu'; it must be one of lstm, gru, elman, slstm"),
        ({"cell": None}, ValueError, "cell is None"),
        ({"cell": "gru"}, ValueError, "dimension 2 must be the 3 gates of gru"),
        ({"gates": torch.ones(2, 5, 4, 8)}, ValueError, "gates has 4 dimensions"),
        ({"gates": torch.ones(2, 5, 4, 3, 8).int()}, TypeError, "gates is int32"),
        ({"gates": None}, TypeError, "gates is None"),
        ({"gates": torch.ones(2, 5, 4, 0, 8), "recurrent": torch.ones(4, 0, 8, 8), "bias": None}, ValueError, "head"),
        ({"recurrent": torch.ones(4, 3, 8, 7)}, ValueError, r"recurrent has shape \[4, 3, 8, 7\]; its dimension 3"),
        ({"recurrent": torch.ones(4, 3, 8, 8).half()}, TypeError, "recurrent is float16; it must be float32"),
        ({"bias": torch.ones(4, 24)}, ValueError, "bias has 2 dimensions"),
        ({"initial_state": torch.zeros(1, 2, 3, 8)}, ValueError, "dimension 0 must be the 2 states of lstm: h, c"),
        (
            {"initial_state": torch.zeros(2, 2, 3, 8).double()},
            TypeError,
            "initial_state is float64; it must be float32",
        ),
        ({"initial_state": torch.zeros(2, 1, 3, 8)}, ValueError, "initial_state has shape"),
        ({"lengths": steps(1, 2, 3)}, ValueError, "lengths has shape"),
        ({"lengths": steps(1, 2, dtype=torch.int64)}, TypeError, "lengths is int64; it must be int32"),
        ({"lengths": steps(1, 6)}, ValueError, "lengths has 6; they must be between 0 and N, which is 5"),
        ({"lengths": steps(-1, 2)}, ValueError, "lengths has -1"),
        ({"lengths": [1, 2]}, TypeError, "lengths is list"),
        ({"recurrent_clip": 0.0}, ValueError, "recurrent_clip is 0.0; it must be finite, above 0"),
        ({"recurrent_clip": float("nan")}, ValueError, "recurrent_clip is nan"),
        ({"recurrent_clip": "1"}, TypeError, "recurrent_clip is str"),
        ({"recurrent_cut": 1}, TypeError, "recurrent_cut is int; it must be a bool"),
        ({"return_state": None}, TypeError, "return_state is NoneType; it must be a bool"),
        ({"recompute_gates": 0}, TypeError, "recompute_gates is int; it must be a bool"),
        ({"backend": "cudnn"}, ValueError, "backend is 'cudnn'"),
    ],
)
def test_refused(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"flash_rnn: .*{message}"):
        call(**change)


@pytest.mark.interpreted
@pytest.mark.parametrize(
    ("width", "dtype", "message"),
    [
        (8, torch.float64, "not float64"),
        (144, torch.bfloat16, "D is 144, .* limits lstm in bfloat16 to 128 on NVIDIA H100"),
        (72, torch.float32, "limits lstm in float32 to 64"),
    ],
)
def test_what_the_kernels_cannot_hold(width: int, dtype: torch.dtype, message: str) -> None:
    gates, recurrent = torch.zeros(1, 1, 4, 1, width, dtype=dtype), torch.zeros(4, 1, width, width, dtype=dtype)
    with pytest.raises(UnsupportedError, match=message):
        flash_rnn(gates, recurrent, backend="triton")
    assert flash_rnn(gates, recurrent).shape == (1, 1, 1, width)


def test_widths_by_gpu() -> None:
    """The matrices of an LSTM of 128 units fill 128 KiB: more than a block of a consumer GPU has."""
    limits = {name: max_width(4, 2, named(name).smem_block) for name in ("a100-sxm", "h100-sxm", "b200", "rtx-4090")}
    assert limits == {"a100-sxm": 128, "h100-sxm": 128, "b200": 128, "rtx-4090": 64}
    assert max_width(1, 2, named("h100-sxm").smem_block) == 256
    assert max_width(4, 4, named("rtx-4090").smem_block) == 64
    assert max_width(4, 4, 1024) == 0

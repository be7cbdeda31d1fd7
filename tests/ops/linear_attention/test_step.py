"""linear_attention_step: tokens one after the other are the sequence, with the state moved on in place."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from iokernels import autotune, linear_attention, linear_attention_state, linear_attention_step
from iokernels.testing.budget import check_relative_rms

from .calls import LIMITS, draw, tiles

BACKENDS = ("reference", "torch", "triton")


pytestmark = pytest.mark.tiles(**tiles())


@pytest.mark.parametrize("normalize", [False, True], ids=["plain", "normalized"])
@pytest.mark.parametrize("taylor", [False, True], ids=["linear", "taylor"])
@pytest.mark.parametrize("decay", [None, "head", "token"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_steps_are_the_sequence(
    dtype: torch.dtype, decay: str | None, taylor: bool, normalize: bool, device: str
) -> None:
    """A prompt at once, then one token, then two, then one: on every backend what the oracle says of the whole."""
    given = draw(
        2, 4, 20, 10, 24, key_heads=2, dtype=dtype, decay=decay, taylor=taylor, normalize=normalize, device=device
    )
    wide: dict[str, Any] = {name: x.double() if isinstance(x, torch.Tensor) else x for name, x in given.items()}
    truth, last = linear_attention(**wide, return_state=True, backend="reference")
    for backend in BACKENDS:

        def rows(start: int, stop: int) -> dict:
            part = {name: given[name][:, :, start:stop] for name in ("q", "k", "v")}
            if decay == "token":
                part["log_decay"] = given["log_decay"][:, :, start:stop]
            return {**given, **part}

        out, state = linear_attention(**rows(0, 16), return_state=True, backend=backend)
        outs, address = [out], state.data_ptr()
        for start, stop in ((16, 17), (17, 19), (19, 20)):
            outs.append(linear_attention_step(state=state, **rows(start, stop), backend=backend))
        assert state.data_ptr() == address
        check_relative_rms(torch.cat(outs, 2).flatten(2), truth.flatten(2), limit=LIMITS[dtype], what=f"{backend} out")
        check_relative_rms(state.flatten(2), last.flatten(2), limit=LIMITS[dtype], what=f"{backend} state")


@pytest.mark.parametrize("widths", [(16, 16), (100, 60), (256, 256)], ids=str)
@pytest.mark.parametrize("normalize", [False, True], ids=["plain", "normalized"])
def test_from_an_empty_state(normalize: bool, widths: tuple[int, int], device: str) -> None:
    given = draw(1, 2, 3, *widths, dtype=torch.bfloat16, decay="head", normalize=normalize, device=device)
    whole = linear_attention(**given, backend="reference")
    state = linear_attention_state(1, 2, *widths, normalize=normalize, device=device)
    with autotune.override(linear_attention_step=tiles(width=64)["linear_attention_step"]):
        out = linear_attention_step(state=state, **given, backend="triton")
    check_relative_rms(out.flatten(2), whole.flatten(2), limit=8e-3, what="out")
    assert state.abs().max() > 0.1


def test_what_a_step_refuses(device: str) -> None:
    given = draw(1, 2, 1, device=device)
    state = linear_attention_state(1, 2, 16, 24, device=device)
    with pytest.raises(ValueError, match="q requires a gradient"):
        linear_attention_step(**{**given, "q": given["q"].requires_grad_()}, state=state)
    with torch.no_grad():
        linear_attention_step(**given, state=state)
    given["q"] = given["q"].detach()
    with pytest.raises(ValueError, match="state is not contiguous"):
        linear_attention_step(**given, state=state.mT.contiguous().mT)
    with pytest.raises(ValueError, match="state has shape"):
        linear_attention_step(**given, state=state[..., :20].contiguous())
    with pytest.raises(TypeError, match="state is torch"):
        linear_attention_step(**given, state=state.double())
    with pytest.raises(TypeError, match="dtype is torch"):
        linear_attention_state(1, 2, 16, 24, dtype=torch.float16)

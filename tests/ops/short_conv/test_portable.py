"""The torch backend's tiles: filters of a few taps, cut in every dimension."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from iokernels import short_conv
from iokernels.ops.short_conv.portable import taps
from iokernels.testing.budget import check_relative_rms

LIMITS = {torch.float64: 1e-14, torch.float32: 2e-6, torch.float16: 1.5e-3, torch.bfloat16: 3e-3}


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("channels_inside", [False, True])
@pytest.mark.parametrize(("width", "padding"), [(4, "causal"), (5, "same"), (8, (7, 7)), (3, "valid"), (2, (0, 1))])
def test_tiles_are_the_whole(
    width: int, padding: Any, channels_inside: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 23, 6).transpose(1, 2) if channels_inside else torch.randn(3, 6, 23)
    given: dict[str, Any] = {"x": x, "weight": torch.randn(6, width), "bias": torch.randn(6)}
    options: dict[str, Any] = {"padding": padding, "activation": None if width == 5 else "silu"}
    if padding == "causal":
        options["return_state"] = True

    def results(backend: str, kind: torch.dtype) -> list[torch.Tensor]:
        leaves = {name: x.to(dtype).to(kind).requires_grad_() for name, x in given.items()}
        found = short_conv(**leaves, **options, backend=backend)
        found = found if isinstance(found, tuple) else (found,)
        upstream = [torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(dtype).to(kind) for y in found]
        return [*(y.detach() for y in found), *torch.autograd.grad(found, list(leaves.values()), upstream)]

    expected = results("reference", torch.float64)
    monkeypatch.setattr(taps, "_LEAST_CHANNELS", 2)
    for elements in (7, 40, 10_000):
        monkeypatch.setattr(taps, "_elements", lambda x, elements=elements: elements)
        for actual, wanted in zip(results("torch", dtype), expected, strict=True):
            every = tuple(range(wanted.dim()))
            check_relative_rms(actual, wanted, limit=LIMITS[dtype], what=f"tiles of {elements}", dim=every)

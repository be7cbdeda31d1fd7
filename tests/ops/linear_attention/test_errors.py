"""What linear_attention refuses, and how it says so."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from iokernels import UnsupportedError, lightning_attention, linear_attention

from .calls import draw


def changed(**arguments: Any) -> dict[str, Any]:
    return draw(1, 4, 6, 8, 8, key_heads=2, decay="token") | arguments


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (TypeError, "q is None; it must be a torch.Tensor", {"q": None}),
        (TypeError, "q is int64", {"q": torch.zeros(1, 2, 6, 8, dtype=torch.int64)}),
        (TypeError, "k is float16; it must be float32, as q is", {"k": torch.zeros(1, 2, 6, 8).half()}),
        (ValueError, r"k has shape \[1, 2, 7, 8\]", {"k": torch.zeros(1, 2, 7, 8)}),
        (ValueError, "q has 2 heads and v has 3", {"v": torch.zeros(1, 3, 6, 8), "log_decay": None}),
        (ValueError, "q has 0 heads", {name: torch.zeros(1, 0, 6, 8) for name in ("q", "k")}),
        (ValueError, "widths are 8 and 0", {"v": torch.zeros(1, 4, 6, 0)}),
        (ValueError, r"log_decay has shape \[4, 6\]; it must be \[H\] or \[B,", {"log_decay": torch.zeros(4, 6)}),
        (ValueError, r"its dimension 0 \(H\) must be 4", {"log_decay": torch.zeros(3)}),
        (ValueError, "log_decay has a value that is not at most 0", {"log_decay": torch.full((4,), 0.1)}),
        (ValueError, "log_decay has a value that is not at most 0", {"log_decay": torch.full((4,), float("nan"))}),
        (TypeError, "log_decay is int64", {"log_decay": torch.zeros(4, dtype=torch.int64)}),
        (ValueError, "feature_map is 'elu'", {"feature_map": "elu"}),
        (TypeError, "normalize is int", {"normalize": 1}),
        (TypeError, "return_state is NoneType", {"return_state": None}),
        (TypeError, "scale is str", {"scale": "1"}),
        (ValueError, "scale is inf", {"scale": float("inf")}),
        (ValueError, "its last two dimensions must be 8 and 8", {"initial_state": torch.zeros(1, 4, 8, 9)}),
        (ValueError, "must be 73 and 9", {"initial_state": torch.zeros(1, 4, 8, 8), "feature_map": "taylor",
                                          "normalize": True}),
        (TypeError, "initial_state is bfloat16", {"initial_state": torch.zeros(1, 4, 8, 8).bfloat16()}),
        (TypeError, "initial_state is torch.float64", {"initial_state": torch.zeros(1, 4, 8, 8).double()}),
        (ValueError, "initial_state has shape", {"initial_state": torch.zeros(2, 4, 8, 8)}),
        (ValueError, "backend is 'gpu'", {"backend": "gpu"}),
        (UnsupportedError, "its kernels take float16 and bfloat16, not float32", {"backend": "cuda"}),
    ],
)  # fmt: skip
def test_wrong_arguments(error: type[Exception], message: str, arguments: dict[str, Any]) -> None:
    with pytest.raises(error, match=message):
        linear_attention(**changed(**arguments))


@pytest.mark.parametrize(
    ("message", "offsets"),
    [
        ("cu_seqlens starts with 1", [1, 6]),
        ("it must not decrease", [0, 4, 3]),
        ("past the 6 packed rows", [0, 7]),
        ("cu_seqlens is empty", []),
    ],
)
def test_wrong_offsets(message: str, offsets: list[int]) -> None:
    x = torch.zeros(6, 2, 8)
    with pytest.raises(ValueError, match=message):
        linear_attention(x, x, x, cu_seqlens=torch.tensor(offsets, dtype=torch.int32))


def test_packed_tensors_have_three_dimensions() -> None:
    x, offsets = torch.zeros(6, 2, 8), torch.tensor([0, 6], dtype=torch.int32)
    with pytest.raises(ValueError, match="q has 4 dimensions"):
        linear_attention(x[None], x[None], x[None], cu_seqlens=offsets)
    with pytest.raises(TypeError, match="cu_seqlens is int64"):
        linear_attention(x, x, x, cu_seqlens=offsets.long())
    with pytest.raises(ValueError, match="log_decay has shape"):
        linear_attention(x, x, x, cu_seqlens=offsets, log_decay=torch.zeros(1, 2, 6))


@pytest.mark.parametrize(
    ("reason", "key_width", "value_width", "options"),
    [
        ("K is 257", 257, 8, {}),
        ("V is 300", 8, 300, {}),
        ("with the Taylor map its kernels hold widths up to 32", 33, 8, {"feature_map": "taylor"}),
        ("not float64", 8, 8, {"dtype": torch.float64}),
    ],
)
def test_what_the_kernels_do_not_hold(reason: str, key_width: int, value_width: int, options: dict[str, Any]) -> None:
    taylor = options.get("feature_map") == "taylor"
    given = draw(1, 1, 4, key_width, value_width, dtype=options.get("dtype", torch.float32), taylor=taylor)
    with pytest.raises(UnsupportedError, match=reason):
        linear_attention(**given, backend="triton")
    assert linear_attention(**given, backend="torch").isfinite().all()


def test_slopes() -> None:
    x = torch.zeros(1, 2, 4, 8)
    with pytest.raises(ValueError, match="slopes has a value that is not at least 0"):
        lightning_attention(x, x, x, slopes=torch.tensor([0.1, -0.1]))
    with pytest.raises(ValueError, match=r"slopes has shape \[1, 2\]"):
        lightning_attention(x, x, x, slopes=torch.zeros(1, 2))
    with pytest.raises(TypeError, match="slopes is list"):
        lightning_attention(x, x, x, slopes=[0.1, 0.2])  # pyright: ignore[reportArgumentType]


def test_autocast() -> None:
    given = draw(1, 2, 6, 8, 8, decay="token")
    with torch.autocast("cpu", torch.bfloat16):
        out = linear_attention(**given, backend="torch")
    assert out.dtype == torch.bfloat16

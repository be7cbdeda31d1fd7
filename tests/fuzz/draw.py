"""What a case draws from: a number alone says every choice, so that a case can be made again."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from iokernels.testing.layouts import LAYOUTS

_T = TypeVar("_T")

HALVES = (torch.float16, torch.bfloat16)
DTYPES: dict[str, dict[torch.dtype, int]] = {
    "reference": {torch.float64: 3, torch.float32: 2, torch.float16: 1, torch.bfloat16: 1},
    "torch": {torch.float32: 6, torch.float64: 2, torch.float16: 2, torch.bfloat16: 3},
    "triton": {torch.float32: 3, torch.float16: 2, torch.bfloat16: 2},
    "cuda": {torch.float16: 1, torch.bfloat16: 1},
}
"""The dtypes that a backend takes, with their weights."""

_LAYOUT_WEIGHTS = {
    "contiguous": 8, "offset": 2, "padded": 2, "strided": 3, "heads_last": 3, "permuted": 2, "turned": 2,
    "expanded": 1, "negated": 1, "conjugated": 1,
}  # fmt: skip


class Draw:
    """Choices and tensors of one case."""

    def __init__(self, operator: str, seed: int, backend: str | None = None) -> None:
        self.random = random.Random(f"{operator} {seed}")
        self.generator = torch.Generator().manual_seed(self.random.getrandbits(60))
        self.notes: dict[str, str] = {}
        self.values = "normal"
        self._backend = backend
        self._plain = self.chance(0.25)  # a quarter of all cases are contiguous throughout

    def chance(self, probability: float) -> bool:
        return self.random.random() < probability

    def pick(self, options: Sequence[_T]) -> _T:
        return self.random.choice(options)

    def weighed(self, weights: dict[_T, int]) -> _T:
        return self.random.choices(list(weights), list(weights.values()))[0]

    def backend(self, weights: dict[str, int]) -> str:
        """A backend by weight, or the one that was asked for. The choice is drawn in any case."""
        drawn = self.weighed(weights)
        return drawn if self._backend is None else self._backend

    def dtype(self, backend: str, weights: dict[torch.dtype, int] | None = None) -> torch.dtype:
        return self.weighed(DTYPES[backend] if weights is None else weights)

    def size(self, most: int, edges: Sequence[int] = (), *, least: int = 0) -> int:
        """A size up to ``most``: 0, 1 and the neighbours of ``edges`` more often than others."""
        kind = self.random.random()
        near = [edge + side for edge in edges for side in (-1, 0, 1) if least <= edge + side <= most]
        if kind < 0.04:
            return least
        if kind < 0.14:
            return min(max(1, least), most)
        if kind < 0.5 and near:
            return self.pick(near)
        return self.random.randint(min(max(1, least), most), most)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64)

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.generator, dtype=torch.float64)

    def magnitude(self, dtype: torch.dtype) -> str:
        """What the values of this case are like: for all tensors that :meth:`floats` makes."""
        kinds = {"normal": 8, "small": 1, "zeros": 1, "constant": 1, "outlier": 1}
        kinds |= {} if dtype == torch.float16 else {"large": 2, "tiny": 1}
        self.values = self.weighed(kinds)
        return self.values

    def floats(self, name: str, shape: Sequence[int], dtype: torch.dtype, *, scale: float = 1.0) -> Tensor:
        """A tensor of this case's magnitude; one in five cases of zeros has others beside them."""
        x = self.normal(*shape) * scale
        values = self.values
        if values == "zeros" and self.chance(0.5):
            values = "normal"
        if values == "large":
            x = x * 8.0
        elif values == "small":
            x = x * 0.03
        elif values == "tiny":
            x = x * 1e-6
        elif values == "zeros":
            x = x * 0.0
        elif values == "constant":
            x = torch.full_like(x, float(self.normal(1)) * scale)
        elif values == "outlier" and x.numel():
            x.view(-1)[self.random.randrange(x.numel())] *= 30.0
        return self.laid_out(name, x.to(dtype), values)

    def laid_out(self, name: str, x: Tensor, values: str = "", *, but: Sequence[str] = ()) -> Tensor:
        """``x`` in a drawn layout, noted under ``name``. ``but`` names layouts that this argument does not take."""
        layout = "contiguous" if self._plain else self.weighed(_LAYOUT_WEIGHTS)
        if layout in but:
            layout = "contiguous"
        x = LAYOUTS[layout](x, self.random)
        negative = ", negative bit" if x.is_neg() else ""
        self.notes[name] = (
            f"{str(x.dtype).removeprefix('torch.')}{list(x.shape)}, strides {list(x.stride())}, "
            f"offset {x.storage_offset()}{negative}" + (f", {values}" if values else "")
        )
        return x

    def spoil_a_row(self, name: str, x: Tensor) -> None:
        """NaN in one row of ``x [B, H, N, D]``, which this row of the result shows, and no other."""
        if 0 in x.stride() or not x.numel():
            return
        at = tuple(self.random.randrange(size) for size in x.shape[:3])
        x[at] = float("nan")
        self.notes[name] += f", NaN in row {at}"

    def ints(self, name: str, values: Sequence[Any], *, but: Sequence[str] = ("expanded",)) -> Tensor:
        """An int32 tensor of these values, in a drawn layout."""
        x = torch.tensor(values, dtype=torch.int32)
        found = self.laid_out(name, x, but=but)
        self.notes[name] += f" {values}" if x.numel() <= 16 else ""
        return found

"""One row of ``iokernels io``: the bytes of one shape, and what the tracer counted of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch

from iokernels.testing.case import dtype_name
from iokernels.testing.case.accounts import Account, Bound, Bytes, Configs
from iokernels.testing.case.shape import Shape

PASSES: tuple[Literal["fwd", "bwd"], ...] = ("fwd", "bwd")
"""Whole passes that have a floor and a naive formula."""


@dataclass(frozen=True)
class Counted:
    """What was counted, kernel by kernel, and the model of the same shape with the same tiles."""

    shape: Shape
    counts: Mapping[str, Bytes]
    model: Mapping[str, Account]

    def wrong(self) -> list[str]:
        """The kernels whose count is not their model."""
        modelled = {kernel: account.model for kernel, account in self.model.items()}
        kernels = dict.fromkeys((*self.counts, *modelled))
        return [kernel for kernel in kernels if self.counts.get(kernel) != modelled.get(kernel)]


@dataclass(frozen=True)
class Row:
    """One shape and dtype. ``floors`` and ``naive`` are those of whole passes; ``counted`` is None where nothing can
    be counted; ``bound`` is that of the forward pass for ``on_chip`` bytes, what a block of these tiles holds."""

    shape: Shape
    dtype: torch.dtype
    configs: Configs
    kernels: Mapping[str, Account]
    floors: Mapping[str, int]
    naive: Mapping[str, int]
    counted: Counted | None
    on_chip: int | None
    bound: Bound | None

    def modelled(self, which: str) -> int:
        """Bytes of all kernels of a pass."""
        return sum(account.model.total for account in self.kernels.values() if account.which == which)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        counted = self.counted
        return {
            "shape": str(self.shape),
            "dtype": dtype_name(self.dtype),
            "configs": {name: asdict(config) for name, config in self.configs.items()},
            "kernels": {
                kernel: {"pass": account.which, "floor": account.floor._asdict(), "model": account.model._asdict()}
                for kernel, account in self.kernels.items()
            },
            "passes": {
                which: {"floor": self.floors[which], "model": self.modelled(which), "naive": self.naive[which]}
                for which in self.floors
            },
            "counted": counted
            and {
                "shape": str(counted.shape),
                "count": {kernel: found._asdict() for kernel, found in counted.counts.items()},
                "model": {kernel: account.model._asdict() for kernel, account in counted.model.items()},
                "wrong": counted.wrong(),
            },
            "on_chip_bytes": self.on_chip,
            "lower_bound": self.bound and self.bound._asdict(),
        }

"""IO accounts: how many bytes the kernels of an operator should move, and how many they do.

An operator states them in its :class:`~iokernels.testing.case.Case` as :class:`Accounts`. ``iokernels io`` prints them,
and one test holds the model of every kernel of every operator to what the tracer counts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch

from iokernels.testing.case.shape import Shape

Configs = Mapping[str, Any]
"""Launch parameters by the name under which :func:`iokernels.autotune.select` chooses them."""


class Bytes(NamedTuple):
    """Bytes read from and written to global memory."""

    read: int
    written: int

    @property
    def total(self) -> int:
        """Both together."""
        return self.read + self.written


class Account(NamedTuple):
    """One kernel: the pass it belongs to, its ``floor`` (each of its own inputs read once, each output written once)
    and its ``model`` (what the thread blocks of this tiling request)."""

    which: Literal["fwd", "bwd"]
    floor: Bytes
    model: Bytes


class Bound(NamedTuple):
    """A lower bound from the literature for one shape: an order of magnitude, without its constant.

    ``formula`` is what ``nbytes`` evaluates; ``source`` names the paper and what is bounded.
    """

    nbytes: float
    formula: str
    source: str


@dataclass(frozen=True)
class OnChip:
    """How the traffic of the forward pass depends on the on-chip memory M of a block.

    ``nbytes(shape, dtype, configs)`` is what a block of these launch parameters holds, ``tilings(shape, dtype)`` yields
    launch parameters from small to large, whether or not a GPU could run them, and
    ``lower_bound(shape, dtype, nbytes)`` bounds every algorithm with so much memory.
    """

    nbytes: Callable[[Shape, torch.dtype, Configs], int]
    tilings: Callable[[Shape, torch.dtype], Iterable[Configs]]
    lower_bound: Callable[[Shape, torch.dtype, int], Bound]


@dataclass(frozen=True)
class Accounts:
    """What an operator says of the bytes of its kernels of one backend.

    ``model(shape, dtype, configs)`` holds an :class:`Account` for every kernel of a forward and a backward pass, by the
    kernel's function name. ``configs(shape, dtype)`` are the launch parameters that would be selected (on the GPU of
    :func:`iokernels.runtime.device.assume`). ``naive_bytes(shape, dtype, pass)`` are the bytes of the formula in
    separate steps, and ``naive`` says which steps. ``shapes`` are small ones on which the test counts, with the small
    tiles ``test_configs``, so that every shape takes several blocks.
    """

    model: Callable[[Shape, torch.dtype, Configs], Mapping[str, Account]]
    configs: Callable[[Shape, torch.dtype], Configs]
    naive_bytes: Callable[[Shape, torch.dtype, Literal["fwd", "bwd"]], int]
    naive: str
    shapes: tuple[tuple[Shape, torch.dtype], ...]
    test_configs: Configs
    on_chip: OnChip | None = None

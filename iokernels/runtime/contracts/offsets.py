"""Cumulative lengths of packed sequences: what may be said of their values without waiting for a device."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from iokernels.runtime.errors import UnsupportedError
from iokernels.runtime.plans import is_concrete

from . import Contract


def readable(x: Tensor) -> bool:
    """Whether reading ``x`` costs no synchronisation, and there is something to read."""
    return (
        x.is_cpu
        and not torch.compiler.is_compiling()
        and is_concrete(x)
        and torch._C._get_tracing_state() is None  # the values of an example are not those of every call
    )


def on_host(operator: str, name: str, x: Tensor) -> list[int]:
    """The values of ``x``, for an oracle that reads them on the host.

    Raises:
        UnsupportedError: ``x`` is a meta tensor.
    """
    if x.is_meta:
        raise UnsupportedError(
            f"{operator}: backend 'reference' reads {name} on the host, and a meta tensor has no values. "
            "Backends that can: torch, triton."
        )
    return x.tolist()


def check_offsets(contract: Contract, name: str, offsets: Tensor, total: int) -> list[int] | None:
    """The lengths that readable offsets ``[S + 1]`` of ``total`` packed rows stand for; None for others.

    Raises:
        ValueError: they do not start with 0, decrease, or end past the rows.
    """
    if not readable(offsets):
        return None
    values = offsets.tolist()
    lengths = [end - start for start, end in pairwise(values)]
    contract.require(values[0] == 0, f"{name} starts with {values[0]}; it must start with 0")
    contract.require(all(length >= 0 for length in lengths), f"{name} is {values}; it must not decrease")
    contract.require(values[-1] <= total, f"{name} ends with {values[-1]}, past the {total} packed rows")
    return lengths


def read_offsets(cu_seqlens: Tensor, total: int) -> list[int]:
    """The offsets as numbers. On meta, where there are none, all rows are the last sequence's: shapes are the same."""
    if cu_seqlens.is_meta:
        return [0] * (cu_seqlens.shape[0] - 1) + [total]
    return cu_seqlens.tolist()

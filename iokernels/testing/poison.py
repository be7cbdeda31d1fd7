"""Fills memory that nobody wrote with NaN, so that a kernel that forgets an element, or reads it too soon, shows it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from iokernels.runtime.scoped import Scoped

_ALLOCATORS: tuple[tuple[Any, str], ...] = (
    (torch, "empty"),
    (torch, "empty_like"),
    (torch, "empty_permuted"),
    (torch, "empty_strided"),
    (Tensor, "new_empty"),
    (Tensor, "new_empty_strided"),
)


def poison_(x: Tensor) -> Tensor:
    """Fill ``x`` in place with NaN, or the largest integer, or True, and return it."""
    if x.dtype.is_floating_point or x.dtype.is_complex:
        value: float | int | bool = float("nan")
    else:
        value = True if x.dtype == torch.bool else torch.iinfo(x.dtype).max
    with torch.no_grad():
        return x.fill_(value)


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Poison what ``torch.empty``, ``empty_like``, ``empty_strided``, ``empty_permuted``, ``Tensor.new_empty`` and
    ``Tensor.new_empty_strided`` return, in this process, until the context ends.

    Tensors without memory of their own (meta and fake tensors, those that a compiler or exporter traces) and sparse or
    quantized ones are left as they are. Allocations inside PyTorch's C++ code are not seen.
    """
    # PyTorch lists its allocators the first time a device context is used; it must list the true ones.
    with torch.device("cpu"):
        torch.empty(0)
    with _depth.set(1):
        yield


def _install(depth: int) -> None:
    for (owner, name), allocate in _TRUE.items():
        for _ in range(depth):
            allocate = _poisoning(allocate)
        setattr(owner, name, allocate)


_TRUE = {(owner, name): getattr(owner, name) for owner, name in _ALLOCATORS}
_depth = Scoped(0, combine=lambda none, given: len(given), changed=_install)


# One wrapper for each allocator in a process: TorchDynamo remembers the functions that it may put in a graph.
@functools.cache
def _poisoning(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(allocate, assigned=("__name__", "__doc__"), updated=())
    def allocate_poisoned(*args: Any, **kwargs: Any) -> Tensor:
        x = allocate(*args, **kwargs)
        if torch.compiler.is_compiling() or not _has_memory(x):
            return x
        return poison_(x)

    return allocate_poisoned


def _has_memory(x: Tensor) -> bool:
    return (
        type(x) in (Tensor, torch.nn.Parameter)
        and x.device.type != "meta"
        and x.layout == torch.strided
        and not x.is_quantized
        and not torch._is_functional_tensor(x)  # pyright: ignore[reportPrivateImportUsage]
    )

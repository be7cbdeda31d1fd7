"""Operators as ``torch.library`` entries: one schema, one implementation, one fake.

``Library.define`` + ``impl`` + ``register_fake`` is the cheapest boundary that ``torch.compile`` and
``torch.export`` can trace (a few microseconds; ``torch.library.custom_op`` costs about five times as much).
The implementation is registered for every device: it receives the name of the backend among its arguments and
imports that backend when it is first called. Gradients stay outside, in an ``autograd.Function``.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import cache
from importlib import import_module
from typing import Any

import torch

_LIBRARY = torch.library.Library("iokernels", "DEF")


def register(schema: str, *, impl: Callable[..., Any], fake: Callable[..., Any]) -> torch._ops.OpOverload:
    """Register ``iokernels::<schema>`` and return its overload, bound once for cheap calls.

    ``fake`` receives the same arguments as ``impl``, as meta tensors, and returns outputs of the same shapes,
    dtypes and strides.
    """
    name = schema.partition("(")[0]
    _LIBRARY.define(schema)
    _LIBRARY.impl(name, _outside_autocast(impl), "CompositeExplicitAutograd")
    torch.library.register_fake(f"iokernels::{name}", fake, lib=_LIBRARY)
    return getattr(torch.ops.iokernels, name).default


def _outside_autocast(impl: Callable[..., Any]) -> Callable[..., Any]:
    """``impl`` with autocast off inside: the public function has cast the inputs, and the products within an operator
    are in the precision that it says."""

    def run(*arguments: Any) -> Any:
        on = [kind for kind in ("cpu", "cuda") if torch.is_autocast_enabled(kind)]
        if not on:
            return impl(*arguments)
        with ExitStack() as off:
            for kind in on:
                off.enter_context(torch.autocast(kind, enabled=False))
            return impl(*arguments)

    return run


def lazily(package: str | None, **modules: str) -> Callable[[str], Any]:
    """A function from the name of a backend to its module in ``package``, imported when it is first asked for."""

    @cache
    def module_of(backend: str) -> Any:
        if backend == "triton":
            # Triton's interpreter computes what a GPU does only once it is mended.
            import_module("iokernels.runtime.interpreter").install()
        return import_module(modules[backend], package)

    return module_of

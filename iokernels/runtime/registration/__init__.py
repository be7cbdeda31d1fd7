"""Operators as ``torch.library`` entries: one schema, one implementation, one fake.

``Library.define`` + ``impl`` + ``register_fake`` is the cheapest boundary that ``torch.compile`` and
``torch.export`` can trace (a few microseconds; ``torch.library.custom_op`` costs about five times as much).
The implementation is registered for every device: it receives the name of the backend among its arguments and
imports that backend when it is first called. Gradients stay outside, in an ``autograd.Function``, which saves a call a
dispatch (:mod:`.differentiable`).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import cache
from importlib import import_module
from typing import Any

import torch

from iokernels.runtime.errors import UnsupportedError

from .schema import schema_of

_LIBRARY = torch.library.Library("iokernels", "DEF")


def register(
    name: str,
    inputs: str,
    results: str,
    *,
    impl: Callable[..., Any],
    fake: Callable[..., Any],
    options: type | None = None,
    gradient: Callable[..., Any] | None = None,
) -> torch._ops.OpOverload:
    """Register ``iokernels::<name>(<inputs>, <options>) -> <results>`` and return its overload, bound once for cheap
    calls.

    The fields of the NamedTuple ``options`` are the last arguments of the operator; ``impl`` and ``fake`` get them as
    one. ``fake`` receives the same arguments as ``impl``, as meta tensors, and returns outputs of the same shapes,
    dtypes and strides. ``gradient`` gets the arguments as the operator does, and is called in place of ``impl``
    wherever autograd is on: it calls an ``autograd.Function`` where an argument wants a gradient.
    """
    arguments = inputs if options is None else f"{inputs}, {schema_of(options)}"
    _LIBRARY.define(f"{name}({arguments}) -> {results}")
    overload = getattr(torch.ops.iokernels, name).default
    written = _written(overload)
    first = len(overload._schema.arguments) - len(getattr(options, "_fields", ()))
    impl = _outside_autocast(impl, options, first)
    _LIBRARY.impl(name, _telling_autograd(impl, written) if written else impl, "CompositeExplicitAutograd")
    torch.library.register_fake(f"iokernels::{name}", _packing(fake, options, first), lib=_LIBRARY)
    torch.library.register_vmap(f"iokernels::{name}", _one_by_one(overload), lib=_LIBRARY)
    if gradient is not None:
        _LIBRARY.impl(name, gradient, "Autograd")
    if written:
        _LIBRARY.impl(name, _without_negation(overload, written), "Negative")
    return overload


def _written(overload: torch._ops.OpOverload) -> list[int]:
    """The places of the arguments that the operator writes."""
    infos = [argument.alias_info for argument in overload._schema.arguments]
    return [place for place, info in enumerate(infos) if info is not None and info.is_write]


def _telling_autograd(impl: Callable[..., Any], written: list[int]) -> Callable[..., Any]:
    """``impl``, after which autograd knows that arguments were written: a kernel's stores do not tell it, and a graph
    that has saved one of them would go backward with what it has become. 0.4 us for each."""

    def run(*arguments: Any) -> Any:
        results = impl(*arguments)
        for place in written:
            x = arguments[place]
            if isinstance(x, torch.Tensor) and not x.is_inference():
                torch.autograd.graph.increment_version(x)
        return results

    return run


def _without_negation(overload: torch._ops.OpOverload, written: list[int]) -> Callable[..., Any]:
    """Resolve views that carry a negation bit, as the dispatcher does for operators that write nothing; a negated view
    cannot be written through."""

    def run(*arguments: Any) -> Any:
        for place in written:
            if isinstance(arguments[place], torch.Tensor) and arguments[place].is_neg():
                name = overload._schema.arguments[place].name
                raise ValueError(
                    f"{overload.name()}: {name} is a negated view, which cannot be written; pass {name}.resolve_neg()"
                )
        return overload(*(x.resolve_neg() if isinstance(x, torch.Tensor) else x for x in arguments))

    return run


def _one_by_one(overload: torch._ops.OpOverload) -> Callable[..., Any]:
    """What ``torch.func.vmap`` does with the operator: one call for each slice of the mapped dimension."""
    written = _written(overload)

    def slice_of(argument: Any, dim: Any, index: int) -> Any:
        if isinstance(argument, (list, tuple)):
            return [slice_of(x, d, index) for x, d in zip(argument, dim, strict=True)] if dim is not None else argument
        return argument if dim is None else argument.select(dim, index)

    def rule(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> Any:
        for i in written:
            if isinstance(arguments[i], torch.Tensor) and in_dims[i] is None:
                raise UnsupportedError(
                    f"{overload.name()}: {overload._schema.arguments[i].name} is written and is one for all slices of "
                    "torch.func.vmap; map it too"
                )
        if info.batch_size == 0:
            raise UnsupportedError(f"{overload.name()}: torch.func.vmap maps over a dimension of size 0")
        results = [
            overload(*(slice_of(x, dim, index) for x, dim in zip(arguments, in_dims, strict=True)))
            for index in range(info.batch_size)
        ]
        if results[0] is None:
            return None, None
        if isinstance(results[0], torch.Tensor):
            return torch.stack(results), 0
        return tuple(map(torch.stack, zip(*results, strict=True))), (0,) * len(results[0])

    return rule


def _packing(call: Callable[..., Any], options: Any, first: int) -> Callable[..., Any]:
    """``call``, which gets the arguments from the place ``first`` on as one NamedTuple ``options``."""
    if options is None:
        return call
    # The constructor of a NamedTuple would name each field again: 0.3 us. The schema has counted them.
    new = tuple.__new__
    return lambda *arguments: call(*arguments[:first], new(options, arguments[first:]))


def _outside_autocast(impl: Callable[..., Any], options: Any, first: int) -> Callable[..., Any]:
    """``impl`` of packed options with autocast off inside: the public function has cast the inputs, and the products
    within an operator are in the precision that it says."""
    enabled, new, packed = torch.is_autocast_enabled, tuple.__new__, _packing(impl, options, first)

    def run(*arguments: Any) -> Any:
        if not enabled("cpu") and not enabled("cuda"):
            # As ``packed`` does; a call between would cost each operator 0.1 us.
            return impl(*arguments) if options is None else impl(*arguments[:first], new(options, arguments[first:]))
        with ExitStack() as off:
            for kind in ("cpu", "cuda"):
                if enabled(kind):
                    off.enter_context(torch.autocast(kind, enabled=False))
            return packed(*arguments)

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

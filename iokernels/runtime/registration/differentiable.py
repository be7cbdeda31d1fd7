"""An operator with gradients: a forward and a backward ``torch.library`` entry, an ``autograd.Function`` outside, and a
third entry that an exported graph holds in place of all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType, SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import register
from .once import differentiable_once
from .schema import tensor_fields


class Operators(NamedTuple):
    """What :func:`differentiable` registers."""

    forward: torch._ops.OpOverload
    backward: torch._ops.OpOverload
    exported: torch._ops.OpOverload
    run: Callable[..., Any]
    """Takes the arguments of ``exported`` and is differentiable where an input wants a gradient."""


def differentiable(
    name: str,
    inputs: str,
    results: str,
    *,
    gradients: str,
    saved: str,
    options: Any,
    needs: Any,
    forward: Callable[..., Any],
    fake: Callable[..., Any],
    backward: Callable[..., Any],
    empty: Mapping[str, Callable[[Any], Tensor]] = MappingProxyType({}),
    like: str = "out",
    distinct: tuple[str, ...] = (),
    outside: str | None = None,
    prepare: Callable[..., tuple[Any, ...]] | None = None,
    keep: Callable[..., tuple[Tensor | None, ...]] | None = None,
) -> Operators:
    """Register three operators and return them with the function that calls them:

        <name>_fwd(<inputs>, str backend, <options>) -> (<results>)
        <name>_bwd(<gradients>, <saved>, bool[] needs, str backend, <options>) -> (Tensor d<field of needs>, ...)
        <name>(<outside>, str backend, <options>) -> (as many of the results, from the first, as have gradients)

    What can have a gradient is named by the NamedTuple ``needs``: the first inputs, then the first fields of the
    NamedTuple ``options``, whose tensors stand before its numbers.

    ``forward(*inputs, backend, options)`` and ``fake`` return the results; ``backward(*gradients, *saved, needs,
    backend, options)`` returns a gradient or None for each field of ``needs``. ``empty[field]`` makes it uninitialised
    from all arguments by name; without, it is contiguous.

    ``saved`` names inputs and results, a list of tensors as the last. Where the first gradient is missing and not
    optional, it is zeros of the shape of ``like``, one of these. ``distinct`` names arguments that may be one tensor
    with another, which Dynamo refuses: it gets views.

    Where the inputs of ``<name>`` are others, ``outside``, ``prepare(differentiated, *arguments)`` makes those of
    ``<name>_fwd`` of them. ``keep(needs, options, *inputs without a gradient, *saved)`` replaces by None what this
    backward pass will not read.
    """
    outer, held = _names(outside or inputs), _names(saved)
    single, visible, listed = "," not in results, len(_names(gradients)), "[]" in saved
    whole = single or visible == len(_names(results))
    known = _names(inputs) if single else _names(f"{inputs}, {results}")
    picks = tuple(known.index(field) for field in held)
    zeros = None if gradients.startswith("Tensor?") else held.index(like)
    everything, width = held == known, len(held) - listed

    # Places among the arguments of ``<name>``: of the first option, of the first that has no gradient, of the numbers.
    order = (*outer, "backend", *options._fields)
    leaves = sum(field in outer for field in needs._fields)
    start = len(outer) + 1
    rest = start + len(needs._fields) - leaves
    numbers = start + len(tensor_fields(options))
    places = (*range(leaves), *range(start, rest))
    wanting = len(places)
    if needs._fields != tuple(order[place] for place in places) or order[start:numbers] != tensor_fields(options):
        raise TypeError(f"{name}: what has a gradient stands first, and tensors before numbers")
    twice = tuple(order.index(field) for field in distinct)
    constants = (None,) * (start - leaves + 1)

    def gradients_of(*arguments: Any) -> tuple[Tensor, ...]:
        *given, wanted, backend, opts = arguments
        found = backward(*given, needs(*wanted), backend, opts)
        # An operator returns tensors only: an empty one stands for a gradient that nobody needs.
        some = _first_tensor(given[visible:])
        return tuple(x if need and x is not None else some.new_empty(0) for x, need in zip(found, wanted, strict=True))

    def fake_gradients(*arguments: Any) -> tuple[Tensor, ...]:
        *given, wanted, _, opts = arguments
        of = SimpleNamespace(**opts._asdict(), **dict(zip(held, given[visible:], strict=True)))
        some = _first_tensor(given[visible:])

        def gradient(field: str, need: bool) -> Tensor:
            if need and field in empty:
                return empty[field](of)
            x = getattr(of, field)
            return x.new_empty(x.shape) if need and x is not None else some.new_empty(0)

        return tuple(map(gradient, needs._fields, wanted))

    arrow = results if single else f"({results})"
    forward_op = register(f"{name}_fwd", f"{inputs}, str backend", arrow, impl=forward, fake=fake, options=options)
    backward_op = register(
        f"{name}_bwd",
        f"{gradients}, {saved}, bool[] needs, str backend",
        f"({', '.join(f'Tensor d{field}' for field in needs._fields)})",
        impl=gradients_of,
        fake=fake_gradients,
        options=options,
    )

    def function_forward(ctx: Any, *given: Any) -> Any:
        # What has gradients is first, for autograd; the options without are one, because each costs half a microsecond.
        arguments = (*given[:leaves], *given[wanting:-1], *given[leaves:wanting], *given[-1])
        passed = arguments if prepare is None else prepare(True, *arguments)
        made = forward_op(*passed)
        values = passed if single else (*passed[: len(known) - len(made)], *made)
        kept: Any = values if everything else [values[place] for place in picks]
        if keep is not None:
            wanted = needs(*ctx.needs_input_grad[:wanting])
            kept = keep(wanted, options(*arguments[start:]), *arguments[leaves : start - 1], *kept)
        if listed:
            ctx.save_for_backward(*kept[:width], *arguments[start:numbers], *kept[width])
        else:
            ctx.save_for_backward(*kept, *arguments[start:numbers])
        ctx.backend, ctx.numbers = arguments[start - 1], arguments[numbers:]
        ctx.set_materialize_grads(False)  # they stay None in the common case that nobody uses a second result
        return made if whole else made[:visible]

    @differentiable_once(name)
    def function_backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        kept = list(ctx.saved_tensors)
        tensors, lists = kept[width : width + numbers - start], kept[width + numbers - start :]
        kept = [*kept[:width], lists] if listed else kept[:width]
        wanted = list(ctx.needs_input_grad[:wanting])
        if zeros is None:
            if all(x is None for x in grads):
                return (*(None for _ in wanted), *constants)
        elif grads[0] is None:
            grads = (torch.zeros_like(kept[zeros]), *grads[1:])
        found = backward_op(*grads, *kept, wanted, ctx.backend, *tensors, *ctx.numbers)
        return (*(x if need else None for x, need in zip(found, wanted, strict=True)), *constants)

    function = type(torch.autograd.Function)(
        "_" + "".join(map(str.capitalize, name.split("_"))),
        (torch.autograd.Function,),
        {"forward": staticmethod(function_forward), "backward": staticmethod(function_backward)},
    )

    def differentiated(arguments: tuple[Any, ...]) -> Any:
        if twice and torch.compiler.is_compiling():
            arguments = tuple(
                x.view_as(x) if place in twice and x is not None else x for place, x in enumerate(arguments)
            )
        return function.apply(*arguments[:leaves], *arguments[start:rest], *arguments[leaves:start], arguments[rest:])

    def call(*arguments: Any) -> Any:
        if torch.is_grad_enabled():
            for place in places:
                x = arguments[place]
                if x is not None and x.requires_grad:
                    return differentiated(arguments)
        made = forward_op(*(arguments if prepare is None else prepare(False, *arguments)))
        return made if whole else made[:visible]

    def shown(compute: Callable[..., Any]) -> Callable[..., Any]:
        if whole and prepare is None:
            return compute
        return lambda *given: compute(*(given if prepare is None else prepare(False, *given)))[:visible]

    exported_op = register(
        name,
        f"{outside or inputs}, str backend",
        results if single else f"({', '.join(results.split(', ')[:visible])})",
        impl=shown(forward),
        fake=shown(fake),
        options=options,
        gradient=call,
    )

    def run(*arguments: Any) -> Any:
        return exported_op(*arguments) if torch.compiler.is_exporting() else call(*arguments)

    return Operators(forward_op, backward_op, exported_op, run)


def _names(arguments: str) -> tuple[str, ...]:
    return tuple(argument.split()[-1] for argument in arguments.split(", "))


def _first_tensor(values: Any) -> Tensor:
    return next(x for x in values if isinstance(x, Tensor))

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
    """Takes the arguments of ``exported``, options as one, and is differentiable where an input wants a gradient."""


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

    Where the inputs of ``<name>`` are others, ``outside``, those of ``<name>_fwd`` are the ones with gradients and at
    most one more, which tells whether the call is differentiated. ``keep(wanted, options, *inputs without a gradient,
    *saved)`` replaces by None what this backward pass will not read.
    """
    outer, held = _names(outside or inputs), _names(saved)
    single, visible, listed = "," not in results, len(_names(gradients)), "[]" in saved
    whole = single or visible == len(_names(results))
    known = _names(inputs) if single else _names(f"{inputs}, {results}")
    picks = tuple(known.index(field) for field in held)
    zeros = None if gradients.startswith("Tensor?") else held.index(like)
    everything, width = held == known, len(held) - listed

    order = (*outer, "backend", *options._fields)
    leaves, count = sum(field in outer for field in needs._fields), len(needs._fields)
    ours = count - leaves  # of the options
    if needs._fields != (*outer[:leaves], *options._fields[:ours]):
        raise TypeError(f"{name}: what has a gradient stands first")
    tensors = len(tensor_fields(options))
    if tensor_fields(options) != options._fields[:tensors]:
        raise TypeError(f"{name}: tensors stand before numbers")
    twice = tuple(order.index(field) for field in distinct)
    constants = (None,) * (len(outer) - leaves + 2)
    plain, told = ((x,) * (len(_names(inputs)) - leaves) for x in (False, True))

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
        # What has gradients is first, for autograd, and stands again in the options, which are one argument: each costs
        # half a microsecond.
        backend, opts = given[-2:]
        others, own = given[count:-2], given[leaves:count]
        passed = (*given[:leaves], *(others if outside is None else told), backend, *own, *opts[ours:])
        made = forward_op(*passed)
        values = passed if single else (*passed[: len(known) - len(made)], *made)
        kept: Any = values if everything else [values[place] for place in picks]
        if keep is not None:
            kept = keep(ctx.needs_input_grad, opts, *others, *kept)
        if listed:
            ctx.save_for_backward(*kept[:width], *own, *opts[ours:tensors], *kept[width])
        else:
            ctx.save_for_backward(*kept, *own, *opts[ours:tensors])
        ctx.backend, ctx.numbers = backend, opts[tensors:]
        ctx.set_materialize_grads(False)  # they stay None in the common case that nobody uses a second result
        return made if whole else made[:visible]

    @differentiable_once(name)
    def function_backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        saved = ctx.saved_tensors
        kept, wanted = saved[:width], list(ctx.needs_input_grad[:count])
        if zeros is None:
            if all(x is None for x in grads):
                return ((None,) * count) + constants
        elif grads[0] is None:
            grads = (torch.zeros_like(kept[zeros]), *grads[1:])
        if listed:
            kept = (*kept, list(saved[width + tensors :]))
        found = backward_op(*grads, *kept, wanted, ctx.backend, *saved[width : width + tensors], *ctx.numbers)
        return (*(x if need else None for x, need in zip(found, wanted, strict=True)), *constants)

    kind: Any = type(torch.autograd.Function)
    function = kind(
        "_" + "".join(map(str.capitalize, name.split("_"))),
        (torch.autograd.Function,),
        {"forward": staticmethod(function_forward), "backward": staticmethod(function_backward)},
    )

    def views(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        at = len(arguments) - 1
        flat = tuple(
            x.view_as(x) if place in twice and x is not None else x
            for place, x in enumerate((*arguments[:at], *arguments[at]))
        )
        return *flat[:at], options(*flat[at:])

    def run(*arguments: Any, exported: bool = False) -> Any:
        if not exported and torch.compiler.is_exporting():
            return exported_op(*arguments[:-1], *arguments[-1])
        opts = arguments[-1]
        if torch.is_grad_enabled():
            for x in (*arguments[:leaves], *opts[:ours]):
                if x is not None and x.requires_grad:
                    if twice and torch.compiler.is_compiling():
                        arguments = views(arguments)
                        opts = arguments[-1]
                    return function.apply(*arguments[:leaves], *opts[:ours], *arguments[leaves:-1], opts)
        if outside is None:
            made = forward_op(*arguments[:-1], *opts)
        else:
            made = forward_op(*arguments[:leaves], *plain, arguments[-2], *opts)
        return made if whole else made[:visible]

    def shown(compute: Callable[..., Any]) -> Callable[..., Any]:
        if outside is None:
            return compute if whole else lambda *given: compute(*given)[:visible]
        return lambda *given: compute(*given[:leaves], *plain, *given[-2:])[:visible]

    exported_op = register(
        name,
        f"{outside or inputs}, str backend",
        results if single else f"({', '.join(results.split(', ')[:visible])})",
        impl=shown(forward),
        fake=shown(fake),
        options=options,
        gradient=lambda *flat: run(*flat[: len(outer) + 1], options(*flat[len(outer) + 1 :]), exported=True),
    )

    return Operators(forward_op, backward_op, exported_op, run)


def _names(arguments: str) -> tuple[str, ...]:
    return tuple(argument.split()[-1] for argument in arguments.split(", "))


def _first_tensor(values: Any) -> Tensor:
    return next(x for x in values if isinstance(x, Tensor))

"""Calls with one wrong argument. They may give the right result or a named error, and nothing else."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from iokernels.testing.layouts import storage_of

from .case import Case, Refused, Wrong, outcome_is_named, prove, short
from .draw import Draw


def prove_wrong_call(case: Case, d: Draw) -> None:
    """Change one argument of a right call into a wrong one, and hold the library to an error that names it.

    Raises:
        Wrong: another error, or a result where the formula has none or another one.
    """
    name = d.pick([n for n in case.args if n not in ("return_lse", "backend", *case.sound)])
    value = case.args[name]
    twins = [n for n in case.writes if n != name and name in case.writes and case.args[n].shape == value.shape]
    if twins and d.chance(0.2):
        bad = case.args[twins[0]]  # two names for one tensor that is written to
    elif name in case.writes and d.chance(0.4) and max(value.shape, default=0) > 1:
        bad = _expanded(d, value)
    else:
        bad = _bad_tensor(d, value) if isinstance(value, Tensor) else _bad_value(d, value)
    case.args[name] = bad
    case.notes[name] = f"{_shown(bad)}, wrong"
    case.gradients = ()
    before = {n: storage_of(x) for n, x in case.args.items() if isinstance(x, Tensor) and _plain(x)}
    try:
        with torch.no_grad():
            case.run(dict(case.args))
    except Exception as error:
        if not outcome_is_named(error, set(case.args)):
            raise Wrong(f"an error that names no argument, {short(error)}") from error
        changed = [n for n, x in before.items() if not torch.equal(storage_of(case.args[n]), x)]
        if changed:
            raise Wrong(f"a refused call changed {changed[0]}") from error
        return
    # Accepted: then it has to be right, in whatever dtype that is.
    if isinstance(bad, Tensor) and isinstance(value, Tensor) and bad.dtype != value.dtype:
        case.dtypes = {}
    try:
        prove(case, d.generator, twice=False)
    except (Wrong, Refused):
        raise
    except Exception as error:
        raise Wrong(f"{name} is accepted, and the formula has no result for it ({short(error)})") from error


def _plain(x: Tensor) -> bool:
    return x.layout == torch.strided and not x.is_meta


def _bad_tensor(d: Draw, x: Tensor) -> Any:
    if x.dtype == torch.int32 and x.numel() and d.chance(0.5):
        out_of_range = x.clone()
        at = tuple(d.random.randrange(size) for size in x.shape)
        out_of_range[at] = d.pick((-1, -2, 5, 64, 1000, 10**8, 2**28, 2**31 - 1, -(2**31)))
        return out_of_range
    kind = d.pick(("shape", "shape", "shape", "shape", "dtype", "None", "list", "word", "meta", "sparse"))
    if kind == "shape":
        return _of_another_shape(d, x)
    if kind == "dtype":
        of = [torch.int64, torch.complex64, torch.bool, torch.uint8]
        of += [torch.float32] if x.is_floating_point() and x.dtype != torch.float32 else [torch.float64]
        return x.to(d.pick(of))
    if kind == "sparse" and x.dim() and x.is_floating_point() and x.itemsize > 1:
        return x.to_sparse()
    return {"list": x.tolist(), "word": "q", "meta": x.to("meta")}.get(kind)


def _expanded(d: Draw, x: Tensor) -> Tensor:
    """x with several elements at one address, where nothing can be written."""
    dim = d.pick([dim for dim, size in enumerate(x.shape) if size > 1])
    return x.narrow(dim, 0, 1).clone().expand_as(x)


def _of_another_shape(d: Draw, x: Tensor) -> Tensor:
    """One entry more or less along a dimension, or a dimension more or less."""
    kind = d.pick(("longer", "longer", "shorter", "fewer", "more")) if x.dim() else "more"
    if kind == "more":
        return x[None]
    if kind == "fewer":
        return x.select(0, 0) if x.shape[0] else x.new_zeros(x.shape[1:])
    dim = d.random.randrange(x.dim())
    if kind == "shorter" and x.shape[dim]:
        return x.narrow(dim, 0, x.shape[dim] - 1)
    again = x.narrow(dim, 0, 1) if x.shape[dim] else x.new_zeros([1 if i == dim else n for i, n in enumerate(x.shape)])
    return torch.cat([x, again], dim)


def _bad_value(d: Draw, value: Any) -> Any:
    return d.pick(
        (-1, -7, 2**31, 2**63, 10**400, 1.5, float("nan"), float("inf"), "abc", None, True, (1,), (1, 2, 3), [], {},
         (2**63, 0), (True, False), torch.tensor(1.0), object, b"x", 1j)
    )  # fmt: skip


def _shown(x: Any) -> str:
    if isinstance(x, Tensor):
        values = f" {x.tolist()}" if x.dtype == torch.int32 and x.is_cpu and x.numel() <= 40 else ""
        return f"{x.dtype} {list(x.shape)} on {x.device}, {x.layout}{values}"
    text = repr(x)
    return text if len(text) < 60 else f"{text[:50]}..."

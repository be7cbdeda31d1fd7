"""Calls with one wrong argument. They may give the right result or a named error, and nothing else."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .case import Case, Wrong, outcome_is_named, prove, short
from .draw import Draw
from .layouts import storage_of


def prove_wrong_call(case: Case, d: Draw) -> None:
    """Change one argument of a right call into a wrong one, and hold the library to an error that names it.

    Raises:
        Wrong: another error, or a result where the formula has none or another one.
    """
    name = d.pick([n for n in case.args if n not in ("return_lse", "backend")])
    value = case.args[name]
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
    # Accepted: then it has to be right.
    try:
        prove(case, d.generator, twice=False)
    except Wrong:
        raise
    except Exception as error:
        raise Wrong(f"{name} is accepted, and the formula has no result for it ({short(error)})") from error


def _plain(x: Tensor) -> bool:
    return x.layout == torch.strided and not x.is_meta


def _bad_tensor(d: Draw, x: Tensor) -> Any:
    kind = d.pick(
        ("longer", "longer", "shorter", "fewer dims", "more dims", "dtype", "None", "list", "word", "meta", "sparse")
    )
    if kind in ("longer", "shorter") and x.dim():
        dim = d.random.randrange(x.dim())
        if kind == "longer":
            return torch.cat([x, x.narrow(dim, 0, 1) if x.shape[dim] else x.new_zeros(
                [1 if i == dim else size for i, size in enumerate(x.shape)])], dim)  # fmt: skip
        return x.narrow(dim, 0, x.shape[dim] - 1) if x.shape[dim] else x
    if kind == "fewer dims":
        return x.select(0, 0) if x.dim() and x.shape[0] else x.sum()
    if kind == "more dims":
        return x[None]
    if kind == "dtype":
        of = [torch.int64, torch.complex64, torch.bool, torch.uint8]
        of += [torch.float32] if x.is_floating_point() and x.dtype != torch.float32 else [torch.float64]
        return x.to(d.pick(of))
    if kind == "list":
        return x.tolist()
    if kind == "word":
        return "q"
    if kind == "meta":
        return x.to("meta")
    if kind == "sparse" and x.dim() and x.is_floating_point():
        return x.to_sparse()
    return None


def _bad_value(d: Draw, value: Any) -> Any:
    return d.pick(
        (-1, -7, 2**31, 2**63, 10**400, 1.5, float("nan"), float("inf"), "abc", None, True, (1,), (1, 2, 3), [], {},
         (2**63, 0), (True, False), torch.tensor(1.0), object, b"x", 1j)
    )  # fmt: skip


def _shown(x: Any) -> str:
    if isinstance(x, Tensor):
        return f"{x.dtype} {list(x.shape)} on {x.device}, {x.layout}"
    text = repr(x)
    return text if len(text) < 60 else f"{text[:50]}..."

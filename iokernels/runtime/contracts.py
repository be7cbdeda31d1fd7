"""Argument checks, written as data.

A room states once what its tensors look like::

    CONTRACT = Contract(
        "flash_attention",
        q=Spec("B Hq Nq D", FLOATS),
        k=Spec("B Hkv Nk D", same_dtype_as="q"),
        mask=Spec("B|1 Hq|1 Nq|1 Nk|1", (torch.bool,), optional=True),
    )
    sizes = CONTRACT.check(q=q, k=k, mask=mask)   # {"B": 2, "Hq": 8, ...}

The first argument that names a dimension sets its size and the others must agree; ``X|1`` also takes 1, to be
broadcast; ``X+1`` is one more than X, ``*`` any size. An optional argument that is None is skipped. Every message
names the argument, what it got and what it takes. The code below runs under ``torch.compile`` with symbolic sizes too.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class Spec(NamedTuple):
    """One tensor argument: its dimensions, and the dtypes that it may have (empty: any)."""

    shape: str
    dtypes: tuple[torch.dtype, ...] = ()
    same_dtype_as: str | None = None
    optional: bool = False


def short(dtype: torch.dtype) -> str:
    """``float16`` for ``torch.float16``."""
    return str(dtype).removeprefix("torch.")


class Contract:
    """The tensor arguments of one public function. All must be on the device of the first."""

    def __init__(self, operator: str, **specs: Spec) -> None:
        self.operator = operator
        self.specs = specs
        self._dims = {name: tuple(spec.shape.split()) for name, spec in specs.items()}

    def check(self, known: dict[str, Any] | None = None, **tensors: torch.Tensor | None) -> dict[str, Any]:
        """Return the size of every named dimension; raise ``TypeError`` or ``ValueError`` at the first disagreement.

        ``known`` holds sizes that come from arguments that are not tensors.
        """
        sizes: dict[str, Any] = dict(known or {})
        set_by: dict[str, str] = dict.fromkeys(sizes, "the arguments")
        first: torch.Tensor | None = None
        first_name = ""
        for name, tensor in tensors.items():
            if tensor is None and self.specs[name].optional:
                continue
            if not isinstance(tensor, torch.Tensor):
                got = "None" if tensor is None else type(tensor).__name__
                raise TypeError(f"{self.operator}: {name} is {got}; it must be a torch.Tensor")
            if first is None:
                first, first_name = tensor, name
            elif tensor.device != first.device:
                raise ValueError(
                    f"{self.operator}: {name} is on {tensor.device}; it must be on {first.device}, as {first_name} is"
                )
            self._check_dtype(name, tensor, tensors)
            self._check_shape(name, tensor, sizes, set_by)
        return sizes

    def _check_dtype(self, name: str, tensor: torch.Tensor, tensors: dict[str, torch.Tensor | None]) -> None:
        spec = self.specs[name]
        twin = tensors.get(spec.same_dtype_as) if spec.same_dtype_as else None
        if twin is not None and tensor.dtype != twin.dtype:
            raise TypeError(
                f"{self.operator}: {name} is {short(tensor.dtype)}; it must be {short(twin.dtype)}, "
                f"as {spec.same_dtype_as} is"
            )
        if spec.dtypes and tensor.dtype not in spec.dtypes:
            allowed = " or ".join(short(dtype) for dtype in spec.dtypes)
            raise TypeError(f"{self.operator}: {name} is {short(tensor.dtype)}; it must be {allowed}")

    def _check_shape(self, name: str, tensor: torch.Tensor, sizes: dict[str, Any], set_by: dict[str, str]) -> None:
        dims = self._dims[name]
        if tensor.dim() != len(dims):
            raise ValueError(
                f"{self.operator}: {name} has {tensor.dim()} dimensions, shape {list(tensor.shape)}; "
                f"it must have {len(dims)}: [{', '.join(dims)}]"
            )
        for axis, dim in enumerate(dims):
            size = tensor.shape[axis]
            if dim == "*":
                continue
            if dim.endswith("|1"):
                if size == 1:
                    continue
                dim = dim[:-2]
            plus = 0
            if dim.endswith("+1"):
                dim, plus = dim[:-2], 1
            if dim not in sizes:
                sizes[dim] = size - plus
                set_by[dim] = name
            elif size != sizes[dim] + plus:
                raise ValueError(
                    f"{self.operator}: {name} has shape {list(tensor.shape)}; its dimension {axis} ({dims[axis]}) "
                    f"must be {sizes[dim] + plus}, from the {dim} of {set_by[dim]}"
                )

    def require(self, condition: Any, message: str) -> None:
        """Raise ``ValueError`` with this operator's name before ``message`` unless ``condition`` holds."""
        if not condition:
            raise ValueError(f"{self.operator}: {message}")

    def window(self, window: Any) -> tuple[int, int]:
        """The ``(left, right)`` of an attention window, -1 where it is unbounded; None is unbounded on both sides."""
        if window is None:
            return -1, -1
        ok = isinstance(window, (tuple, list)) and len(window) == 2
        if not ok or not all(isinstance(side, int) and not isinstance(side, bool) for side in window):
            raise TypeError(f"{self.operator}: window is {window!r}; it must be None or two ints, (left, right)")
        left, right = window
        self.require(
            left >= -1 and right >= -1, f"window is {tuple(window)}; each side must be at least 0, or -1 for unbounded"
        )
        return left, right

    def number(self, name: str, value: Any, *, above: float | None = None, least: float | None = None,
               below: float | None = None) -> Any:  # fmt: skip
        """Return ``value`` as a finite float (a traced one stays symbolic) within the bounds, or raise."""
        if isinstance(value, bool) or not isinstance(value, (int, float, torch.SymInt, torch.SymFloat)):
            raise TypeError(f"{self.operator}: {name} is {type(value).__name__}; it must be a number")
        bounds = [
            (above is None or value > above, f"above {above}"),
            (least is None or value >= least, f"at least {least}"),
            (below is None or value < below, f"below {below}"),
        ]
        # A comparison, not math.isfinite, which torch.compile cannot trace on a number that it made dynamic.
        finite = -math.inf < value < math.inf
        if not finite or not all(ok for ok, _ in bounds):
            asked = [text for (_, text), bound in zip(bounds, (above, least, below), strict=True) if bound is not None]
            raise ValueError(
                f"{self.operator}: {name} is {value}; it must be finite" + "".join(f", {a}" for a in asked)
            )
        return float(value) if isinstance(value, int) else value

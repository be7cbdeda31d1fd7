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

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from numbers import Integral, Real
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


def shown(value: Any) -> str:
    """``repr(value)``, but short: Python refuses to write an integer of many digits."""
    if isinstance(value, int) and value.bit_length() > 200:
        return f"an integer of {value.bit_length()} bits"
    if isinstance(value, tuple) and any(isinstance(x, int) and x.bit_length() > 200 for x in value):
        return f"({', '.join(map(shown, value))})"
    return repr(value)


@contextmanager
def untraced() -> Iterator[None]:
    """Inside, ``torch.jit.trace`` records nothing, and sizes are ints: while it traces they are tensors."""
    state = torch._C._get_tracing_state()
    torch._C._set_tracing_state(None)  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield
    finally:
        torch._C._set_tracing_state(state)  # pyright: ignore[reportAttributeAccessIssue]


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
        if torch._C._get_tracing_state() is not None:
            with untraced():
                return self.check(known, **tensors)
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
            self._check_layout(name, tensor)
            self._check_dtype(name, tensor, tensors)
            self._check_shape(name, tensor, sizes, set_by)
        return sizes

    def _check_layout(self, name: str, tensor: torch.Tensor) -> None:
        """Refuse what has no strides: its elements lie elsewhere than where a kernel looks."""
        if tensor.is_nested:
            raise TypeError(
                f"{self.operator}: {name} is a nested tensor; it must be a dense one: pad it "
                "(torch.nested.to_padded_tensor), or pack it where the operator takes cumulative lengths"
            )
        if tensor.layout != torch.strided:
            kind = str(tensor.layout).removeprefix("torch.").removeprefix("_")
            raise TypeError(f"{self.operator}: {name} has layout {kind}; it must be dense: pass {name}.to_dense()")
        if tensor.is_quantized:
            raise TypeError(f"{self.operator}: {name} is quantised, {short(tensor.dtype)}; pass {name}.dequantize()")

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
            hint = f": pass {name}.int()" if tensor.dtype == torch.int64 and spec.dtypes == (torch.int32,) else ""
            raise TypeError(f"{self.operator}: {name} is {short(tensor.dtype)}; it must be {allowed}{hint}")

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
        if not ok or not all(_is_integer(side) for side in window):
            raise TypeError(f"{self.operator}: window is {shown(window)}; it must be None or two ints, (left, right)")
        left, right = (side if isinstance(side, torch.SymInt) else int(side) for side in window)
        # Not require(): torch.compile would have to trace the messages.
        if left < -1 or right < -1:
            raise ValueError(
                f"{self.operator}: window is {shown(tuple(window))}; each side must be at least 0, or -1 for unbounded"
            )
        if left >= _INT64 or right >= _INT64:
            raise ValueError(
                f"{self.operator}: window is {shown(tuple(window))}; each side must be below 2^63: -1 is unbounded"
            )
        # No sequence is as long as the widest windows, and kernels add sides to positions.
        left, right = (-1 if isinstance(side, int) and side >= 2**31 - 1 else side for side in (left, right))
        return left, right  # pyright: ignore[reportReturnType]

    def number(self, name: str, value: Any, *, above: float | None = None, least: float | None = None,
               below: float | None = None) -> Any:  # fmt: skip
        """Return ``value`` as a finite float (a traced one stays symbolic) within the bounds, or raise."""
        value = untraced_value(value)
        if isinstance(value, (bool, torch.SymBool)) or not isinstance(value, (int, float, *_REAL)):
            hint = ": pass 0.0 to turn it off" if value is None and least == 0.0 else ""
            raise TypeError(f"{self.operator}: {name} is {type(value).__name__}; it must be a number{hint}")
        if isinstance(value, Real):
            value = int(value) if isinstance(value, Integral) else float(value)  # NumPy compares in its own precision
        bounds = [
            (above is None or value > above, f"above {above}"),
            (least is None or value >= least, f"at least {least}"),
            (below is None or value < below, f"below {below}"),
        ]
        # A comparison, not math.isfinite, which torch.compile cannot trace on a number that it made dynamic.
        finite = -sys.float_info.max <= value <= sys.float_info.max
        if not finite or not all(ok for ok, _ in bounds):
            asked = [text for (_, text), bound in zip(bounds, (above, least, below), strict=True) if bound is not None]
            raise ValueError(
                f"{self.operator}: {name} is {shown(value)}; it must be finite" + "".join(f", {a}" for a in asked)
            )
        return value if isinstance(value, (torch.SymInt, torch.SymFloat)) else float(value)

    def integer(self, name: str, value: Any, *, least: int | None = None, most: int | None = None) -> Any:
        """Return ``value`` as an int of 64 bits (a traced one stays symbolic) within the bounds, or raise."""
        value = untraced_value(value)
        if not _is_integer(value):
            raise TypeError(f"{self.operator}: {name} is {type(value).__name__}; it must be an int")
        if not isinstance(value, torch.SymInt):
            value = int(value)
        low, high = -_INT64 if least is None else least, _INT64 - 1 if most is None else most
        # Not require(): torch.compile cannot format a symbol, and would have to for the message.
        if not low <= value <= high:
            asked = f"at least {least}" if least is not None and most is None else f"{low} to {high}"
            raise ValueError(f"{self.operator}: {name} is {shown(value)}; it must be {asked}")
        return value

    def flag(self, name: str, value: Any, *, optional: bool = False) -> Any:
        """Return ``value`` as a bool (None where it is ``optional`` and None), or raise."""
        if isinstance(value, bool) or (optional and value is None):
            return value
        if type(value).__module__ == "numpy" and type(value).__name__ in ("bool", "bool_"):
            return bool(value)
        raise TypeError(
            f"{self.operator}: {name} is {type(value).__name__}; it must be a bool" + (" or None" if optional else "")
        )


_INT64 = 2**63
_REAL = (Real, torch.SymInt, torch.SymFloat)


def _is_integer(value: Any) -> bool:
    """Python's integers, NumPy's and traced ones; no bool, though Python counts it among them."""
    return isinstance(value, (int, torch.SymInt, Integral)) and not isinstance(value, (bool, torch.SymBool))


def untraced_value(value: Any) -> Any:
    """The number behind what ``torch.jit.trace`` made of one: it turns sizes, and what is computed of them, into
    tensors."""
    if isinstance(value, torch.Tensor) and torch._C._get_tracing_state() is not None and value.dim() == 0:
        with untraced():
            return value.item()
    return value

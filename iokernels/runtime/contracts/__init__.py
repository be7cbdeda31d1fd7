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

from typing import Any, NamedTuple

import torch

from . import plain
from .plain import integral, shown, untraced

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
        pair = isinstance(window, (tuple, list)) and len(window) == 2
        sides: tuple[Any, ...] = tuple(map(integral, window)) if pair else (None, None)
        if any(side is None for side in sides):
            raise TypeError(f"{self.operator}: window is {shown(window)}; it must be None or two ints, (left, right)")
        left, right = sides
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
        """Return ``value`` as a finite float within the bounds, or raise; see :func:`.plain.number`."""
        return plain.number(self.operator, name, value, above=above, least=least, below=below)

    def integer(self, name: str, value: Any, *, least: int | None = None, most: int | None = None) -> Any:
        """Return ``value`` as an int of 64 bits within the bounds, or raise; see :func:`.plain.whole`."""
        value = plain.whole(self.operator, name, value)
        low, high = -_INT64 if least is None else least, _INT64 - 1 if most is None else most
        # Not require(): torch.compile cannot format a symbol, and would have to for the message.
        if not low <= value <= high:
            asked = f"at least {least}" if least is not None and most is None else f"{low} to {high}"
            raise ValueError(f"{self.operator}: {name} is {shown(value)}; it must be {asked}")
        return value

    def flag(self, name: str, value: Any, *, optional: bool = False) -> Any:
        """Return ``value`` as a bool (None where it is ``optional`` and None), or raise; see :func:`.plain.flag`."""
        return plain.flag(self.operator, name, value, optional=optional)


_INT64 = 2**63

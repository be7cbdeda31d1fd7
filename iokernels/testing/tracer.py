"""Watches every byte that an interpreted Triton kernel touches.

Inside ``with trace() as t:`` each load, store and atomic, whether through pointers, block pointers or tensor
descriptors, is checked against the elements of the kernel's tensor arguments, and its bytes are counted::

    with trace() as t:
        flash_attention(q, k, v, backend="triton")
    assert t.bytes("_forward_kernel").read == model.read

What is counted is what thread blocks ask of global memory: for each instruction of each program, the item size times
the number of different addresses of its unmasked lanes. Nothing is taken off for a cache, or for asking twice.

Only what belongs to an element of an argument may be touched. The gaps of a strided view, the rest of its storage and
memory that the kernel reached through an address it loaded are outside.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from iokernels.runtime import interpreter as harness
from iokernels.runtime.scoped import Scoped

__all__ = ["Kernel", "OutOfBounds", "Trace", "Traffic", "trace"]

_Access = Literal["read", "written", "atomic"]


class OutOfBounds(AssertionError):
    """A kernel touched a byte that belongs to no element of its tensor arguments."""


@dataclass
class Traffic:
    """Bytes requested from global memory. An atomic counts its elements once, though it reads and writes them."""

    read: int = 0
    written: int = 0
    atomic: int = 0

    @property
    def total(self) -> int:
        """All of them."""
        return self.read + self.written + self.atomic

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(self.read + other.read, self.written + other.written, self.atomic + other.atomic)


@dataclass
class Kernel:
    """One launch: the kernel's name, its grid (three extents), and the bytes of each tensor argument by name.

    Bytes that belong to several arguments are put down to the first of them. The elements of a tuple argument are named
    ``name[0]``, ``name[1]``, those of a named tuple ``name.field``; a view has the name of its tensor.
    """

    name: str
    grid: tuple[int, int, int] = (0, 0, 0)
    arguments: dict[str, Traffic] = field(default_factory=dict)

    @property
    def programs(self) -> int:
        """How many programs (thread blocks) were launched."""
        return self.grid[0] * self.grid[1] * self.grid[2]

    @property
    def traffic(self) -> Traffic:
        """The bytes of all arguments."""
        return sum(self.arguments.values(), Traffic())


@dataclass
class Trace:
    """The kernels launched while tracing, in order."""

    kernels: list[Kernel] = field(default_factory=list)

    def bytes(self, name: str | None = None) -> Traffic:
        """Bytes of all launches, or of those of the kernel ``name``.

        Raises:
            KeyError: no kernel of that name was launched.
        """
        launched = [kernel for kernel in self.kernels if name is None or kernel.name == name]
        if name is not None and not launched:
            names = ", ".join(sorted({kernel.name for kernel in self.kernels})) or "none"
            raise KeyError(f"no kernel {name!r} was launched; launched: {names}")
        return sum((kernel.traffic for kernel in launched), Traffic())


@contextmanager
def trace() -> Iterator[Trace]:
    """Check and count every memory access of the Triton kernels launched inside the context, in this process.

    A stray access raises :class:`OutOfBounds` from the launch, before memory is touched; the message names the kernel,
    the program, the nearest argument and how many bytes away from it the access is.

    Raises:
        RuntimeError: Triton compiles its kernels (``TRITON_INTERPRET`` was not set), or is not installed.
    """
    if not harness.active():
        raise RuntimeError("only interpreted kernels can be traced: set TRITON_INTERPRET=1 before Triton is imported")
    harness.install()
    record = Trace()
    with _tracing.set((record,)):
        yield record


class _True:
    """What the interpreter runs with where nothing is traced."""

    def __init__(self) -> None:
        from triton.runtime import interpreter

        self.memory: Any = interpreter._interpreter
        self.call: Any = interpreter.GridExecutor.__call__
        self.to_host: Any = interpreter.GridExecutor._init_args_hst


_true: list[_True] = []
"""Empty where nothing is traced."""


def _watch(records: tuple[Trace, ...]) -> None:
    """Have the interpreter's launches recorded in all of ``records``, and in nothing if there is none."""
    from triton.runtime import interpreter

    executor: Any = interpreter.GridExecutor
    if not _true:
        _true.append(_True())
    true = _true[0]
    if not records:
        executor.__call__, executor._init_args_hst = true.call, true.to_host
        interpreter._interpreter = true.memory
        _true.clear()
        return
    watches: list[_Watch] = []
    for _ in records:
        watches.append(_Watch(watches[-1] if watches else true.memory, interpreter.interpreter_builder))

    def traced_arguments(self: Any, args: Any, kwargs: Any) -> Any:
        args_host, kwargs_host = true.to_host(self, args, kwargs)
        named = {**dict(zip(self.arg_names, args_host, strict=False)), **kwargs_host}
        for record, watch in zip(records, watches, strict=True):
            watch.launch(record.kernels[-1], named)
        return args_host, kwargs_host

    def traced_call(self: Any, *args: Any, **kwargs: Any) -> Any:
        kernels = [Kernel(self.fn.__name__) for _ in records]
        for record, kernel in zip(records, kernels, strict=True):
            record.kernels.append(kernel)
        try:
            return true.call(self, *args, **kwargs)
        except interpreter.InterpreterError as error:
            raise _cause(error) from None
        finally:
            for kernel in kernels:
                kernel.grid = getattr(interpreter.interpreter_builder, "grid_dim", kernel.grid)

    executor.__call__, executor._init_args_hst = traced_call, traced_arguments
    interpreter._interpreter = watches[-1]  # pyright: ignore[reportAttributeAccessIssue]


_tracing: Scoped[tuple[Trace, ...]] = Scoped((), combine=lambda none, given: sum(given, none), changed=_watch)


def _cause(error: BaseException) -> BaseException:
    """The stray access behind the interpreter's errors, one for each helper it passed through; else the error."""
    inner: BaseException | None = error
    while inner is not None:
        if isinstance(inner, OutOfBounds):
            return inner
        inner = inner.__cause__
    return error


class _Span:
    """The addresses from the first to the last element of the arguments that share a storage."""

    def __init__(self, arguments: list[tuple[int, Tensor]]) -> None:
        self.start = min(tensor.data_ptr() for _, tensor in arguments)
        self.stop = max(tensor.data_ptr() + _extent(tensor) for _, tensor in arguments)
        # Which argument each byte belongs to, counted from 1; 0 belongs to none.
        self.owner = np.zeros(self.stop - self.start, dtype=np.int16)
        for number, tensor in reversed(arguments):
            elements = np.lib.stride_tricks.as_strided(
                self.owner[tensor.data_ptr() - self.start :],
                shape=(*tensor.shape, tensor.element_size()),
                strides=(*(2 * stride * tensor.element_size() for stride in tensor.stride()), 2),
            )
            elements[...] = number
        # Scratch, to count different addresses without sorting them.
        self.lane = np.empty(len(self.owner), dtype=np.int32)


def _extent(tensor: Tensor) -> int:
    """Bytes from the first element to the end of the last, which has the highest address: strides are not negative."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()


class _Watch:
    """Stands in for the interpreter's memory: looks at each access, then passes it on."""

    def __init__(self, memory: Any, builder: Any) -> None:
        self._memory = memory
        self._builder = builder
        self._kernel = Kernel("")
        self._names: list[str] = []
        self._spans: list[_Span] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._memory, name)

    def launch(self, kernel: Kernel, arguments: dict[str, Any]) -> None:
        """Allow the elements of the tensors among ``arguments``, which lie in host memory, and nothing else."""
        self._kernel = kernel
        tensors = [named for name, value in arguments.items() for named in _tensors(name, value)]
        self._names = [name for name, _ in tensors]
        kernel.arguments = {name: Traffic() for name in self._names}
        by_storage: dict[int, list[tuple[int, Tensor]]] = {}
        for number, (_, tensor) in enumerate(tensors, start=1):
            if tensor.numel():
                by_storage.setdefault(tensor.untyped_storage().data_ptr(), []).append((number, tensor))
        self._spans = [_Span(group) for group in by_storage.values()]

    def load(self, ptrs: Any, mask: Any, other: Any, dtype: Any) -> Any:
        self._look("read", ptrs, mask, np.dtype(dtype).itemsize)
        return self._memory.load(ptrs, mask, other, dtype)

    def store(self, ptrs: Any, value: Any, mask: Any) -> Any:
        self._look("written", ptrs, mask, value.dtype.itemsize)
        return self._memory.store(ptrs, value, mask)

    def atomic_rmw(self, op: Any, ptrs: Any, value: Any, mask: Any, sem: Any) -> Any:
        self._look("atomic", ptrs, mask, value.dtype.itemsize)
        return self._memory.atomic_rmw(op, ptrs, value, mask, sem)

    def atomic_cas(self, ptrs: Any, expected: Any, value: Any, sem: Any) -> Any:
        self._look("atomic", ptrs, True, value.dtype.itemsize)
        return self._memory.atomic_cas(ptrs, expected, value, sem)

    def _look(self, access: _Access, ptrs: np.ndarray, mask: Any, itemsize: int) -> None:
        # Triton 3.6 hands over a buffer for the mask of a descriptor.
        addresses = ptrs[np.broadcast_to(np.asarray(mask, dtype=bool), ptrs.shape)]
        if not addresses.size:
            return
        lowest, highest = int(addresses.min()), int(addresses.max())
        for span in self._spans:
            if span.start <= lowest and highest + itemsize <= span.stop:
                self._count(access, span, (addresses - np.uint64(span.start)).astype(np.int64), itemsize)
                return
        # A pointer tensor may reach into several storages; then each is looked at by itself.
        inside = np.zeros(addresses.shape, dtype=bool)
        for span in self._spans:
            here = (addresses >= span.start) & (addresses + np.uint64(itemsize) <= span.stop)
            if here.any():
                self._count(access, span, (addresses[here] - np.uint64(span.start)).astype(np.int64), itemsize)
            inside |= here
        if not inside.all():
            self._stray(access, int(addresses[~inside][0]), itemsize)

    def _count(self, access: _Access, span: _Span, offsets: np.ndarray, itemsize: int) -> None:
        owners = span.owner[offsets]
        allowed = owners > 0
        if itemsize > 1:
            # An element lies inside a gap, or straddles its edge, when any of its bytes does.
            for byte in range(1, itemsize):
                allowed &= span.owner[offsets + byte] > 0
        if not allowed.all():
            self._stray(access, span.start + int(offsets[~allowed][0]), itemsize)
        if len(offsets) > 1:
            # The lane that wrote last speaks for its address.
            lanes = np.arange(len(offsets), dtype=np.int32)
            span.lane[offsets] = lanes
            owners = owners[span.lane[offsets] == lanes]
        for number, count in enumerate(np.bincount(owners)):
            if count:
                traffic = self._kernel.arguments[self._names[number - 1]]
                setattr(traffic, access, getattr(traffic, access) + int(count) * itemsize)

    def _stray(self, access: _Access, address: int, itemsize: int) -> None:
        did = {"read": "read", "written": "wrote", "atomic": "updated"}[access]
        raise OutOfBounds(
            f"kernel {self._kernel.name}, program {self._builder.grid_idx}: {did} {itemsize} bytes "
            f"{self._place(address, itemsize)}"
        )

    def _place(self, address: int, itemsize: int) -> str:
        """Where ``address`` is, from the nearest byte of an argument."""
        nearest: tuple[int, str] | None = None
        for span in self._spans:
            owned = np.flatnonzero(span.owner) + span.start
            byte = int(owned[np.abs(owned - address).argmin()])
            name = self._names[span.owner[byte - span.start] - 1]
            if nearest is None or abs(address - byte) < abs(nearest[0]):
                nearest = address - byte, name
        if nearest is None:
            return f"at address {address:#x}, but the kernel was given no memory"
        distance, name = nearest
        if distance == 0:
            return f"that begin inside {name} and end beyond its elements"
        away = "1 byte" if abs(distance) == 1 else f"{abs(distance)} bytes"
        return f"that begin {away} {'after' if distance > 0 else 'before'} an element of {name}"


def _tensors(name: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    """The tensors in a kernel argument, by name: tensors, those inside wrappers, descriptors and tuples."""
    if isinstance(value, tuple):
        fields: Any = getattr(value, "_fields", None)
        for index, element in enumerate(value):
            inner = f"{name}[{index}]" if fields is None else f"{name}.{fields[index]}"
            yield from _tensors(inner.removesuffix(".ptr"), element)
    elif isinstance(value, torch.Tensor):
        yield name, value
    elif hasattr(value, "base"):
        yield from _tensors(name, value.base)

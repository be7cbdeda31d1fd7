"""The arguments of a launch as the driver takes them: an array of addresses, each of a value.

Values lie behind one another, each at a multiple of 8 bytes. The memory is used again by later launches whose arguments
are of the same kinds, one launch at a time.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Mapping

from torch import Tensor

from iokernels.runtime.errors import KernelLaunchError

from .kernel import Argument, Int64

__all__ = ["Frame", "give_back", "packed"]

_POINTER, _INT64, _INT32, _FLOAT = "Q", "q", "i4x", "f4x"
_STRUCTURES = tuple(f"{count}q" for count in range(17))

Layout = tuple[str, ...]


class Frame:
    """Memory for arguments of the kinds ``layout``. ``address`` is that of the array of addresses."""

    __slots__ = ("_pointers", "_values", "address", "fill", "layout")

    def __init__(self, layout: Layout) -> None:
        form = struct.Struct("=" + "".join(layout))
        self.layout = layout
        self._values = ctypes.create_string_buffer(form.size + 8)
        sizes = [struct.calcsize("=" + code) for code in layout]
        start = ctypes.addressof(self._values)
        offsets = (sum(sizes[:place]) for place in range(len(sizes)))
        self._pointers = (ctypes.c_void_p * (len(layout) + 1))(*(start + offset for offset in offsets))
        self.address = ctypes.addressof(self._pointers)
        values, pack_into = self._values, form.pack_into
        self.fill = lambda given: pack_into(values, 0, *given)


_idle: dict[Layout, list[Frame]] = {}


def packed(kernel: str, index: int, args: Mapping[str, Argument]) -> Frame:
    """A frame filled with ``args``, whose tensors have to be on the GPU ``index``. :func:`give_back` ends its use.

    Raises:
        KernelLaunchError: a tensor is elsewhere, or a number does not fit.
    """
    layout: list[str] = []
    values: list[int | float] = []
    for name, value in args.items():
        if isinstance(value, Tensor):
            if value.get_device() != index:
                raise KernelLaunchError(f"{kernel}: {name} is on {value.device}, not on the GPU {index}")
            layout.append(_POINTER)
            values.append(value.data_ptr())
        elif value is None:
            layout.append(_POINTER)
            values.append(0)
        elif isinstance(value, tuple):
            layout.append(_STRUCTURES[len(value)])
            values.extend(value)
        elif isinstance(value, float):
            layout.append(_FLOAT)
            values.append(value)
        elif isinstance(value, Int64):
            layout.append(_INT64)
            values.append(value)
        else:
            if not -(2**31) <= value < 2**31:
                raise KernelLaunchError(f"{kernel}: {name} is {value}, beyond the 32 bits that it is passed in")
            layout.append(_INT32)
            values.append(value)
    key = tuple(layout)
    try:
        frame = _idle[key].pop()
    except (KeyError, IndexError):
        frame = Frame(key)
    frame.fill(values)
    return frame


def give_back(frame: Frame) -> None:
    """The driver has read the arguments: another launch may have the memory."""
    _idle.setdefault(frame.layout, []).append(frame)

"""The Triton kernels of flash_rnn without data: which configurations a call takes, compiling and tuning them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from iokernels.ops.flash_rnn.cells import CELLS
from iokernels.ops.flash_rnn.options import Forward, Needs, Options, empty_history, empty_out, empty_state, empty_values
from iokernels.ops.flash_rnn.triton.tuning import KERNELS, TUNABLES, Problem, max_width
from iokernels.runtime.device import DeviceSpec, spec_of
from iokernels.testing.case import Compilation, Pass, Tuning
from iokernels.testing.case.shape import Shape

from .shapes import VOCABULARY, cell_of


def meta_call(shape: Shape, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor | None, Options]:
    """gates, recurrent, bias and the options of a call of ``shape``, as meta tensors."""

    def empty(*size: int, of: torch.dtype = dtype) -> Tensor:
        return torch.empty(size, dtype=of, device="meta")

    options = Options(
        lengths=empty(shape.b, of=torch.int32) if shape.lengths else None,
        cell=cell_of(shape),
        recurrent_clip=shape.clip,
        recurrent_cut=bool(shape.cut),
        recompute_gates=bool(shape.recompute),
    )
    kind = options.kind()
    if shape.state:
        initial = empty(len(kind.states), shape.b, shape.h, shape.d, of=torch.float32)
        options = options._replace(initial_state=initial)
    step = kind.gates, shape.h, shape.d
    gates = empty(shape.n, shape.b, *step).transpose(0, 1) if shape.nb else empty(shape.b, shape.n, *step)
    return gates, empty(*step, shape.d), empty(*step) if shape.bias else None, options


def configs(shape: Shape, dtype: torch.dtype) -> dict[str, Any]:
    """The configuration that each kernel would be launched with."""
    from iokernels.ops.flash_rnn.triton import launch as triton_launch

    gates, _, _, options = meta_call(shape, dtype)
    launch = triton_launch.Launch(empty_out(gates), options)
    return {kernel: launch.config(kernel) for kernel in KERNELS}


def launch(shape: Shape, dtype: torch.dtype, which: Pass) -> None:
    """Launch the kernels of a pass with meta tensors; nothing where the matrices of a head are more than a block of
    the GPU holds, as the public function refuses it."""
    if shape.d > max_width(CELLS[cell_of(shape)].gates, dtype.itemsize, spec_of(torch.device("meta")).smem_block):
        return
    if which != "bwd":
        _launch_forward(shape, dtype)
    if which != "fwd":
        _launch_backward(shape, dtype)


def _launch_forward(shape: Shape, dtype: torch.dtype) -> None:
    from iokernels.ops.flash_rnn.triton import launch as triton_launch

    gates, recurrent, bias, options = meta_call(shape, dtype)
    triton_launch.forward(gates, recurrent, bias, True, options)


def _launch_backward(shape: Shape, dtype: torch.dtype) -> None:
    from iokernels.ops.flash_rnn.triton import launch as triton_launch

    gates, recurrent, bias, options = meta_call(shape, dtype)
    kind = options.kind()
    state = empty_state(gates, kind)
    saved = Forward(
        empty_out(gates), state, empty_values(gates, kind, not options.recompute_gates), empty_history(gates, kind)
    )
    triton_launch.backward(
        empty_out(gates), state if shape.state else None, gates if options.recompute_gates else None, recurrent, bias,
        saved, options, Needs(True, True, bias is not None, bool(shape.state)),
    )  # fmt: skip


COMPILATION = Compilation(
    launch=launch,
    points=tuple(
        (VOCABULARY.parse(text), dtype)
        for text, dtype in (
            ("d=64", torch.bfloat16),
            ("d=128", torch.bfloat16),
            ("d=16,cell=3,state=1,lengths=1,clip=1", torch.bfloat16),
            ("d=64,cell=3,recompute=1", torch.float16),
            ("d=96,cell=1,state=1,nb=1", torch.float16),
            ("d=32,cell=2,lengths=1,cut=1,bias=0", torch.bfloat16),
            ("d=64,cell=1,lengths=1,recompute=1", torch.float32),
            ("d=24,cell=3,state=1", torch.float32),
        )
    ),
)


def _kernels(shape: Shape) -> tuple[str, ...]:
    return KERNELS if shape.recompute else KERNELS[:2]


def _problem(shape: Shape, dtype: torch.dtype, kernel: str, device: DeviceSpec) -> Problem:
    from iokernels.ops.flash_rnn.triton import launch as triton_launch

    gates, _, _, options = meta_call(shape, dtype)
    return triton_launch.Launch(empty_out(gates), options).problem(kernel, device)


def _launch_one(shape: Shape, dtype: torch.dtype, kernel: str) -> None:
    if kernel == "flash_rnn_fwd":
        _launch_forward(shape, dtype)
    else:
        _launch_backward(shape, dtype)


TUNING = Tuning(
    TUNABLES,
    _kernels,
    _problem,
    _launch_one,
    {"flash_rnn_fwd": (), "flash_rnn_bwd": ("gates",), "flash_rnn_values": ("gates",)},
)

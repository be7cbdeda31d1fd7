"""Launches the Triton kernels of this room: the backend ``triton`` of the operators."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from iokernels import autotune
from iokernels.ops.flash_rnn.options import (
    Forward,
    Gradients,
    Needs,
    Options,
    empty_forward,
    empty_gradients,
    empty_values,
)
from iokernels.ops.flash_rnn.weight_gradients import weight_gradients
from iokernels.ops.shared.triton_tiles import padded
from iokernels.runtime.device import DeviceSpec, guard, spec_of

from . import tuning
from .backward import flash_rnn_bwd_kernel
from .cells import BACKWARD, FORWARD
from .forward import flash_rnn_fwd_kernel
from .steps import Matrices, Steps
from .tuning import TUNABLES
from .values import flash_rnn_values_kernel


def forward(gates: Tensor, recurrent: Tensor, bias: Tensor | None, keep: bool, options: Options) -> Forward:
    """Run all steps. See :class:`.options.Forward` for what is returned; ``keep`` asks for its last two."""
    cell = options.kind()
    result, values, history = empty_forward(gates, keep, options)
    launch = Launch(result.out, options)
    config = launch.config("flash_rnn_fwd")
    if launch.batch > 0:
        with guard(gates.device):
            flash_rnn_fwd_kernel[launch.grid(config)](
                gates, recurrent, launch.bias(bias), launch.initial, launch.lengths, result.out, result.state, values,
                history, steps_of(gates), matrices_of(recurrent), steps_of(result.out), steps_of(values),
                steps_of(history), *launch.sizes,
                CELL=FORWARD[options.cell], GATES=cell.gates, APART=cell.apart, STATES=len(cell.states),
                **launch.widths, **launch.tile(config, gates, result.out, values, history), **resources(config),
            )  # fmt: skip
    return result


def backward(
    dout: Tensor, dstate: Tensor | None, gates: Tensor | None, recurrent: Tensor, bias: Tensor | None, saved: Forward,
    options: Options, needs: Needs,
) -> Gradients:  # fmt: skip
    """Returns the gradients that ``needs`` asks for. ``gates`` is None unless the values are to be recomputed."""
    cell, out = options.kind(), saved.out
    launch = Launch(out, options)
    values = saved.values if gates is None else _recomputed(launch, gates, recurrent, bias, out, options)
    history = saved.history if len(cell.states) > 1 else None
    dgates, dapart, dinitial = empty_gradients(out, options, needs)
    config = launch.config("flash_rnn_bwd")
    if launch.batch > 0:
        with guard(out.device):
            flash_rnn_bwd_kernel[launch.grid(config)](
                recurrent, launch.initial, launch.lengths, out, values, history, dout,
                None if dstate is None else dstate.contiguous(), dgates, dapart, dinitial,
                matrices_of(recurrent), steps_of(out), steps_of(values), steps_of(history), steps_of(dout),
                steps_of(dgates), steps_of(dapart), *launch.sizes, options.recurrent_clip,
                CELL=BACKWARD[options.cell], GATES=cell.gates, APART=cell.apart, STATES=len(cell.states),
                READS_H=int(cell.reads_h), CLIPS=options.recurrent_clip > 0.0, CUTS=options.recurrent_cut,
                **launch.widths, **launch.tile(config, out, values, history, dout, dgates, dapart),
                **resources(config),
            )  # fmt: skip
    drecurrent, dbias = weight_gradients(dgates, dapart, out, launch.initial, options, needs)
    return Gradients(
        gates=dgates if needs.gates else None, recurrent=drecurrent, bias=dbias, initial_state=dinitial
    )  # fmt: skip


def _recomputed(
    launch: Launch, gates: Tensor, recurrent: Tensor, bias: Tensor | None, out: Tensor, options: Options
) -> Tensor:
    cell = options.kind()
    values = empty_values(gates, cell)
    config = launch.config("flash_rnn_values")
    blocks = launch.heads * triton.cdiv(launch.batch * launch.length, config.block)
    if blocks > 0:
        with guard(out.device):
            flash_rnn_values_kernel[(blocks,)](
                gates, recurrent, launch.bias(bias), launch.initial, out, values,
                steps_of(gates), matrices_of(recurrent), steps_of(out), steps_of(values), *launch.sizes,
                GATES=cell.gates, APART=cell.apart, **launch.widths, BLOCK_M=config.block, **resources(config),
            )  # fmt: skip
    return values


class Launch:
    """What every kernel of one call needs, from shapes and options only."""

    def __init__(self, out: Tensor, options: Options) -> None:
        self.out, self.options = out, options
        self.batch, self.length, self.heads, width = out.shape
        # Small tensors, which the kernels index without strides.
        self.initial = None if options.initial_state is None else options.initial_state.contiguous()
        self.lengths = None if options.lengths is None else options.lengths.contiguous()
        self.sizes = self.batch, self.heads, self.length
        self.widths = {
            "WIDTH": width,
            "BLOCK_D": padded(width),
            "PRECISION": "tf32" if torch.get_float32_matmul_precision() != "highest" else "ieee",
        }

    def bias(self, bias: Tensor | None) -> Tensor | None:
        """The bias, indexed without strides."""
        return None if bias is None else bias.contiguous()

    def config(self, kernel: str) -> tuning.Config:
        """The launch parameters of ``kernel``."""
        device = spec_of(self.out.device)
        return autotune.select(TUNABLES[kernel], self.problem(kernel, device), device)

    def problem(self, kernel: str, device: DeviceSpec) -> tuning.Problem:
        """What the launch parameters of ``kernel`` depend on. Positional: this is part of every call."""
        cell = self.options.kind()
        return tuning.Problem(
            kernel,
            self.widths["BLOCK_D"],
            cell.gates,
            cell.values,
            len(cell.states),
            self.out.element_size(),
            self.out.dtype != torch.float32 or self.widths["PRECISION"] != "ieee",
            device.sm,
            device.smem_block,
            autotune.bucket(self.batch),
            autotune.bucket(self.heads),
        )

    def grid(self, config: tuning.Config) -> tuple[int]:
        """A block for each tile of sequences of each head."""
        return (self.heads * triton.cdiv(self.batch, config.block),)

    def tile(self, config: tuning.Config, *tensors: Tensor | None) -> dict[str, Any]:
        """Tile height, and whether offsets inside a tile of one of ``tensors`` need 64 bits."""
        reach = [
            (config.block - 1) * abs(x.stride(0)) + (x.shape[-1] - 1) * abs(x.stride(-1))
            for x in tensors
            if x is not None
        ]
        return {"BLOCK_B": config.block, "WIDE": max(reach) >= 2**31}


def steps_of(x: Tensor | None) -> Steps:
    """Element strides of ``[B, N, X, H, D]`` or ``[B, N, H, D]``; a size of 1 gets 0."""
    if x is None:
        return Steps(0, 0, 0, 0, 0)
    steps = [0 if size == 1 else step for size, step in zip(x.shape, x.stride(), strict=True)]
    return Steps(*steps) if x.dim() == 5 else Steps(*steps[:2], 0, *steps[2:])


def matrices_of(x: Tensor) -> Matrices:
    """Element strides of ``[G, H, D, D]``; a size of 1 gets 0."""
    return Matrices(*[0 if size == 1 else step for size, step in zip(x.shape, x.stride(), strict=True)])


def resources(config: tuning.Config) -> dict[str, Any]:
    """Options of the compiler, not arguments of a kernel."""
    return {"num_warps": config.num_warps, "num_stages": config.num_stages}

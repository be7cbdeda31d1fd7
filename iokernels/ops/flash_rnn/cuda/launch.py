"""Launches the CUDA kernels of this room, ``csrc/flash_rnn``: the backend ``cuda`` of the operators."""

from __future__ import annotations

import math
from typing import Any

import torch
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
from iokernels.ops.shared.cuda_tiles import in_sixteens
from iokernels.runtime.cuda.kernel import Argument, Int64, cuda_kernel
from iokernels.runtime.device import guard, spec_of

from . import tuning as resources
from .tuning import TUNABLES

CELLS = {"lstm": "Lstm", "gru": "Gru", "elman": "Elman", "slstm": "Slstm"}
"""The structures of ``csrc/flash_rnn/cells.cuh``."""


def forward(gates: Tensor, recurrent: Tensor, bias: Tensor | None, keep: bool, options: Options) -> Forward:
    """Run all steps. See :class:`.options.Forward` for what is returned; ``keep`` asks for its last two."""
    result, values, history = empty_forward(gates, keep, options)
    launch = Launch("flash_rnn_fwd_cuda", result.out, options)
    launch(
        gates_ptr=gates, recurrent_ptr=recurrent, bias_ptr=None if bias is None else bias.contiguous(),
        initial_ptr=launch.initial, lengths_ptr=launch.lengths, out_ptr=result.out, state_ptr=result.state,
        values_ptr=values, history_ptr=history, **launch.exchange(1), stride_gates=steps_of(gates),
        stride_recurrent=matrices_of(recurrent), stride_out=steps_of(result.out), stride_values=steps_of(values),
        stride_history=steps_of(history), **launch.sizes,
    )  # fmt: skip
    return result


def backward(
    dout: Tensor, dstate: Tensor | None, gates: Tensor | None, recurrent: Tensor, bias: Tensor | None, saved: Forward,
    options: Options, needs: Needs,
) -> Gradients:  # fmt: skip
    """Returns the gradients that ``needs`` asks for. ``gates`` is None unless the values are to be recomputed."""
    cell, out = options.kind(), saved.out
    values = saved.values if gates is None else _recomputed(gates, recurrent, bias, out, options)
    history = saved.history if len(cell.states) > 1 else None
    dgates, dapart, dinitial = empty_gradients(out, options, needs)
    launch = Launch("flash_rnn_bwd_cuda", out, options)
    launch(
        recurrent_ptr=recurrent, initial_ptr=launch.initial, lengths_ptr=launch.lengths, out_ptr=out,
        values_ptr=values, history_ptr=history, dout_ptr=dout,
        dstate_ptr=None if dstate is None else dstate.contiguous(), dgates_ptr=dgates, dapart_ptr=dapart,
        dinitial_ptr=dinitial, **launch.exchange(cell.gates), stride_recurrent=matrices_of(recurrent),
        stride_out=steps_of(out), stride_values=steps_of(values), stride_history=steps_of(history),
        stride_dout=steps_of(dout), stride_dgates=steps_of(dgates), stride_dapart=steps_of(dapart), **launch.sizes,
        clip=options.recurrent_clip or math.inf, cuts=int(options.recurrent_cut),
    )  # fmt: skip
    drecurrent, dbias = weight_gradients(dgates, dapart, out, launch.initial, options, needs)
    return Gradients(
        gates=dgates if needs.gates else None, recurrent=drecurrent, bias=dbias, initial_state=dinitial
    )  # fmt: skip


def _recomputed(gates: Tensor, recurrent: Tensor, bias: Tensor | None, out: Tensor, options: Options) -> Tensor:
    values = empty_values(gates, options.kind())
    launch = Launch("flash_rnn_values_cuda", out, options)
    rows = launch.batch * launch.length
    walkers = resources.walkers(launch.problem, launch.config, rows)
    launch(
        walkers,
        gates_ptr=gates, recurrent_ptr=recurrent, bias_ptr=None if bias is None else bias.contiguous(),
        initial_ptr=launch.initial, out_ptr=out, values_ptr=values, stride_gates=steps_of(gates),
        stride_recurrent=matrices_of(recurrent), stride_out=steps_of(out), stride_values=steps_of(values),
        batch=launch.batch, heads=launch.heads, rows=Int64(rows), walkers=walkers,
    )  # fmt: skip
    return values


class Launch:
    """One launch of one kernel: its configuration, from shapes and options only, and the arguments all share."""

    def __init__(self, kernel: str, out: Tensor, options: Options) -> None:
        self.kernel, self.options, self.out = kernel, options, out
        self.batch, self.length, self.heads, self.width = out.shape
        # Small tensors, which the kernels index without strides.
        self.initial = None if options.initial_state is None else options.initial_state.contiguous()
        self.lengths = None if options.lengths is None else options.lengths.contiguous()
        self.sizes: dict[str, Any] = {"batch": self.batch, "heads": self.heads, "length": self.length}
        self.precise = out.dtype == torch.float32 and torch.get_float32_matmul_precision() == "highest"
        device = spec_of(out.device)
        self.problem = resources.problem_for(
            kernel, options.kind(), self.width, self.heads, self.batch, out.element_size(), not self.precise, device
        )
        self.config = autotune.select(TUNABLES[kernel], self.problem, device)

    @property
    def groups(self) -> int:
        """Tiles of sequences of all heads."""
        return self.heads * -(-self.batch // self.config.tile)

    def exchange(self, count: int) -> dict[str, Any]:
        """Where several blocks of a head meet: memory for ``count`` tiles, twice, and counters."""
        if self.config.blocks == 1:
            return {"exchange_ptr": None, "arrived_ptr": None}
        size = self.groups, 2, count, self.config.tile, self.problem.padded_width
        counters = torch.zeros(self.groups, dtype=torch.int32, device=self.out.device)
        return {"exchange_ptr": self.out.new_empty(size), "arrived_ptr": counters}

    def __call__(self, walkers: int | None = None, /, **args: Argument) -> None:
        """Launch it, for a block or a group of blocks for each tile, or ``walkers`` for each head."""
        config = self.config
        if self.batch == 0 or walkers == 0:
            return
        kernel = cuda_kernel(
            f"flash_rnn/{_SOURCE[self.kernel]}.cu", self.kernel,
            Element=self.out.dtype, Cell=f"struct {CELLS[self.options.cell]}", WIDTH=self.width,
            UNITS=config.units(self.problem), BLOCKS=config.blocks, TILE=config.tile, SPLIT=config.split,
            HELD=config.held(self.problem), STAGES=config.stages, VECTORS=vectors(self.width, args),
            PRECISE=self.precise,
        )  # fmt: skip
        smem = resources.shared_bytes(
            self.problem, config.blocks, config.tile, config.split, config.eighths, config.stages
        )
        groups = self.groups if walkers is None else self.heads * walkers
        with guard(self.out.device):
            kernel.launch((groups * config.blocks,), config.threads(self.problem), smem, args,
                          cooperative=config.blocks > 1 and walkers is None)  # fmt: skip


_SOURCE = {"flash_rnn_fwd_cuda": "forward", "flash_rnn_bwd_cuda": "backward", "flash_rnn_values_cuda": "values"}


_UNALIGNED = ("recurrent_ptr", "bias_ptr", "initial_ptr", "dstate_ptr", "lengths_ptr", "arrived_ptr")
"""What is read element by element."""


def vectors(width: int, args: dict[str, Argument]) -> bool:
    """Whether all rows that come and go with a step are whole, aligned 16 bytes."""
    tensors = [x for name, x in args.items() if isinstance(x, Tensor) and name not in _UNALIGNED]
    return width % 8 == 0 and all(in_sixteens(x) for x in tensors)


def steps_of(x: Tensor | None) -> tuple[int, ...]:
    """Element strides of ``[B, N, X, H, D]`` or ``[B, N, H, D]``: the structure ``Steps`` of the kernels."""
    if x is None:
        return 0, 0, 0, 0, 0
    steps = x.stride()
    return steps if x.dim() == 5 else (*steps[:2], 0, *steps[2:])


def matrices_of(x: Tensor) -> tuple[int, ...]:
    """Element strides of ``[G, H, D, D]``."""
    return x.stride()

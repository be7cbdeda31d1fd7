"""Launches the Triton kernels of this room: the backend ``triton`` of the operators."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from iokernels import autotune
from iokernels.ops.linear_attention.options import Options, columns, empty_denominator, empty_state, features, sequences
from iokernels.ops.shared.layout import empty_in_order_of
from iokernels.ops.shared.triton_tiles import View, is_wide, padded, view
from iokernels.runtime.device import DeviceSpec, guard, spec_of

from . import tuning
from .chunks import NO_DECAY, PER_HEAD, PER_TOKEN, Features, Inputs, Offsets, Sizes
from .forward import linear_attention_fwd_kernel
from .state import (
    linear_attention_bwd_scan_kernel,
    linear_attention_bwd_state_kernel,
    linear_attention_fwd_scan_kernel,
    linear_attention_fwd_state_kernel,
)
from .step import linear_attention_step_kernel
from .tuning import TUNABLES

SCAN_BLOCK = 1024
"""Elements of a state that a block of the scan takes."""


def forward(q: Tensor, k: Tensor, v: Tensor, options: Options) -> tuple[Tensor, Tensor, Tensor]:
    """Returns (out, final state, denominator). See :class:`Options` for the arguments."""
    out, state = empty_in_order_of(v, v.shape[3]), empty_state(q, v, options)
    denominator = empty_denominator(v, options)
    launch = Launch(q, k, v, options)
    if options.cu_seqlens is not None:
        # Rows that belong to no sequence are visited by no block.
        out.zero_()
        denominator.zero_()
        state.zero_()
    if state.shape[0] * state.shape[1] == 0:
        return out, state, denominator
    config = launch.config("linear_attention_fwd")
    cut = launch.cut(config.segments, config.chunk)
    with guard(q.device):
        start = options.initial_state
        if cut.split:
            start = launch.states_before(cut, start, state)
        has_state, writes_state = start is not None, not cut.split
        linear_attention_fwd_kernel[launch.grid(cut, config)](
            launch.inputs, cut.offsets, view(out), rows_view(denominator if options.normalize else None, v),
            view(start), view(state if writes_state else None), *launch.varying(cut), options.scale,
            FEATURES=launch.features(cut, has_state=has_state, writes_state=writes_state),
            SIZES=launch.sizes(config, q, k, v, out), **resources(config),
        )  # fmt: skip
    return out, state, denominator


def step(q: Tensor, k: Tensor, v: Tensor, state: Tensor, options: Options) -> Tensor:
    """Returns out, and moves ``state`` on by the tokens."""
    out = empty_in_order_of(v, v.shape[3])
    launch = Launch(q, k, v, options)
    if state.numel() == 0:
        return out
    config = launch.config("linear_attention_step")
    slices = 1 if options.normalize else triton.cdiv(v.shape[3], config.width)
    with guard(q.device):
        linear_attention_step_kernel[(v.shape[0] * v.shape[1] * slices,)](
            launch.inputs, state, view(out), launch.heads, launch.group, launch.rows, options.scale,
            FEATURES=launch.features(None, has_state=True, writes_state=True),
            K_WIDTH=q.shape[3], V_WIDTH=v.shape[3], BLOCK_K=padded(q.shape[3]), BLOCK_V=config.width,
            **resources(config),
        )  # fmt: skip
    return out


def backward(*arguments: Any) -> Any:
    """Returns the gradients: see :func:`.launch_backward.backward`."""
    from .launch_backward import backward as run

    return run(*arguments)


class Cut(NamedTuple):
    """How sequences are cut into segments."""

    split: bool
    segments: int  # of all sequences; packed: the most there can be
    per_sequence: int
    rows: int  # of a segment
    offsets: Offsets


class Launch:
    """What every kernel of one call needs, from shapes and options only."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, options: Options) -> None:
        self.q, self.k, self.v, self.options = q, k, v, options
        self.heads, self.rows = v.shape[1], v.shape[2]
        self.group = v.shape[1] // k.shape[1]
        self.sequences = sequences(q, options)
        # Read without strides.
        self.offsets = None if options.cu_seqlens is None else options.cu_seqlens.contiguous()
        decay = options.log_decay
        decay = decay.view(1, -1, 1) if decay is not None and decay.dim() == 1 else decay
        self.inputs = Inputs(view(q), view(k), view(v), view(decay))
        self.block_k, self.block_v = padded(q.shape[3]), padded(v.shape[3])
        self.precision = "tf32" if torch.get_float32_matmul_precision() != "highest" else "ieee"

    def config(self, kernel: str, decay_gradient: bool = False) -> tuning.Config:
        """The launch parameters of ``kernel``."""
        device = spec_of(self.q.device)
        return autotune.select(TUNABLES[kernel], self.problem(kernel, device, decay_gradient), device)

    def problem(self, kernel: str, device: DeviceSpec, decay_gradient: bool = False) -> tuning.Problem:
        """What the launch parameters of ``kernel`` depend on. Positional: this is part of every call."""
        mean = self.rows // max(self.sequences, 1) if self.offsets is not None else self.rows
        return tuning.Problem(
            kernel,
            self.block_k,
            self.block_v,
            self.q.element_size(),
            self.q.dtype != torch.float32 or self.precision != "ieee",
            self.options.taylor,
            decay_gradient,
            device.sm,
            device.sms,
            device.smem_block,
            autotune.bucket(self.sequences * self.heads),
            autotune.bucket(mean),
        )

    def cut(self, segments: int, chunk: int, most_rows: int | None = None) -> Cut:
        """Cut sequences into about ``segments`` parts of whole chunks, of at most ``most_rows`` rows."""
        sharing = 1 if self.offsets is None else self.sequences
        rows = tuning.segment_rows(self.rows, sharing, segments, chunk, most_rows)
        if rows is None:
            return Cut(False, self.sequences, 1, max(self.rows, 1), Offsets(self.offsets, None))
        if self.offsets is None:
            per_sequence = triton.cdiv(self.rows, rows)
            return Cut(True, self.sequences * per_sequence, per_sequence, rows, Offsets(None, None))
        # Each sequence has its rows divided by those of a segment, rounded up, and one segment at least.
        bounds = self.offsets.clamp(0, self.rows)
        counts = ((bounds.diff() + (rows - 1)) // rows).clamp_(min=1)
        table = torch.nn.functional.pad(counts.cumsum(0), (1, 0)).to(torch.int32)
        return Cut(True, self.rows // rows + self.sequences, 1, rows, Offsets(self.offsets, table))

    def features(
        self, cut: Cut | None, *, has_state: bool, writes_state: bool, decay_gradient: bool = False
    ) -> Features:
        """What a kernel of this call is compiled for."""
        options = self.options
        decay = NO_DECAY
        if options.log_decay is not None:
            decay = PER_TOKEN if options.per_token() else PER_HEAD
        return Features(
            varlen=self.offsets is not None,
            split=cut is not None and cut.split,
            decay=decay,
            normalize=options.normalize,
            taylor=options.taylor,
            has_state=has_state,
            writes_state=writes_state,
            decay_gradient=decay_gradient,
        )

    def varying(self, cut: Cut) -> tuple[int, ...]:
        """What ``VARYING`` names, in its order."""
        steps = max(self.sequences - 1, 0).bit_length()
        return self.heads, self.group, self.sequences, self.rows, cut.per_sequence, cut.rows, steps

    def grid(self, cut: Cut, config: tuning.Config, width: int | None = None) -> tuple[int]:
        """A block for each slice of ``width`` columns (V unless given) of each head of each segment."""
        return (cut.segments * self.heads * triton.cdiv(self.v.shape[3] if width is None else width, config.width),)

    def sizes(self, config: tuning.Config, *tensors: Tensor, over: str = "v") -> Sizes:
        """What a kernel that reads and writes tiles of ``tensors`` is compiled for; ``over`` names the width that
        ``config.width`` cuts."""
        return Sizes(
            self.q.shape[3],
            self.v.shape[3],
            config.width if over == "k" else self.block_k,
            config.width if over == "v" else self.block_v,
            config.chunk,
            is_wide(config.chunk, *tensors),
            self.precision,
        )

    def states_before(self, cut: Cut, initial: Tensor | None, final: Tensor | None) -> Tensor:
        """The state before every segment ``[P, H, F, W]``; fills ``final`` with that behind every sequence."""
        states, totals = self._segment_states(cut)
        config = self.config("linear_attention_state")
        linear_attention_fwd_state_kernel[self.grid(cut, config)](
            self.inputs, cut.offsets, view(states), totals, *self.varying(cut),
            FEATURES=self.features(cut, has_state=False, writes_state=False),
            SIZES=self.sizes(config, self.k, self.v), **resources(config),
        )  # fmt: skip
        self._scan(linear_attention_fwd_scan_kernel, cut, states, totals, initial, final)
        return states

    def gradients_behind(
        self, cut: Cut, dout: Tensor, dden: Tensor | None, dfinal: Tensor | None, dinitial: Tensor | None
    ) -> Tensor:
        """The gradient of the state behind every segment; fills ``dinitial`` with that before every sequence."""
        states, totals = self._segment_states(cut)
        config = self.config("linear_attention_state")
        linear_attention_bwd_state_kernel[self.grid(cut, config)](
            self.inputs, cut.offsets, view(dout), rows_view(dden, self.v), view(states), totals, *self.varying(cut),
            self.options.scale, FEATURES=self.features(cut, has_state=False, writes_state=False),
            SIZES=self.sizes(config, self.q, dout), **resources(config),
        )  # fmt: skip
        self._scan(linear_attention_bwd_scan_kernel, cut, states, totals, dfinal, dinitial)
        return states

    def _segment_states(self, cut: Cut) -> tuple[Tensor, Tensor]:
        rows = features(self.q.shape[3], self.options.taylor)
        width = columns(self.v.shape[3], self.options.normalize)
        states = self.q.new_empty((cut.segments, self.heads, rows, width), dtype=torch.float32)
        return states, states.new_empty((cut.segments, self.heads))

    def _scan(
        self, kernel: Any, cut: Cut, states: Tensor, totals: Tensor, first: Tensor | None, last: Tensor | None
    ) -> None:
        size = states.shape[2] * states.shape[3]
        first = None if first is None else first.contiguous()
        kernel[(self.sequences * self.heads * triton.cdiv(size, SCAN_BLOCK),)](
            states, totals, first, last, cut.offsets.segments_ptr, self.heads, cut.segments, cut.per_sequence, size,
            FEATURES=self.features(cut, has_state=first is not None, writes_state=last is not None),
            BLOCK=SCAN_BLOCK, num_warps=4,
        )  # fmt: skip


NO_ROWS = View(None, 0, 0, 0, 0)


def rows_view(x: Tensor | None, v: Tensor, shares: bool = False) -> View:
    """A contiguous ``[B, H, N]``, or several one after the other: the last stride is from one to the next.

    Without ``x`` there are strides only where other ``shares`` follow them, so that lengths make no kernel variants.
    """
    if x is None and not shares:
        return NO_ROWS
    batch, heads, length, _ = v.shape
    return View(x, heads * length, length, 1, batch * heads * length)


def resources(config: tuning.Config) -> dict[str, Any]:
    """Options of the compiler, not arguments of a kernel."""
    return {"num_warps": config.num_warps, "num_stages": config.num_stages}

"""Launches the Triton kernels of the gated delta rule: the backend ``triton`` of its operators."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from iokernels import autotune
from iokernels.ops.gated_delta_rule.options import (
    DeltaOptions,
    Gradients,
    chunk_rows,
    empty_inverses,
    empty_state,
    log_decay_gradient,
)
from iokernels.ops.shared.layout import empty_in_order_of
from iokernels.ops.shared.triton_tiles import View, is_wide, padded, view
from iokernels.runtime.device import DeviceSpec, guard, spec_of

from . import tuning
from .backward import gated_delta_rule_bwd_walk_kernel
from .chunks import Features, Inputs, Places, Sizes
from .forward import gated_delta_rule_bwd_states_kernel, gated_delta_rule_fwd_kernel
from .grads import Given, gated_delta_rule_bwd_grads_kernel
from .inverse import gated_delta_rule_inverse_kernel
from .step import gated_delta_rule_step_kernel
from .tuning import TUNABLES

NONE = View(None, 0, 0, 0, 0)
"""What a kernel gets in the place of an input that it does not read."""


def forward(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, options: DeltaOptions) -> tuple[Tensor, Tensor, Tensor]:
    """Returns (out, final state, and what the backward pass needs). See :class:`DeltaOptions` for the arguments."""
    launch = Launch(q, k, v, options)
    out, final, inverses = empty_in_order_of(v, v.shape[3]), empty_state(q, v, options), empty_inverses(q, v, "triton")
    if launch.varlen:
        out.zero_()  # rows that belong to no sequence are visited by no block
    decay, initial = options.log_decay, options.initial_state
    with guard(q.device):
        config = launch.config(tuning.INVERSE, q)
        if launch.chunks * launch.heads > 0:
            gated_delta_rule_inverse_kernel[(launch.chunks * launch.heads,)](
                Inputs(NONE, view(k), NONE, view(beta), view(decay), NONE), view(inverses), launch.places,
                *launch.varying[:3], FEATURES=launch.features(decay, None), SIZES=launch.sizes(config, k),
                **_resources(config),
            )  # fmt: skip
        config = launch.config(tuning.WALKS[0], q)
        if (blocks := launch.walks(config)) > 0:
            gated_delta_rule_fwd_kernel[(blocks,)](
                Inputs(view(q), view(k), view(v), view(beta), view(decay), view(inverses)), view(initial), view(out),
                view(final), launch.places, *launch.varying, options.scale,
                FEATURES=launch.features(decay, initial), SIZES=launch.sizes(config, q, k, v, out),
                **_resources(config),
            )  # fmt: skip
    return out, final, inverses


def backward(
    dout: Tensor, dfinal: Tensor | None, q: Tensor, k: Tensor, v: Tensor, beta: Tensor, inverses: Tensor,
    options: DeltaOptions,
) -> Gradients:  # fmt: skip
    """The gradients of all arguments. ``dfinal`` is None where nobody used the final state."""
    launch = Launch(q, k, v, options)
    decay, initial = options.log_decay, options.initial_state
    shape, shared = v.shape[:3], launch.heads != k.shape[1]
    # Heads that share a key leave their gradients beside each other, to be added up in float32.
    dq, dk = (
        x.new_empty((*shape, launch.key_dim), dtype=torch.float32) if shared else empty_in_order_of(x, launch.key_dim)
        for x in (q, k)
    )
    dv, dinitial = empty_in_order_of(v, v.shape[3]), empty_state(q, v, options)
    written, right = torch.empty_like(v), torch.empty_like(v)
    states = q.new_empty((launch.chunks, launch.heads, launch.key_dim, v.shape[3]))
    dstates = torch.empty_like(states)
    grads_config = launch.config(tuning.GRADS, q)
    parts = triton.cdiv(launch.key_dim, grads_config.block_k)
    dbeta = q.new_empty((parts, *shape), dtype=torch.float32)
    ddecay = None if decay is None else torch.empty_like(dbeta)
    if launch.varlen:
        for gradient in (dq, dk, dv, dbeta, ddecay):
            if gradient is not None:
                gradient.zero_()
    inputs = Inputs(view(q), view(k), view(v), view(beta), view(decay), view(inverses))
    with guard(q.device):
        config = launch.config(tuning.WALKS[1], q)
        if (blocks := launch.walks(config)) > 0:
            gated_delta_rule_bwd_states_kernel[(blocks,)](
                inputs._replace(q=NONE), view(initial), view(states), view(written), launch.places, *launch.varying,
                FEATURES=launch.features(decay, initial), SIZES=launch.sizes(config, k, v, written),
                **_resources(config),
            )  # fmt: skip
        config = launch.config(tuning.WALKS[2], q)
        if (blocks := launch.walks(config)) > 0:
            gated_delta_rule_bwd_walk_kernel[(blocks,)](
                inputs._replace(v=view(dout)), view(dfinal), view(dv), view(right), view(dstates), view(dinitial),
                launch.places, *launch.varying, options.scale,
                FEATURES=launch.features(decay, dfinal), SIZES=launch.sizes(config, q, k, dout, dv, right),
                **_resources(config),
            )  # fmt: skip
        config = grads_config
        if launch.chunks * launch.heads > 0:
            given = Given(view(dout), view(written), view(right), view(states), view(dstates))
            gated_delta_rule_bwd_grads_kernel[(launch.chunks * launch.heads * parts,)](
                inputs._replace(inverse=NONE), given, view(dq), view(dk), dbeta, ddecay, launch.places,
                *launch.varying, beta.numel(), options.scale, FEATURES=launch.features(decay, None),
                SIZES=launch.sizes(config, q, k, v, dout, written, right, dq, dk), **_resources(config),
            )  # fmt: skip
    if shared:
        dq, dk = (_over_group(gradient, x) for gradient, x in ((dq, q), (dk, k)))
    if decay is not None and ddecay is not None:
        ddecay = log_decay_gradient(_over_parts(ddecay, decay), decay)
    return Gradients(dq, dk, dv, _over_parts(dbeta, beta), ddecay, None if initial is None else dinitial)


def step(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, state: Tensor, log_decay: Tensor | None, scale: float
) -> Tensor:
    """The next tokens; ``state [B, H, K, V]`` is updated in place."""
    launch = Launch(q, k, v, DeltaOptions())
    out = empty_in_order_of(v, v.shape[3])
    config = launch.config(tuning.STEP, q)
    if (blocks := launch.walks(config)) > 0:
        with guard(q.device):
            gated_delta_rule_step_kernel[(blocks,)](
                Inputs(view(q), view(k), view(v), view(beta), view(log_decay), NONE), view(state), view(out),
                *launch.varying[:3], scale, FEATURES=launch.features(log_decay, None), SIZES=launch.sizes(config),
                **_resources(config),
            )  # fmt: skip
    return out


def _over_group(gradient: Tensor, like: Tensor) -> Tensor:
    """The sum over the heads that share one, in the dtype and memory order of ``like``."""
    total = empty_in_order_of(like, like.shape[3])
    total.copy_(gradient.unflatten(1, (like.shape[1], -1)).sum(2))
    return total


def _over_parts(gradient: Tensor, like: Tensor) -> Tensor:
    """The sum of the parts, in the dtype and strides of ``like``."""
    total = torch.empty_like(like)
    total.copy_(gradient.sum(0) if gradient.shape[0] > 1 else gradient[0])
    return total


def _resources(config: tuning.Config) -> dict[str, Any]:
    """Options of the compiler, not arguments of a kernel."""
    return {"num_warps": config.num_warps, "num_stages": config.num_stages}


class Launch:
    """What every kernel of one call needs, from shapes and options only."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, options: DeltaOptions) -> None:
        batch, self.heads, rows, self.value_dim = v.shape
        self.key_dim = q.shape[3]
        self.chunk = chunk_rows(q.dtype, self.key_dim)
        self.varlen = options.cu_seqlens is not None
        self.sequences = options.sequences(v)
        self.places = Places(None, None, None)
        self.chunks = batch * triton.cdiv(rows, self.chunk)
        if options.cu_seqlens is not None:
            # As many as there can be, whatever the offsets are: the host does not read them.
            self.chunks = rows // self.chunk + self.sequences if self.sequences else 0
            self.places = Places(*chunk_table(options.cu_seqlens, rows, self.chunk, self.chunks))
        # What ``VARYING`` names, in its order, but for the scale.
        self.varying = (self.heads, self.heads // k.shape[1] if k.shape[1] else 1, rows, rows)
        self.half = q.dtype != torch.float32
        self.precision = "tf32" if torch.get_float32_matmul_precision() != "highest" else "ieee"
        self.inverse_precision = "tf32x3" if self.half or self.precision == "tf32" else "ieee"

    def features(self, decay: Tensor | None, state: Tensor | None) -> Features:
        """What a kernel that takes these is compiled for."""
        return Features(varlen=self.varlen, decay=decay is not None, state=state is not None)

    def walks(self, config: tuning.Config) -> int:
        """How many blocks walk along sequences."""
        return self.sequences * self.heads * triton.cdiv(self.value_dim, config.block_v)

    def config(self, kernel: str, q: Tensor) -> tuning.Config:
        """The launch parameters of ``kernel``."""
        device = spec_of(q.device)
        return autotune.select(TUNABLES[kernel], self.problem(kernel, q, device), device)

    def problem(self, kernel: str, q: Tensor, device: DeviceSpec) -> tuning.Problem:
        """What the launch parameters of ``kernel`` depend on. Positional: this is part of every call."""
        return tuning.Problem(
            kernel,
            padded(self.key_dim),
            padded(self.value_dim),
            self.chunk,
            q.element_size(),
            self.half or self.precision != "ieee",
            device.sm,
            device.smem_block,
            device.sms,
            autotune.bucket(self.sequences * self.heads),
            autotune.bucket(self.varying[2]),
        )

    def sizes(self, config: tuning.Config, *tensors: Tensor) -> Sizes:
        """What a kernel that reads and writes tiles of ``tensors`` is compiled for."""
        return Sizes(
            KEY_DIM=self.key_dim,
            VALUE_DIM=self.value_dim,
            BLOCK_K=config.block_k,
            BLOCK_V=config.block_v,
            BLOCK_C=self.chunk,
            PADDED_K=padded(self.key_dim),
            PADDED_V=padded(self.value_dim),
            WIDE=is_wide(self.chunk, *tensors),
            PRECISION=self.precision,
            SOLVE_PRECISION="tf32" if self.half else self.precision,
            INVERSE_PRECISION=self.inverse_precision,
        )


def chunk_table(cu_seqlens: Tensor, total: int, chunk: int, most: int) -> tuple[Tensor, Tensor, Tensor]:
    """Where packed sequences and their chunks lie, computed on the device, int32.

    Returns the offsets ``[S + 1]``, made to rise within ``[0, total]`` whatever they were; how many chunks stand before
    each sequence, ``[S]``; and ``[most, 2]``, first row and number of rows of each chunk (no rows past the last one).
    """
    offsets = cu_seqlens.clamp(0, total).cummax(0).values
    lengths = offsets[1:] - offsets[:-1]
    chunks = (lengths + (chunk - 1)) // chunk
    stops = chunks.cumsum(0, dtype=torch.int32)
    starts = stops - chunks
    number = torch.arange(most, device=offsets.device, dtype=torch.int32)
    sequence = torch.searchsorted(stops, number, right=True).clamp(max=max(lengths.shape[0] - 1, 0))
    if lengths.shape[0] == 0:
        return offsets, starts, offsets.new_empty((0, 2))
    within = (number - starts[sequence]) * chunk
    rows = (lengths[sequence] - within).clamp(0, chunk)
    # Past the last chunk ``within`` lies beyond its sequence: no rows, and a first row inside the tensor.
    first_row = (offsets[:-1][sequence] + within).clamp(max=total)
    return offsets, starts, torch.stack([first_row, rows], dim=1).to(torch.int32)

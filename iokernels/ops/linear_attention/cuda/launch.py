"""Launches ``csrc/linear_attention``: the backend ``cuda`` of ``linear_attention``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from iokernels import autotune
from iokernels.ops.linear_attention.options import Options, empty_denominator, empty_state, sequences
from iokernels.ops.shared.cuda_tiles import in_sixteens
from iokernels.ops.shared.layout import empty_in_order_of
from iokernels.runtime.cuda.kernel import Argument, cuda_kernel
from iokernels.runtime.device import guard, spec_of

from . import tuning


def forward(q: Tensor, k: Tensor, v: Tensor, options: Options) -> tuple[Tensor, Tensor, Tensor]:
    """Returns (out, final state, an empty tensor for the denominator). See :class:`Options` for the arguments."""
    out, state = empty_in_order_of(v, v.shape[3]), empty_state(q, v, options)
    if options.cu_seqlens is not None:
        out.zero_()  # rows that belong to no sequence are visited by no block
    if state.shape[0] * state.shape[1]:
        launch = Launch(q, k, v, options)
        initial = options.initial_state
        args = {
            "q_ptr": q,
            "k_ptr": k,
            "v_ptr": v,
            "out_ptr": out,
            "decay_ptr": launch.decay,
            "state_ptr": initial,
            "last_ptr": state,
            "cu_seqlens_ptr": launch.offsets,
            "stride_q": q.stride(),
            "stride_k": k.stride(),
            "stride_v": v.stride(),
            "stride_out": out.stride(),
            "stride_decay": strides(launch.decay),
            "stride_state": strides(initial),
            "stride_last": state.stride(),
        }
        with guard(q.device):
            launch.run(tuning.FORWARD, "forward", (q, k, v, out), args)
    return out, state, empty_denominator(v, options)


def backward(*arguments: Any) -> Any:
    """Returns the gradients: see :func:`.cuda_bwd.backward`."""
    from .backward import backward as run

    return run(*arguments)


class Launch:
    """What every kernel of one call needs, from shapes and options only."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, options: Options) -> None:
        self.q, self.v, self.options = q, v, options
        self.sequences = sequences(q, options)
        self.heads, self.rows = v.shape[1], v.shape[2]
        self.group = self.heads // k.shape[1]
        self.decay = _as_rows(options.log_decay)
        # Read without strides.
        self.offsets = None if options.cu_seqlens is None else options.cu_seqlens.contiguous()
        self.device = spec_of(q.device)

    def widths(self, kernel: str) -> tuple[int, int]:
        """Those of y and z: the gradients of q and k contract over the columns of v."""
        key, value = self.q.shape[3], self.v.shape[3]
        return (value, key) if kernel in (tuning.BACKWARD_Q, tuning.BACKWARD_K) else (key, value)

    def problem(self, kernel: str, crossing: bool = False) -> tuning.Problem:
        """What the launch parameters of ``kernel`` depend on."""
        mean = self.rows if self.offsets is None else self.rows // max(self.sequences, 1)
        y, z = self.widths(kernel)
        return tuning.Problem(
            -(-y // 16) * 16,
            -(-z // 16) * 16,
            crossing,
            self.device.sm,
            self.device.sms,
            self.device.smem_block,
            self.device.smem_sm,
            autotune.bucket(self.sequences * self.heads),
            autotune.bucket(mean),
        )

    def config(self, kernel: str, crossing: bool = False) -> tuning.Config:
        """The launch parameters of ``kernel``."""
        return autotune.select(tuning.TUNABLES[kernel], self.problem(kernel, crossing), self.device)

    def run(
        self, kernel: str, source: str, tiled: tuple[Tensor, ...], args: dict[str, Argument], *,
        crossing: bool = False, **constants: Any,
    ) -> None:  # fmt: skip
        """Launch ``kernel``, compiled for dtype, widths, tiles and the form of the decays, with a block for each slice
        of every head of every sequence. ``tiled`` are the tensors that go through tiles; ``args`` precede what every
        kernel takes last."""
        problem, config = self.problem(kernel, crossing), self.config(kernel, crossing)
        y, z = self.widths(kernel)
        made = cuda_kernel(
            f"linear_attention/{source}.cu",
            f"{kernel}_kernel",
            Element=self.q.dtype,
            Y_WIDTH=y,
            Z_WIDTH=z,
            CHUNK=config.chunk,
            WARPS=config.num_warps,
            DECAY=0 if self.decay is None else 2 if self.options.per_token() else 1,
            ALIGNED=all(map(in_sixteens, tiled)),
            **constants,
        )
        sizes = {"heads": self.heads, "group": self.group, "seqlen": self.rows, "scale": float(self.options.scale)}
        grid = self.sequences * self.heads * tuning.slices(problem, config)
        made.launch((grid,), 32 * config.num_warps, tuning.shared_bytes(problem, config), args | sizes)


def _as_rows(decay: Tensor | None) -> Tensor | None:
    """Decays as the kernels read them: float32, ``[B, H, N, 1]``, or one for all rows ``[1, H, 1, 1]``."""
    if decay is None:
        return None
    decay = decay.to(torch.float32)
    return decay[None, :, None, None] if decay.dim() == 1 else decay.unsqueeze(3)


def strides(x: Tensor | None) -> tuple[int, ...]:
    """Those of four dimensions; of None, which no kernel reads, zeros."""
    return (0, 0, 0, 0) if x is None else x.stride()

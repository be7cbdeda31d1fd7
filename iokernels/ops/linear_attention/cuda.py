"""Launches ``csrc/linear_attention/forward.cu``: the backend ``cuda`` of ``linear_attention``, its forward pass."""

from __future__ import annotations

import torch
from torch import Tensor

from iokernels import autotune
from iokernels.ops.cuda_tiles import in_sixteens
from iokernels.runtime.device import guard, spec_of
from iokernels.runtime.launch import CudaKernel, cuda_kernel

from . import tuning_cuda as tuning
from .options import Options, empty_denominator, empty_in_order_of, empty_state


def forward(q: Tensor, k: Tensor, v: Tensor, options: Options) -> tuple[Tensor, Tensor, Tensor]:
    """Returns (out, final state, an empty tensor for the denominator). See :class:`Options` for the arguments."""
    out, state = empty_in_order_of(v, v.shape[3]), empty_state(q, v, options)
    if options.cu_seqlens is not None:
        out.zero_()  # rows that belong to no sequence are visited by no block
    if state.shape[0] * state.shape[1]:
        with guard(q.device):
            launch = Launch(q, k, v, options)
            launch.run(out, state)
    return out, state, empty_denominator(v, options)


class Launch:
    """What the launch needs, from shapes and options only."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, options: Options) -> None:
        self.q, self.k, self.v, self.options = q, k, v, options
        packed = options.cu_seqlens
        self.sequences = v.shape[0] if packed is None else packed.shape[0] - 1
        self.heads, self.rows = v.shape[1], v.shape[2]
        self.decay = _as_rows(options.log_decay)
        device = spec_of(q.device)
        mean = self.rows if packed is None else self.rows // max(self.sequences, 1)
        self.problem = tuning.Problem(
            -(-q.shape[3] // 16) * 16,
            -(-v.shape[3] // 16) * 16,
            device.sm,
            device.sms,
            device.smem_block,
            device.smem_sm,
            autotune.bucket(self.sequences * self.heads),
            autotune.bucket(mean),
        )
        self.config = autotune.select(tuning.TUNABLE, self.problem, device)

    @property
    def grid(self) -> int:
        """Blocks: the slices of every head of every sequence."""
        return self.sequences * self.heads * tuning.slices(self.problem, self.config)

    def kernel(self, out: Tensor) -> CudaKernel:
        """The kernel, compiled for dtype, widths, tiles and the form of the decays."""
        decay = self.options.log_decay
        return cuda_kernel(
            "linear_attention/forward.cu",
            "linear_attention_cuda_kernel",
            Element=self.q.dtype,
            KEY_WIDTH=self.q.shape[3],
            VALUE_WIDTH=self.v.shape[3],
            CHUNK=self.config.chunk,
            WARPS=self.config.num_warps,
            DECAY=0 if decay is None else 2 if self.options.per_token() else 1,
            ALIGNED=all(in_sixteens(x) for x in (self.q, self.k, self.v, out)),
        )

    def run(self, out: Tensor, state: Tensor) -> None:
        """Write ``out`` and the final ``state``."""
        q, k, v, options = self.q, self.k, self.v, self.options
        initial, packed = options.initial_state, options.cu_seqlens
        args = {
            "q_ptr": q,
            "k_ptr": k,
            "v_ptr": v,
            "out_ptr": out,
            "decay_ptr": self.decay,
            "state_ptr": initial,
            "last_ptr": state,
            "cu_seqlens_ptr": None if packed is None else packed.contiguous(),
            "stride_q": q.stride(),
            "stride_k": k.stride(),
            "stride_v": v.stride(),
            "stride_out": out.stride(),
            "stride_decay": _strides(self.decay),
            "stride_state": _strides(initial),
            "stride_last": state.stride(),
            "heads": self.heads,
            "group": self.heads // q.shape[1],
            "seqlen": self.rows,
            "scale": float(options.scale),
        }
        smem = tuning.shared_bytes(self.problem, self.config)
        self.kernel(out).launch((self.grid,), 32 * self.config.num_warps, smem, args)


def _as_rows(decay: Tensor | None) -> Tensor | None:
    """Decays as the kernel reads them: float32, ``[B, H, N, 1]``, or one for all rows ``[1, H, 1, 1]``."""
    if decay is None:
        return None
    decay = decay.to(torch.float32)
    return decay[None, :, None, None] if decay.dim() == 1 else decay.unsqueeze(3)


def _strides(x: Tensor | None) -> tuple[int, ...]:
    return (0, 0, 0, 0) if x is None else x.stride()

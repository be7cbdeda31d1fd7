"""Launches ``csrc/flash_attention/*.cu``: the backend ``cuda`` of the operator."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from iokernels import autotune
from iokernels.ops.flash_attention.options import Gradients, Needs, Options, empty_out, empty_statistics
from iokernels.ops.shared.cuda_tiles import in_sixteens
from iokernels.ops.shared.layout import empty_in_order_of
from iokernels.ops.shared.windows import clamp
from iokernels.runtime.cuda.kernel import Argument, Constant, Int64, cuda_kernel
from iokernels.runtime.device import guard, spec_of

from . import tuning


def forward(q: Tensor, k: Tensor, v: Tensor, options: Options) -> tuple[Tensor, Tensor]:
    """Returns (out, lse), the kernels having neither bias nor slopes. See :class:`Options` for the arguments."""
    out, lse = empty_out(q, v), empty_statistics(q, options)
    launch = Launch(q, k, v, options)
    if launch.packed:
        # Rows that belong to no sequence are visited by no block.
        out.zero_()
        lse.fill_(float("-inf"))
    config, constants, smem = launch.of_kernel(tuning.FORWARD, q, k, v, out)
    blocks = launch.sequences * launch.heads * -(-launch.seqlen_q // (16 * config.warps))
    if blocks > 0:
        kernel = cuda_kernel("flash_attention/forward.cu", "flash_attention_forward", BLOCK_N=config.block, **constants)
        args = _named(q=q, k=k, v=v, out=out, lse=lse) | launch.offsets
        args |= _strides(q=q, k=k, v=v, out=out, lse=lse) | launch.numbers
        with guard(q.device):
            kernel.launch((blocks,), 32 * config.warps, smem, args)
    return out, lse


def backward(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    options: Options, needs: Needs,
) -> Gradients:  # fmt: skip
    """Returns the gradients that ``needs`` asks for. ``dlse`` is None where nobody used the LSE."""
    launch = Launch(q, k, v, options)
    dq = empty_in_order_of(q, q.shape[3]) if needs.q else None
    dk = empty_in_order_of(k, k.shape[3]) if needs.k else None
    dv = empty_in_order_of(v, v.shape[3]) if needs.v else None
    # A tensor of which no block is launched, or some rows belong to no sequence, is not written throughout.
    nothing = launch.seqlen_q == 0 or launch.seqlen_k == 0 or launch.sequences == 0 or launch.heads == 0
    for grad in (dq, dk, dv):
        if grad is not None and (nothing or launch.packed):
            grad.zero_()
    if not nothing:
        with guard(q.device):
            delta = _delta(out, dout, dlse)
            inputs = {"q": q, "k": k, "v": v, "dout": dout}
            statistics = {"lse": lse, "delta": delta}
            if dq is not None:
                _launch_q(launch, inputs, statistics, dq)
            if dk is not None or dv is not None:
                _launch_kv(launch, inputs, statistics, dk, dv)
    return Gradients(dq, dk, dv)


_DELTA_WARPS = 4


def _delta(out: Tensor, dout: Tensor, dlse: Tensor | None) -> Tensor:
    """float32 [B, Hq, Nq]."""
    batch, heads, rows, width = out.shape
    delta = torch.empty((batch, heads, rows), dtype=torch.float32, device=out.device)
    kernel = cuda_kernel(
        "flash_attention/delta.cu",
        "flash_attention_delta",
        Element=out.dtype,
        VALUE_DIM=width,
        WARPS=_DELTA_WARPS,
        ALIGNED=in_sixteens(out) and in_sixteens(dout),
    )
    args = _named(out=out, dout=dout, dlse=dlse, delta=delta) | _strides(out=out, dout=dout, dlse=dlse)
    args |= {"heads": heads, "rows": rows, "total": Int64(delta.numel())}
    # A lane has 8 columns of a row, and a row's lanes are a power of two.
    lanes = min(1 << (-(-width // 8) - 1).bit_length(), 32)
    rows_of_block = _DELTA_WARPS * (32 // lanes)
    kernel.launch((-(-delta.numel() // rows_of_block),), 32 * _DELTA_WARPS, 0, args)
    return delta


def _launch_q(launch: Launch, inputs: dict[str, Tensor], statistics: dict[str, Tensor], dq: Tensor) -> None:
    config, constants, smem = launch.of_kernel(tuning.BACKWARD_Q, *inputs.values(), dq)
    kernel = cuda_kernel(
        "flash_attention/backward_q.cu", "flash_attention_backward_q", BLOCK_N=config.block, **constants
    )
    tensors = {**inputs, **statistics, "dq": dq}
    args = _named(**tensors) | launch.offsets | _strides(**tensors) | launch.numbers | {"scale": launch.scale}
    blocks = launch.sequences * launch.heads * -(-launch.seqlen_q // (16 * config.warps))
    kernel.launch((blocks,), 32 * config.warps, smem, args)


def _launch_kv(
    launch: Launch, inputs: dict[str, Tensor], statistics: dict[str, Tensor], dk: Tensor | None, dv: Tensor | None
) -> None:
    outputs = [x for x in (dk, dv) if x is not None]
    config, constants, smem = launch.of_kernel(tuning.BACKWARD_KV, *inputs.values(), *outputs)
    # Registers hold the sums of both gradients up to a width; beyond, a launch makes one of them.
    together = max(launch.problem.block_d, launch.problem.block_v) <= tuning.HELD
    blocks = launch.sequences * inputs["k"].shape[1] * -(-launch.seqlen_k // (16 * config.warps))
    for grad_k, grad_v in ((True, True),) if together else ((True, False), (False, True)):
        tensors = {
            **inputs, **statistics, "dk": dk if grad_k else None, "dv": dv if grad_v else None
        }  # fmt: skip
        if tensors["dk"] is None and tensors["dv"] is None:
            continue
        kernel = cuda_kernel(
            "flash_attention/backward_kv.cu",
            "flash_attention_backward_kv",
            BLOCK_M=config.block,
            GRAD_K=tensors["dk"] is not None,
            GRAD_V=tensors["dv"] is not None,
            **constants,
        )
        args = _named(**tensors) | launch.offsets | _strides(**tensors) | launch.numbers | {"scale": launch.scale}
        kernel.launch((blocks,), 32 * config.warps, smem, args)


def _named(**tensors: Tensor | None) -> dict[str, Argument]:
    return {f"{name}_ptr": x for name, x in tensors.items()}


def _strides(**tensors: Tensor | None) -> dict[str, Argument]:
    """Strides by name; zeros for what is absent: a row of statistics has three, the others four."""
    absent = {"dlse": (0, 0, 0)}
    return {f"stride_{name}": absent.get(name, (0,) * 4) if x is None else x.stride() for name, x in tensors.items()}


class Launch:
    """What every kernel of one call needs, from shapes and options only."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, options: Options) -> None:
        batch, self.heads, rows, self.head_dim = q.shape
        keys, self.value_dim = v.shape[2:]
        offsets = options.cu_seqlens_q
        self.packed = offsets is not None
        self.sequences = batch if offsets is None else offsets.shape[0] - 1
        self.seqlen_q = min(options.max_seqlen_q, rows) if self.packed else rows
        self.seqlen_k = min(options.max_seqlen_k, keys) if self.packed else keys
        self.offsets: dict[str, Argument] = {
            "offsets_q_ptr": None if options.cu_seqlens_q is None else options.cu_seqlens_q.contiguous(),
            "offsets_k_ptr": None if options.cu_seqlens_k is None else options.cu_seqlens_k.contiguous(),
        }
        softcap = options.softcap
        self.scale = options.scale
        self.numbers: dict[str, Argument] = {
            "heads": self.heads,
            "group": self.heads // k.shape[1],
            "seqlen_q": self.seqlen_q,
            "seqlen_k": self.seqlen_k,
            "total_q": rows,
            "total_k": keys,
            "qk_scale": float(options.scale / softcap if softcap > 0.0 else options.scale * math.log2(math.e)),
            "softcap_log2": softcap * math.log2(math.e),
            "window_left": clamp(options.window_left),
            "window_right": clamp(options.window_right),
        }
        self.device = spec_of(q.device)
        self.softcap = softcap > 0.0
        self.problem = tuning.Problem(
            tuning.FORWARD,
            padded(self.head_dim),
            padded(self.value_dim),
            options.window_right >= 0,
            self.device.sm,
            self.device.smem_block,
            self.device.smem_sm,
            autotune.bucket(self.sequences * self.heads),
            autotune.bucket(self.seqlen_q),
            autotune.bucket(self.seqlen_k),
            self.softcap,
        )

    def of_kernel(self, kernel: str, *tensors: Tensor) -> tuple[tuning.Config, dict[str, Constant], int]:
        """The launch parameters of ``kernel``, what it is compiled for, and its bytes of shared memory. ``tensors`` are
        those that it reaches by tiles."""
        problem = self.problem._replace(kernel=kernel)
        config = autotune.select(tuning.TUNABLES[kernel], problem, self.device)
        constants: dict[str, Constant] = {
            "Element": tensors[0].dtype,
            "HEAD_DIM": self.head_dim,
            "VALUE_DIM": self.value_dim,
            "WARPS": config.warps,
            "SOFTCAP": self.softcap,
            "ALIGNED": all(in_sixteens(x) for x in tensors),
        }
        return config, constants, tuning.shared_bytes(problem, config)


def padded(width: int) -> int:
    """A width in whole fragments of 16."""
    return -(-width // 16) * 16

"""Launches the Triton kernels of this room: the backend ``triton`` of the operators."""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
from torch import Tensor

from iokernels import autotune
from iokernels.ops.flash_attention.dropout import threshold
from iokernels.ops.flash_attention.options import Gradients, Needs, Options, empty_out, empty_statistics, lse_and_tail
from iokernels.ops.shared.layout import empty_in_order_of
from iokernels.ops.shared.triton_tiles import is_wide, padded, view
from iokernels.ops.shared.windows import clamp
from iokernels.runtime.device import DeviceSpec, guard, spec_of

from . import tuning
from .backward_bias import One, flash_attention_bwd_dbias_kernel
from .backward_kv import flash_attention_bwd_dkv_kernel
from .backward_q import Given, flash_attention_bwd_delta_kernel, flash_attention_bwd_dq_kernel
from .forward import Results, flash_attention_fwd_kernel
from .scores import Extras, Features, Inputs, Scales, Sizes
from .tuning import TUNABLES


def forward(q: Tensor, k: Tensor, v: Tensor, options: Options) -> tuple[Tensor, Tensor]:
    """Returns out and the statistics (:func:`empty_statistics`). See :class:`Options` for the arguments."""
    out, statistics = empty_out(q, v), empty_statistics(q, options)
    lse, tail = lse_and_tail(statistics)
    launch = Launch(q, k, v, options)
    if launch.features.varlen:
        # Rows that belong to no sequence are visited by no block.
        out.zero_()
        lse.fill_(float("-inf"))
        if tail is not None:
            tail.zero_()
    config = launch.config("flash_attention_fwd", q)
    blocks = launch.sequences * launch.heads * triton.cdiv(launch.seqlen_q, config.block_m)
    if blocks > 0:
        with guard(q.device):
            flash_attention_fwd_kernel[(blocks,)](
                launch.inputs, Results(view(out), view(lse), tail), launch.extras, *launch.varying, launch.scales,
                FEATURES=launch.features, SIZES=launch.sizes(config, q, k, v, out), **launch.resources(config),
            )  # fmt: skip
    return out, statistics


def backward(
    dout: Tensor, dstatistics: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, statistics: Tensor,
    options: Options, needs: Needs,
) -> Gradients:  # fmt: skip
    """Returns the gradients that ``needs`` asks for. ``dstatistics`` is None where nobody used the LSE."""
    launch = Launch(q, k, v, options)
    # The kernels step through statistics by single elements.
    lse, tail = lse_and_tail(statistics.contiguous())
    dlse = None if dstatistics is None else lse_and_tail(dstatistics)[0]
    delta = torch.empty_like(lse)
    dq = empty_in_order_of(q, q.shape[3]) if needs.q else None
    dk = empty_in_order_of(k, k.shape[3]) if needs.k or needs.v else None
    dv = empty_in_order_of(v, v.shape[3]) if needs.k or needs.v else None
    dbias = torch.empty(options.bias.shape, dtype=options.bias.dtype, device=q.device) if needs.bias else None
    # A tensor of which no block is launched, or some rows belong to no sequence, is not written throughout.
    nothing = launch.seqlen_q == 0 or launch.seqlen_k == 0 or launch.sequences == 0 or launch.heads == 0
    for grad in (dq, dk, dv):
        if grad is not None and (nothing or launch.features.varlen):
            grad.zero_()
    # The longest lengths of a packed call are bounds; the blocks end with the tensors.
    if dbias is not None and (nothing or dbias.shape[2] > launch.seqlen_q or dbias.shape[3] > launch.seqlen_k):
        dbias.zero_()

    with guard(q.device):
        _launch_delta(launch, out, dout, dlse, delta)
        given = Given(view(dout), view(lse), tail, delta)
        if dq is not None and not nothing:
            config = launch.config("flash_attention_bwd_dq", q)
            grid = (launch.sequences * launch.heads * triton.cdiv(launch.seqlen_q, config.block_m),)
            flash_attention_bwd_dq_kernel[grid](
                launch.inputs, given, view(dq), launch.extras, *launch.varying, launch.scales,
                FEATURES=launch.features, SIZES=launch.sizes(config, q, k, v, dout, dq), **launch.resources(config),
            )  # fmt: skip
        if dk is not None and dv is not None and not nothing:
            config = launch.config("flash_attention_bwd_dkv", q)
            grid = (launch.sequences * k.shape[1] * triton.cdiv(launch.seqlen_k, config.block_n),)
            flash_attention_bwd_dkv_kernel[grid](
                launch.inputs, given, view(dk), view(dv), launch.extras, *launch.varying, launch.scales,
                FEATURES=launch.features, SIZES=launch.sizes(config, q, k, v, dout, dk, dv), **launch.resources(config),
            )  # fmt: skip
        if dbias is not None and not nothing:
            config = launch.config("flash_attention_bwd_dbias", q)
            one = One(*(size == 1 for size in dbias.shape))
            row_tiles = 1 if one.ROW else triton.cdiv(launch.seqlen_q, config.block_m)
            key_tiles = 1 if one.KEY else triton.cdiv(launch.seqlen_k, config.block_n)
            flash_attention_bwd_dbias_kernel[(dbias.shape[0] * dbias.shape[1] * row_tiles * key_tiles,)](
                launch.inputs, given, view(dbias), launch.extras, *launch.varying, launch.sequences, launch.scales,
                ONE=one, FEATURES=launch.features, SIZES=launch.sizes(config, q, k, v, dout),
                **launch.resources(config),
            )  # fmt: skip
    return Gradients(
        q=dq,
        k=dk if needs.k else None,
        v=dv if needs.v else None,
        bias=dbias,
        sinks=_sinks_gradient(options.sinks, lse, tail, delta) if needs.sinks and options.sinks is not None else None,
    )


def _launch_delta(launch: Launch, out: Tensor, dout: Tensor, dlse: Tensor | None, delta: Tensor) -> None:
    batch, heads, rows, value_dim = out.shape
    if delta.numel() == 0:
        return
    block_v = padded(value_dim)
    block_m = max(16, 4096 // block_v)
    flash_attention_bwd_delta_kernel[(batch * heads * triton.cdiv(rows, block_m),)](
        view(out), view(dout), view(dlse), view(delta), heads, rows,
        VALUE_DIM=value_dim, BLOCK_V=block_v, BLOCK_M=block_m, WIDE=is_wide(block_m, out, dout), num_warps=4,
    )  # fmt: skip


def _sinks_gradient(sinks: Tensor, lse: Tensor, tail: Tensor | None, delta: Tensor) -> Tensor:
    """A sink is a logit whose weight exp(sink - lse) has no value: dsink = -sum of weight * delta."""
    logit = sinks.to(lse.dtype)[None, :, None] - lse
    weight = torch.exp(logit if tail is None else logit - tail)
    # Rows of no sequence, or of a sink of -inf without keys, have lse = -inf and take no part.
    return -(weight * delta).masked_fill_(lse == float("-inf"), 0.0).sum((0, 2)).to(sinks.dtype)


class Launch:
    """What every kernel of one call needs, from shapes and options only."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, options: Options) -> None:
        batch, self.heads, rows, self.head_dim = q.shape
        keys, self.value_dim = v.shape[2:]
        varlen = options.cu_seqlens_q is not None
        self.sequences = options.cu_seqlens_q.shape[0] - 1 if options.cu_seqlens_q is not None else batch
        self.seqlen_q = min(options.max_seqlen_q, rows) if varlen else rows
        self.seqlen_k = min(options.max_seqlen_k, keys) if varlen else keys
        softcap, changes = options.softcap > 0.0, options.keeps_tail
        self.features = Features(
            varlen=varlen,
            left=options.window_left >= 0,
            right=options.window_right >= 0,
            softcap=softcap,
            bias=options.bias is not None,
            mask=options.mask is not None,
            alibi=options.alibi_slopes is not None,
            sinks=options.sinks is not None,
            dropout=options.dropout_p > 0.0,
            natural=changes,
            # In float32 the kernel would multiply -inf by a smaller scale than this as by 0.
            fold_scale=options.scale > 1e-30 and not softcap and not changes,
        )
        # Vectors of a few elements, which the kernels index without strides.
        cu_seqlens_q, cu_seqlens_k, sinks = (
            None if x is None else x.contiguous() for x in (options.cu_seqlens_q, options.cu_seqlens_k, options.sinks)
        )
        self.inputs = Inputs(view(q), view(k), view(v), cu_seqlens_q, cu_seqlens_k)
        mask = None if options.mask is None else options.mask.view(torch.uint8)
        self.extras = Extras(view(options.bias), view(mask), view(options.alibi_slopes), sinks, options.dropout_seed)
        unit = 1.0 if changes else math.log2(math.e)
        self.scales = Scales(
            scale=options.scale,
            qk_scale=options.scale / options.softcap if softcap else options.scale * unit,
            softcap=options.softcap * unit,
            dropout_scale=1.0 / (1.0 - options.dropout_p),
        )
        # What ``VARYING`` names, in its order.
        self.varying = (
            self.heads, self.heads // k.shape[1], self.seqlen_q, self.seqlen_k, rows, keys,
            clamp(options.window_left), clamp(options.window_right), threshold(options.dropout_p),
        )  # fmt: skip
        self.block_d, self.block_v = padded(self.head_dim), padded(self.value_dim)
        self.precision = "tf32" if torch.get_float32_matmul_precision() != "highest" else "ieee"

    def config(self, kernel: str, q: Tensor) -> tuning.Config:
        """The launch parameters of ``kernel``."""
        device = spec_of(q.device)
        return autotune.select(TUNABLES[kernel], self.problem(kernel, q, device), device)

    def problem(self, kernel: str, q: Tensor, device: DeviceSpec) -> tuning.Problem:
        """What the launch parameters of ``kernel`` depend on. Positional: this is part of every call."""
        features = self.features
        return tuning.Problem(
            kernel,
            self.block_d,
            self.block_v,
            q.element_size(),
            q.dtype != torch.float32 or self.precision != "ieee",
            features.bias or features.mask or features.alibi or features.softcap or features.dropout,
            device.sm,
            device.smem_block,
            features.right,
            features.left,
            autotune.bucket(self.sequences * self.heads),
            autotune.bucket(self.seqlen_q),
            autotune.bucket(self.seqlen_k),
        )

    def sizes(self, config: tuning.Config, *tensors: Tensor) -> Sizes:
        """What a kernel that reads and writes tiles of ``tensors`` is compiled for."""
        wide = is_wide(max(config.block_m, config.block_n), *tensors)
        return Sizes(
            self.head_dim, self.value_dim, self.block_d, self.block_v, config.block_m, config.block_n, wide,
            self.precision,
        )  # fmt: skip

    def resources(self, config: tuning.Config) -> dict[str, Any]:
        """Options of the compiler, not arguments of a kernel."""
        return {"num_warps": config.num_warps, "num_stages": config.num_stages}

"""Launches the Triton kernels of block-sparse attention: the backend ``triton`` of the operator."""

from __future__ import annotations

import math

import torch
import triton
from torch import Tensor

from iokernels import autotune
from iokernels.ops.block_sparse_attention.index.transposed import transposed_lists
from iokernels.ops.block_sparse_attention.options import Gradients, Options, empty_lse, packed_heads
from iokernels.ops.shared.layout import empty_in_order_of
from iokernels.ops.shared.triton_tiles import padded, strides
from iokernels.ops.shared.windows import clamp
from iokernels.runtime.device import DeviceSpec, guard, spec_of

from . import tuning
from .backward_kv import block_sparse_bwd_dkv_kernel
from .backward_q import block_sparse_bwd_dq_kernel
from .forward import block_sparse_combine_kernel, block_sparse_fwd_kernel
from .keys import Features
from .tuning import TUNABLES


def forward(q: Tensor, k: Tensor, v: Tensor, options: Options) -> tuple[Tensor, Tensor]:
    """Returns (out, lse). See :class:`Options` for the arguments."""
    out, lse = empty_in_order_of(q, v.shape[3]), empty_lse(q)
    if lse.numel() == 0:
        return out, lse
    launch = Launch(q, k, v, options)
    config = launch.config(tuning.FWD)
    row_tiles = triton.cdiv(launch.item_rows, config.block_m)
    tiles = launch.items * row_tiles
    parts, partials = config.parts, lse
    if parts > 1:
        shape = (tiles * parts, config.block_m, v.shape[3] + 2)
        partials = torch.empty(shape, dtype=torch.float32, device=q.device)
    features = launch.features(q, k, v, out, lse)
    with guard(q.device):
        block_sparse_fwd_kernel[(tiles * parts,)](
            q, k, v, out, lse, *launch.lists, launch.seqlens, launch.table, partials,
            strides(q), strides(k), strides(v), strides(out), strides(lse), *launch.list_strides, launch.stride_table,
            *launch.numbers(row_tiles), parts, launch.qk_scale,
            FEATURES=features, BLOCK_M=config.block_m, BLOCK_N=config.block_n, **launch.constants,
            num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip
        if parts > 1:
            constants = {name: launch.constants[name] for name in ("VALUE_DIM", "BLOCK_V")}
            block_sparse_combine_kernel[(tiles,)](
                out, lse, launch.seqlens, partials, strides(out), strides(lse), *launch.numbers(row_tiles),
                parts, FEATURES=features, BLOCK_M=config.block_m, **constants, num_warps=4,
            )  # fmt: skip
    return out, lse


def backward(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    options: Options, needs: tuple[bool, ...],
) -> Gradients:  # fmt: skip
    """Returns the gradients that ``needs`` asks for. ``dlse`` is None where nobody used the LSE."""
    needs_q, needs_k, needs_v = needs
    dq = empty_in_order_of(q, q.shape[3]) if needs_q else None
    both = needs_k or needs_v
    dk = empty_in_order_of(k, k.shape[3]) if both else None
    dv = empty_in_order_of(v, v.shape[3]) if both else None
    if lse.numel() > 0:
        launch = Launch(q, k, v, options)
        delta = torch.empty_like(lse)
        with guard(q.device):
            _launch_dq(launch, dout, dlse, q, k, v, out, lse, delta, dq)
            if dk is not None and dv is not None and dk.numel() > 0:
                _launch_dkv(launch, dout, q, k, v, lse, delta, dk, dv)
    else:
        for grad in (dk, dv):
            if grad is not None:
                grad.zero_()
    return Gradients(dq, dk if needs_k else None, dv if needs_v else None)


def _launch_dq(
    launch: Launch, dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    delta: Tensor, dq: Tensor | None,
) -> None:  # fmt: skip
    config = launch.config(tuning.DQ)
    row_tiles = triton.cdiv(launch.item_rows, config.block_m)
    of_rows = [x for x in (q, out, dout, dlse, dq) if x is not None]
    block_sparse_bwd_dq_kernel[(launch.items * row_tiles,)](
        q, k, v, out, dout, lse, dlse, delta, dq, *launch.lists,
        strides(q), strides(k), strides(v), strides(out), strides(dout), strides(lse), strides(dlse), strides(dq),
        *launch.list_strides, *launch.numbers(row_tiles), launch.options.scale, launch.qk_scale,
        FEATURES=launch.features(*of_rows, k, v), HAS_DLSE=dlse is not None, NEEDS_DQ=dq is not None,
        BLOCK_M=config.block_m, BLOCK_N=config.block_n, **launch.constants,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip


def _launch_dkv(
    launch: Launch, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, delta: Tensor, dk: Tensor, dv: Tensor
) -> None:
    config, options = launch.config(tuning.DKV), launch.options
    batch, kv_heads, keys, _ = k.shape
    ratio = max(config.block_n // options.block_k, 1)
    lists = launch.group // launch.packed
    found = transposed_lists(
        options.indices, options.counts, triton.cdiv(keys, options.block_k), ratio=ratio, joined=lists
    )  # fmt: skip
    key_tiles = triton.cdiv(keys, config.block_n)
    block_sparse_bwd_dkv_kernel[(batch * kv_heads * key_tiles,)](
        q, k, v, dout, lse, delta, dk, dv, *found, launch.sink, launch.window,
        strides(q), strides(k), strides(v), strides(dout), strides(lse), strides(dk), strides(dv),
        launch.packed, kv_heads, launch.group, launch.rows, launch.query_blocks, lists, q.shape[2], keys, key_tiles,
        found.starts.shape[2] - 1, found.entries.shape[2],
        clamp(options.sink), clamp(options.window), options.scale, launch.qk_scale,
        FEATURES=launch.features(q, k, v, dout, dk, dv), SHARED=options.counts.shape[1] == 1,
        SPAN=max(config.block_n, options.block_k), BLOCK_L=triton.next_power_of_2(lists),
        BLOCK_M=config.block_m, BLOCK_N=config.block_n, **launch.constants,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip


class Launch:
    """What the kernels of one call need, from shapes and options only."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, options: Options) -> None:
        batch, heads, self.seqlen_q, head_dim = q.shape
        kv_heads, value_dim = k.shape[1], v.shape[3]
        self.q, self.options = q, options
        self.group = heads // kv_heads
        self.packed = packed_heads(heads, kv_heads, options.counts.shape[1])
        self.packs = heads // self.packed
        self.query_blocks = options.counts.shape[2]
        self.rows = self.seqlen_q if self.query_blocks == 1 else options.block_q
        self.item_rows = self.rows * self.packed
        self.items = batch * self.packs * self.query_blocks
        self.paged = options.block_table is not None
        self.page = k.shape[2] if self.paged else 0
        # Vectors of a few elements, which the kernels index without strides.
        self.sink, self.window, self.seqlens = (
            None if x is None else x.contiguous()
            for x in (options.sink_heads, options.window_heads, options.cache_seqlens)
        )
        self.lists = (options.indices, options.counts, self.sink, self.window)
        self.list_strides = (strides(options.indices), strides(options.counts))
        # Rows of the page table are read one after the other.
        table = options.block_table
        self.table = table if table is None or table.stride(1) == 1 or table.shape[1] == 1 else table.contiguous()
        self.stride_table = 0 if self.table is None else self.table.stride(0)
        self.qk_scale = options.scale * math.log2(math.e)
        self.constants = {
            "HEAD_DIM": head_dim,
            "VALUE_DIM": value_dim,
            "BLOCK_D": padded(head_dim),
            "BLOCK_V": padded(value_dim),
            "PRECISION": "tf32" if torch.get_float32_matmul_precision() != "highest" else "ieee",
        }

    def numbers(self, row_tiles: int) -> tuple[int, ...]:
        """In the order of the kernels' arguments."""
        options = self.options
        return (
            self.packed, self.packs, self.group, self.rows, self.query_blocks, row_tiles, options.indices.shape[3],
            self.seqlen_q, options.kv_len, clamp(options.sink), clamp(options.window),
        )  # fmt: skip

    def features(self, *tensors: Tensor) -> Features:
        """What a kernel that addresses ``tensors`` is compiled for."""
        return Features(
            causal=self.options.causal,
            block_k=self.options.block_k,
            page=self.page,
            sink_heads=self.sink is not None,
            window_heads=self.window is not None,
            one_list=self.options.counts.shape[1] == 1,
            lengths=self.options.cache_seqlens is not None,
            wide=any(_reach(x) >= 2**31 for x in tensors),
        )

    def config(self, kernel: str) -> tuning.Config:
        """The launch parameters of ``kernel``."""
        device = spec_of(self.q.device)
        return autotune.select(TUNABLES[kernel], self.problem(kernel, device), device)

    def problem(self, kernel: str, device: DeviceSpec) -> tuning.Problem:
        """What the launch parameters of ``kernel`` depend on. Positional: this is part of every call."""
        return tuning.Problem(
            kernel,
            self.constants["BLOCK_D"],
            self.constants["BLOCK_V"],
            self.q.element_size(),
            self.q.dtype != torch.float32 or self.constants["PRECISION"] != "ieee",
            self.options.block_k,
            self.paged,
            device.sm,
            device.sms,
            device.smem_block,
            padded(self.item_rows),
            autotune.bucket(self.items),
            autotune.bucket(self.options.kv_len),
        )


def _reach(x: Tensor) -> int:
    """How far the last element of a sequence is from its first, all heads included."""
    return sum((size - 1) * abs(step) for size, step in zip(x.shape[1:], x.stride()[1:], strict=True))

"""Launches ``csrc/lean_attention/forward.cu``: the backend ``cuda`` of the operator."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from iokernels import autotune
from iokernels.runtime.device import DeviceSpec, guard, spec_of
from iokernels.runtime.launch import CudaKernel, Int64, cuda_kernel

from . import tuning_cuda as tuning
from .arrivals import ARRIVALS, arrivals_of
from .options import Options, as_bytes, capacity, empty_lse, empty_out, per_key

MOST_ROWS = 64
"""Rows of a row tile: more heads and positions of a key head make several, each of which reads the keys."""

CODES = {torch.int8: 1, torch.float8_e4m3fn: 2}
"""How a quantised cache is decoded; 0 where there is nothing to decode."""


def forward(q: Tensor, k_cache: Tensor, v_cache: Tensor, options: Options) -> tuple[Tensor, Tensor]:
    """Returns (out, lse). See :class:`Options` for the arguments."""
    out, lse = empty_out(q, v_cache), empty_lse(q)
    if out.numel() == 0:
        return out, lse
    launch = Launch(q, k_cache, v_cache, options)
    table = options.block_table
    if table is not None and table.stride(1) != 1 and table.shape[1] != 1:
        table = table.contiguous()
    scales = [x if x is None or per_key(x) else x.contiguous() for x in (options.k_scale, options.v_scale)]
    softcap = options.softcap
    with guard(q.device):
        arrivals = arrivals_of(q.device, launch.items)
        args = {
            "q_ptr": q,
            "k_ptr": as_bytes(k_cache),
            "v_ptr": as_bytes(v_cache),
            "out_ptr": out,
            "lse_ptr": lse,
            "seqlens_ptr": options.cache_seqlens.contiguous(),
            "table_ptr": table,
            "sinks_ptr": None if options.sinks is None else options.sinks.to(torch.float32).contiguous(),
            "k_scale_ptr": scales[0],
            "v_scale_ptr": scales[1],
            "partial_ptr": launch.workspace(),
            "arrivals_ptr": arrivals,
            "stride_q": q.stride(),
            "stride_k": k_cache.stride(),
            "stride_v": v_cache.stride(),
            "stride_out": out.stride(),
            "stride_lse": lse.stride(),
            "stride_k_scale": _stride(scales[0]),
            "stride_v_scale": _stride(scales[1]),
            "stride_table": Int64(0 if table is None else table.stride(0)),
            "batch": q.shape[0],
            "rows": q.shape[2],
            "group": q.shape[1] // k_cache.shape[1],
            "kv_heads": k_cache.shape[1],
            "row_tiles": launch.row_tiles,
            "capacity": capacity(k_cache, options),
            "page": 0 if table is None else k_cache.shape[2],
            "qk_scale": float(options.scale / softcap if softcap > 0.0 else options.scale * math.log2(math.e)),
            "softcap_log2": softcap * math.log2(math.e),
            "window_left": _clamp(options.window_left),
            "window_right": _clamp(options.window_right),
            "fewest_tiles": tuning.FEWEST_TILES,
            "most_parts": launch.most_parts,
            "part_tiles": launch.part_tiles,
        }
        try:
            launch.kernel().launch((launch.grid,), 32 * launch.warps, launch.smem, args)
        except BaseException:
            ARRIVALS.clear()  # a kernel that was broken off leaves counts behind
            raise
    return out, lse


class Launch:
    """What one call launches, from shapes and options only."""

    def __init__(self, q: Tensor, k_cache: Tensor, v_cache: Tensor, options: Options) -> None:
        batch, heads, rows, _ = q.shape
        kv_heads, readers = k_cache.shape[1], heads // k_cache.shape[1] * rows
        self.q, self.k_cache, self.v_cache, self.options = q, k_cache, v_cache, options
        self.row_warps = next(warps for warps in (1, 2, 4) if readers <= 16 * warps or 16 * warps == MOST_ROWS)
        self.row_tiles = -(-readers // (16 * self.row_warps))
        self.items = batch * kv_heads * self.row_tiles
        device = spec_of(q.device)
        self.problem = self._problem(device)
        self.config = autotune.select(tuning.TUNABLE, self.problem, device)
        # What a call asks for comes before what an override or a table says.
        self.equal_shares = bool(self.config.stream_k) if options.schedule == "auto" else options.schedule == "lean"
        self.tiles = max(-(-capacity(k_cache, options) // self.config.block_n), 1)
        if options.window_left >= 0:
            self.tiles = min(self.tiles, -(-(options.window_left + rows) // self.config.block_n) + 1)
        self.part_tiles, self.most_parts = 0, tuning.MOST_PARTS
        self.grid = min(self.config.blocks, self.items * self.tiles)
        if not self.equal_shares:
            self.part_tiles = tuning.part_tiles(self.problem, self.config, self.items, self.tiles)
            self.most_parts = -(-self.tiles // self.part_tiles)
            self.grid = self.items * self.most_parts
        self.warps = self.row_warps * self.config.key_warps
        self.smem = tuning.shared_bytes(self.problem, self.config)

    def _problem(self, device: DeviceSpec) -> tuning.Problem:
        options, invariant = self.options, self.options.schedule == "invariant"
        unit = 16 if self.k_cache.dtype == self.q.dtype else 32
        return tuning.Problem(
            self.row_warps,
            -(-self.q.shape[3] // unit) * unit,
            -(-self.v_cache.shape[3] // unit) * unit,
            self.k_cache.element_size(),
            per_key(options.k_scale) or per_key(options.v_scale),
            options.schedule,
            options.block_table is not None,
            device.sm,
            device.sms,
            device.smem_block,
            device.smem_sm,
            0 if invariant else autotune.bucket(self.items),
            0 if invariant else autotune.bucket(capacity(self.k_cache, options)),
        )

    def kernel(self) -> CudaKernel:
        """The kernel, compiled for dtypes, widths and tiles; lengths, batch and options are its arguments."""
        q, k_cache, v_cache, options = self.q, self.k_cache, self.v_cache, self.options
        code = CODES.get(k_cache.dtype, 0)
        return cuda_kernel(
            "lean_attention/forward.cu",
            "lean_attention_forward",
            Element=q.dtype,
            Cache="u8" if code else q.dtype,
            CODE=code,
            HEAD_DIM=q.shape[3],
            VALUE_DIM=v_cache.shape[3],
            BLOCK_N=self.config.block_n,
            ROW_WARPS=self.row_warps,
            KEY_WARPS=self.config.key_warps,
            STAGES=self.config.stages,
            PAGED=options.block_table is not None,
            K_BY_KEY=per_key(options.k_scale),
            V_BY_KEY=per_key(options.v_scale),
            ALIGNED=all(_in_sixteens(x) for x in (q, k_cache, v_cache)),
        )

    def workspace(self) -> Tensor:
        """Room for the partial results: two of each block, or one of each part; none where no item is cut."""
        slots = 2 * self.grid if self.equal_shares else self.grid if self.most_parts > 1 else 0
        floats = 16 * self.row_warps * (2 + -(-self.v_cache.shape[3] // 4) * 4)
        return torch.empty((slots, floats), dtype=torch.float32, device=self.q.device)


def _in_sixteens(x: Tensor) -> bool:
    """Whether every row of ``x`` is whole units of 16 bytes, at addresses that are too."""
    *outer, last = zip(x.shape, x.stride(), strict=True)
    unit = 16 // x.element_size()
    if last[0] % unit or last[1] != 1:
        return False
    return x.data_ptr() % 16 == 0 and all(size == 1 or stride % unit == 0 for size, stride in outer)


def _stride(scale: Tensor | None) -> tuple[int, ...]:
    return scale.stride() if scale is not None and per_key(scale) else (0, 0, 0)


def _clamp(side: int) -> int:
    """A window side as int32 with room for sums: any longer one is as good as unbounded."""
    return min(side, 2**30)

"""Launches ``csrc/lean_attention/forward.cu``: the backend ``cuda`` of the operator."""

from __future__ import annotations

import torch
from torch import Tensor

from iokernels import autotune
from iokernels.ops.lean_attention.options import Options, capacity, empty_lse, empty_out, per_key
from iokernels.ops.shared.arrivals import ARRIVALS, arrivals_of
from iokernels.ops.shared.caches import as_bytes
from iokernels.ops.shared.cuda_tiles import in_sixteens
from iokernels.ops.shared.windows import clamp
from iokernels.runtime.cuda.kernel import CudaKernel, Int64, cuda_kernel
from iokernels.runtime.device import DeviceSpec, guard, spec_of

from . import tuning

CODES = {torch.int8: 1, torch.float8_e4m3fn: 2}
"""How a quantised cache is decoded; 0 where there is nothing to decode."""


def forward(q: Tensor, k_cache: Tensor, v_cache: Tensor, options: Options) -> tuple[Tensor, Tensor]:
    """Returns (out, lse). See :class:`Options` for the arguments."""
    out, lse = empty_out(q, v_cache), empty_lse(q)
    if out.numel() == 0:
        return out, lse
    most = capacity(k_cache, options)
    with guard(q.device):
        prefix = None
        if options.k_prefix is not None and options.v_prefix is not None:
            # What the common keys alone give every row: acc of all rows, then m and l.
            prefix = torch.empty(lse.numel() * (2 + _quads(v_cache.shape[3])), dtype=torch.float32, device=q.device)
            keys, values = options.k_prefix.unsqueeze(0), options.v_prefix.unsqueeze(0)
            _launch(Launch(q, keys, values, options, most, of_prefix=True), out, lse, prefix)
        _launch(Launch(q, k_cache, v_cache, options, most), out, lse, prefix)
    return out, lse


def _launch(launch: Launch, out: Tensor, lse: Tensor, prefix: Tensor | None) -> None:
    q, k_cache, v_cache, options = launch.q, launch.k_cache, launch.v_cache, launch.options
    table, scales, softcap = launch.table, launch.scales, options.softcap
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
        "prefix_ptr": prefix,
        "partial_ptr": launch.workspace(),
        "arrivals_ptr": arrivals_of(q.device, launch.items),
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
        "capacity": launch.capacity,
        "page": 0 if table is None else k_cache.shape[2],
        "pages": k_cache.shape[0],
        "qk_scale": float(options.scale / softcap if softcap > 0.0 else options.scale),
        "softcap": float(softcap),
        "window_left": clamp(options.window_left),
        "window_right": clamp(options.window_right),
        "fewest_tiles": tuning.FEWEST_TILES,
        "most_parts": launch.most_parts,
        "part_tiles": launch.part_tiles,
        "prefix": launch.prefix,
    }
    try:
        launch.kernel().launch((launch.grid,), 32 * launch.warps, launch.smem, args)
    except BaseException:
        ARRIVALS.clear()  # a kernel that was broken off leaves counts behind
        raise


class Launch:
    """What one launch needs, from shapes and options only.

    ``most`` keys of its own is what a sequence can have. ``of_prefix``: for the pass over the common keys, which the
    caches then are, and whose items are rows of the whole batch.
    """

    def __init__(
        self, q: Tensor, k_cache: Tensor, v_cache: Tensor, options: Options, most: int, *, of_prefix: bool = False
    ) -> None:
        batch, heads, rows, _ = q.shape
        kv_heads = k_cache.shape[1]
        readers = heads // kv_heads * rows * (batch if of_prefix else 1)
        self.q, self.k_cache, self.v_cache, self.options = q, k_cache, v_cache, options
        self.of_prefix, self.capacity, self.prefix = of_prefix, most, k_cache.shape[2] if of_prefix else 0
        invariant = options.schedule == "invariant"
        # The shape of a tile decides the order of sums: where that may not depend on the batch, neither may the shape.
        alike = of_prefix and invariant
        self.row_warps = next(warps for warps in (1, 2, 4) if warps == 4 or (readers <= 16 * warps and not alike))
        self.row_tiles = -(-readers // (16 * self.row_warps))
        self.items = (1 if of_prefix else batch) * kv_heads * self.row_tiles
        self.schedule = "split" if of_prefix and not invariant else options.schedule
        # Rows of the page table are read one after the other.
        table = None if of_prefix else options.block_table
        self.table = table if table is None or table.stride(1) == 1 or table.shape[1] == 1 else table.contiguous()
        self.scales = [x if x is None or per_key(x) else x.contiguous() for x in (options.k_scale, options.v_scale)]
        device = spec_of(q.device)
        self.problem = self._problem(device)
        self.config = autotune.select(tuning.TUNABLE, self.problem, device)
        # What a call asks for comes before what an override or a table says.
        lean = bool(self.config.stream_k) if self.schedule == "auto" else self.schedule == "lean"
        keys = self.prefix if of_prefix else most
        self.tiles = max(-(-keys // self.config.block_n), 1)
        if options.window_left >= 0 and not of_prefix:
            self.tiles = min(self.tiles, -(-(options.window_left + rows) // self.config.block_n) + 1)
        if lean:
            self.part_tiles, self.most_parts = 0, tuning.MOST_PARTS
            self.grid = min(self.config.blocks, self.items * self.tiles)
        else:
            self.part_tiles = tuning.part_tiles(self.problem, self.config, self.items, self.tiles)
            self.most_parts = -(-self.tiles // self.part_tiles)
            self.grid = self.items * self.most_parts
        self.warps = self.row_warps * self.config.key_warps
        self.smem = tuning.shared_bytes(self.problem, self.config)

    def _problem(self, device: DeviceSpec) -> tuning.Problem:
        options, invariant = self.options, self.schedule == "invariant"
        unit = 16 if self.k_cache.dtype == self.q.dtype else 32
        return tuning.Problem(
            self.row_warps,
            -(-self.q.shape[3] // unit) * unit,
            -(-self.v_cache.shape[3] // unit) * unit,
            self.k_cache.element_size(),
            per_key(options.k_scale) or per_key(options.v_scale),
            self.schedule,
            self.table is not None,
            device.sm,
            device.sms,
            device.smem_block,
            device.smem_sm,
            0 if invariant else autotune.bucket(self.items),
            0 if invariant else autotune.bucket(self.prefix if self.of_prefix else self.capacity),
        )

    def kernel(self) -> CudaKernel:
        """The kernel, compiled for dtypes, widths and tiles; lengths, batch and options are its arguments."""
        q, k_cache, v_cache, options = self.q, self.k_cache, self.v_cache, self.options
        code = CODES.get(k_cache.dtype, 0)
        return cuda_kernel(
            "lean_attention/forward.cu",
            "lean_attention_cuda_kernel",
            Element=q.dtype,
            Cache="u8" if code else q.dtype,
            CODE=code,
            HEAD_DIM=q.shape[3],
            VALUE_DIM=v_cache.shape[3],
            BLOCK_N=self.config.block_n,
            ROW_WARPS=self.row_warps,
            KEY_WARPS=self.config.key_warps,
            STAGES=self.config.stages,
            PAGED=self.table is not None,
            K_BY_KEY=per_key(options.k_scale),
            V_BY_KEY=per_key(options.v_scale),
            ALIGNED=all(in_sixteens(x) for x in (q, k_cache, v_cache)),
            OF_PREFIX=self.of_prefix,
        )

    def workspace(self) -> Tensor:
        """Room for the partial results: two of each block, or one of each part; none where no item is cut."""
        slots = 2 * self.grid if not self.part_tiles else self.grid if self.most_parts > 1 else 0
        floats = 16 * self.row_warps * (2 + _quads(self.v_cache.shape[3]))
        return torch.empty((slots, floats), dtype=torch.float32, device=self.q.device)


def _quads(width: int) -> int:
    """A width in whole vectors of four, in which sums are stored."""
    return -(-width // 4) * 4


def _stride(scale: Tensor | None) -> tuple[int, ...]:
    return scale.stride() if scale is not None and per_key(scale) else (0, 0, 0)

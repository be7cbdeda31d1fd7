"""Launches the Triton kernels of this room: the backend ``triton`` of the operator."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from iokernels import autotune
from iokernels.ops.lean_attention.options import Options, capacity, empty_lse, empty_out, per_key
from iokernels.ops.shared.arrivals import ARRIVALS, arrivals_of
from iokernels.ops.shared.caches import as_bytes
from iokernels.ops.shared.triton_tiles import View, is_wide, padded, view
from iokernels.ops.shared.windows import clamp
from iokernels.runtime.device import DeviceSpec, guard, spec_of

from . import tuning
from .lean import lean_attention_kernel
from .split import lean_attention_combine_kernel, lean_attention_split_kernel
from .tuning import TUNABLES
from .walk import BY_HEAD, BY_KEY, E4M3, INT8, NO_CODE, UNSCALED, Features, Inputs, Results, Scales, Sizes

MOST_ROWS = 64
"""Rows of a row tile: more heads and positions of a key head make several, each of which reads the keys."""

LEAST_TILES = 2
"""Tiles of the smallest share: fewer would cost more to merge than they save."""

MOST_PARTS = 64
"""Into how many shares an item is cut at most, since one block merges them all."""


def forward(q: Tensor, k_cache: Tensor, v_cache: Tensor, options: Options) -> tuple[Tensor, Tensor]:
    """Returns (out, lse). See :class:`Options` for the arguments."""
    out, lse = empty_out(q, v_cache), empty_lse(q)
    if out.numel() == 0:
        return out, lse
    launch = Launch(q, k_cache, v_cache, options)
    with guard(q.device):
        before = _prefix(launch, q, options) if options.k_prefix is not None else (None, None)
        own = Arguments(launch, q, k_cache, v_cache, out, lse, launch.table, *before)
        if launch.equal_shares:
            _launch_lean(launch, own)
        else:
            _launch_split(launch, own, launch.items, launch.tiles, prefix=0)
    return out, lse


def _launch_lean(launch: Launch, own: Arguments) -> None:
    blocks = min(launch.config.blocks, launch.items * launch.tiles)
    arrivals = arrivals_of(launch.q.device, launch.items)
    try:
        lean_attention_kernel[(blocks,)](
            own.inputs, own.results(launch.workspace(2 * blocks)), arrivals, *launch.varying, own.stride_table,
            launch.scales, FEATURES=own.features, SIZES=own.sizes, **launch.resources,
        )  # fmt: skip
    except BaseException:
        ARRIVALS.clear()  # a kernel that was broken off leaves counts behind
        raise


def _launch_split(launch: Launch, own: Arguments, items: int, tiles: int, *, prefix: int) -> None:
    part_tiles = tuning.part_tiles(launch.problem, launch.config, items, tiles)
    most_parts = max(-(-tiles // part_tiles), 1)
    several = most_parts > 1
    # Not None for one part: the kernel is compiled with both ways in it, and this one is never written to.
    partials = launch.workspace(items * most_parts) if several else own.lse
    results, cut = own.results(partials), (prefix, part_tiles, most_parts)
    lean_attention_split_kernel[(items * most_parts,)](
        own.inputs, results, *launch.varying, own.stride_table, *cut, launch.scales,
        FEATURES=own.features, SIZES=own.sizes, **launch.resources,
    )  # fmt: skip
    if several:
        *counts, _, left, right = launch.varying
        lean_attention_combine_kernel[(items,)](
            launch.seqlens, launch.sinks, results, *counts, left, right, *cut,
            FEATURES=own.features, SIZES=own.sizes, num_warps=4,
        )  # fmt: skip


def _prefix(launch: Launch, q: Tensor, options: Options) -> tuple[Tensor, Tensor]:
    """What the common keys alone give every row: out in float32, and lse."""
    assert options.k_prefix is not None
    assert options.v_prefix is not None
    keys, values = options.k_prefix.unsqueeze(0), options.v_prefix.unsqueeze(0)
    out = torch.empty((*q.shape[:3], values.shape[3]), dtype=torch.float32, device=q.device)
    lse = empty_lse(q)
    readers = Launch(q, launch.k_cache, launch.v_cache, options, all_sequences=True)
    own = Arguments(readers, q, keys, values, out, lse, None, None, None)
    items, tiles = readers.items, triton.cdiv(keys.shape[2], readers.config.block_n)
    _launch_split(readers, own, items, tiles, prefix=keys.shape[2])
    return out, lse


class Arguments:
    """The arguments of one pass over keys."""

    def __init__(
        self, launch: Launch, q: Tensor, keys: Tensor, values: Tensor, out: Tensor, lse: Tensor, table: Tensor | None,
        prefix_out: Tensor | None, prefix_lse: Tensor | None,
    ) -> None:  # fmt: skip
        paged = table is not None
        self.features = launch.features._replace(
            page=keys.shape[2] if paged else 0,
            after_prefix=prefix_out is not None,
        )
        self.lse = lse
        self.inputs = Inputs(
            view(q), view(as_bytes(keys)), view(as_bytes(values)), _factors(launch.k_scale), _factors(launch.v_scale),
            launch.seqlens, table, launch.sinks,
        )  # fmt: skip
        self._written = view(out), view(lse), view(prefix_out), prefix_lse
        self.stride_table = table.stride(0) if table is not None else 0
        self.sizes = Sizes(
            HEAD_DIM=q.shape[3],
            VALUE_DIM=values.shape[3],
            BLOCK_D=padded(q.shape[3]),
            BLOCK_V=padded(values.shape[3]),
            BLOCK_M=launch.block_m,
            BLOCK_N=launch.config.block_n,
            WIDE=is_wide(launch.config.block_n, keys, values),
            PRECISION=launch.precision,
            LEAST=LEAST_TILES,
            MOST_PARTS=MOST_PARTS,
        )

    def results(self, partials: Tensor) -> Results:
        """What a kernel writes that has ``partials`` for a workspace."""
        return Results(*self._written, partials)


class Launch:
    """What the kernels of one call need, from shapes and options only.

    ``all_sequences``: for the pass over the common keys, whose items are rows of the whole batch.
    """

    def __init__(
        self, q: Tensor, k_cache: Tensor, v_cache: Tensor, options: Options, *, all_sequences: bool = False
    ) -> None:
        batch, heads, rows, _ = q.shape
        kv_heads = k_cache.shape[1]
        readers = heads // kv_heads * rows * (batch if all_sequences else 1)
        self.q, self.options, self.k_cache, self.v_cache = q, options, k_cache, v_cache
        # The shape of a tile decides the order of sums: where that may not depend on the batch, neither may the shape.
        alike = all_sequences and options.schedule == "invariant"
        self.block_m = MOST_ROWS if alike else min(padded(readers), MOST_ROWS)
        self.row_tiles = triton.cdiv(readers, self.block_m)
        self.capacity = capacity(k_cache, options)
        self.items = (1 if all_sequences else batch) * kv_heads * self.row_tiles
        self.precision = "tf32" if torch.get_float32_matmul_precision() != "highest" else "ieee"
        self.seqlens = options.cache_seqlens.contiguous()
        self.sinks = None if options.sinks is None else options.sinks.contiguous()
        # Rows of the page table are read one after the other.
        table = options.block_table
        self.table = table if table is None or table.stride(1) == 1 or table.shape[1] == 1 else table.contiguous()
        self.k_scale, self.v_scale = (
            x if x is None or per_key(x) else x.contiguous() for x in (options.k_scale, options.v_scale)
        )
        self.features = Features(
            page=0,
            left=options.window_left >= 0,
            right=options.window_right >= 0,
            softcap=options.softcap > 0.0,
            sinks=options.sinks is not None,
            code=_CODES.get(k_cache.dtype, NO_CODE).value,
            k_scale=_scaling(options.k_scale),
            v_scale=_scaling(options.v_scale),
            after_prefix=False,
            all_sequences=all_sequences,
        )
        softcap = options.softcap
        self.scales = Scales(float(options.scale / softcap if softcap > 0.0 else options.scale), float(softcap))
        # What ``VARYING`` names, in its order, but for the stride of the page table.
        self.varying = (
            batch, rows, heads // kv_heads, kv_heads, self.row_tiles, self.capacity, k_cache.shape[0],
            clamp(options.window_left), clamp(options.window_right),
        )  # fmt: skip
        device = spec_of(q.device)
        self.problem = self._problem(device, all_sequences)
        self.config = autotune.select(TUNABLES[tuning.KERNEL], self.problem, device)
        # What a call asks for comes before what an override or a table says.
        self.equal_shares = bool(self.config.stream_k) if options.schedule == "auto" else options.schedule == "lean"
        self.tiles = max(triton.cdiv(self.capacity, self.config.block_n), 1)
        if options.window_left >= 0:
            seen = triton.cdiv(options.window_left + rows, self.config.block_n) + 1
            self.tiles = min(self.tiles, seen)
        self.resources = {"num_warps": self.config.num_warps, "num_stages": self.config.num_stages}

    def _problem(self, device: DeviceSpec, all_sequences: bool) -> tuning.Problem:
        q, options = self.q, self.options
        invariant = options.schedule == "invariant"
        return tuning.Problem(
            self.block_m,
            padded(q.shape[3]),
            padded(self.v_cache.shape[3]),
            q.element_size(),
            self.k_cache.element_size(),
            q.dtype != torch.float32 or self.precision != "ieee",
            "split" if all_sequences and not invariant else options.schedule,
            options.block_table is not None,
            device.sm,
            device.sms,
            device.smem_block,
            device.smem_sm,
            0 if invariant else autotune.bucket(self.items),
            0 if invariant else autotune.bucket(self.capacity),
        )

    def workspace(self, slots: int) -> Tensor:
        """Room for so many partial results."""
        shape = (slots, self.block_m, self.v_cache.shape[3] + 2)
        return torch.empty(shape, dtype=torch.float32, device=self.q.device)


def _factors(scale: Tensor | None) -> View:
    """The factors of every key, or of heads, which are indexed without strides."""
    return view(scale) if per_key(scale) else View(scale, 0, 0, 0, 0)


_CODES = {torch.int8: INT8, torch.float8_e4m3fn: E4M3}


def _scaling(scale: Tensor | None) -> int:
    if scale is None:
        return UNSCALED.value
    return BY_KEY.value if per_key(scale) else BY_HEAD.value

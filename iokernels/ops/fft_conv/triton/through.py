"""Launches transforms through memory: :mod:`.outer`, :mod:`.inner`, :mod:`.outer` again.

Heads are taken a few at a time, so that what lies in memory between the steps stays below a bound.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from iokernels.ops.fft_conv.options import Gradients
from iokernels.ops.shared.triton_tiles import view

from . import tuning
from .call import Launch
from .filters import real_transform, taps_gradient
from .inner import Rows, RowSizes, fft_conv_bwd_inner_kernel, fft_conv_fwd_inner_kernel
from .outer import (
    Scaled,
    Signal,
    Source,
    TileSizes,
    fft_conv_outer_bwd_in_kernel,
    fft_conv_outer_bwd_out_kernel,
    fft_conv_outer_fwd_in_kernel,
    fft_conv_outer_fwd_out_kernel,
)
from .transform import Results

WORKSPACE = 2**30
"""How many bytes of rows a pass keeps, unless those of a single head are more."""

_POST = tuning.Wanted(False, False, False, True, False)


_NOTHING = Rows(None, None, None)


class Steps:
    """One call, of some of its heads."""

    def __init__(self, launch: Launch, config: tuning.Config, cover: tuning.Through) -> None:
        self.launch, self.config, self.cover = launch, config, cover
        self.tile = launch.outer_config(cover)
        self.outer, self.length = cover.outer, cover.n1 * cover.n2
        self.points = self.outer * self.length
        self.columns = launch.columns(cover)

    def rows(self, chunks: int) -> Rows:
        """Room for A of every sequence."""
        launch, tile = self.launch, self.tile
        count = chunks * launch.batch * launch.heads

        def empty(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.empty(count, *size, dtype=dtype, device=launch.u.device)

        return Rows(
            empty(self.outer, self.length, dtype=launch.compute),
            empty(self.outer // tile.rows, self.length // tile.columns),
            empty(self.cover.rows),
        )

    def matrix(self, back: bool) -> Tensor:
        """The real transform of the columns."""
        return real_transform(self.launch.u.device, self.launch.compute, self.outer, back)

    def tile_sizes(self, *tensors: Tensor | None) -> TileSizes:
        """What the kernels of the first and the last step that take ``tensors`` are compiled for."""
        tile, launch = self.tile, self.launch
        wide = launch.wide(self.points, *tensors)
        return TileSizes(self.outer, self.length, tile.rows, tile.columns, tile.depth, launch.products, wide)

    def row_sizes(self) -> RowSizes:
        """What the kernels of the rows are compiled for."""
        cover, tile, launch = self.cover, self.tile, self.launch
        return RowSizes(
            self.outer,
            cover.n1,
            cover.n2,
            cover.n1,
            self.columns,
            launch.middle(self.length),
            launch.products,
            tuning.hoists(launch.problem("fft_conv_fwd"), cover.n1, cover.n1, cover.n2),
            tile.rows,
            tile.columns,
        )

    def first(
        self, kernel: Any, x: Tensor, gate: Tensor | None, state: Tensor | None, chunks: int, overlap: int, stop: int,
        limit: int,
    ) -> Rows:  # fmt: skip
        """A of ``gate * x``."""
        launch, tile, rows = self.launch, self.tile, self.rows(chunks)
        tiles = self.outer // tile.rows * (self.length // tile.columns)
        source = Source(gate=gate is not None, state=state is not None, periodic=self.cover.periodic)
        kernel[(rows.values_ptr.shape[0] * tiles,)](
            Signal(view(x), view(gate), state), Scaled(rows.values_ptr, rows.scales_ptr, self.matrix(False)),
            launch.batch, launch.heads, launch.n, overlap, self.cover.step, stop, limit,
            SOURCE=source, SIZES=self.tile_sizes(x, gate), num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip
        return rows

    def forward(self, spectrum: list[Tensor], y: Tensor) -> None:
        """y."""
        launch, cover, tile, options, config = self.launch, self.cover, self.tile, self.launch.options, self.config
        rows = self.first(
            fft_conv_outer_fwd_in_kernel, launch.u, options.pre_gate, launch.state, cover.chunks, cover.overlap,
            self.points, launch.n,
        )  # fmt: skip
        total = cover.chunks * launch.batch
        fft_conv_fwd_inner_kernel[(launch.heads * cover.rows * -(-total // config.units),)](
            rows, launch.filter(spectrum, cover), total, launch.heads, config.units, SIZES=self.row_sizes(),
            num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip
        post = options.post_gate
        first, blocks = self.results(cover.overlap, cover.overlap + launch.n)
        fft_conv_outer_fwd_out_kernel[(rows.values_ptr.shape[0] * blocks * (self.length // tile.columns),)](
            Scaled(rows.values_ptr, rows.out_scales_ptr, self.matrix(True)), view(post), view(y),
            launch.batch, launch.heads, launch.n, cover.overlap, cover.step, first, blocks,
            POST=post is not None, SIZES=self.tile_sizes(post, y),
            num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip

    def results(self, low: int, high: int) -> tuple[int, int]:
        """The tiles of rows n0 that hold positions from ``low`` up to ``high``: the first one, and how many."""
        size = self.length * self.tile.rows
        return low // size, -(-min(high, self.points) // size) - low // size

    def backward(self, dy: Tensor, spectrum: list[Tensor], wanted: tuning.Wanted, grads: Gradients) -> Tensor | None:
        """All gradients but dk and dskip, of which the sums are returned."""
        launch, cover, options = self.launch, self.cover, self.launch.options
        kernel, signal = fft_conv_outer_bwd_in_kernel, (launch.u, options.pre_gate, launch.state)
        together = wanted._replace(post=wanted.post and cover.same)
        v = g = None
        if together.k or together.post:
            v = self.first(kernel, *signal, cover.back_chunks, cover.past, cover.step, launch.n)
        if wanted.v or wanted.k:
            limit = launch.n + cover.overlap if cover.periodic else launch.n
            g = self.first(
                kernel, dy, options.post_gate, None, cover.back_chunks, cover.past, self.points, limit
            )  # fmt: skip
        sums = None
        if any(together):
            sums = self.gradients_of_rows(v, g, spectrum, together, cover.back_chunks)
        if wanted.post and not cover.same:
            v = self.first(kernel, *signal, cover.chunks, cover.overlap, self.points, launch.n)
            self.gradients_of_rows(v, None, spectrum, _POST, cover.chunks)
        if wanted.v:
            assert g is not None
            self.last(g, dy, wanted._replace(post=False), grads, cover.past, cover.step)
        if wanted.post:
            assert v is not None
            self.last(v, dy, _POST, grads, cover.overlap, self.points)
        return sums

    def gradients_of_rows(
        self, v: Rows | None, g: Rows | None, spectrum: list[Tensor], wanted: tuning.Wanted, chunks: int
    ) -> Tensor | None:
        """The rows of w in the place of those of v, and of dv in that of g; returns the sums of dK."""
        launch, cover, config = self.launch, self.cover, self.config
        total = chunks * launch.batch
        parts = -(-total // config.units)
        sums = None
        if wanted.k:
            shape = (parts, launch.heads, cover.rows, 2, cover.n1, self.columns)
            sums = torch.empty(shape, dtype=torch.float32, device=launch.u.device)
        fft_conv_bwd_inner_kernel[(launch.heads * cover.rows * parts,)](
            v or _NOTHING, g or _NOTHING, sums, launch.filter(spectrum, cover), total, launch.heads, config.units,
            WANTED=wanted, SIZES=self.row_sizes(), num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip
        return sums

    def last(
        self, rows: Rows, dy: Tensor, wanted: tuning.Wanted, grads: Gradients, overlap: int, stop: int
    ) -> None:  # fmt: skip
        """The gradients that are made of dv, or dpost of w."""
        launch, tile, options = self.launch, self.tile, self.launch.options
        first, blocks = self.results(overlap if wanted.post else 0, min(stop, launch.n + overlap))
        tensors = launch.u, options.pre_gate, dy, grads.u, grads.pre_gate, grads.post_gate
        fft_conv_outer_bwd_out_kernel[(rows.values_ptr.shape[0] * blocks * (self.length // tile.columns),)](
            Scaled(rows.values_ptr, rows.out_scales_ptr, self.matrix(True)),
            view(launch.u), view(options.pre_gate), view(dy),
            Results(view(grads.u), view(grads.pre_gate), view(grads.post_gate), grads.initial_state),
            launch.batch, launch.heads, launch.n, overlap, self.cover.step, stop, first, blocks,
            SOURCE=Source(options.pre_gate is not None, launch.state is not None, self.cover.periodic), WANTED=wanted,
            SIZES=self.tile_sizes(*tensors), num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip


def forward(
    launch: Launch, config: tuning.Config, cover: tuning.Through, k: Tensor, transformed: list[Tensor], y: Tensor
) -> None:
    """y of every head."""
    for group in _groups(launch, config, cover, cover.chunks):
        part, planes = _of_heads(launch, k, transformed, group)
        spectrum = part.spectrum(k[group], planes, cover)
        Steps(part, config, cover).forward(spectrum, y[:, group])


def backward(
    launch: Launch,
    config: tuning.Config,
    cover: tuning.Through,
    dy: Tensor,
    k: Tensor,
    transformed: list[Tensor],
    wanted: tuning.Wanted,
    grads: Gradients,
) -> None:
    """The gradients of every head."""
    for group in _groups(launch, config, cover, 2 * cover.back_chunks):
        part, planes = _of_heads(launch, k, transformed, group)
        spectrum = part.spectrum(k[group], planes, cover)
        mine = grads._replace(
            **{name: x[:, group] for name in ("u", "pre_gate", "post_gate", "initial_state")
               if (x := getattr(grads, name)) is not None}
        )  # fmt: skip
        past = None if mine.initial_state is None else torch.empty_like(
            mine.initial_state, memory_format=torch.contiguous_format
        )  # fmt: skip
        sums = Steps(part, config, cover).backward(
            dy[:, group], spectrum, wanted, mine._replace(initial_state=past)
        )  # fmt: skip
        if past is not None and mine.initial_state is not None:
            mine.initial_state.copy_(past)
        if sums is not None:
            grads.put_filter(*taps_gradient(sums, k.shape[1], launch.n, cover, launch.options), group)


def _groups(launch: Launch, config: tuning.Config, cover: tuning.Through, chunks: int) -> Iterator[slice]:
    """The heads in groups whose rows stay below the bound."""
    a_head = chunks * launch.batch * config.outer * config.length * launch.compute.itemsize
    count = max(1, min(launch.heads, WORKSPACE // a_head))
    for start in range(0, launch.heads, count):
        yield slice(start, start + count)


def _of_heads(launch: Launch, k: Tensor, transformed: list[Tensor], group: slice) -> tuple[Launch, list[Tensor]]:
    """The call of some of its heads."""
    options = launch.options
    cut = options._replace(
        **{name: x[:, group] for name in ("pre_gate", "post_gate", "initial_state")
           if (x := getattr(options, name)) is not None},
        skip=None if options.skip is None else options.skip[group],
    )  # fmt: skip
    planes = [x[group] for x in transformed]
    return Launch(launch.u[:, group], k[group], planes, cut, launch.device), planes

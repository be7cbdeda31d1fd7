"""How many bytes the Triton kernels of fft_conv request where transforms go through memory: the model of their tiling.

Counted as in :mod:`.traffic`. A is what lies in memory between the steps: N0 M elements of the kernels' own dtype
for a block of a sequence, written by the first step, read and written in place by that of the rows, read by the last.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np

from iokernels.ops.fft_conv.triton.tuning import Config, OuterConfig, Through
from iokernels.testing.case.accounts import Account, Bytes

from .traffic import Problem, backward_floor, constants, floor_of_filter

_SUM = 4  # bytes of a float32: a state, a scale, the filter's gradient


class Sizes(NamedTuple):
    """A call, its blocks, and the tiles of its kernels."""

    problem: Problem
    config: Config
    cover: Through
    tile: OuterConfig

    @property
    def length(self) -> int:
        """Points of a row."""
        return self.cover.n1 * self.cover.n2

    @property
    def points(self) -> int:
        """Points of a transform."""
        return self.cover.outer * self.length

    @property
    def tiles(self) -> int:
        """Tiles of A from left to right."""
        return self.length // self.tile.columns

    def a(self, chunks: int) -> int:
        """Bytes of A of every sequence."""
        return self.problem.batch * self.problem.heads * chunks * self.points * self.problem.compute_size


def _first(sizes: Sizes, chunks: int, overlap: int, stop: int, limit: int, *, gate: bool, state: bool) -> Bytes:
    """A of one signal: its elements once for every tile of rows, the matrix for the steps that are not zeros, A."""
    problem, cover, tile = sizes.problem, sizes.cover, sizes.tile
    rows, blocks = problem.batch * problem.heads, cover.outer // tile.rows
    read = 0
    for chunk in range(chunks):
        start = chunk * cover.step - overlap
        filled = max(0, min(stop, limit - start))
        steps = -(-filled // (sizes.length * tile.depth))
        found = _loaded(sizes, start, filled)
        past = max(0, min(0, start + stop) - start) if state else 0
        read += blocks * (found * problem.itemsize * (2 if gate else 1) + past * _SUM)
        read += blocks * sizes.tiles * steps * tile.rows * tile.depth * problem.compute_size
    return Bytes(rows * read, sizes.a(chunks) + rows * chunks * blocks * sizes.tiles * _SUM)


def _loaded(sizes: Sizes, start: int, filled: int) -> int:
    """Elements of a signal that the first ``filled`` positions ask for. Around the end, a tile may hold one twice."""
    n, tile = sizes.problem.seqlen, sizes.tile
    if not sizes.cover.periodic:
        return max(0, min(start + filled, n) - max(start, 0))
    offs = np.arange(filled)
    step = offs // (sizes.length * tile.depth) * sizes.tiles + offs % sizes.length // tile.columns
    return len(np.unique(step * n + (offs + start) % n))


def _rows(sizes: Sizes, chunks: int, signals: int, results: int, *, spectrum: bool, sums: bool) -> Bytes:
    """Every row of ``signals`` read, of ``results`` written, with their scales; what a thread block loads once."""
    problem, config, cover, _ = sizes
    total = problem.batch * chunks
    parts = -(-total // config.units)
    programs = problem.heads * cover.rows * parts
    roots, planes = constants(problem, cover)
    loads = programs if problem.hoisted else problem.heads * cover.rows * total
    rows = problem.heads * total
    read = programs * (planes if spectrum else _SUM) + loads * roots
    read += signals * (sizes.a(chunks) + rows * cover.outer * sizes.tiles * _SUM)
    written = results * (sizes.a(chunks) + rows * cover.rows * _SUM)
    return Bytes(read, written + (programs * 2 * cover.n1 * problem.columns * _SUM if sums else 0))


def _last(sizes: Sizes, chunks: int, low: int, high: int) -> int:
    """A, its scales and the matrix, for every tile of rows that holds positions from ``low`` up to ``high``."""
    problem, cover, tile = sizes.problem, sizes.cover, sizes.tile
    size = sizes.length * tile.rows
    blocks = -(-min(high, sizes.points) // size) - low // size
    # Frequencies 0 and N0 / 2 beside the others, whose two parts have one scale.
    scales = cover.rows if tile.depth == cover.outer else cover.outer
    matrix = cover.outer * (tile.rows + tile.columns) * problem.compute_size
    return problem.batch * problem.heads * chunks * blocks * sizes.tiles * (matrix + scales * _SUM)


def forward(sizes: Sizes) -> dict[str, Account]:
    """The three steps."""
    problem, cover = sizes.problem, sizes.cover
    rows, tensor = problem.batch * problem.heads, problem.tensor
    gate = tensor if problem.gated else 0
    a = sizes.a(cover.chunks)
    first = _first(
        sizes, cover.chunks, cover.overlap, sizes.points, problem.seqlen, gate=problem.gated, state=problem.state
    )
    middle = _rows(sizes, cover.chunks, 1, 1, spectrum=True, sums=False)
    last = _last(sizes, cover.chunks, cover.overlap, cover.overlap + problem.seqlen)
    past = rows * (problem.taps - 1) * _SUM if problem.state else 0
    return {
        "fft_conv_outer_fwd_in_kernel": Account("fwd", Bytes(tensor + gate + past, a), first),
        "fft_conv_fwd_inner_kernel": Account("fwd", Bytes(a + floor_of_filter(problem), a), middle),
        "fft_conv_outer_fwd_out_kernel": Account("fwd", Bytes(a + gate, tensor), Bytes(last + gate, tensor)),
    }


def backward(sizes: Sizes) -> dict[str, Account]:
    """The three steps of v and of g, with the gates' gradients made by the last. Where the blocks of v are others
    forward and backward, dpost takes three steps of its own."""
    problem, cover = sizes.problem, sizes.cover
    rows, tensor, gated, state = problem.batch * problem.heads, problem.tensor, problem.gated, problem.state
    chunks, n = cover.back_chunks, problem.seqlen
    apart = gated and not cover.same
    limit = n + cover.overlap if cover.periodic else n
    firsts = [
        _first(sizes, chunks, cover.past, cover.step, n, gate=gated, state=state),
        _first(sizes, chunks, cover.past, sizes.points, limit, gate=gated, state=False),
    ]
    middles = [_rows(sizes, chunks, 2, 2 if gated and not apart else 1, spectrum=True, sums=True)]
    lasts = _last(sizes, chunks, 0, min(cover.step, n + cover.past)) + (2 * tensor if gated else 0)
    if apart:
        firsts.append(_first(sizes, cover.chunks, cover.overlap, sizes.points, n, gate=True, state=state))
        middles.append(_rows(sizes, cover.chunks, 1, 1, spectrum=True, sums=False))
    if gated:
        lasts += _last(sizes, cover.chunks, cover.overlap, cover.overlap + n) + tensor  # dy
    past = rows * (problem.taps - 1) * _SUM if state else 0
    whole = backward_floor(problem)
    a = sizes.a(chunks)
    taps = floor_of_filter(problem)
    signals = Bytes(whole.read - taps, 2 * a)
    made = 2 * a if gated else a
    return {
        "fft_conv_outer_bwd_in_kernel": Account("bwd", signals, _sum(firsts)),
        "fft_conv_bwd_inner_kernel": Account("bwd", Bytes(2 * a + taps, made + taps), _sum(middles)),
        "fft_conv_outer_bwd_out_kernel": Account(
            "bwd",
            Bytes(made + (3 * tensor if gated else 0), whole.written - taps),
            Bytes(lasts, tensor * (3 if gated else 1) + past),
        ),
    }


def _sum(parts: list[Bytes]) -> Bytes:
    return Bytes(sum(part.read for part in parts), sum(part.written for part in parts))


KERNELS: dict[Literal["fwd", "bwd"], tuple[str, ...]] = {
    "fwd": ("fft_conv_outer_fwd_in_kernel", "fft_conv_fwd_inner_kernel", "fft_conv_outer_fwd_out_kernel"),
    "bwd": ("fft_conv_outer_bwd_in_kernel", "fft_conv_bwd_inner_kernel", "fft_conv_outer_bwd_out_kernel"),
}
"""The kernels of a pass, in the order of its steps."""

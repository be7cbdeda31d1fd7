"""How many bytes the Triton kernels of flash_attention should request from global memory: the model of their tiling.

Counted as a thread block requests them: each address once a load instruction, whatever the caches serve. Without mask,
bias and ALiBi, whose traffic is one element a visible score. The tests hold the model to what the tracer counts.
"""

from __future__ import annotations

from typing import NamedTuple

from iokernels.ops.flash_attention.tuning import Config

_STATISTIC = 4  # bytes of an lse or a delta
_OFFSETS = 16  # the begin and end of a packed sequence's queries and keys, int32


class Bytes(NamedTuple):
    """Bytes that the blocks of one kernel read and write."""

    read: int
    written: int


class Problem(NamedTuple):
    """One call. ``lengths`` holds (queries, keys) of every sequence; ``longest`` is the grid's, in packed calls."""

    lengths: tuple[tuple[int, int], ...]
    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    itemsize: int
    window_left: int = -1
    window_right: int = -1
    packed: bool = False
    longest: tuple[int, int] = (0, 0)
    dlse: bool = False

    def grid_lengths(self, sequence: int) -> tuple[int, int]:
        """The lengths that the grid covers for one sequence."""
        return self.longest if self.packed else self.lengths[sequence]


def _blocks(length: int, size: int) -> int:
    return -(-length // size)


def _keys_visited(problem: Problem, n: int, nk: int, first_row: int, config: Config) -> int:
    """Rows of k and v that a block of queries loads."""
    start, stop = 0, nk
    shift, last_row = nk - n, min(first_row + config.block_m, n) - 1
    if problem.window_right >= 0:
        stop = max(min(nk, last_row + shift + problem.window_right + 1), 0)
    if problem.window_left >= 0:
        start = max(first_row + shift - problem.window_left, 0) // config.block_n * config.block_n
    if stop <= start:
        return 0
    return min(start + _blocks(stop - start, config.block_n) * config.block_n, nk) - start


def _rows_visited(problem: Problem, n: int, nk: int, first_key: int, config: Config) -> int:
    """Rows of q and dO that a block of keys loads, for one query head."""
    start, stop = 0, n
    shift, last_key = nk - n, min(first_key + config.block_n, nk) - 1
    if problem.window_left >= 0:
        stop = max(min(n, last_key + problem.window_left - shift + 1), 0)
    if problem.window_right >= 0:
        start = max(first_key - shift - problem.window_right, 0) // config.block_m * config.block_m
    if stop <= start:
        return 0
    return min(start + _blocks(stop - start, config.block_m) * config.block_m, n) - start


def _walks_over_keys(problem: Problem, config: Config) -> tuple[int, int]:
    """Of the kernels that own rows: all blocks, and all rows of k (and v) that they load."""
    blocks = loaded = 0
    for sequence, (n, nk) in enumerate(problem.lengths):
        blocks += problem.heads * _blocks(problem.grid_lengths(sequence)[0], config.block_m)
        for first_row in range(0, n, config.block_m):
            loaded += problem.heads * _keys_visited(problem, n, nk, first_row, config)
    return blocks, loaded


def _offsets(problem: Problem, blocks: int) -> int:
    return blocks * _OFFSETS if problem.packed else 0


def forward(problem: Problem, config: Config) -> Bytes:
    """q, out and lse once; k and v once for each block of rows that sees them."""
    blocks, loaded = _walks_over_keys(problem, config)
    rows = problem.heads * sum(n for n, _ in problem.lengths)
    pair = problem.itemsize * (problem.head_dim + problem.value_dim)
    return Bytes(
        read=rows * problem.head_dim * problem.itemsize + loaded * pair + _offsets(problem, blocks),
        written=rows * (problem.value_dim * problem.itemsize + _STATISTIC),
    )


def backward_delta(problem: Problem) -> Bytes:
    """out and dO once, and delta once."""
    rows = problem.heads * sum(n for n, _ in problem.lengths)
    return Bytes(
        read=rows * (2 * problem.value_dim * problem.itemsize + (_STATISTIC if problem.dlse else 0)),
        written=rows * _STATISTIC,
    )


def backward_dq(problem: Problem, config: Config) -> Bytes:
    """q, dO, lse, delta and dq once; k and v once for each block of rows that sees them."""
    blocks, loaded = _walks_over_keys(problem, config)
    rows = problem.heads * sum(n for n, _ in problem.lengths)
    pair = problem.itemsize * (problem.head_dim + problem.value_dim)
    return Bytes(
        read=rows * (pair + 2 * _STATISTIC) + loaded * pair + _offsets(problem, blocks),
        written=rows * problem.head_dim * problem.itemsize,
    )


def backward_dkv(problem: Problem, config: Config) -> Bytes:
    """k, v, dk and dv once; q, dO, lse and delta once for each block of keys that they see."""
    pair = problem.itemsize * (problem.head_dim + problem.value_dim)
    blocks = loaded = 0
    for sequence, (n, nk) in enumerate(problem.lengths):
        blocks += problem.kv_heads * _blocks(problem.grid_lengths(sequence)[1], config.block_n)
        for first_key in range(0, nk, config.block_n):
            loaded += problem.heads * _rows_visited(problem, n, nk, first_key, config)
    keys = problem.kv_heads * sum(nk for _, nk in problem.lengths)
    return Bytes(
        read=keys * pair + loaded * (pair + 2 * _STATISTIC) + _offsets(problem, blocks),
        written=keys * pair,
    )

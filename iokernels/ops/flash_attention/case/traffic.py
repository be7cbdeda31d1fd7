"""How many bytes the Triton kernels of flash_attention should request from global memory: the model of their tiling.

Counted as a thread block requests them: each address once a load instruction, whatever the caches serve. The model is
exact, with every option; a test holds it to what the tracer counts.
"""

from __future__ import annotations

from dataclasses import dataclass

from iokernels.ops.flash_attention.triton.tuning import Config
from iokernels.testing.case.accounts import Account, Bytes

_STATISTIC = 4  # bytes of an lse, its tail or a delta
_OFFSETS = 16  # the begin and end of a packed sequence's queries and keys, int32
_SLOPE = 4  # of ALiBi, float32
_SEED = 8  # of dropout, int64


@dataclass(frozen=True)
class Problem:
    """One call. ``lengths`` holds (queries, keys) of every sequence; ``longest`` is the grid's, in packed calls.

    A bias and a mask have an element for every score of a head; ``bias_batch`` is 0 without a bias, and 1 where one
    serves all sequences.
    """

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
    mask: bool = False
    bias_batch: int = 0
    alibi: bool = False
    sinks: bool = False
    dropout: bool = False

    def grid_lengths(self, sequence: int) -> tuple[int, int]:
        """The lengths that the grid covers for one sequence."""
        return self.longest if self.packed else self.lengths[sequence]

    @property
    def rows(self) -> int:
        """Queries of all heads and sequences."""
        return self.heads * sum(n for n, _ in self.lengths)

    @property
    def keys(self) -> int:
        """Keys of all key heads and sequences."""
        return self.kv_heads * sum(nk for _, nk in self.lengths)

    @property
    def pair(self) -> int:
        """Bytes of one row of q and dO, or of k and v."""
        return self.itemsize * (self.head_dim + self.value_dim)

    @property
    def per_score(self) -> int:
        """Bytes that a bias and a mask hold for one score."""
        return bool(self.bias_batch) * self.itemsize + self.mask

    @property
    def per_head(self) -> int:
        """Bytes that a block reads when it turns to a head of a sequence."""
        return self.alibi * _SLOPE + self.dropout * _SEED

    @property
    def statistics(self) -> int:
        """Bytes of what a forward pass keeps of a row: its lse, and a tail where something is added to the scores."""
        return _STATISTIC * (2 if self.bias_batch or self.alibi else 1)

    @property
    def bias_bytes(self) -> int:
        """Bytes of the bias, or of its gradient."""
        n, nk = self.longest
        return self.itemsize * self.bias_batch * self.heads * n * nk

    @property
    def options_once(self) -> int:
        """Bytes of bias, mask, slopes and seed, each read once."""
        n, nk = self.longest
        mask = self.mask * len(self.lengths) * self.heads * n * nk
        return self.bias_bytes + mask + self.alibi * self.heads * _SLOPE + self.dropout * _SEED


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


def _rows_visited(problem: Problem, n: int, nk: int, first_key: int, config: Config) -> tuple[int, int]:
    """Rows of q and dO that a block of keys loads for one query head, and in how many steps."""
    start, stop = 0, n
    shift, last_key = nk - n, min(first_key + config.block_n, nk) - 1
    if problem.window_left >= 0:
        stop = max(min(n, last_key + problem.window_left - shift + 1), 0)
    if problem.window_right >= 0:
        start = max(first_key - shift - problem.window_right, 0) // config.block_m * config.block_m
    if stop <= start:
        return 0, 0
    steps = _blocks(stop - start, config.block_m)
    return min(start + steps * config.block_m, n) - start, steps


def _walk_over_keys(problem: Problem, config: Config) -> int:
    """Bytes that the kernels that own rows read repeatedly: k, v, bias, mask and a few numbers a block."""
    grid = busy = loaded = scores = 0
    for sequence, (n, nk) in enumerate(problem.lengths):
        grid += _blocks(problem.grid_lengths(sequence)[0], config.block_m)
        busy += _blocks(n, config.block_m)
        for first_row in range(0, n, config.block_m):
            visited = _keys_visited(problem, n, nk, first_row, config)
            loaded += visited
            scores += visited * min(config.block_m, n - first_row)
    a_head = grid * problem.packed * _OFFSETS + busy * problem.per_head
    return problem.heads * (a_head + loaded * problem.pair + scores * problem.per_score)


def forward(problem: Problem, config: Config) -> Account:
    """q, out and lse once; k and v once for each block of rows that sees them."""
    q = problem.rows * problem.head_dim * problem.itemsize
    blocks = problem.heads * sum(_blocks(n, config.block_m) for n, _ in problem.lengths)
    written = problem.rows * (problem.value_dim * problem.itemsize + problem.statistics)
    sink = problem.sinks * problem.itemsize
    once = q + problem.keys * problem.pair + problem.options_once + problem.heads * sink
    return Account(
        "fwd",
        floor=Bytes(once, written),
        model=Bytes(q + _walk_over_keys(problem, config) + blocks * sink, written),
    )


def backward_delta(problem: Problem) -> Account:
    """out and dO once (and dlse where it is used), and delta once."""
    read = problem.rows * (2 * problem.value_dim * problem.itemsize + problem.dlse * _STATISTIC)
    once = Bytes(read, problem.rows * _STATISTIC)
    return Account("bwd", floor=once, model=once)


def backward_dq(problem: Problem, config: Config) -> Account:
    """q, dO, lse, delta and dq once; k and v once for each block of rows that sees them."""
    own = problem.rows * (problem.pair + problem.statistics + _STATISTIC)
    written = problem.rows * problem.head_dim * problem.itemsize
    return Account(
        "bwd",
        floor=Bytes(own + problem.keys * problem.pair + problem.options_once, written),
        model=Bytes(own + _walk_over_keys(problem, config), written),
    )


def backward_dkv(problem: Problem, config: Config) -> Account:
    """k, v, dk and dv once; q, dO, lse and delta once for each block of keys that they see."""
    grid = loaded = scores = turns = 0
    for sequence, (n, nk) in enumerate(problem.lengths):
        grid += _blocks(problem.grid_lengths(sequence)[1], config.block_n)
        for first_key in range(0, nk, config.block_n):
            visited, steps = _rows_visited(problem, n, nk, first_key, config)
            loaded += visited
            scores += visited * min(config.block_n, nk - first_key)
            turns += steps
    row = problem.pair + problem.statistics + _STATISTIC
    repeated = problem.heads * (loaded * row + scores * problem.per_score + turns * problem.per_head)
    own = problem.keys * problem.pair
    offsets = problem.kv_heads * grid * problem.packed * _OFFSETS
    return Account(
        "bwd",
        floor=Bytes(own + problem.rows * row + problem.options_once, own),
        model=Bytes(own + repeated + offsets, own),
    )


def backward_dbias(problem: Problem, config: Config) -> Account:
    """dbias once; for every tile of it and every sequence and head that the tile was added to, q, dO, lse and delta
    of its rows, k and v of its keys, and what bias and mask hold for it. No tile is left out for a window."""
    row, own = problem.pair + problem.statistics + _STATISTIC, problem.bias_bytes
    read = 0
    for n, nk in problem.lengths:
        row_tiles, key_tiles = _blocks(problem.longest[0], config.block_m), _blocks(problem.longest[1], config.block_n)
        # Every tile of rows meets every tile of keys, so each row is read once a tile of keys.
        tiles = n * key_tiles * row + nk * row_tiles * problem.pair + n * nk * problem.per_score
        read += problem.heads * (tiles + row_tiles * key_tiles * (problem.per_head + problem.packed * _OFFSETS))
    once = problem.rows * row + problem.keys * problem.pair + problem.options_once
    return Account("bwd", floor=Bytes(once, own), model=Bytes(read, own))


def accounts(problem: Problem, configs: dict[str, Config]) -> dict[str, Account]:
    """Every kernel that one forward and backward pass launches, by name; ``configs`` as autotune names them."""
    found: dict[str, Account] = {}
    if problem.rows:
        found["flash_attention_fwd_kernel"] = forward(problem, configs["flash_attention_fwd"])
        found["flash_attention_bwd_delta_kernel"] = backward_delta(problem)
    if problem.rows and problem.keys:
        found["flash_attention_bwd_dq_kernel"] = backward_dq(problem, configs["flash_attention_bwd_dq"])
        found["flash_attention_bwd_dkv_kernel"] = backward_dkv(problem, configs["flash_attention_bwd_dkv"])
        if problem.bias_batch:
            found["flash_attention_bwd_dbias_kernel"] = backward_dbias(problem, configs["flash_attention_bwd_dbias"])
    return found

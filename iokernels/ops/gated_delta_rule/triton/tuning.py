"""Launch parameters of the gated delta rule's kernels: what a configuration is, and the analytic default.

The configurations that tuning may try are in :mod:`.space`. Rows to a chunk are no part of them: passes
share what they keep for each chunk (:func:`.delta_options.chunk_rows`).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch

from iokernels.autotune import RESULTS, precision_of, precision_word
from iokernels.ops.gated_delta_rule.options import chunk_rows
from iokernels.runtime.device import DeviceSpec

INVERSE = "gated_delta_rule_inverse"
WALKS = ("gated_delta_rule_fwd", "gated_delta_rule_bwd_states", "gated_delta_rule_bwd_walk")
GRADS = "gated_delta_rule_bwd_grads"
STEP = "gated_delta_rule_step"
KERNELS = (INVERSE, *WALKS, GRADS, STEP)


@dataclass(frozen=True)
class Config:
    """One way to launch a kernel: ``block_k`` columns of k and ``block_v`` of v to a tile, powers of two, 16 at least.

    All kernels but the one of gradients hold k whole: ``block_k`` is its padded width there. The inverse reads no v.
    """

    block_k: int = field(metadata=RESULTS)
    block_v: int = field(metadata=RESULTS)
    num_warps: int
    num_stages: int


class Problem(NamedTuple):
    """What the choice depends on. Widths are rounded up to powers of two, 16 at least.

    Counts, after ``smem_block``, are rounded up to powers of two, so that there are few problems; of them the default
    looks at ``heads`` alone.
    """

    kernel: str
    width_k: int
    width_v: int
    chunk: int  # rows
    itemsize: int  # bytes an element of q, k, v
    tensor_cores: bool  # False for float32 at full precision
    sm: int
    smem_block: int  # bytes of shared memory a thread block may use
    sms: int
    heads: int = 64  # of all sequences
    seqlen: int = 4096  # of all sequences together


def table_key(problem: Problem) -> dict[str, Any]:
    """What tables are looked up by: float16 and bfloat16 are alike to the hardware."""
    return {
        "dtype": precision_word(problem.itemsize, problem.tensor_cores),
        "width_k": problem.width_k,
        "width_v": problem.width_v,
        "heads": problem.heads,
        "seqlen": problem.seqlen,
    }


def problem_of(kernel: str, key: dict[str, Any], device: DeviceSpec) -> Problem:
    """The reverse of :func:`table_key`: a problem that has this key. Raises ``KeyError`` for a key of another make."""
    itemsize, tensor_cores = precision_of(key["dtype"])
    return Problem(
        kernel=kernel,
        chunk=chunk_rows(torch.float16 if itemsize == 2 else torch.float32, key["width_k"]),
        itemsize=itemsize,
        tensor_cores=tensor_cores,
        sm=device.sm,
        smem_block=device.smem_block,
        sms=device.sms,
        **{name: value for name, value in key.items() if name != "dtype"},
    )


SIZES = ("heads", "seqlen")
"""The sizes of :func:`table_key` of which the nearest entry serves."""


def default(problem: Problem) -> Config:
    """A configuration that fits, for every problem the kernels accept."""
    config = _preferred(problem)
    while shared_bytes(problem, config) > problem.smem_block:
        config = _smaller(problem, config)
    return config


def _preferred(problem: Problem) -> Config:
    """What the registers suggest, and the number of blocks, before shared memory has its say."""
    width_k, width_v = problem.width_k, problem.width_v
    if problem.kernel == STEP:
        # The state is all there is: 32 KiB of it a block keep enough bytes in flight.
        return Config(width_k, max(16, min(width_v, 8192 // width_k)), 4, 1)
    if problem.kernel == INVERSE:
        return Config(width_k, 16, 4, 1)
    # Warpgroup (Hopper) and tensor-memory (Blackwell) products read operands from shared memory, which frees registers.
    roomy, half = problem.sm // 10 in (9, 10), problem.itemsize == 2
    if problem.kernel == GRADS:
        columns = (64, 32) if half and roomy else (32, 16 if half else 32)
        return Config(min(width_k, columns[0]), min(width_v, columns[1]), 8, 1)
    # A walk: columns as the registers allow beside q, k and the scores, fewer while that is what fills the GPU.
    columns = min(32 if problem.tensor_cores or width_k <= 128 else 16, width_v)
    while columns > 16 and problem.heads * (width_v // columns) < problem.sms:
        columns //= 2
    hopper = half and problem.sm // 10 == 9
    return Config(width_k, columns, 4 if hopper else 8, 2 if hopper else 1)


def _smaller(problem: Problem, config: Config) -> Config:
    """The next thing to give up: stages first, then columns of v, then of k."""
    if config.num_stages > 1:
        return replace(config, num_stages=config.num_stages - 1)
    if config.block_v > 16:
        return replace(config, block_v=config.block_v // 2)
    if config.block_k > 16 and problem.kernel == GRADS:
        return replace(config, block_k=config.block_k // 2)
    raise AssertionError(f"no configuration of {problem.kernel} fits in {problem.smem_block} bytes")


def shared_bytes(problem: Problem, config: Config) -> int:
    """An upper estimate of the shared memory that the compiler takes, in bytes."""
    chunk, size = problem.chunk, problem.itemsize
    if problem.kernel == STEP:
        return 4 * (config.block_k + config.block_v) * config.num_warps
    if problem.kernel == INVERSE:
        # The systems are float32, and a product holds both of its operands.
        return size * chunk * config.block_k + 3 * 4 * chunk * chunk
    if problem.kernel == GRADS:
        tiles = chunk * (4 * config.block_v + 2 * config.block_k) + 2 * config.block_k * config.block_v
        return size * (tiles * config.num_stages + 2 * chunk * chunk)
    # q and k, v or its like, the inverse; then the state and what passes from one product to the next.
    walked = size * chunk * (2 * config.block_k + config.block_v) + 4 * chunk * chunk
    own = size * (config.block_k * config.block_v + chunk * (chunk + config.block_v)) + 4 * chunk * config.block_v
    return config.num_stages * walked + own

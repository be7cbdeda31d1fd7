"""Launch parameters of the gated delta rule's kernels: what a configuration is, its default and its space.

Rows to a chunk are no part of them: passes share what they keep for each chunk
(:func:`iokernels.ops.gated_delta_rule.options.chunk_rows`).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch

from iokernels.autotune import RESULTS, Size, Tunable, Unkeyed
from iokernels.autotune.space import (
    Constraint,
    Space,
    fits_registers,
    fits_shared_memory,
    literals,
    powers_of_two,
)
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
    chunk: Unkeyed[int]  # rows
    itemsize: int  # bytes an element of q, k, v
    tensor_cores: bool  # False for float32 at full precision
    sm: int
    smem_block: int  # bytes of shared memory a thread block may use
    sms: int
    heads: Size = 64  # of all sequences
    seqlen: Size = 4096  # of all sequences together


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


_TILE = ("block_k", "block_v", "num_warps")


def accumulators(problem: Problem, block_k: int, block_v: int) -> int:
    """The 32-bit registers of a block that hold states, sums and products."""
    chunk = problem.chunk
    if problem.kernel == STEP:
        return 2 * block_k * block_v
    if problem.kernel == INVERSE:
        return 4 * chunk * chunk
    if problem.kernel == GRADS:
        return 4 * chunk * chunk + 3 * chunk * block_k
    return block_k * block_v + 2 * chunk * block_v + chunk * chunk


def _space(kernel: str) -> Space[Config]:
    def words(problem: Problem, device: DeviceSpec, block_k: int, block_v: int, warps: int) -> int:
        return accumulators(problem, block_k, block_v)

    def shared(problem: Problem, device: DeviceSpec, block_k: int, block_v: int, stages: int) -> int:
        return shared_bytes(problem, Config(block_k, block_v, 4, stages))

    def columns(problem: Problem, device: DeviceSpec, block_k: int, block_v: int) -> bool:
        whole = block_k == problem.width_k or (kernel == GRADS and block_k < problem.width_k)
        return whole and (block_v == 16 if kernel == INVERSE else block_v <= problem.width_v)

    return Space(
        name=kernel,
        version=1,
        axes=(
            powers_of_two("block_k", 16, 256),
            powers_of_two("block_v", 16, 256),
            literals("num_warps", 2, 4, 8),
            literals("num_stages", 1, 2, 3),
        ),
        constraints=(
            Constraint("columns", ("block_k", "block_v"), columns),
            fits_registers(_TILE, "num_warps", words),
            fits_shared_memory(("block_k", "block_v", "num_stages"), shared),
        ),
        make=Config,
    )


def _completed(kernel: str, key: dict[str, Any]) -> dict[str, Any]:
    return {"chunk": chunk_rows(torch.float16 if key["itemsize"] == 2 else torch.float32, key["width_k"])}


TUNABLES: dict[str, Tunable[Config]] = {
    kernel: Tunable(kernel, "triton", _space(kernel), default, Problem, _completed) for kernel in KERNELS
}
"""The kernels of the gated delta rule by name."""

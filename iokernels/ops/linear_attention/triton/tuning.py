"""Launch parameters of the linear_attention kernels: what a configuration is, its default and its space.

The default follows from what must fit. A block keeps its part of the state in registers (64 K of them an SM, 255 a
thread at most) and ``num_stages`` chunks of what it walks over in shared memory. Where heads alone do not fill the GPU,
sequences are cut into segments.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import NamedTuple

from iokernels.autotune import RESULTS, Size, Tunable, bucket
from iokernels.autotune.space import (
    Constraint,
    Space,
    fits_registers,
    fits_shared_memory,
    literals,
    powers_of_two,
)
from iokernels.runtime.device import DeviceSpec

KERNELS = (
    "linear_attention_fwd",
    "linear_attention_bwd_dq",
    "linear_attention_bwd_dk",
    "linear_attention_bwd_dv",
    "linear_attention_state",
    "linear_attention_step",
)

CUTTING = ("linear_attention_fwd", "linear_attention_bwd_dq")
"""The kernels whose configuration says into how many segments sequences are cut: for the forward pass, and for all of
the backward pass."""

RESTART = 1024
"""Most rows of a segment in a backward pass that computes the gradient of decays: it is summed up inside a segment, and
rounding errors with it."""


@dataclass(frozen=True)
class Config:
    """One way to launch a kernel. ``chunk`` rows (of the step kernel: 1) are taken at a time by a block that owns
    ``width`` columns, both powers of two. ``segments`` counts the parts that a sequence is cut into; it is that of the
    kernels in :data:`CUTTING` that counts."""

    chunk: int = field(metadata=RESULTS)
    width: int = field(metadata=RESULTS)
    num_warps: int
    num_stages: int
    segments: int = field(default=1, metadata=RESULTS)


class Problem(NamedTuple):
    """What the choice depends on. Widths are rounded up to powers of two, 16 at least.

    Counts are rounded up to powers of two (:func:`bucket`), so that there are few problems.
    """

    kernel: str
    block_k: int
    block_v: int
    itemsize: int  # bytes an element of q, k, v
    tensor_cores: bool  # False for float32 at full precision
    taylor: bool
    crossing: bool  # the backward pass computes the gradient of decays
    sm: int
    sms: int
    smem_block: int  # bytes of shared memory a thread block may use
    heads: Size = 64  # of v, of all sequences
    seqlen: Size = 4096  # packed: the mean length

    @property
    def rows_width(self) -> int:
        """The width of what a chunk's products contract: x and y of the walk."""
        return self.block_k if self._over_values else self.block_v

    @property
    def sliced_width(self) -> int:
        """The width that blocks share out: z of the walk, and with the Taylor map V in every kernel."""
        return self.block_v if self._over_values or self.taylor else self.block_k

    @property
    def _over_values(self) -> bool:
        return not self.kernel.endswith(("_dq", "_dk"))


def default(problem: Problem) -> Config:
    """A configuration that fits, for every problem the kernels accept."""
    config = _preferred(problem)
    while not fits(problem, config):
        config = _smaller(problem, config)
    return replace(config, segments=_segments(problem, config)) if problem.kernel in CUTTING else config


def _preferred(problem: Problem) -> Config:
    """The shape that the registers suggest, before shared memory has its say."""
    if problem.kernel == "linear_attention_step":
        # The state passes through once: many small blocks, to have many loads in flight.
        rows = problem.block_k * problem.block_k if problem.taylor else problem.block_k
        return Config(1, max(min(problem.block_v, 4096 // rows), 4), 4, 1)
    if problem.taylor:
        # A state of K^2 rows: 16 K numbers of it a block, or 8 K where its product with V is a tile as well.
        keys = problem.kernel.endswith(("_dq", "_dk"))
        width = max(min(problem.block_v, (8192 if keys else 16384) // problem.block_k**2), 16)
        if problem.itemsize == 4:
            return Config(16, 16, 8, 1)
        return Config(32 if keys and problem.block_k <= 16 else 16, width, 8, 1)
    rows, width = problem.rows_width, problem.sliced_width
    if problem.itemsize == 4:
        if problem.tensor_cores:
            return Config(32, min(width, 64 if rows <= 128 else 32), 8, 2)
        # Without matrix units a thread holds whole rows of both operands.
        return Config(16, min(width, 64) if rows <= 64 else 16, 8, 1)
    # The gradient of decays keeps more tiles alive; warpgroup products (Hopper, Blackwell) take 64 rows.
    chunk = 32 if problem.crossing or rows > 128 or problem.sm // 10 not in (9, 10) else 64
    if rows <= 64:
        return Config(chunk, min(width, 64), 4, 3)
    if rows <= 128 and problem.sm // 10 not in (9, 10):
        chunk = 16  # operands of the other matrix units are in registers, beside a whole state
    return Config(chunk, min(width, 128 if rows <= 128 else 64), 8, 2)


def _segments(problem: Problem, config: Config) -> int:
    """Enough that every SM has a block, each with some chunks of its own to walk."""
    blocks = problem.heads * -(-problem.sliced_width // config.width)
    wanted = bucket(problem.sms // blocks + 1) // 2  # a power of two, rounded down
    return max(min(wanted, problem.seqlen // (4 * config.chunk)), 1)


def _smaller(problem: Problem, config: Config) -> Config:
    """The next thing to give up: stages first, then columns, then rows."""
    if config.num_stages > 1:
        return replace(config, num_stages=config.num_stages - 1)
    if config.width > 16:
        return replace(config, width=config.width // 2)
    if config.chunk > 16:
        return replace(config, chunk=config.chunk // 2)
    raise AssertionError(f"no configuration of {problem.kernel} fits in {problem.smem_block} bytes")


def segment_rows(total: int, sharing: int, segments: int, chunk: int, most_rows: int | None = None) -> int | None:
    """The rows of a segment, or None where sequences stay whole.

    ``sharing`` packed sequences have ``total`` rows together. A segment holds whole chunks, and at most ``most_rows``.
    """
    mean = -(-total // max(sharing, 1))
    rows = max(-(-mean // (segments * chunk)), 1) * chunk
    if segments == 1:
        rows = total
    if most_rows is not None:
        rows = min(rows, most_rows)
    return rows if rows < total else None


def fits(problem: Problem, config: Config) -> bool:
    """Whether the tiles that a block holds in shared memory fit."""
    return shared_bytes(problem, config) <= problem.smem_block


def shared_bytes(problem: Problem, config: Config) -> int:
    """An upper estimate of the shared memory that the compiler takes, in bytes."""
    if problem.kernel == "linear_attention_step":
        return 4 * problem.block_k * config.width
    chunk, width, item = config.chunk, config.width, problem.itemsize
    rows = problem.rows_width
    held = rows * width  # the state as an operand
    walked = config.num_stages * chunk * (2 * rows + width)
    scores = chunk * chunk
    if problem.taylor:
        held = (problem.block_k + problem.block_k**2) * width
        walked = config.num_stages * chunk * (2 * problem.block_k + 2 * width)
        # The products of two columns, and room to change their layout.
        walked += chunk * problem.block_k**2 * (2 if item == 2 else 1)
    if problem.kernel == "linear_attention_state":
        return item * (walked + held)
    return item * (walked + held + 2 * scores)


_TILE = ("chunk", "width", "num_warps")


def accumulators(problem: Problem, chunk: int, width: int) -> int:
    """The 32-bit registers of a block that hold the state, results and scores."""
    rows = problem.rows_width
    if problem.kernel == "linear_attention_step":
        return (problem.block_k**2 if problem.taylor else rows) * width
    if problem.taylor:
        products = chunk * problem.block_k**2
        return (problem.block_k + problem.block_k**2) * width + products + 2 * chunk * (width + chunk)
    state = rows * width
    if problem.kernel == "linear_attention_state":
        return state
    return state + 2 * chunk * (width + chunk)


def _space(kernel: str) -> Space[Config]:
    def words(problem: Problem, device: DeviceSpec, chunk: int, width: int, warps: int) -> int:
        return accumulators(problem, chunk, width)

    def shared(problem: Problem, device: DeviceSpec, chunk: int, width: int, stages: int) -> int:
        return shared_bytes(problem, Config(chunk, width, 4, stages))

    def no_wider(problem: Problem, device: DeviceSpec, width: int) -> bool:
        return width <= problem.sliced_width

    def whole_chunks(problem: Problem, device: DeviceSpec, chunk: int, segments: int) -> bool:
        return segments == 1 or segments * chunk <= problem.seqlen

    step = kernel == "linear_attention_step"
    return Space(
        name=kernel,
        version=1,
        axes=(
            literals("chunk", 1) if step else powers_of_two("chunk", 16, 128),
            powers_of_two("width", 4 if step else 16, 256),
            literals("num_warps", 1, 2, 4, 8) if step else literals("num_warps", 4, 8, 16),
            literals("num_stages", 1) if step else literals("num_stages", 1, 2, 3, 4),
            powers_of_two("segments", 1, 256) if kernel in CUTTING else literals("segments", 1),
        ),
        constraints=(
            Constraint("width", ("width",), no_wider),
            fits_registers(_TILE, "num_warps", words),
            fits_shared_memory(("chunk", "width", "num_stages"), shared),
            Constraint("whole chunks", ("chunk", "segments"), whole_chunks),
        ),
        make=Config,
    )


TUNABLES: dict[str, Tunable[Config]] = {
    kernel: Tunable(kernel, "triton", _space(kernel), default, Problem) for kernel in KERNELS
}
"""The kernels of this room by name."""

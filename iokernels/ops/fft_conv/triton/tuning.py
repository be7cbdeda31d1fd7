"""Launch parameters of the fft_conv kernels: blocks of transforms, configurations, their default and their space."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from iokernels.autotune import RESULTS, RoundedSize, Tunable, Unkeyed
from iokernels.autotune.space import Axis, Constraint, Space, fits_registers, fits_shared_memory, literals
from iokernels.ops.fft_conv.options import CIRCULAR, TWO_SIDED
from iokernels.runtime.device import DeviceSpec

KERNELS = ("fft_conv_fwd", "fft_conv_bwd")
OUTER_KERNEL = "fft_conv_outer"

SHORTEST = 256
"""The shortest transform: two products of 16 by 16."""

LONGEST = {2: 8192, 4: 2048}
"""The longest transform on chip, by the bytes of an element. In float32, with products of three terms, the next one
keeps more in local memory than the way through memory would move."""

LONGEST_ROW = 4096
"""The longest transform on chip of those that are part of one through memory."""

OUTERS = tuple(1 << bits for bits in range(4, 12))
"""How many rows a transform through memory has: from a product of 16 by 16 to one of 2048 by 2048."""

LONGEST_THROUGH = 1 << 23
"""The longest transform through memory. Angles are counted as whole numbers that float32 holds."""


@dataclass(frozen=True)
class Config:
    """One way to launch a kernel: transforms of ``length``, a power of two; ``units`` of them to a thread block.

    With ``outer`` above 1 they are the rows of transforms of ``outer * length`` points, which go through memory.
    """

    length: int = field(metadata=RESULTS)
    units: int = field(metadata=RESULTS)
    num_warps: int
    num_stages: int
    outer: int = field(default=1, metadata=RESULTS)


@dataclass(frozen=True)
class OuterConfig:
    """One way to launch the first and the last step of transforms through memory: a tile of ``rows`` by ``columns``,
    from products of ``depth`` at a time. Powers of two; :func:`fitted` cuts them to the transform's sizes."""

    rows: int = field(metadata=RESULTS)
    columns: int = field(metadata=RESULTS)
    depth: int = field(metadata=RESULTS)
    num_warps: int
    num_stages: int


class Problem(NamedTuple):
    """What the choice depends on."""

    kernel: str
    itemsize: Unkeyed[int]  # bytes an element of u
    precision: str  # "half", "tf32" or "tf32x3": what the products are made of
    seqlen: RoundedSize
    taps: RoundedSize  # that reach an output
    mode: str
    state: Unkeyed[bool]  # there is an initial state
    gated: bool
    sm: int
    smem_block: int  # bytes of shared memory a thread block may use
    sms: int = 132
    heads: RoundedSize = 768
    pairs: RoundedSize = 32  # of sequences


class Blocks(NamedTuple):
    """How transforms of one length cover a sequence: :mod:`.forward` has the words."""

    n1: int
    n2: int
    half: bool
    overlap: int
    step: int
    chunks: int
    periodic: bool

    @property
    def outer(self) -> int:
        """Rows of a transform through memory: here there are none."""
        return 1


class Through(NamedTuple):
    """How transforms of ``outer n1 n2`` points through memory cover a sequence.

    Forward as :class:`Blocks`: position i of block c is at time ``c step - overlap + i``, positions from ``overlap`` on
    are results. Backward it is at time ``c step - past + i``: the first ``step`` positions of v, of which each is in
    one block alone, meet the gradients of all the block's positions; those that they reach are no more than that.
    """

    outer: int
    n1: int
    n2: int
    overlap: int
    past: int
    step: int
    chunks: int
    back_chunks: int
    periodic: bool

    @property
    def rows(self) -> int:
        """Rows that are transformed: of the others these are the mirror image."""
        return self.outer // 2 + 1

    @property
    def same(self) -> bool:
        """Whether the blocks of v are the same forward and backward."""
        return self.chunks == self.back_chunks == 1 and self.overlap == self.past


class Wanted(NamedTuple):
    """What a launch of the backward kernel computes."""

    v: bool  # dv, and of it du, dpre and dstate as far as they are wanted
    u: bool
    pre: bool
    post: bool
    k: bool
    state: bool = False


_ONE_PASS = {2: 2048, 4: 1024}
"""The longest transform of which a thread holds the registers for all gradients at once, by the bytes of an element.

Of 4096 points, gated, it would keep 960 bytes a thread in local memory (sm_90; 2008 on sm_80), 240 KiB a thread block
for every 56 KiB that a block of a pair moves; one after the other they keep 120 at most.
"""


_ROOMY = {2: 1024, 4: 512}
"""The longest row of a transform through memory that leaves registers free on every GPU."""


def passes(wanted: Wanted, length: int, itemsize: int) -> list[Wanted]:
    """The launches of a backward pass: one, or dv, dk and dpost each by itself."""
    if length <= _ONE_PASS[itemsize]:
        return [wanted]
    nothing = Wanted(False, False, False, False, False)
    parts = [wanted._replace(post=False, k=False), nothing._replace(k=wanted.k), nothing._replace(post=wanted.post)]
    return [part for part in parts if any(part)]


def factors(length: int) -> tuple[int, int]:
    """``length`` as N1 N2, powers of two: N1 as large as may be, so that every warp has rows of the products to itself.

    Warps beyond N1 / 16 would repeat the work of others, and keep all of F2 and of z in registers for it.
    """
    n2 = {4096: 32, 8192: 64}.get(length, 16)
    return length // n2, n2


def blocks(length: int, seqlen: int, taps: int, mode: str, state: bool) -> Blocks | None:
    """The blocks of a call, or None where transforms of this length do not do."""
    n1, n2 = factors(length)
    if mode == CIRCULAR and seqlen == length:
        return Blocks(n1, n2, False, 0, length, 1, False)
    if mode != CIRCULAR and not state and 2 * seqlen <= length:
        # Lags of both signs fit: no output is reached around the end.
        return Blocks(n1, n2, n1 >= 32, length // 2, length // 2, 1, False)
    if mode == TWO_SIDED or taps - 1 > length // 2:
        return None
    step = length - (taps - 1)
    return Blocks(n1, n2, False, taps - 1, step, max(1, -(-seqlen // step)), mode == CIRCULAR)


def through(outer: int, length: int, seqlen: int, taps: int, mode: str, state: bool) -> Through | None:
    """The blocks of a call in transforms through memory, or None where those of ``outer * length`` points do not do."""
    n1, n2 = factors(length)
    points = outer * length
    if points > LONGEST_THROUGH or length > LONGEST_ROW:
        return None
    if mode == CIRCULAR and seqlen == points:
        return Through(outer, n1, n2, 0, 0, points, 1, 1, False)
    reach = taps - 1
    past = reach if state else 0
    if mode == TWO_SIDED:
        return Through(outer, n1, n2, 0, 0, points, 1, 1, False) if 2 * seqlen - 1 <= points else None
    if seqlen + reach <= points:
        overlap = reach if mode == CIRCULAR or state else 0
        return Through(outer, n1, n2, overlap, past, points, 1, 1, mode == CIRCULAR)
    if reach > points // 2:
        return None
    step = points - reach
    chunks, back_chunks = max(1, -(-seqlen // step)), max(1, -(-(seqlen + past) // step))
    return Through(outer, n1, n2, reach, past, step, chunks, back_chunks, mode == CIRCULAR)


def lengths(itemsize: int) -> tuple[int, ...]:
    """The transforms that the kernels have for elements of so many bytes."""
    return tuple(1 << bits for bits in range(SHORTEST.bit_length() - 1, LONGEST[itemsize].bit_length()))


def hoists(problem: Problem, n1: int, rows: int, n2: int) -> bool:
    """Whether a kernel keeps F1 [N1, ROWS] and F2 in shared memory, rather than loading them for every block.

    Where they fit, and not on Blackwell's data-centre parts, whose tensor memory the results of all products, which the
    compiler then keeps apart, would overflow.
    """
    small = n1 < 64  # rows, too few for the products that use it
    return (problem.sm // 10 != 10 or small) and hoisted_bytes(problem.itemsize, n1, rows, n2) <= problem.smem_block


def hoisted_bytes(itemsize: int, n1: int, rows: int, n2: int) -> int:
    """Shared memory of a kernel that keeps F1 and F2 there: copies of both parts, negated, transposed, as the products
    want them, and z; in float32 of two terms each. The most that was read off compiled kernels."""
    terms, second = (2, 6) if itemsize == 4 else (1, 4)
    return itemsize * terms * (6 * n1 * rows + second * n2 * n2 + 2 * n1 * n2)


def tiling_refusal(seqlen: Any, taps: Any, mode: str, state: bool, itemsize: int) -> str | None:
    """Why no transform serves a call of so many effective taps, as the end of a sentence, or None."""
    if any(blocks(length, seqlen, taps, mode, state) is not None for length in lengths(itemsize)):
        return None
    if any(through(outer, LONGEST_ROW, seqlen, taps, mode, state) is not None for outer in OUTERS):
        return None
    half = LONGEST_THROUGH // 2
    return (
        f"its transforms of up to {LONGEST_THROUGH} points serve sequences up to {half} with any filter that reaches "
        f"no further, and filters up to {half + 1} taps with any sequence; N is {seqlen} with {taps} taps"
    )


def default(problem: Problem) -> Config:
    """A configuration for every problem that the kernels accept: the least work, and enough thread blocks.

    What fits on chip stays there. Through memory, every row of a head is a thread block of its own.
    """
    outer, length = best_lengths(problem)
    total = most_units(problem, outer, length)
    rows = outer // 2 + 1 if outer > 1 else 1
    parts = min(total, max(1, -(-2 * problem.sms // max(problem.heads * rows, 1))))
    return Config(length, max(1, -(-total // parts)), warps(length), 1, outer)


def default_outer(problem: Problem) -> OuterConfig:
    """Tiles of the first and the last step of transforms through memory, for every problem."""
    return _outer_tile(problem.itemsize, max(best_lengths(problem)[0], OUTERS[0]))


def _outer_tile(itemsize: int, outer: int) -> OuterConfig:
    """All rows, up to as many as leave an SM room for more than one thread block, so that a signal is read once."""
    most = 64 if itemsize == 4 else 128
    rows = min(outer, most)
    columns = 64 if rows == most else 128
    return OuterConfig(rows, columns, min(rows, 32), 4 if itemsize == 4 or rows <= 32 else 8, 1 if itemsize == 4 else 2)


def fitted(config: OuterConfig, outer: int, length: int) -> OuterConfig:
    """The tile of a configuration for transforms of so many rows of so many points: of columns, whole rows N2."""
    rows, depth = min(config.rows, outer), min(config.depth, outer)
    return replace(config, rows=rows, columns=min(max(config.columns, factors(length)[1]), length), depth=depth)


def warps(length: int) -> int:
    """16 rows of the products to a warp."""
    return min(8, factors(length)[0] // 16)


def blocks_of(problem: Problem, length: int) -> Blocks | None:
    """:func:`blocks` of a problem."""
    return blocks(length, problem.seqlen, problem.taps, problem.mode, problem.state)


def cover_of(problem: Problem, outer: int, length: int) -> Blocks | Through | None:
    """The blocks of a problem, on chip or through memory."""
    if outer == 1:
        return blocks_of(problem, length) if length <= LONGEST[problem.itemsize] else None
    return through(outer, length, problem.seqlen, problem.taps, problem.mode, problem.state)


def most_units(problem: Problem, outer: int, length: int) -> int:
    """How many units a head has: pairs of sequences on chip, sequences through memory, by their blocks."""
    cover = cover_of(problem, outer, length)
    assert cover is not None
    if isinstance(cover, Through):
        return 2 * problem.pairs * cover.back_chunks
    return problem.pairs * cover.chunks


def best_lengths(problem: Problem) -> tuple[int, int]:
    """Rows and points of the transform that takes the least time on paper; one row on chip wherever it fits.

    It is that of the forward kernel for both passes.
    """
    able = [(1, length) for length in lengths(problem.itemsize) if blocks_of(problem, length) is not None]
    if not able:
        able = [(outer, length) for outer in OUTERS for length in row_lengths() if cover_of(problem, outer, length)]
    return min(able, key=lambda pair: work(problem, *pair))


def row_lengths() -> tuple[int, ...]:
    """The transforms on chip that transforms through memory are made of."""
    return tuple(1 << bits for bits in range(SHORTEST.bit_length() - 1, LONGEST_ROW.bit_length()))


def work(problem: Problem, outer: int, length: int) -> float:
    """Arithmetic and bytes of a sequence in one measure: a byte moved is worth about 200 operations of matrix units, or
    a third of them where products have three terms."""
    cover = cover_of(problem, outer, length)
    assert cover is not None
    worth = 200 / (3 if problem.itemsize == 4 else 1)
    if isinstance(cover, Through):
        points = outer * length
        crowd = 1 if length <= _ROOMY[problem.itemsize] else 2
        operations = 4 * outer * points + 8 * points * (cover.n1 + cover.n2) * crowd
        tile = _outer_tile(problem.itemsize, outer)
        # What tiles of a product ask for again comes from the cache, at a third of the price.
        again = 2 * points * outer * (1 / tile.rows + 1 / tile.columns) / 3
        return cover.chunks * (operations / worth + (4 * points + 2 * cover.step + again) * problem.itemsize)
    n1 = cover.n1 * (0.5 if cover.half else 1.0)
    touched = min(length, problem.seqlen + cover.overlap) + min(cover.step, problem.seqlen)
    return cover.chunks * (8 * length * (n1 + cover.n2) / worth + touched * problem.itemsize)


def _space(kernel: str) -> Space[Config]:
    def serves(problem: Problem, device: DeviceSpec, length: int, outer: int) -> bool:
        return cover_of(problem, outer, length) is not None

    def some_work(problem: Problem, device: DeviceSpec, length: int, units: int, outer: int) -> bool:
        return units <= most_units(problem, outer, length)  # only asked of what serves the call

    def words(problem: Problem, device: DeviceSpec, length: int, warps: int) -> int:
        # A transform, and in the backward pass the gradient of the filter.
        return 2 * length * (2 if kernel == "fft_conv_bwd" else 1)

    def choices(problem: Problem) -> tuple[int, ...]:
        return tuple(sorted({1 << bits for bits in range(12)} | {default(problem).units}))

    def outers(problem: Problem) -> tuple[int, ...]:
        # Through memory only what has to go there: it is several times the bytes.
        return (1,) if best_lengths(problem)[0] == 1 else OUTERS

    return Space(
        name=kernel,
        version=2,
        axes=(
            Axis("length", lambda problem: sorted({*lengths(problem.itemsize), *row_lengths()})),
            Axis("units", choices),
            literals("num_warps", 1, 2, 4, 8, 16),
            literals("num_stages", 1, 2),
            Axis("outer", outers),
        ),
        constraints=(
            Constraint("serves the call", ("length", "outer"), serves),
            Constraint("no more units than there are", ("length", "units", "outer"), some_work),
            fits_registers(("length", "num_warps"), "num_warps", words),
            # Operands on their way between two products; more is used where it is there.
            fits_shared_memory(("length",), lambda problem, device, length: problem.itemsize * 2 * length),
        ),
        make=Config,
    )


def _outer_space() -> Space[OuterConfig]:
    def words(problem: Problem, device: DeviceSpec, rows: int, columns: int, warps: int) -> int:
        return rows * columns + 16 * 32 * warps

    def shared(problem: Problem, device: DeviceSpec, rows: int, columns: int, depth: int, stages: int) -> int:
        return stages * depth * (rows + columns) * problem.itemsize

    return Space(
        name=OUTER_KERNEL,
        version=1,
        axes=(
            literals("rows", 16, 32, 64, 128),
            literals("columns", 64, 128, 256),
            literals("depth", 16, 32, 64),
            literals("num_warps", 4, 8),
            literals("num_stages", 1, 2, 3),
        ),
        constraints=(
            fits_registers(("rows", "columns", "num_warps"), "num_warps", words),
            fits_shared_memory(("rows", "columns", "depth", "num_stages"), shared),
        ),
        make=OuterConfig,
    )


def _completed(kernel: str, key: dict[str, Any]) -> dict[str, Any]:
    return {"itemsize": 2 if key["precision"] == "half" else 4, "state": False}


TUNABLES: dict[str, Tunable[Any]] = {
    kernel: Tunable(kernel, "triton", _space(kernel), default, Problem, _completed) for kernel in KERNELS
} | {OUTER_KERNEL: Tunable(OUTER_KERNEL, "triton", _outer_space(), default_outer, Problem, _completed)}
"""The kernels of this room by name."""

"""Launch parameters of the CUDA kernels of fft_conv: covers of a sequence, the analytic default, the space."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

from iokernels.autotune import RESULTS, RoundedSize, Tunable, Unkeyed
from iokernels.autotune.space import Axis, Constraint, Space, fits_shared_memory, literals
from iokernels.ops.fft_conv.options import CIRCULAR, TWO_SIDED
from iokernels.ops.fft_conv.triton.tuning import KERNELS
from iokernels.runtime.device import DeviceSpec

LENGTHS = (4096, 8192, 16384, 32768)
"""The transforms: 16 or 32 times 16 * 16 or 32 * 32."""

LONGEST_WHOLE = 16384
"""The longest block of which no half is zeros: of a longer one a thread cannot hold its share of the input."""


@dataclass(frozen=True)
class Config:
    """One way to launch a kernel: transforms of ``length``; ``units`` blocks of pairs to a thread block."""

    length: int = field(metadata=RESULTS)
    units: int = field(metadata=RESULTS)
    num_warps: int


class Problem(NamedTuple):
    """What the choice depends on."""

    kernel: str
    seqlen: RoundedSize
    taps: RoundedSize  # that reach an output
    mode: str
    state: Unkeyed[bool]  # there is an initial state
    gated: bool
    smem_block: int  # bytes of shared memory a thread block may use
    sms: int
    heads: RoundedSize
    pairs: RoundedSize  # of sequences


class Cover(NamedTuple):
    """How transforms of one length cover a sequence: ``csrc/fft_conv/forward.cu`` has the words."""

    half: bool
    lead: int
    step: int
    chunks: int
    periodic: bool


def factors(length: int) -> tuple[int, int]:
    """N1 and R of ``length = N1 R R``."""
    r = 16 if length <= 8192 else 32
    return length // (r * r), r


def cover(length: int, seqlen: int, taps: int, mode: str, state: bool) -> Cover | None:
    """The blocks of a call, or None where transforms of this length do not do.

    What lies before a block's first result is rounded up to a multiple of 4, so that accesses stay aligned.
    """
    if mode == CIRCULAR and seqlen == length <= LONGEST_WHOLE:
        return Cover(False, 0, length, 1, False)
    if mode != CIRCULAR and not state and 2 * seqlen <= length:
        # Lags of both signs fit: no output is reached around the end.
        return Cover(True, length // 2, length // 2, 1, False)
    if mode == TWO_SIDED or taps - 1 > length // 2 or length > LONGEST_WHOLE:
        return None
    lead = -(-(taps - 1) // 4) * 4
    step = length - lead
    return Cover(False, lead, step, max(1, -(-seqlen // step)), mode == CIRCULAR)


def refusal(seqlen: Any, taps: Any, mode: str, state: bool, smem_block: int) -> str | None:
    """Why no transform on chip serves a call of so many effective taps, as the end of a sentence, or None."""
    able = [length for length in LENGTHS if shared_bytes(length) <= smem_block]
    if any(cover(length, seqlen, taps, mode, state) is not None for length in able):
        return None
    half, whole = max(able) // 2, min(max(able), LONGEST_WHOLE) // 2
    return (
        f"its transforms on chip serve sequences up to {half} with any filter that reaches no further, and filters up "
        f"to {whole + 1} taps with any sequence; N is {seqlen} with {taps} taps"
    )


def shared_bytes(length: int) -> int:
    """Of a thread block: two planes of float16, both matrices of roots, the factors between stages 2 and 3, and the
    largest exponents."""
    n1, r = factors(length)
    return 4 * length + 4 * n1 * n1 + 8 * r * r + 256


def most_warps(length: int) -> int:
    """A warp owns at least 32 of the R R columns."""
    _, r = factors(length)
    return min(16, r * r // 32)


def cover_of(problem: Problem, length: int) -> Cover | None:
    """:func:`cover` of a problem."""
    return cover(length, problem.seqlen, problem.taps, problem.mode, problem.state)


def work(problem: Problem, length: int) -> float:
    """Arithmetic and bytes of a sequence in one measure: a byte moved is worth about 200 operations of matrix units."""
    blocks = cover_of(problem, length)
    assert blocks is not None
    n1, r = factors(length)
    first = n1 * (0.5 if blocks.half and n1 == 32 else 1.0)
    touched = min(length, problem.seqlen + blocks.lead) + min(blocks.step, problem.seqlen)
    return blocks.chunks * (8 * length * (first + 2 * r) / 200 + 2 * touched)


def default(problem: Problem) -> Config:
    """A configuration for every problem that the kernels accept: the least work, and enough thread blocks."""
    able = [x for x in LENGTHS if shared_bytes(x) <= problem.smem_block and cover_of(problem, x) is not None]
    length = min(able, key=lambda x: work(problem, x))
    blocks = cover_of(problem, length)
    assert blocks is not None
    total = problem.pairs * blocks.chunks
    parts = min(total, max(1, -(-2 * problem.sms // max(problem.heads, 1))))
    return Config(length, max(1, -(-total // parts)), min(8, most_warps(length)))


def _space(kernel: str) -> Space[Config]:
    def serves(problem: Problem, device: DeviceSpec, length: int) -> bool:
        return cover_of(problem, length) is not None

    def some_work(problem: Problem, device: DeviceSpec, length: int, units: int) -> bool:
        blocks = cover_of(problem, length)
        return blocks is not None and units <= problem.pairs * blocks.chunks

    def columns(problem: Problem, device: DeviceSpec, length: int, num_warps: int) -> bool:
        return num_warps <= most_warps(length)

    def shared(problem: Problem, device: DeviceSpec, length: int) -> int:
        return shared_bytes(length)

    def choices(problem: Problem) -> tuple[int, ...]:
        return tuple(sorted({1 << bits for bits in range(12)} | {default(problem).units}))

    return Space(
        name=f"{kernel}_cuda",
        version=1,
        axes=(literals("length", *LENGTHS), Axis("units", choices), literals("num_warps", 4, 8, 16)),
        constraints=(
            Constraint("serves the call", ("length",), serves),
            Constraint("no more units than there are", ("length", "units"), some_work),
            Constraint("a warp has 32 columns", ("length", "num_warps"), columns),
            fits_shared_memory(("length",), shared),
        ),
        make=Config,
    )


def _completed(kernel: str, key: dict[str, Any]) -> dict[str, Any]:
    return {"kernel": kernel.removesuffix("_cuda"), "state": False}


TUNABLES: dict[str, Tunable[Config]] = {
    f"{kernel}_cuda": Tunable(f"{kernel}_cuda", "cuda", _space(kernel), default, Problem, _completed)
    for kernel in KERNELS
}
"""The CUDA kernels of this room by name."""

"""Launch parameters of the fft_conv kernels: blocks of transforms, what a configuration is, and the analytic default.

The configurations that tuning may try are in :mod:`.tuning_space`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

from iokernels.autotune import RESULTS, bucket
from iokernels.runtime.device import DeviceSpec

from .options import CIRCULAR, TWO_SIDED

KERNELS = ("fft_conv_fwd", "fft_conv_bwd")

SHORTEST = 256
"""The shortest transform: two products of 16 by 16."""

LONGEST = {2: 8192, 4: 4096}
"""The longest transform on chip, by the bytes of an element."""

_HOISTED = {2: 20, 4: 72}
"""Bytes of shared memory for a point of a transform when the operands that do not change stay there, by the bytes of an
element: the most that was read off kernels compiled for several GPUs."""


@dataclass(frozen=True)
class Config:
    """One way to launch a kernel: transforms of ``length``, a power of two; ``units`` of them to a thread block."""

    length: int = field(metadata=RESULTS)
    units: int = field(metadata=RESULTS)
    num_warps: int
    num_stages: int


class Problem(NamedTuple):
    """What the choice depends on."""

    kernel: str
    itemsize: int  # bytes an element of u
    tensor_cores: str  # "half", "tf32" or "tf32x3": what the products are made of
    seqlen: int
    taps: int  # that reach an output
    mode: str
    state: bool  # there is an initial state
    gated: bool
    sm: int
    smem_block: int  # bytes of shared memory a thread block may use
    sms: int = 132
    heads: int = 768
    pairs: int = 32  # of sequences


class Blocks(NamedTuple):
    """How transforms of one length cover a sequence: :mod:`.triton_fwd` has the words."""

    n1: int
    n2: int
    half: bool
    overlap: int
    step: int
    chunks: int
    periodic: bool


class Wanted(NamedTuple):
    """What a launch of the backward kernel computes."""

    v: bool  # dv, and of it du and dpre as far as they are wanted
    u: bool
    pre: bool
    post: bool
    k: bool


_ONE_PASS = {2: 2048, 4: 1024}
"""The longest transform of which a thread holds the registers for all gradients at once, by the bytes of an element."""


def passes(wanted: Wanted, length: int, itemsize: int) -> list[Wanted]:
    """The launches of a backward pass: one, or dv, dk and dpost each by itself."""
    if length <= _ONE_PASS[itemsize]:
        return [wanted]
    nothing = Wanted(False, False, False, False, False)
    parts = [wanted._replace(post=False, k=False), nothing._replace(k=wanted.k), nothing._replace(post=wanted.post)]
    return [part for part in parts if any(part)]


def factors(length: int) -> tuple[int, int]:
    """``length`` as N1 N2, powers of two, N1 the larger where they differ."""
    bits = length.bit_length() - 1
    return 1 << (bits + 1) // 2, 1 << bits // 2


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


def lengths(itemsize: int) -> tuple[int, ...]:
    """The transforms that the kernels have for elements of so many bytes."""
    return tuple(1 << bits for bits in range(SHORTEST.bit_length() - 1, LONGEST[itemsize].bit_length()))


def hoists(problem: Problem, length: int) -> bool:
    """Whether a kernel keeps the operands that do not change in shared memory, rather than in registers.

    Where they fit, and not on Blackwell's data-centre parts, whose tensor memory the results of all products, which the
    compiler then keeps apart, would overflow.
    """
    small = factors(length)[0] < 64  # rows, too few for the products that use it
    return (problem.sm // 10 != 10 or small) and _HOISTED[problem.itemsize] * length <= problem.smem_block


def tiling_refusal(seqlen: Any, taps: Any, mode: str, state: bool, itemsize: int) -> str | None:
    """Why no transform on chip serves a call of so many effective taps, as the end of a sentence, or None."""
    if any(blocks(length, seqlen, taps, mode, state) is not None for length in lengths(itemsize)):
        return None
    half = LONGEST[itemsize] // 2
    return (
        f"its transforms on chip serve sequences up to {half} with any filter that reaches no further, and filters up "
        f"to {half + 1} taps with any sequence; N is {seqlen} with {taps} taps"
    )


def table_key(problem: Problem) -> dict[str, Any]:
    """What tables are looked up by: float16 and bfloat16 are alike to the hardware."""
    return {
        "precision": problem.tensor_cores,
        "mode": problem.mode,
        "gated": problem.gated,
        "heads": bucket(problem.heads),
        "pairs": bucket(problem.pairs),
        "seqlen": bucket(problem.seqlen),
        "taps": bucket(problem.taps),
    }


SIZES = ("heads", "pairs", "seqlen", "taps")
"""The sizes of :func:`table_key` of which the nearest entry serves."""


def problem_of(kernel: str, key: dict[str, Any], device: DeviceSpec) -> Problem:
    """The reverse of :func:`table_key`: a problem that has this key. Raises ``KeyError`` for a key of another make."""
    return Problem(
        kernel=kernel,
        itemsize=2 if key["precision"] == "half" else 4,
        tensor_cores=key["precision"],
        seqlen=key["seqlen"],
        taps=key["taps"],
        mode=key["mode"],
        state=False,
        gated=key["gated"],
        sm=device.sm,
        smem_block=device.smem_block,
        sms=device.sms,
        heads=key["heads"],
        pairs=key["pairs"],
    )


def default(problem: Problem) -> Config:
    """A configuration for every problem that the kernels accept: the least work, and enough thread blocks."""
    length = best_length(problem)
    cover = blocks_of(problem, length)
    assert cover is not None
    total = problem.pairs * cover.chunks
    parts = min(total, max(1, -(-2 * problem.sms // max(problem.heads, 1))))
    return Config(length, max(1, -(-total // parts)), warps(problem, length), 1)


def warps(problem: Problem, length: int) -> int:
    """Enough threads for the accumulators: both parts of a transform, in the backward pass twice."""
    words = 2 * length * (2 if problem.kernel == "fft_conv_bwd" else 1) * (2 if problem.itemsize == 4 else 1)
    return 4 if words <= 4096 else 8


def blocks_of(problem: Problem, length: int) -> Blocks | None:
    """:func:`blocks` of a problem."""
    return blocks(length, problem.seqlen, problem.taps, problem.mode, problem.state)


def best_length(problem: Problem) -> int:
    """The transform that takes the least time on paper. It is that of the forward kernel for both passes."""
    able = [length for length in lengths(problem.itemsize) if blocks_of(problem, length) is not None]
    return min(able, key=lambda length: work(problem, length))


def work(problem: Problem, length: int) -> float:
    """Arithmetic and bytes of a sequence in one measure: a byte moved is worth about 200 operations of matrix units."""
    cover = blocks_of(problem, length)
    assert cover is not None
    n1 = cover.n1 * (0.5 if cover.half else 1.0)
    touched = min(length, problem.seqlen + cover.overlap) + min(cover.step, problem.seqlen)
    return cover.chunks * (8 * length * (n1 + cover.n2) / 200 + touched * problem.itemsize)

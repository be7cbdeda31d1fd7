"""How many bytes the Triton kernels of fft_conv on chip should request from global memory: the model of their tiling.

Counted as a thread block requests them: each address once a load instruction, whatever the caches serve. The model is
exact, with every option; a test holds it to what the tracer counts. Filters are transformed, and their gradient brought
back to taps, by ``torch.fft``: that is not in here. :mod:`.through` has the transforms through memory.
"""

from __future__ import annotations

from dataclasses import dataclass

from iokernels.ops.fft_conv.triton.tuning import Blocks, Config, Through, Wanted, passes
from iokernels.testing.case.accounts import Account, Bytes

_SUM = 4  # bytes of a float32: a state, a scale, the filter's gradient


@dataclass(frozen=True)
class Problem:
    """One call: ``columns`` of the frequencies are kept, and ``members`` sequences share a transform."""

    batch: int
    heads: int
    seqlen: int
    taps: int
    itemsize: int
    gated: bool
    state: bool
    columns: int
    members: int
    hoisted: bool = False  # F1 and F2 are made once a thread block, not once a unit

    @property
    def compute_size(self) -> int:
        """Bytes of one part of a filter's frequency, or of a root of unity."""
        return 4 if self.itemsize == 4 else 2

    @property
    def tensor(self) -> int:
        """Bytes of u."""
        return self.batch * self.heads * self.seqlen * self.itemsize


def _positions(problem: Problem, cover: Blocks) -> tuple[int, int, int]:
    """Of the blocks of one sequence: positions loaded from u, those loaded from the past, gradients of ``rest``."""
    length, n = cover.n1 * cover.n2, problem.seqlen
    inputs = past = rest = 0
    for chunk in range(cover.chunks):
        start = chunk * cover.step - cover.overlap
        first = start + length // 2 if cover.half else start
        stop = min(start + length, n)
        inputs += stop - first if cover.periodic else max(0, stop - max(first, 0))
        past += max(0, min(0, start + length) - start) if problem.state else 0
        if cover.periodic:
            # Everything up to the next end of the sequence but one, apart from what the block itself makes.
            now = max(0, min(start + length, n) - (start + cover.overlap))
            ahead = sum(
                1 for i in range(length)
                if (time := start + i + (length if i < cover.overlap else 0)) < 2 * n
                and not (i >= cover.overlap and time < n)
            )  # fmt: skip
            rest += ahead
            assert now >= 0
        elif cover.chunks > 1:
            rest += max(0, min(start + length + cover.overlap, n) - (start + length))
    return inputs, past, rest


def constants(problem: Problem, cover: Blocks | Through) -> tuple[int, int]:
    """Bytes of the roots of unity that F1 and F2 are made of, and of the spectrum (of one row) with its scale."""
    roots = problem.compute_size * 2 * (cover.n1 + cover.n2)
    return roots, problem.compute_size * 2 * cover.n1 * problem.columns + _SUM


def _programs(problem: Problem, config: Config, cover: Blocks, before: int = 0) -> tuple[int, int]:
    """Thread blocks of the grid, and how often they load the roots of unity."""
    units = -(-problem.batch // problem.members) * (cover.chunks + before)
    grid = problem.heads * -(-units // config.units)
    return grid, grid if problem.hoisted else problem.heads * units


def floor_of_filter(problem: Problem) -> int:
    """Bytes of the taps."""
    return problem.heads * problem.taps * _SUM


def forward(problem: Problem, config: Config, cover: Blocks) -> Account:
    """The spectrum once a thread block; u, pre and the past for every position; post and y once."""
    inputs, past, _ = _positions(problem, cover)
    roots, spectrum = constants(problem, cover)
    grid, loads = _programs(problem, config, cover)
    rows = problem.batch * problem.heads
    gate = problem.tensor if problem.gated else 0
    read = rows * (inputs * problem.itemsize * (2 if problem.gated else 1) + past * _SUM) + gate
    floor = problem.tensor * (3 if problem.gated else 1) + floor_of_filter(problem)
    floor += rows * (problem.taps - 1) * _SUM if problem.state else 0
    read += grid * spectrum + loads * roots
    return Account("fwd", floor=Bytes(floor, problem.tensor), model=Bytes(read, problem.tensor))


def backward(problem: Problem, config: Config, cover: Blocks) -> Account:
    """As the forward kernel, with dy and post for what a block makes and what comes after it; for the gates' gradients
    u, pre and dy once more; du, dpre, dpost once, and a sum of the filter's frequencies a thread block. The gradient of
    the initial state takes a block more of every sequence.

    Long transforms take a pass each for dv, dk and dpost: constants, spectrum, u, pre, dy and post more than once.
    """
    inputs, past, rest = _positions(problem, cover)
    roots, spectrum = constants(problem, cover)
    rows, gated = problem.batch * problem.heads, problem.gated
    tensors = 2 if gated else 1
    wanted = Wanted(v=True, u=True, pre=gated, post=gated, k=True, state=problem.state)
    read, written = 0, problem.tensor * (3 if gated else 1)
    for part in passes(wanted, cover.n1 * cover.n2, problem.itemsize):
        before = int(part.state)
        grid, loads = _programs(problem, config, cover, before)
        read += grid * (spectrum if part.v or part.post else _SUM) + loads * roots
        if part.v or part.k:
            read += tensors * problem.tensor  # dy, and post with it
        if part.k or part.post:
            read += rows * (inputs * problem.itemsize * tensors + (past + before * cover.overlap) * _SUM)
        if part.v:
            later = rest + before * min(cover.overlap, problem.seqlen)
            read += tensors * rows * later * problem.itemsize + (2 * problem.tensor if gated else 0)
        if part.post:
            read += problem.tensor  # dy
        if part.k:
            written += grid * 2 * cover.n1 * problem.columns * _SUM
        written += rows * before * cover.overlap * _SUM
    return Account("bwd", floor=backward_floor(problem), model=Bytes(read, written))


def backward_floor(problem: Problem) -> Bytes:
    """Every input of the backward pass read once, every gradient written once."""
    rows = problem.batch * problem.heads
    past = rows * (problem.taps - 1) * _SUM if problem.state else 0
    read = problem.tensor * (4 if problem.gated else 2) + floor_of_filter(problem) + past
    return Bytes(read, problem.tensor * (3 if problem.gated else 1) + floor_of_filter(problem) + past)

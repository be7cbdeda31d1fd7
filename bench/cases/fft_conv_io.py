"""How many bytes the Triton kernels of fft_conv should request from global memory: the model of their tiling.

Counted as a thread block requests them: each address once a load instruction, whatever the caches serve. The model is
exact, with every option; a test holds it to what the tracer counts. Filters are transformed, and their gradient brought
back to taps, by ``torch.fft``: that is not in here.
"""

from __future__ import annotations

from dataclasses import dataclass

from iokernels.bench.accounts import Account, Bytes
from iokernels.ops.fft_conv.tuning import Blocks, Config

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

    @property
    def compute_size(self) -> int:
        """Bytes of a constant and of a filter's frequency."""
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


def _once_a_block(problem: Problem, config: Config, cover: Blocks) -> tuple[int, int]:
    """Thread blocks of the grid, and the bytes of constants, spectrum and scale that one loads."""
    n1, n2, columns = cover.n1, cover.n2, problem.columns
    pairs = -(-problem.batch // problem.members)
    grid = problem.heads * -(-pairs * cover.chunks // config.units)
    rows = n1 // 2 if cover.half else n1
    constants = 2 * (n1 * rows + n1 * n2 + n2 * columns)
    return grid, problem.compute_size * (constants + 2 * n1 * columns) + _SUM


def forward(problem: Problem, config: Config, cover: Blocks) -> Account:
    """Constants and spectrum once a thread block; u, pre and the past for every position; post and y once."""
    inputs, past, _ = _positions(problem, cover)
    grid, once = _once_a_block(problem, config, cover)
    rows = problem.batch * problem.heads
    gate = problem.tensor if problem.gated else 0
    read = rows * (inputs * problem.itemsize * (2 if problem.gated else 1) + past * _SUM) + gate
    floor = problem.tensor * (3 if problem.gated else 1) + problem.heads * problem.taps * _SUM
    floor += rows * (problem.taps - 1) * _SUM if problem.state else 0
    return Account("fwd", floor=Bytes(floor, problem.tensor), model=Bytes(read + grid * once, problem.tensor))


def backward(problem: Problem, config: Config, cover: Blocks) -> Account:
    """As the forward kernel, with dy and post for what a block makes and what comes after it; for the gates' gradients
    u, pre and dy once more; du, dpre, dpost once, and a sum of the filter's frequencies a thread block."""
    inputs, past, rest = _positions(problem, cover)
    grid, once = _once_a_block(problem, config, cover)
    rows = problem.batch * problem.heads
    tensors = 2 if problem.gated else 1
    read = rows * (inputs * problem.itemsize * tensors + past * _SUM)
    read += tensors * (problem.tensor + rows * rest * problem.itemsize)  # dy, and post with it
    read += 3 * problem.tensor if problem.gated else 0  # u, pre, dy
    written = problem.tensor * (3 if problem.gated else 1)
    sums = grid * 2 * cover.n1 * problem.columns * _SUM
    floor = problem.tensor * (4 if problem.gated else 2) + problem.heads * problem.taps * _SUM
    floor += rows * (problem.taps - 1) * _SUM if problem.state else 0
    return Account(
        "bwd",
        floor=Bytes(floor, written + problem.heads * problem.taps * _SUM),
        model=Bytes(read + grid * once, written + sums),
    )

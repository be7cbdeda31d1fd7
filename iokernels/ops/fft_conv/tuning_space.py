"""The configurations that tuning may try for the fft_conv kernels, and which of them look best on paper."""

from __future__ import annotations

from functools import partial

from iokernels.autotune.space import Axis, Constraint, Space, fits_registers, fits_shared_memory, literals
from iokernels.autotune.tunable import Tunable
from iokernels.runtime.device import DeviceSpec

from .tuning import KERNELS, SIZES, Config, Problem, blocks_of, default, lengths, table_key, work


def accumulators(kernel: str, problem: Problem, length: int) -> int:
    """The 32-bit registers of a thread block that hold a transform, and in the backward pass the filter's gradient."""
    return 2 * length * (2 if kernel == "fft_conv_bwd" else 1)


def shared_bytes(problem: Problem, length: int) -> int:
    """The shared memory of operands on their way between two products, in bytes; more is used where it is there."""
    return problem.itemsize * 2 * length


def predicted_seconds(problem: Problem, device: DeviceSpec, config: Config) -> float:
    """What a launch would take on paper, good for ranking: the work of its thread blocks, in whole waves."""
    cover = blocks_of(problem, config.length)
    assert cover is not None
    total = problem.pairs * cover.chunks
    parts = -(-total // config.units)
    waves = -(-problem.heads * parts // device.sms)
    once = problem.itemsize * 2 * config.length  # the spectrum
    unit = 2 * work(problem, config.length) / cover.chunks
    crowd = 1.0 + 0.1 * abs(config.num_warps - (4 if config.length <= 2048 else 8)) / 4
    return waves * (once + config.units * unit) * crowd * device.sms / device.dram_bandwidth


def _space(kernel: str) -> Space[Config]:
    def serves(problem: Problem, device: DeviceSpec, length: int) -> bool:
        return blocks_of(problem, length) is not None

    def some_work(problem: Problem, device: DeviceSpec, length: int, units: int) -> bool:
        cover = blocks_of(problem, length)
        return cover is not None and units <= problem.pairs * cover.chunks

    def words(problem: Problem, device: DeviceSpec, length: int, warps: int) -> int:
        return accumulators(kernel, problem, length)

    def shared(problem: Problem, device: DeviceSpec, length: int) -> int:
        return shared_bytes(problem, length)

    def choices(problem: Problem) -> tuple[int, ...]:
        return tuple(sorted({1 << bits for bits in range(12)} | {default(problem).units}))

    return Space(
        name=kernel,
        version=1,
        axes=(
            Axis("length", lambda problem: lengths(problem.itemsize)),
            Axis("units", choices),
            literals("num_warps", 4, 8, 16),
            literals("num_stages", 1, 2),
        ),
        constraints=(
            Constraint("serves the call", ("length",), serves),
            Constraint("no more units than there are", ("length", "units"), some_work),
            fits_registers(("length", "num_warps"), "num_warps", words),
            fits_shared_memory(("length",), shared),
        ),
        make=Config,
        order=partial(predicted_seconds),
    )


TUNABLES: dict[str, Tunable[Config]] = {
    kernel: Tunable(kernel, "triton", _space(kernel), default, table_key, SIZES) for kernel in KERNELS
}
"""The kernels of this room by name."""

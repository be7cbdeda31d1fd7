"""What the launches of one call of ``fft_conv`` share: the problem, its blocks, the filter's planes, constants."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from iokernels import autotune
from iokernels.ops.fft_conv.options import Options, band_length, kept_bins, reach
from iokernels.ops.shared.triton_tiles import view
from iokernels.runtime.device import DeviceSpec

from . import tuning
from .filters import planes_of, roots_of_unity, with_skip
from .transform import Features, Filter, Inputs, Sizes
from .tuning import TUNABLES


class Launch:
    """What every kernel of one call needs."""

    def __init__(self, u: Tensor, k: Tensor, transformed: list[Tensor], options: Options, device: DeviceSpec) -> None:
        self.u, self.options, self.device = u, options, device
        self.batch, self.heads, self.n = u.shape
        state = options.initial_state
        self.state = None if state is None else state.contiguous()
        self.mode, self.taps = reach(self.n, k.shape[1], options.mode, options.keep, state is not None)
        self.compute = torch.float32 if u.dtype == torch.float32 else torch.float16
        self.precision = "tf32x3" if torch.get_float32_matmul_precision() == "highest" else "tf32"
        # Rows and points of a filter that was transformed before.
        self.fixed: tuple[int, int] | None = None
        if transformed:
            *rows, _, n1, n2 = transformed[0].shape[1:]
            fixed = 2 * (rows[0] - 1) if rows else 1, n1 * n2
            self.fixed = None if self._cover(*fixed) is None else fixed

    @property
    def pairs(self) -> int:
        """Transforms for a block of every sequence."""
        return self.batch if self.options.batch_invariant else -(-self.batch // 2)

    def problem(self, kernel: str) -> tuning.Problem:
        """What the launch parameters of ``kernel`` depend on."""
        return tuning.Problem(
            kernel,
            self.u.element_size(),
            "half" if self.compute == torch.float16 else self.precision,
            self.n,
            self.taps,
            self.mode,
            self.state is not None,
            self.options.pre_gate is not None or self.options.post_gate is not None,
            self.device.sm,
            self.device.smem_block,
            self.device.sms,
            self.heads,
            self.pairs,
        )

    def config(self, kernel: str) -> tuning.Config:
        """The launch parameters of ``kernel``."""
        config = autotune.select(TUNABLES[kernel], self.problem(kernel), self.device)
        return config if self.fixed is None else replace(config, outer=self.fixed[0], length=self.fixed[1])

    def outer_config(self, cover: tuning.Through) -> tuning.OuterConfig:
        """The tiles of the first and the last step of transforms through memory."""
        kernel = tuning.OUTER_KERNEL
        config = autotune.select(TUNABLES[kernel], self.problem(kernel), self.device)
        return tuning.fitted(config, cover.outer, cover.n1 * cover.n2)

    def _cover(self, outer: int, length: int) -> tuning.Blocks | tuning.Through | None:
        call = self.n, self.taps, self.mode, self.state is not None
        return tuning.blocks(length, *call) if outer == 1 else tuning.through(outer, length, *call)

    def blocks(self, config: tuning.Config) -> tuning.Blocks | tuning.Through:
        """How transforms cover a sequence."""
        cover = self._cover(config.outer, config.length)
        if cover is None:
            raise ValueError(
                f"fft_conv: a configuration with transforms of {config.outer * config.length} points does not serve "
                f"N = {self.n} with {self.taps} taps"
            )
        return cover

    def single(self, cover: tuning.Blocks) -> bool:
        """Whether all of a sequence is one block, with nothing before it or after it."""
        return not cover.periodic and cover.chunks == 1

    def grid(self, config: tuning.Config, cover: tuning.Blocks, before: int = 0) -> tuple[int]:
        """Thread blocks: every head, in as many parts as its units take, with those of so many blocks before time 0."""
        return (self.heads * -(-self.pairs * (cover.chunks + before) // config.units),)

    def varying(self, config: tuning.Config, cover: tuning.Blocks, before: int = 0) -> tuple[int, ...]:
        """What changes from call to call, in the order of the arguments of kernels on chip."""
        return self.batch, self.heads, self.n, cover.overlap, cover.step, cover.chunks + before, config.units

    def spectrum(self, k: Tensor, transformed: list[Tensor], cover: tuning.Blocks | tuning.Through) -> list[Tensor]:
        """The filter's planes and their scale, with the skip term."""
        if self.fixed is None:
            transformed = planes_of(k, self.n, cover, self.compute, self.options)
        return transformed if self.options.skip is None else with_skip(transformed, self.options.skip)

    def filter(self, spectrum: list[Tensor], cover: tuning.Blocks | tuning.Through) -> Filter:
        """The planes and their scale, with the roots of unity of F1 and F2."""
        device, dtype = self.u.device, self.compute
        return Filter(*spectrum, roots_of_unity(device, dtype, cover.n1), roots_of_unity(device, dtype, cover.n2))

    def columns(self, cover: tuning.Blocks | tuning.Through) -> int:
        """How many columns of frequencies the kernels keep. Those that are 0 in the filter are dropped in halves."""
        length = cover.outer * cover.n1 * cover.n2
        if self.options.keep == 1.0 or self.options.skip is not None:
            return cover.n2
        if length != band_length(self.n, self.options.mode):
            return cover.n2
        needed = 2 * ((kept_bins(self.options.keep, length) - 1) // (cover.outer * cover.n1) + 1)
        return min(cover.n2, max(16, autotune.bucket(needed)))

    def middle(self, length: int) -> float:
        """The power of two nearest ``1 / sqrt(length)``, from above: what is applied between two transforms."""
        return 2.0 ** -((length.bit_length() - 1) // 2)

    def wide(self, length: int, *tensors: Tensor | None) -> bool:
        """Whether offsets inside a block of ``length`` can pass 2^31 elements."""
        return any((length + self.n) * abs(x.stride(2)) >= 2**31 for x in tensors if x is not None)

    @property
    def products(self) -> str:
        """The precision of float32 products; of float16 ones there is no choice."""
        return self.precision if self.compute == torch.float32 else "tf32"

    def inputs(self) -> Inputs:
        """What the kernels on chip make v of."""
        options = self.options
        return Inputs(view(self.u), view(options.pre_gate), view(options.post_gate), self.state)

    def features(self, cover: tuning.Blocks) -> Features:
        """What the kernels on chip do."""
        options = self.options
        return Features(
            pre=options.pre_gate is not None,
            post=options.post_gate is not None,
            state=self.state is not None,
            periodic=cover.periodic,
            pair=not options.batch_invariant and self.batch > 1,
        )

    def sizes(self, cover: tuning.Blocks, *tensors: Tensor) -> Sizes:
        """What kernels on chip that take ``tensors`` and the gates are compiled for."""
        options, length = self.options, cover.n1 * cover.n2
        rows = cover.n1 // 2 if cover.half else cover.n1
        return Sizes(
            cover.n1,
            cover.n2,
            rows,
            self.columns(cover),
            self.middle(length),
            self.wide(length, *tensors, options.pre_gate, options.post_gate),
            self.products,
            tuning.hoists(self.problem("fft_conv_fwd"), cover.n1, rows, cover.n2),
        )

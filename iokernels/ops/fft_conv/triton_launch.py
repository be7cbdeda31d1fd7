"""Launches the Triton kernels of this room: the backend ``triton`` of the operators."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from iokernels import autotune
from iokernels.ops.triton_tiles import strides
from iokernels.runtime.device import DeviceSpec, guard, spec_of

from . import tuning
from .options import Gradients, Needs, Options, band_length, kept_bins, reach, state_dtype
from .triton_bwd import fft_conv_bwd_kernel
from .triton_filters import planes_of, roots_of_unity, state_gradient, taps_gradient, with_skip
from .triton_fwd import fft_conv_fwd_kernel
from .triton_transform import Features
from .tuning_space import TUNABLES


def transform(k: Tensor, n: int, dtype: torch.dtype, options: Options) -> list[Tensor]:
    """The frequencies of a filter ``[H, Nk]`` for inputs of length n and of ``dtype``, as the kernels want them."""
    u = torch.empty(1, k.shape[0], n, dtype=dtype, device="meta")
    launch = Launch(u, k, [], options, spec_of(k.device))
    config = launch.config("fft_conv_fwd")
    return planes_of(k, n, *tuning.factors(config.length), launch.compute, options)


def forward(u: Tensor, k: Tensor, transformed: list[Tensor], options: Options) -> Tensor:
    """y as :class:`Options` defines it. ``transformed`` is what :func:`transform` made of k, or empty."""
    y = u.new_empty(u.shape)
    if y.numel() == 0:
        return y
    with guard(u.device):
        launch = Launch(u, k, transformed, options, spec_of(u.device))
        config = launch.config("fft_conv_fwd")
        cover = launch.blocks(config)
        fft_conv_fwd_kernel[launch.grid(config, cover)](
            u, options.pre_gate, options.post_gate, launch.state, *launch.spectrum(k, transformed, cover),
            *launch.roots(cover), y,
            strides(u), strides(options.pre_gate), strides(options.post_gate), strides(y), *launch.sizes(config, cover),
            **launch.constexprs(cover, u, y), num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip
    return y


def backward(dy: Tensor, u: Tensor, k: Tensor, transformed: list[Tensor], options: Options, needs: Needs) -> Gradients:
    """The gradients that ``needs`` names."""
    grads = Gradients(
        *(x.new_empty(x.shape) if need and x is not None else None
          for x, need in zip((u, k, *options[:4]), needs, strict=True))
    )  # fmt: skip
    if u.numel() == 0:
        for grad in grads:
            if grad is not None:
                grad.zero_()
        return grads
    wanted = tuning.Wanted(
        v=grads.u is not None or grads.pre_gate is not None,
        u=grads.u is not None,
        pre=grads.pre_gate is not None,
        post=grads.post_gate is not None,
        k=grads.k is not None or grads.skip is not None,
    )
    with guard(u.device):
        if wanted.v or wanted.post or wanted.k:
            _launch_backward(dy, u, k, transformed, options, wanted, grads)
        if grads.initial_state is not None:
            past = options.initial_state
            assert past is not None
            g = dy[:, :, : past.shape[2]].to(state_dtype(u.dtype))
            if options.post_gate is not None:
                g = g * options.post_gate[:, :, : past.shape[2]]
            grads.initial_state.copy_(state_gradient(g, k.to(g.dtype)))
    return grads


def _launch_backward(
    dy: Tensor,
    u: Tensor,
    k: Tensor,
    transformed: list[Tensor],
    options: Options,
    wanted: tuning.Wanted,
    grads: Gradients,
) -> None:
    launch = Launch(u, k, transformed, options, spec_of(u.device))
    config = launch.config("fft_conv_bwd")
    cover = launch.blocks(config)
    grid = launch.grid(config, cover)
    constexprs = launch.constexprs(cover, dy, u, u)
    heads = u.shape[1]
    sums = None
    if wanted.k:
        shape = (grid[0] // heads, heads, 2, cover.n1, constexprs["COLS"])
        sums = torch.empty(shape, dtype=torch.float32, device=u.device)
    spectrum, rest = launch.spectrum(k, transformed, cover), not launch.single(cover)
    for part in tuning.passes(wanted, cover.n1 * cover.n2, u.element_size()):
        fft_conv_bwd_kernel[grid](
            dy, u, options.pre_gate, options.post_gate, launch.state, *spectrum, *launch.roots(cover),
            grads.u, grads.pre_gate, grads.post_gate, sums,
            strides(dy), strides(u), strides(options.pre_gate), strides(options.post_gate),
            strides(grads.u), strides(grads.pre_gate), strides(grads.post_gate), *launch.sizes(config, cover),
            WANTED=part, REST=rest and part.v, **constexprs,
            num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip
    if sums is not None:
        dk, dskip = taps_gradient(sums, k.shape[1], u.shape[2], cover.n1, cover.n2, options)
        if grads.k is not None:
            grads.k.copy_(dk)
        if grads.skip is not None:
            grads.skip.copy_(dskip)


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
        # The length of a filter that was transformed before.
        self.length = transformed[0].shape[2] * transformed[0].shape[3] if transformed else None
        if self.length is not None and self._blocks(self.length) is None:
            self.length = None

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
        return config if self.length is None else replace(config, length=self.length)

    def _blocks(self, length: int) -> tuning.Blocks | None:
        return tuning.blocks(length, self.n, self.taps, self.mode, self.state is not None)

    def blocks(self, config: tuning.Config) -> tuning.Blocks:
        """How transforms cover a sequence."""
        cover = self._blocks(config.length)
        if cover is None:
            raise ValueError(
                f"fft_conv: a configuration with transforms of {config.length} points does not serve N = {self.n} with "
                f"{self.taps} taps"
            )
        return cover

    def single(self, cover: tuning.Blocks) -> bool:
        """Whether all of a sequence is one block, with nothing before it or after it."""
        return not cover.periodic and cover.chunks == 1

    def grid(self, config: tuning.Config, cover: tuning.Blocks) -> tuple[int]:
        """Thread blocks: every head, in as many parts as its units take."""
        return (self.heads * -(-self.pairs * cover.chunks // config.units),)

    def sizes(self, config: tuning.Config, cover: tuning.Blocks) -> tuple[int, ...]:
        """In the order of every kernel's arguments."""
        return self.batch, self.heads, self.n, cover.overlap, cover.step, cover.chunks, config.units

    def spectrum(self, k: Tensor, transformed: list[Tensor], cover: tuning.Blocks) -> list[Tensor]:
        """The filter's planes and their scale, with the skip term."""
        if self.length is None:
            transformed = planes_of(k, self.n, cover.n1, cover.n2, self.compute, self.options)
        return transformed if self.options.skip is None else with_skip(transformed, self.options.skip)

    def roots(self, cover: tuning.Blocks) -> tuple[Tensor, Tensor]:
        """F1 and F2."""
        device, dtype = self.u.device, self.compute
        return roots_of_unity(device, dtype, cover.n1), roots_of_unity(device, dtype, cover.n2)

    def columns(self, cover: tuning.Blocks) -> int:
        """How many columns of frequencies the kernels keep. Those that are 0 in the filter are dropped in halves."""
        length = cover.n1 * cover.n2
        if self.options.keep == 1.0 or self.options.skip is not None:
            return cover.n2
        if length != band_length(self.n, self.options.mode):
            return cover.n2
        needed = 2 * ((kept_bins(self.options.keep, length) - 1) // cover.n1 + 1)
        return min(cover.n2, max(16, autotune.bucket(needed)))

    def constexprs(self, cover: tuning.Blocks, *tensors: Tensor) -> dict[str, Any]:
        """What the kernels are compiled for."""
        options, length = self.options, cover.n1 * cover.n2
        gates = [x for x in (options.pre_gate, options.post_gate) if x is not None]
        return {
            "FEATURES": Features(
                pre=options.pre_gate is not None,
                post=options.post_gate is not None,
                state=self.state is not None,
                periodic=cover.periodic,
                pair=not options.batch_invariant and self.batch > 1,
            ),
            "N1": cover.n1,
            "N2": cover.n2,
            "ROWS": cover.n1 // 2 if cover.half else cover.n1,
            "COLS": self.columns(cover),
            "MIDDLE": 2.0 ** -((length.bit_length() - 1) // 2),
            "WIDE": any((length + self.n) * abs(x.stride(2)) >= 2**31 for x in (*tensors, *gates)),
            "HOIST": tuning.hoists(self.problem("fft_conv_fwd"), length),
            "PRECISION": self.precision if self.compute == torch.float32 else "tf32",
        }

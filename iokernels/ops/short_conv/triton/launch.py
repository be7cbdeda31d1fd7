"""Launches the Triton kernels of ``short_conv``: the backend ``triton`` of its operators."""

from __future__ import annotations

from dataclasses import replace

import torch
import triton
from torch import Tensor

from iokernels import autotune
from iokernels.autotune import bucket
from iokernels.ops.shared.triton_tiles import view
from iokernels.ops.short_conv.options import (
    ShortGradients,
    ShortNeeds,
    ShortOptions,
    empty_rows,
    empty_state,
    out_length,
)
from iokernels.runtime.device import DeviceSpec, guard, spec_of

from .backward import Wanted, short_conv_bwd_kernel
from .forward import Sizes, short_conv_fwd_kernel, short_conv_state_kernel
from .step import short_conv_step_kernel
from .tiles import Gradients, Inputs, ShortFeatures, is_wide
from .tuning import DIRECT_WIDTH, TUNABLES, ShortConfig, ShortProblem, dweight_inner, inner, product_rows
from .wide import (
    DweightSizes,
    Pass,
    short_conv_wide_bwd_kernel,
    short_conv_wide_dweight_kernel,
    short_conv_wide_fwd_kernel,
)
from .wide import Sizes as WideSizes


def forward(x: Tensor, weight: Tensor, options: ShortOptions) -> tuple[Tensor, Tensor]:
    """Returns (out, final state). See :class:`ShortOptions`."""
    launch = Launch(x, weight, options)
    out, final_state = empty_rows(x, launch.out_len), empty_state(x, launch.width, options)
    if launch.features.varlen:
        out.zero_()  # rows that belong to no sequence are visited by no block
    with guard(x.device):
        if out.numel() and launch.sequences:
            if launch.direct:
                launch.run_forward(out)
            else:
                launch.run_wide(x, out, options.left)
        if options.return_state and final_state.numel():
            launch.run_state(final_state)
    return out, final_state


def backward(
    dout: Tensor | None, dfinal: Tensor | None, x: Tensor, weight: Tensor, options: ShortOptions, needs: ShortNeeds
) -> ShortGradients:
    """Returns the gradients that ``needs`` asks for. An output gradient is None where nobody used that output."""
    launch = Launch(x, weight, options)
    dx = empty_rows(x, x.shape[2]) if needs.x else None
    dstate = torch.empty_like(options.initial_state) if options.initial_state is not None else None
    dstate = dstate if needs.initial_state else None
    if dx is not None and launch.features.varlen:
        dx.zero_()
    if dout is not None and dout.numel() == 0:
        dout = None
    sums = None
    if (needs.weight or needs.bias) and dout is not None and launch.sequences:
        sums = launch.sums()
    with guard(x.device):
        if launch.sequences:
            run = launch.run_backward if launch.direct else launch.run_wide_backward
            run(dout, dfinal, dx, dstate, sums)
    if sums is not None:
        sums = sums.sum(0)  # in a fixed order
    dweight = dbias = None
    if needs.weight:
        dweight = torch.zeros_like(launch.weight) if sums is None else sums[:-1].t().to(weight.dtype).contiguous()
    if needs.bias and options.bias is not None:
        dbias = torch.zeros_like(options.bias) if sums is None else sums[-1].to(options.bias.dtype)
    return ShortGradients(dx, dweight, dbias, dstate)


def step(
    x: Tensor, weight: Tensor, state: Tensor, bias: Tensor | None, state_indices: Tensor | None, silu: bool
) -> Tensor:
    """One row for each sequence; its state is overwritten."""
    batch, channels = x.shape
    out = x.new_empty((batch, channels))
    if out.numel() == 0:
        return out
    block_h = min(256, bucket(channels))
    channel_blocks = triton.cdiv(channels, block_h)
    with guard(x.device):
        short_conv_step_kernel[(batch * channel_blocks,)](
            view(x), weight.contiguous(), view(state), None if bias is None else bias.contiguous(),
            None if state_indices is None else state_indices.contiguous(), view(out), channels, channel_blocks,
            SILU=silu, WIDTH=weight.shape[1], BLOCK_H=block_h, num_warps=max(1, min(4, block_h // 64)),
        )  # fmt: skip
    return out


class Launch:
    """What every kernel of one call needs, from shapes and options only."""

    def __init__(self, x: Tensor, weight: Tensor, options: ShortOptions) -> None:
        self.x = x
        self.batch, self.channels, self.seqlen = x.shape
        self.width = weight.shape[1]
        self.left = options.left
        self.direct = self.width <= DIRECT_WIDTH
        self.out_len = out_length(self.seqlen, self.width, options)
        self.state = options.initial_state if self.width > 1 else None
        self.features = ShortFeatures(
            varlen=options.cu_seqlens is not None,
            state=self.state is not None,
            silu=options.silu,
            bias=options.bias is not None,
        )
        self.sequences = self.batch if options.cu_seqlens is None else options.cu_seqlens.shape[0] - 1
        # Vectors and a small matrix, which the kernels index without strides.
        self.weight = weight.contiguous()
        self.bias = None if options.bias is None else options.bias.contiguous()
        self.cu_seqlens = None if options.cu_seqlens is None else options.cu_seqlens.contiguous()
        self.block_s = bucket(self.sequences)
        self.inputs = Inputs(view(x), view(self.state), self.weight, self.bias, self.cu_seqlens)
        self.single = x.dtype == torch.float32 or weight.dtype != x.dtype

    def problem(self, kernel: str, device: DeviceSpec) -> ShortProblem:
        """What the launch parameters of ``kernel`` depend on. Positional: this is part of every call."""
        x = self.x
        return ShortProblem(
            kernel,
            bucket(self.width),
            x.element_size(),
            x.stride(2) <= x.stride(1) or self.channels == 1,
            bucket(max(self.seqlen // max(self.sequences, 1) if self.features.varlen else self.seqlen, 1)),
            bucket(self.channels),
            bucket(max(self.sequences, 1)),
            device.sm,
            device.smem_block,
        )

    def config(self, kernel: str) -> ShortConfig:
        """The launch parameters of ``kernel``."""
        device = spec_of(self.x.device)
        return autotune.select(TUNABLES[kernel], self.problem(kernel, device), device)

    def tiles(self, rows: int, block_n: int) -> tuple[int, int]:
        """Tiles of a sequence, and slots of the grid, for ``rows`` rows (packed: an upper bound of both)."""
        if self.features.varlen:
            return 0, self.seqlen // block_n + self.sequences
        tiles = triton.cdiv(rows, block_n)
        return tiles, tiles * self.batch

    def varying(self, tiles: int, blocks: int) -> tuple[int, ...]:
        """What ``VARYING`` names, in its order."""
        return self.channels, self.seqlen, self.out_len, self.seqlen, self.sequences, tiles, blocks

    def sizes(self, block_n: int, block_h: int, wide: bool) -> Sizes:
        """What a kernel without products is compiled for."""
        return Sizes(self.width, self.left, block_n, block_h, self.block_s, wide)

    def run_forward(self, out: Tensor) -> None:
        """Write the output."""
        config = self.config("short_conv_fwd")
        tiles, slots = self.tiles(self.out_len, config.block_n)
        blocks = triton.cdiv(self.channels, config.block_h)
        short_conv_fwd_kernel[(slots * blocks,)](
            self.inputs, view(out), *self.varying(tiles, blocks), FEATURES=self.features,
            SIZES=self.sizes(config.block_n, config.block_h, self.is_wide(config, self.x, out, self.state)),
            num_warps=config.num_warps,
        )  # fmt: skip

    def run_state(self, final_state: Tensor) -> None:
        """Write what each sequence leaves behind."""
        block_r, block_h = bucket(self.width - 1), min(64, bucket(self.channels))
        blocks = triton.cdiv(self.channels, block_h)
        short_conv_state_kernel[(self.sequences * blocks,)](
            self.inputs, view(final_state), self.channels, self.seqlen, self.seqlen, blocks, FEATURES=self.features,
            SIZES=self.sizes(block_r, block_h, is_wide(2 * block_r, block_h, self.x, self.state)), num_warps=4,
        )  # fmt: skip

    def sums(self) -> Tensor:
        """An uninitialised table of the sums of every tile, float32 ``[slots, W + 1, H]``; every line gets written."""
        config = self.config("short_conv_bwd" if self.direct else "short_conv_wide_dweight")
        rows = max(self.seqlen, self.out_len) if self.direct else self.out_len
        slots = self.tiles(rows, config.block_n)[1]
        return self.x.new_empty((slots, self.width + 1, self.channels), dtype=torch.float32)

    def run_backward(
        self, dout: Tensor | None, dfinal: Tensor | None, dx: Tensor | None, dstate: Tensor | None, sums: Tensor | None
    ) -> None:
        """Write the gradients that are not None: of x, of the initial state, and the table of sums."""
        config = self.config("short_conv_bwd")
        given = Gradients(view(dout), view(dfinal))
        tiles, slots = self.tiles(max(self.seqlen, self.out_len), config.block_n)
        blocks = triton.cdiv(self.channels, config.block_h)
        if slots and (sums is not None or (dx is not None and dx.numel())):
            short_conv_bwd_kernel[(slots * blocks,)](
                self.inputs, given, view(dx), sums, *self.varying(tiles, blocks), FEATURES=self.features,
                WANTED=Wanted(dx is not None, sums is not None, dout is not None, dfinal is not None, 0),
                SIZES=self.sizes(config.block_n, config.block_h, self.is_wide(config, self.x, dout, dx, self.state)),
                num_warps=config.num_warps,
            )  # fmt: skip
        if dstate is not None and dstate.numel():
            block_n, block_h = bucket(self.width - 1), min(64, bucket(self.channels))
            blocks = triton.cdiv(self.channels, block_h)
            short_conv_bwd_kernel[(self.sequences * blocks,)](
                self.inputs, given, view(dstate), None, *self.varying(1, blocks), FEATURES=self.features,
                WANTED=Wanted(True, False, dout is not None, dfinal is not None, 1 - self.width),
                SIZES=self.sizes(block_n, block_h, is_wide(4 * self.width, block_h, self.x, dout, dstate, self.state)),
                num_warps=4,
            )  # fmt: skip

    def run_wide(
        self, rows: Tensor, out: Tensor, left: int, *, dout: Tensor | None = None, dfinal: Tensor | None = None,
        gradient: bool = False, row_base: int = 0,
    ) -> None:  # fmt: skip
        """One product with the filter's Toeplitz matrices: forward, through the activation (``dout``), or reversed."""
        config = self.config("short_conv_wide_bwd" if gradient or dout is not None else "short_conv_wide_fwd")
        q = inner(self.width)
        config = replace(config, block_n=product_rows(self.width, config))
        lines = config.block_n // q
        tiles, slots = (1, self.sequences) if row_base else self.tiles(out.shape[2], config.block_n)
        block_h = config.block_h
        blocks = triton.cdiv(self.channels, block_h)
        features = self.features
        if gradient:
            features = features._replace(state=False, silu=False, bias=False)
        single = rows.dtype == torch.float32 or self.weight.dtype != rows.dtype
        kernel = short_conv_wide_bwd_kernel if gradient or dout is not None else short_conv_wide_fwd_kernel
        kernel[(slots * blocks,)](
            self.inputs._replace(x=view(rows)), Gradients(view(dout), view(dfinal)), view(out), self.channels,
            rows.shape[2], out.shape[2] if not row_base else self.seqlen, self.seqlen, self.sequences, tiles, blocks,
            left, FEATURES=features, PASS=Pass(dout is not None, dfinal is not None, gradient, row_base),
            SIZES=WideSizes(
                self.width, lines, q, min(32, q), block_h, self.block_s, self.is_wide(config, rows, out, dout), single,
                self.precision(),
            ),
            num_warps=config.num_warps,
        )  # fmt: skip

    def run_wide_backward(
        self, dout: Tensor | None, dfinal: Tensor | None, dx: Tensor | None, dstate: Tensor | None, sums: Tensor | None
    ) -> None:
        """The same for a wide filter."""
        if dout is None:  # the gradient of a final state alone: rows of x and the state, as they went there
            dout = empty_rows(self.x, self.out_len).zero_()
            dsum = dout
        elif self.features.silu:
            dsum = torch.empty_like(dout, dtype=torch.float32)
            if self.features.varlen:
                dsum.zero_()
            self.run_wide(self.x, dsum, self.left, dout=dout)
        else:
            dsum = dout
        back = self.width - 1 - self.left
        if dx is not None and dx.numel():
            self.run_wide(dsum, dx, back, dfinal=dfinal, gradient=True)
        if dstate is not None and dstate.numel():
            self.run_wide(dsum, dstate, back, dfinal=dfinal, gradient=True, row_base=1 - self.width)
        if sums is not None:
            config = self.config("short_conv_wide_dweight")
            q, lags = dweight_inner(self.width)
            tiles, slots = self.tiles(self.out_len, config.block_n)
            blocks = triton.cdiv(self.channels, config.block_h)
            short_conv_wide_dweight_kernel[(slots * blocks,)](
                view(dsum), self.inputs, sums, *self.varying(tiles, blocks), self.left, FEATURES=self.features,
                SIZES=DweightSizes(
                    self.width, config.block_n // q, 16, q, lags, bucket(self.width), config.block_h, self.block_s,
                    self.is_wide(config, self.x, dsum, self.state),
                    dsum.dtype == torch.float32 or self.x.dtype == torch.float32, self.precision(),
                ),
                num_warps=config.num_warps,
            )  # fmt: skip

    def precision(self) -> str:
        """How float32 operands are multiplied: three tf32 products for float32 inputs, one where they were halves."""
        return "tf32x3" if self.x.dtype == torch.float32 else "tf32"

    def is_wide(self, config: ShortConfig, *tensors: Tensor | None) -> bool:
        """Whether an offset inside a tile needs 64 bits."""
        return is_wide(config.block_n + 2 * self.width, config.block_h, *tensors)

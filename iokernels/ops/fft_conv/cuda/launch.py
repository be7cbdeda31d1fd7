"""Launches the CUDA kernels of this room: the backend ``cuda`` of ``fft_conv``."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from iokernels import autotune
from iokernels.ops.fft_conv.options import Gradients, Needs, Options, empty_gradients, reach
from iokernels.ops.shared.layout import state_dtype
from iokernels.runtime.cuda.kernel import Argument, CudaKernel, cuda_kernel
from iokernels.runtime.device import DeviceSpec, guard, spec_of

from . import tuning
from .filters import spectrum_of, state_gradient, taps_gradient, with_skip


def transform(k: Tensor, n: int, dtype: torch.dtype, options: Options) -> list[Tensor]:
    """The frequencies of a filter ``[H, Nk]`` for inputs of length n and of ``dtype``, as the kernels want them."""
    u = torch.empty(1, k.shape[0], n, dtype=dtype, device="meta")
    return spectrum_of(k, n, Launch(u, k, [], options, spec_of(k.device)).config("fft_conv_fwd").length, options)


def forward(u: Tensor, k: Tensor, transformed: list[Tensor], options: Options) -> Tensor:
    """y as :class:`Options` defines it. ``transformed`` is what :func:`transform` made of k, or empty."""
    y = u.new_empty(u.shape)
    if y.numel() == 0:
        return y
    with guard(u.device):
        launch = Launch(u, k, transformed, options, spec_of(u.device))
        config = launch.config("fft_conv_fwd")
        spectrum, scale = launch.spectrum(k, transformed, config)
        launch.run(
            "fft_conv_fwd", config, (u, *launch.gates),
            {
                "u_ptr": u, "pre_ptr": options.pre_gate, "post_ptr": options.post_gate, "state_ptr": launch.state,
                "spectrum_ptr": spectrum, "scale_ptr": scale, "y_ptr": y,
                "stride_u": u.stride(), "stride_pre": _strides(options.pre_gate),
                "stride_post": _strides(options.post_gate),
            },
        )  # fmt: skip
    return y


def backward(dy: Tensor, u: Tensor, k: Tensor, transformed: list[Tensor], options: Options, needs: Needs) -> Gradients:
    """The gradients that ``needs`` names."""
    grads = empty_gradients(u, k, options, needs)
    if u.numel() == 0:
        return grads
    with guard(u.device):
        if any(x is not None for x in grads[:5]):
            _launch_backward(dy, u, k, transformed, options, grads)
        if grads.initial_state is not None:
            past = options.initial_state
            assert past is not None
            g = dy[:, :, : past.shape[2]].to(state_dtype(u.dtype))
            if options.post_gate is not None:
                g = g * options.post_gate[:, :, : past.shape[2]]
            grads.initial_state.copy_(state_gradient(g, k.to(g.dtype)))
    return grads


def _launch_backward(
    dy: Tensor, u: Tensor, k: Tensor, transformed: list[Tensor], options: Options, grads: Gradients
) -> None:
    launch = Launch(u, k, transformed, options, spec_of(u.device))
    config = launch.config("fft_conv_bwd")
    spectrum, scale = launch.spectrum(k, transformed, config)
    sums = None
    if grads.k is not None or grads.skip is not None:
        blocks = launch.blocks(config, launch.cover(config))
        shape = (blocks // launch.heads, launch.heads, config.length, 2)
        sums = torch.empty(shape, dtype=torch.float32, device=u.device)
    launch.run(
        "fft_conv_bwd", config, (dy, u, *launch.gates),
        {
            "dy_ptr": dy, "u_ptr": u, "pre_ptr": options.pre_gate, "post_ptr": options.post_gate,
            "state_ptr": launch.state, "spectrum_ptr": spectrum, "scale_ptr": scale,
            "du_ptr": grads.u, "dpre_ptr": grads.pre_gate, "dpost_ptr": grads.post_gate, "dk_ptr": sums,
            "stride_dy": dy.stride(), "stride_u": u.stride(), "stride_pre": _strides(options.pre_gate),
            "stride_post": _strides(options.post_gate),
        },
    )  # fmt: skip
    if sums is not None:
        grads.put_filter(*taps_gradient(sums, k.shape[1], u.shape[2], options))


def kernel_of(kernel: str, config: tuning.Config, half: bool, aligned: bool, dtype: torch.dtype) -> CudaKernel:
    """``kernel`` as it is compiled for one configuration."""
    n1, r = tuning.factors(config.length)
    return cuda_kernel(
        "fft_conv/forward.cu" if kernel == "fft_conv_fwd" else "fft_conv/backward.cu", f"{kernel}_kernel",
        Element=dtype, N1=n1, R=r, WARPS=config.num_warps, HALF=half, ALIGNED=aligned,
    )  # fmt: skip


class Launch:
    """What every kernel of one call needs."""

    def __init__(self, u: Tensor, k: Tensor, transformed: list[Tensor], options: Options, device: DeviceSpec) -> None:
        self.u, self.options, self.device = u, options, device
        self.batch, self.heads, self.n = u.shape
        state = options.initial_state
        self.state = None if state is None else state.contiguous()
        self.gates = [x for x in (options.pre_gate, options.post_gate) if x is not None]
        self.mode, self.taps = reach(self.n, k.shape[1], options.mode, options.keep, state is not None)
        self.members = 1 if options.batch_invariant or self.batch == 1 else 2
        # The length of a filter that was transformed before.
        self.length = transformed[0].shape[1] if transformed else None
        if self.length is not None and self._cover(self.length) is None:
            self.length = None

    @property
    def pairs(self) -> int:
        """Transforms for a block of every sequence."""
        return -(-self.batch // self.members)

    def problem(self, kernel: str) -> tuning.Problem:
        """What the launch parameters of ``kernel`` depend on."""
        return tuning.Problem(
            kernel=kernel,
            seqlen=self.n,
            taps=self.taps,
            mode=self.mode,
            state=self.state is not None,
            gated=bool(self.gates),
            smem_block=self.device.smem_block,
            sms=self.device.sms,
            heads=self.heads,
            pairs=self.pairs,
        )

    def config(self, kernel: str) -> tuning.Config:
        """The launch parameters of ``kernel``."""
        config = autotune.select(tuning.TUNABLES[f"{kernel}_cuda"], self.problem(kernel), self.device)
        if self.length is None:
            return config
        return replace(config, length=self.length, num_warps=min(config.num_warps, tuning.most_warps(self.length)))

    def _cover(self, length: int) -> tuning.Cover | None:
        return tuning.cover(length, self.n, self.taps, self.mode, self.state is not None)

    def cover(self, config: tuning.Config) -> tuning.Cover:
        """How transforms cover a sequence."""
        found = self._cover(config.length)
        if found is None:
            raise ValueError(
                f"fft_conv: a configuration with transforms of {config.length} points does not serve N = {self.n} with "
                f"{self.taps} taps"
            )
        return found

    def blocks(self, config: tuning.Config, cover: tuning.Cover) -> int:
        """Thread blocks: every head, in as many parts as its units take."""
        return self.heads * -(-self.pairs * cover.chunks // config.units)

    def spectrum(self, k: Tensor, transformed: list[Tensor], config: tuning.Config) -> list[Tensor]:
        """The filter's frequencies and their scale, with the skip term."""
        if self.length is None:
            transformed = spectrum_of(k, self.n, config.length, self.options)
        return transformed if self.options.skip is None else with_skip(transformed, self.options.skip)

    def aligned(self, tensors: tuple[Tensor, ...]) -> bool:
        """Whether four steps from a multiple of four on are 8 aligned bytes of each tensor, or none of it."""
        return (
            self.state is None
            and self.n % 4 == 0
            and all(x.stride(2) == 1 and x.stride(0) % 4 == x.stride(1) % 4 == 0 for x in tensors)
            and all(x.data_ptr() % 8 == 0 for x in tensors)
        )

    def run(self, kernel: str, config: tuning.Config, inputs: tuple[Tensor, ...], args: dict[str, Argument]) -> None:
        """Launch ``kernel`` with its tensors in ``args``, and what every kernel takes behind them."""
        cover = self.cover(config)
        sizes: dict[str, Any] = {
            "batch": self.batch,
            "heads": self.heads,
            "seqlen": self.n,
            "past": 0 if self.state is None else self.state.shape[2],
            "lead": cover.lead,
            "step": cover.step,
            "chunks": cover.chunks,
            "units": config.units,
            "members": self.members,
            "periodic": int(cover.periodic),
        }
        kernel_of(kernel, config, cover.half, self.aligned(inputs), self.u.dtype).launch(
            grid=(self.blocks(config, cover),),
            block=32 * config.num_warps,
            smem=tuning.shared_bytes(config.length),
            args={**args, **sizes},
        )


def _strides(x: Tensor | None) -> tuple[int, ...]:
    return (0, 0, 0) if x is None else x.stride()

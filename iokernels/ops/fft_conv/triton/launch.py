"""Launches the Triton kernels of this room: the backend ``triton`` of the operators."""

from __future__ import annotations

import torch
from torch import Tensor

from iokernels.ops.fft_conv.options import Gradients, Needs, Options, empty_gradients
from iokernels.ops.shared.triton_tiles import view
from iokernels.runtime.device import guard, spec_of

from . import through, tuning
from .backward import fft_conv_bwd_kernel
from .call import Launch
from .filters import planes_of, taps_gradient
from .forward import fft_conv_fwd_kernel
from .transform import Results


def transform(k: Tensor, n: int, dtype: torch.dtype, options: Options) -> list[Tensor]:
    """The frequencies of a filter ``[H, Nk]`` for inputs of length n and of ``dtype``, as the kernels want them."""
    u = torch.empty(1, k.shape[0], n, dtype=dtype, device="meta")
    launch = Launch(u, k, [], options, spec_of(k.device))
    return planes_of(k, n, launch.blocks(launch.config("fft_conv_fwd")), launch.compute, options)


def forward(u: Tensor, k: Tensor, transformed: list[Tensor], options: Options) -> Tensor:
    """y as :class:`Options` defines it. ``transformed`` is what :func:`transform` made of k, or empty."""
    y = u.new_empty(u.shape)
    if y.numel() == 0:
        return y
    with guard(u.device):
        launch = Launch(u, k, transformed, options, spec_of(u.device))
        config = launch.config("fft_conv_fwd")
        cover = launch.blocks(config)
        if isinstance(cover, tuning.Through):
            through.forward(launch, config, cover, k, transformed, y)
            return y
        fft_conv_fwd_kernel[launch.grid(config, cover)](
            launch.inputs(), view(y), launch.filter(launch.spectrum(k, transformed, cover), cover),
            *launch.varying(config, cover), FEATURES=launch.features(cover), SIZES=launch.sizes(cover, u, y),
            num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip
    return y


def backward(dy: Tensor, u: Tensor, k: Tensor, transformed: list[Tensor], options: Options, needs: Needs) -> Gradients:
    """The gradients that ``needs`` names."""
    grads = empty_gradients(u, k, options, needs)
    if u.numel() == 0:
        return grads
    wanted = tuning.Wanted(
        v=any(x is not None for x in (grads.u, grads.pre_gate, grads.initial_state)),
        u=grads.u is not None,
        pre=grads.pre_gate is not None,
        post=grads.post_gate is not None,
        k=grads.k is not None or grads.skip is not None,
        state=grads.initial_state is not None,
    )
    if not any(wanted):
        return grads
    with guard(u.device):
        launch = Launch(u, k, transformed, options, spec_of(u.device))
        config = launch.config("fft_conv_bwd")
        cover = launch.blocks(config)
        if isinstance(cover, tuning.Through):
            through.backward(launch, config, cover, dy, k, transformed, wanted, grads)
        else:
            _on_chip_backward(launch, config, cover, dy, k, transformed, wanted, grads)
    return grads


def _on_chip_backward(
    launch: Launch,
    config: tuning.Config,
    cover: tuning.Blocks,
    dy: Tensor,
    k: Tensor,
    transformed: list[Tensor],
    wanted: tuning.Wanted,
    grads: Gradients,
) -> None:
    u, options, heads = launch.u, launch.options, launch.heads
    features, sizes = launch.features(cover), launch.sizes(cover, dy, u)
    inputs, results = launch.inputs(), Results(
        view(grads.u), view(grads.pre_gate), view(grads.post_gate), grads.initial_state
    )  # fmt: skip
    sums = None
    filter, rest = launch.filter(launch.spectrum(k, transformed, cover), cover), not launch.single(cover)
    for part in tuning.passes(wanted, cover.n1 * cover.n2, u.element_size()):
        before = int(part.state)
        grid = launch.grid(config, cover, before)
        if part.k:
            shape = (grid[0] // heads, heads, 2, cover.n1, sizes.COLS)
            sums = torch.empty(shape, dtype=torch.float32, device=u.device)
        fft_conv_bwd_kernel[grid](
            view(dy), inputs, results, sums, filter, *launch.varying(config, cover, before),
            FEATURES=features, WANTED=part, REST=part.state or (rest and part.v), SIZES=sizes,
            num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip
    if sums is not None:
        grads.put_filter(*taps_gradient(sums, k.shape[1], u.shape[2], cover, options))

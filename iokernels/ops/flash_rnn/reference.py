"""The oracle: one step after the other, as the equations read, under autograd.

Computes in float32, in float64 for float64 inputs (use that to judge others), on any device, and is differentiable to
any order: h enters the next product as it is, not rounded to the dtype of the gates as kernels have it.
"""

from __future__ import annotations

from typing import Any

import torch
from einops import einsum, rearrange
from torch import Tensor

from iokernels.ops.shared.layout import state_dtype
from iokernels.runtime.registration.precision import lifted

from .options import Options, initial_states, valid_steps


def run(gates: Tensor, recurrent: Tensor, bias: Tensor | None, options: Options) -> tuple[Tensor, Tensor]:
    """The network as :class:`Options` defines it. Returns (out, final states)."""
    out, state = _run(*lifted((gates, recurrent, bias, options)))
    return out.to(gates.dtype), state


def _run(gates: Tensor, recurrent: Tensor, bias: Tensor | None, options: Options) -> tuple[Tensor, Tensor]:
    cell = options.kind()
    kind = state_dtype(gates.dtype)
    states = tuple(initial_states(gates, options).unbind(0))
    valid = None if options.lengths is None else valid_steps(gates, options.lengths)
    outs = [states[0].new_zeros((gates.shape[0], 0, *states[0].shape[1:]))]
    for step in range(gates.shape[1]):
        h = _recurrent_path(states[0], options).to(gates.dtype)
        s = einsum(recurrent, h, "g h i j, b h j -> g b h i").to(kind)
        if bias is not None:
            s = s + rearrange(bias.to(kind), "g h d -> g 1 h d")
        x = rearrange(gates[:, step].to(kind), "b g h d -> g b h d")
        values = torch.cat([x[: cell.joined] + s[: cell.joined], s[cell.joined :], x[cell.joined :]])
        following = cell.step(values, cell.start(states))
        if valid is None:
            states = following
            outs.append(states[0].unsqueeze(1))
        else:
            now = valid[:, step, None, None]
            states = tuple(torch.where(now, new, old) for new, old in zip(following, states, strict=True))
            outs.append(states[0].masked_fill(~now, 0.0).unsqueeze(1))
    return torch.cat(outs, dim=1).to(gates.dtype), torch.stack(states)


def _recurrent_path(h: Tensor, options: Options) -> Tensor:
    """h on its way into the product: the same forward, and what the options say backward."""
    if options.recurrent_cut:
        return h.detach()
    if options.recurrent_clip > 0.0:
        return _Clip.apply(h, options.recurrent_clip)  # pyright: ignore[reportReturnType]
    return h


class _Clip(torch.autograd.Function):
    """The identity, whose gradient is clamped. Forward-mode derivatives are those of the identity."""

    @staticmethod
    def forward(x: Tensor, limit: float) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, float], output: Tensor) -> None:
        ctx.limit = inputs[1]

    @staticmethod
    def backward(ctx: Any, dx: Tensor) -> Any:
        return dx.clamp(-ctx.limit, ctx.limit), None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        return tangents[0].view_as(tangents[0])

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, None], x: Tensor, limit: float) -> tuple[Tensor, int | None]:
        return _Clip.apply(x, limit), in_dims[0]  # pyright: ignore[reportReturnType]

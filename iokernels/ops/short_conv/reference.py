"""The oracle of ``short_conv``: every window of the extended sequence times the filter, one sequence after the other.

Plain differentiable PyTorch, in float32 or, for float64 inputs, which give the truth of tests, in float64.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from iokernels.runtime.contracts.offsets import on_host
from iokernels.runtime.registration.precision import lifted

from .options import ShortOptions, empty_rows, empty_state, out_length


def convolve(x: Tensor, weight: Tensor, options: ShortOptions) -> tuple[Tensor, Tensor]:
    """(out, final state), as :class:`ShortOptions` says; the state is empty where it is not asked for."""
    out, final = _convolve(*lifted((x, weight, options)))
    return out.to(x.dtype), final.to(x.dtype)


def _convolve(x: Tensor, weight: Tensor, options: ShortOptions) -> tuple[Tensor, Tensor]:
    if options.cu_seqlens is None:
        return _dense(x, weight, options)
    if options.cu_seqlens.is_meta:
        return empty_rows(x, x.shape[2]), empty_state(x, weight.shape[1], options)
    packed = options._replace(cu_seqlens=None)
    # In rows of no sequence zeros that are, where there is no sequence at all, functions of x and weight still.
    nothing = (x[:, :, :0].sum() + weight[:, :0].sum()).to(x.dtype)
    outs, states = [], []
    bounds = on_host("short_conv", "cu_seqlens", options.cu_seqlens)
    for sequence, (start, stop) in enumerate(pairwise(bounds)):
        state = options.initial_state
        state = None if state is None else state[sequence : sequence + 1]
        out, final = _dense(x[:, :, start:stop], weight, packed._replace(initial_state=state))
        outs.append(out)
        states.append(final)
    outs.append(torch.zeros_like(x[:, :, bounds[-1] :]) + nothing)
    return torch.cat(outs, dim=2), torch.cat(states) if states else empty_state(x, weight.shape[1], options)


def _dense(x: Tensor, weight: Tensor, options: ShortOptions) -> tuple[Tensor, Tensor]:
    width = weight.shape[1]
    before = x.new_zeros((*x.shape[:2], options.left)) if options.initial_state is None else options.initial_state
    extended = torch.cat([before, x, x.new_zeros((*x.shape[:2], options.right))], dim=2)
    dtype = torch.promote_types(x.dtype, weight.dtype)
    if out_length(x.shape[2], width, options) > 0:
        out = torch.einsum("bhnw,hw->bhn", extended.unfold(2, width, 1).to(dtype), weight.to(dtype))
    else:
        out = (x[:, :, :0] * weight[:, :1]).to(dtype)
    if options.bias is not None:
        out = out + options.bias[:, None].to(dtype)
    if options.silu:
        out = out * torch.sigmoid(out)
    final = extended[:, :, extended.shape[2] - (width - 1) :] if options.return_state else x.new_empty(0)
    return out.to(x.dtype), final.clone()


def step(
    x: Tensor, weight: Tensor, state: Tensor, bias: Tensor | None, state_indices: Tensor | None, silu: bool
) -> Tensor:
    """One more row: returns the output and writes the new state over the old one."""
    out = torch.zeros_like(x)
    if x.is_meta:
        return out
    rows = range(x.shape[0]) if state_indices is None else on_host("short_conv_step", "state_indices", state_indices)
    for i, row in enumerate(rows):
        if row >= 0:
            options = ShortOptions(bias, state[row : row + 1], None, weight.shape[1] - 1, 0, silu, True)
            result, final = convolve(x[i : i + 1, :, None], weight, options)
            out[i] = result[0, :, 0]
            state[row] = final[0]
    return out

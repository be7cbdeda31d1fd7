"""Short depthwise convolution in PyTorch: the backend ``torch`` of ``short_conv``.

Every call becomes one valid convolution over an extended sequence: x between its left context (the state, or zeros) and
zeros to the right. Packed sequences stand in it one behind the other with W - 1 rows between them, which hold the state
of the next one or zeros, so that no window mixes two. Half precision is computed in float32; memory is O(N).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .short_options import (
    ShortGradients,
    ShortNeeds,
    ShortOptions,
    compute_dtype,
    empty_rows,
    empty_state,
    out_length,
)


def forward(x: Tensor, weight: Tensor, options: ShortOptions) -> tuple[Tensor, Tensor]:
    """Returns (out, final state). See :class:`ShortOptions`."""
    width = weight.shape[1]
    extended = _Extended(x, weight, options)
    out, final_state = empty_rows(x, out_length(x.shape[2], width, options)), empty_state(x, width, options)
    result = extended.before_activation(weight, options)
    if options.silu:
        result = F.silu(result)
    out.copy_(extended.only_in_sequences(result))
    if options.return_state:
        final_state.copy_(extended.finals(extended.rows))
    return out, final_state


def backward(
    dout: Tensor | None, dfinal: Tensor | None, x: Tensor, weight: Tensor, options: ShortOptions, needs: ShortNeeds
) -> ShortGradients:
    """Returns the gradients that ``needs`` asks for. An output gradient is None where nobody used that output."""
    extended = _Extended(x, weight, options)
    width, dtype = weight.shape[1], extended.rows.dtype
    if dout is None:
        dpre = extended.rows.new_zeros((*x.shape[:2], out_length(x.shape[2], width, options)))
    else:
        dpre = extended.only_in_sequences(dout.to(dtype))
        if options.silu:
            pre = extended.before_activation(weight, options)
            share = torch.sigmoid(pre)
            dpre = dpre * share * (1.0 + pre * (1.0 - share))
    spread = extended.spread(dpre)
    dx = dweight = dbias = dstate = None
    if needs.x or needs.initial_state:
        padded = F.pad(spread, (width - 1, width - 1))
        drows = correlate(padded, weight.to(dtype).flip(1))
        if dfinal is not None:
            extended.add_finals(drows, dfinal.to(dtype))
        if needs.x:
            dx = empty_rows(x, x.shape[2])
            dx.copy_(extended.only_in_sequences(extended.inputs(drows)))
        if needs.initial_state:
            dstate = extended.states(drows).to(x.dtype).contiguous()
    if needs.weight:
        length = spread.shape[2]
        taps = [(spread * extended.rows[:, :, w : w + length]).sum((0, 2)) for w in range(width)]
        dweight = torch.stack(taps, dim=1).to(weight.dtype)
    if needs.bias and options.bias is not None:
        dbias = dpre.sum((0, 2)).to(options.bias.dtype)
    return ShortGradients(dx, dweight, dbias, dstate)


def step(
    x: Tensor, weight: Tensor, state: Tensor, bias: Tensor | None, state_indices: Tensor | None, silu: bool
) -> Tensor:
    """One row for each sequence; its state is overwritten."""
    if state_indices is not None:
        used = state_indices >= 0
        out = torch.zeros_like(x)
        rows = state_indices[used].long()
        taken = state[rows]
        out[used] = step(x[used], weight, taken, bias, None, silu)
        state[rows] = taken
        return out
    dtype = compute_dtype(x)
    window = torch.cat([state, x[:, :, None]], dim=2)
    out = (window.to(dtype) * weight.to(dtype)).sum(2)
    if bias is not None:
        out = out + bias.to(dtype)
    if silu:
        out = F.silu(out)
    state.copy_(window[:, :, 1:])
    return out.to(x.dtype)


def correlate(rows: Tensor, weight: Tensor) -> Tensor:
    """Depthwise valid correlation, ``[B, H, N] x [H, W] -> [B, H, N - W + 1]``, in the dtype of both."""
    channels, width = weight.shape
    length = rows.shape[2] - width + 1
    if rows.device.type == "cpu" and rows.numel() and length > 0:
        return F.conv1d(rows, weight[:, None], groups=channels)
    # Elsewhere taps are added one by one: cuDNN would round float32 to tf32.
    out = rows[:, :, :length] * weight[:, :1]
    for w in range(1, width):
        out.addcmul_(rows[:, :, w : w + length], weight[:, w : w + 1])
    return out


class _Extended:
    """x with its context, ``rows [B, H, left + N + right]`` in float32 or float64, and where its parts lie.

    Packed: ``row_at [total]`` is where an input stands, and ``state_at`` and ``final_at [S, W - 1]`` are where the
    contexts of the sequences start from and what they leave. Without packing these places are slices.
    """

    def __init__(self, x: Tensor, weight: Tensor, options: ShortOptions) -> None:
        batch, channels, length = x.shape
        self.width, self.left, self.length = weight.shape[1], options.left, length
        self.packed = options.cu_seqlens is not None
        dtype = compute_dtype(x, weight)
        state = options.initial_state
        if options.cu_seqlens is None:
            before = x.new_zeros((batch, channels, options.left), dtype=dtype) if state is None else state.to(dtype)
            after = x.new_zeros((batch, channels, options.right), dtype=dtype)
            self.rows = torch.cat([before, x.to(dtype), after], dim=2)
            return
        ends = options.cu_seqlens.long().clamp(0, length)
        sequences, gap = ends.shape[0] - 1, self.width - 1
        at = torch.arange(length, device=x.device)
        which = torch.searchsorted(ends, at, right=True) - 1
        self.inside = (which >= 0) & (which < sequences)
        self.window_at = at + which.clamp(0, sequences) * gap
        shift = torch.arange(sequences, device=x.device) * gap
        context = torch.arange(gap, device=x.device)
        self.state_at = (ends[:-1] + shift)[:, None] + context
        self.final_at = (ends[1:] + shift)[:, None] + context
        self.rows = x.new_zeros((batch, channels, length + (sequences + 1) * gap), dtype=dtype)
        self.rows.index_copy_(2, self.window_at + self.left, x.to(dtype))
        if state is not None:
            self.rows[0].index_copy_(1, self.state_at.flatten(), state.to(dtype).transpose(0, 1).flatten(1))

    def before_activation(self, weight: Tensor, options: ShortOptions) -> Tensor:
        """The sums before the activation, ``[B, H, M]``."""
        result = correlate(self.rows, weight.to(self.rows.dtype))
        if self.packed:
            result = result.index_select(2, self.window_at)
        if options.bias is not None:
            result = result + options.bias.to(result.dtype)[:, None]
        return result

    def spread(self, dpre: Tensor) -> Tensor:
        """Gradients of the sums, at the places of their windows."""
        if not self.packed:
            return dpre
        spread = dpre.new_zeros((*dpre.shape[:2], self.rows.shape[2] - self.width + 1))
        return spread.index_copy_(2, self.window_at, dpre)

    def only_in_sequences(self, rows: Tensor) -> Tensor:
        """Zeros in the rows that belong to no packed sequence."""
        return torch.where(self.inside, rows, 0.0) if self.packed else rows

    def inputs(self, rows: Tensor) -> Tensor:
        """The part of ``rows`` where x stands."""
        if self.packed:
            return rows.index_select(2, self.window_at + self.left)
        return rows[:, :, self.left : self.left + self.length]

    def states(self, rows: Tensor) -> Tensor:
        """The part where the initial states stand, ``[B or S, H, W - 1]``."""
        return self._contexts(rows, self.state_at) if self.packed else rows[:, :, : self.width - 1]

    def finals(self, rows: Tensor) -> Tensor:
        """The last W - 1 rows of every sequence and its context."""
        return self._contexts(rows, self.final_at) if self.packed else rows[:, :, self.length :]

    def add_finals(self, rows: Tensor, dfinal: Tensor) -> None:
        """Add the gradients of the final states where :meth:`finals` reads."""
        if self.packed:
            rows[0].index_add_(1, self.final_at.flatten(), dfinal.transpose(0, 1).flatten(1))
        else:
            rows[:, :, self.length :] += dfinal

    def _contexts(self, rows: Tensor, places: Tensor) -> Tensor:
        return rows[0].index_select(1, places.flatten()).unflatten(1, places.shape).transpose(0, 1)

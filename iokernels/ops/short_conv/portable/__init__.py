"""Short depthwise convolution in PyTorch: the backend ``torch`` of ``short_conv``.

Every call becomes one valid convolution over an extended sequence: x between its left context (the state, or zeros) and
zeros to the right. Packed sequences stand in it one behind the other with W - 1 rows between them, which hold the state
of the next one or zeros, so that no window mixes two. Half precision is computed in float32; memory is O(N).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from iokernels.ops.short_conv.options import (
    ShortGradients,
    ShortNeeds,
    ShortOptions,
    compute_dtype,
    empty_rows,
    empty_state,
    out_length,
)

from . import taps


def forward(x: Tensor, weight: Tensor, options: ShortOptions) -> tuple[Tensor, Tensor]:
    """Returns (out, final state). See :class:`ShortOptions`."""
    width = weight.shape[1]
    final_state = empty_state(x, width, options)
    if _by_taps(x, width, options):
        if options.return_state:
            kept = min(x.shape[2], width - 1)
            final_state[:, :, : width - 1 - kept].zero_()
            final_state[:, :, width - 1 - kept :] = x[:, :, x.shape[2] - kept :]
        return taps.forward(x, weight, options), final_state
    extended = _Extended(x, weight, options)
    result = extended.before_activation(weight, options)
    if options.silu:
        result = F.silu(result, inplace=True)
    out = _like(x, extended.only_in_sequences(result))
    if options.return_state:
        final_state.copy_(extended.finals(extended.rows))
    return out, final_state


def backward(
    dout: Tensor | None, dfinal: Tensor | None, x: Tensor, weight: Tensor, options: ShortOptions, needs: ShortNeeds
) -> ShortGradients:
    """Returns the gradients that ``needs`` asks for. An output gradient is None where nobody used that output."""
    width = weight.shape[1]
    if dout is not None and _by_taps(x, width, options):
        return _backward_by_taps(dout, dfinal, x, weight, options, needs)
    extended = _Extended(x, weight, options)
    dtype = extended.rows.dtype
    if dout is None:
        dpre = extended.rows.new_zeros((*x.shape[:2], out_length(x.shape[2], width, options)))
    else:
        dpre = extended.only_in_sequences(dout.to(dtype))
        if options.silu:
            dpre = torch.ops.aten.silu_backward(dpre, extended.before_activation(weight, options))
    spread = extended.spread(dpre)
    dx = dweight = dbias = dstate = None
    rows = needs.x or needs.initial_state
    drows, dtaps = correlate_backward(spread, extended.rows, weight.to(dtype), rows, needs.weight)
    if drows is not None:
        if dfinal is not None:
            extended.add_finals(drows, dfinal.to(dtype))
        if needs.x:
            dx = _like(x, extended.only_in_sequences(extended.inputs(drows)))
        if needs.initial_state and options.initial_state is not None:
            dstate = torch.empty_like(options.initial_state).copy_(extended.states(drows))
    if dtaps is not None:
        dweight = dtaps.to(weight.dtype)
    if needs.bias and options.bias is not None:
        dbias = dpre.sum((0, 2)).to(options.bias.dtype)
    return ShortGradients(dx, dweight, dbias, dstate)


def _by_taps(x: Tensor, width: int, options: ShortOptions) -> bool:
    """Whether the call is one for :mod:`.taps`."""
    few = width <= taps.MOST_TAPS
    return few and options.cu_seqlens is None and options.initial_state is None and x.numel() > 0


def _backward_by_taps(
    dout: Tensor, dfinal: Tensor | None, x: Tensor, weight: Tensor, options: ShortOptions, needs: ShortNeeds
) -> ShortGradients:
    dx, dweight, dbias = taps.backward(dout, x, weight, options, (needs.x, needs.weight))
    if dx is not None and dfinal is not None:
        kept = min(x.shape[2], weight.shape[1] - 1)
        dx[:, :, x.shape[2] - kept :] += dfinal[:, :, dfinal.shape[2] - kept :]
    return ShortGradients(
        dx,
        None if dweight is None else dweight.to(weight.dtype),
        dbias.to(options.bias.dtype) if needs.bias and options.bias is not None else None,
        None,
    )


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


def correlate(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Depthwise valid correlation, ``[B, H, N] x [H, W] -> [B, H, N - W + 1]``, in the dtype of all, a new tensor."""
    channels, width = weight.shape
    length = rows.shape[2] - width + 1
    few = width <= 16 and rows.stride(1) < rows.stride(2)
    if rows.device.type == "cpu" and rows.numel() and length > 0 and not few:
        return F.conv1d(rows, weight[:, None], bias, groups=channels)
    # Taps one by one keep channels inside where PyTorch's convolution would reorder them. On a GPU they are also more
    # exact: cuDNN would round float32 to tf32.
    out = rows[:, :, :length] * weight[:, :1]
    for w in range(1, width):
        out.addcmul_(rows[:, :, w : w + length], weight[:, w : w + 1])
    return out if bias is None else out.add_(bias[:, None])


def correlate_backward(
    dsum: Tensor, rows: Tensor, weight: Tensor, needs_rows: bool, needs_weight: bool
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of :func:`correlate` in its rows and filter, None where not needed."""
    channels, width = weight.shape
    length = dsum.shape[2]
    if rows.device.type == "cpu" and dsum.numel() and (needs_rows or needs_weight):
        drows, dweight, _ = torch.ops.aten.convolution_backward(
            dsum, rows, weight[:, None], None, [1], [0], [1], False, [0], channels, [needs_rows, needs_weight, False]
        )
        return drows, None if dweight is None else dweight.squeeze(1)
    drows = dweight = None
    if needs_rows:
        padded = _zeros(dsum, length + 2 * (width - 1), dsum.dtype)
        padded[:, :, width - 1 : width - 1 + length] = dsum
        drows = correlate(padded, weight.flip(1))
    if needs_weight:
        taps = [(dsum * rows[:, :, w : w + length]).sum((0, 2)) for w in range(width)]
        dweight = torch.stack(taps, dim=1)
    return drows, dweight


def _like(x: Tensor, rows: Tensor) -> Tensor:
    """``rows`` in the dtype and memory order of x, as the operators' fakes promise; itself where it has them."""
    out = empty_rows(x, rows.shape[2])
    if rows.dtype == x.dtype and rows.stride() == out.stride() and rows.storage_offset() == 0:
        return rows
    return out.copy_(rows)


def _zeros(x: Tensor, length: int, dtype: torch.dtype) -> Tensor:
    """Zeros ``[B, H, length]`` in the memory order of x."""
    return torch.zeros_like(empty_rows(x, length), dtype=dtype)


class _Extended:
    """x with its context, ``rows [B, H, left + N + right]`` in float32 or float64, and where its parts lie.

    Packed: ``row_at [total]`` is where an input stands, and ``state_at`` and ``final_at [S, W - 1]`` are where the
    contexts of the sequences start from and what they leave. Without packing these places are slices.
    """

    def __init__(self, x: Tensor, weight: Tensor, options: ShortOptions) -> None:
        length = x.shape[2]
        self.width, self.left, self.length = weight.shape[1], options.left, length
        self.packed = options.cu_seqlens is not None
        dtype = compute_dtype(x, weight)
        state = options.initial_state
        if options.cu_seqlens is None:
            self.rows = _zeros(x, options.left + length + options.right, dtype)
            self.rows[:, :, options.left : options.left + length] = x
            if state is not None:
                self.rows[:, :, : options.left] = state
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
        self.rows = _zeros(x, length + (sequences + 1) * gap, dtype)
        self.rows.index_copy_(2, self.window_at + self.left, x.to(dtype))
        if state is not None:
            self.rows[0].index_copy_(1, self.state_at.flatten(), state.to(dtype).transpose(0, 1).flatten(1))

    def before_activation(self, weight: Tensor, options: ShortOptions) -> Tensor:
        """The sums before the activation, ``[B, H, M]``."""
        bias = None if options.bias is None else options.bias.to(self.rows.dtype)
        result = correlate(self.rows, weight.to(self.rows.dtype), bias)
        return result.index_select(2, self.window_at) if self.packed else result

    def spread(self, dpre: Tensor) -> Tensor:
        """Gradients of the sums, at the places of their windows."""
        if not self.packed:
            return dpre
        spread = _zeros(dpre, self.rows.shape[2] - self.width + 1, dpre.dtype)
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

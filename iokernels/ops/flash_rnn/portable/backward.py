"""The backward pass of the backend ``torch``.

What the pointwise gradients are made of does not depend on the gradient that comes back
(:mod:`iokernels.ops.flash_rnn.cells`), so it is computed for many steps at a time, in whole-tensor operations. A step
is then a handful of products and one batched product, ``dh = ds R``, which is added to the gradient of the output of
the step before. The gradients of R and b take one product and one sum for those many steps. Memory: that of so many
steps.
"""

from __future__ import annotations

import torch
from torch import Tensor

from iokernels.ops.flash_rnn.cells import Cell, States
from iokernels.ops.flash_rnn.options import Forward, Gradients, Needs, Options, empty_gates
from iokernels.ops.shared.layout import state_dtype

from .steps import by_gate, initial_of, join, offset_of, product, step_major, valid_of, weights_of

CHUNK_BYTES, MOST_STEPS = 2**20, 64
"""Steps whose values fill a core's cache are worked on together, but at most so many."""


def backward(
    dout: Tensor, dstate: Tensor | None, gates: Tensor | None, recurrent: Tensor, bias: Tensor | None, saved: Forward,
    options: Options, needs: Needs,
) -> Gradients:  # fmt: skip
    """Returns the gradients that ``needs`` asks for. ``gates`` is None unless the values are to be recomputed."""
    cell, out = options.kind(), saved.out
    kind = state_dtype(out.dtype)
    length, heads, width = out.shape[1:]
    weights, valid = weights_of(recurrent), valid_of(out, options)
    initial = cell.start(initial_of(out.unsqueeze(2), options))
    dgates = empty_gates(out, cell) if needs.gates else None
    dweights, dbias = weights.new_zeros(heads, width, cell.gates * width), weights.new_zeros(heads, cell.gates * width)
    hidden, douts = step_major(out), step_major(dout)
    history = [step_major(x) for x in saved.history.unbind(2)]
    walk = _Walk(out, weights, dstate, options)
    for first in reversed(range(0, length, walk.most)):
        chunk = slice(first, min(first + walk.most, length))
        count = chunk.stop - first
        # States before and after every step. h: as the product saw it, rounded.
        h_before = walk.h_before[:, :count]
        h_before.transpose(0, 1).copy_(_shifted(hidden, initial[0].to(out.dtype), chunk))
        others = zip(history, initial[1:], strict=True)
        previous = (h_before.transpose(0, 1), *(_shifted(x, before, chunk) for x, before in others))
        states = (hidden[chunk], *(x[chunk] for x in history))
        if gates is None:
            values = step_major(saved.values)[chunk].to(kind)
        else:
            values = _values_again(step_major(gates)[chunk], h_before.flatten(1, 2), weights, bias, cell)
        if gates is not None or saved.values.dtype != kind:
            for some, activation in cell.runs():
                activation.in_place(values[:, some])
        walk.back(values.unbind(1), previous, states, douts[chunk], None if valid is None else valid[chunk])
        ds = walk.ds[:, :count].flatten(1, 2)
        if needs.recurrent:
            dweights.baddbmm_(h_before.flatten(1, 2).transpose(1, 2), ds)
        if needs.bias:
            dbias += ds.sum(1)
        if dgates is not None:
            dx, dvalues = step_major(dgates)[chunk], walk.dvalues[:count]
            dx[:, : cell.joined] = dvalues[:, : cell.joined]
            if cell.apart:
                dx[:, cell.joined :] = dvalues[:, cell.gates :]
    per_gate = dweights.view(heads, width, cell.gates, width).permute(2, 0, 3, 1)
    return Gradients(
        gates=dgates,
        recurrent=per_gate.to(recurrent.dtype).contiguous() if needs.recurrent else None,
        bias=dbias.view(heads, cell.gates, width).transpose(0, 1).to(out.dtype).contiguous() if needs.bias else None,
        initial_state=torch.stack(walk.dstates).transpose(1, 2).contiguous() if needs.initial_state else None,
    )


class _Walk:
    """The steps from the last to the first, up to ``most`` of them at a time, and what stays the same for all.

    ``dstates`` are the gradients of the states that the walk has come to. After :meth:`back` the gradients of the
    values are in ``dvalues [most, A, H, B, D]``, and those of s in ``ds [H, most, B, G D]``, which is part of the same
    memory: they lie as products take them.
    """

    def __init__(self, out: Tensor, weights: Tensor, dstate: Tensor | None, options: Options) -> None:
        cell = self.cell = options.kind()
        self.options, self.weights = options, weights
        batch, length, heads, width = out.shape
        bytes_of_step = max(1, batch * cell.values * heads * width * weights.itemsize)
        self.most = most = max(1, min(CHUNK_BYTES // bytes_of_step, MOST_STEPS, length))
        self.h_before = weights.new_empty((heads, most, batch, width))
        dvalues = weights.new_empty((heads, most, batch, cell.values, width))
        self.dvalues = dvalues.permute(1, 3, 0, 2, 4)
        self.ds = dvalues.flatten(3)[..., : cell.gates * width]
        self.slopes = weights.new_empty((cell.values, most, heads, batch, width))
        # The gradient of h before the first step, and after every one.
        self.dh = weights.new_zeros((most + 1, heads, batch, width))
        if dstate is None:
            self.dstates = (self.dh[0],) * len(cell.states)
        else:
            self.dstates = tuple(x.transpose(0, 1).contiguous() for x in dstate.to(weights.dtype).unbind(0))
        # Views of single steps. They are made once: small networks would spend much of their time on them.
        self._dh = self.dh.unbind(0)
        self._ds = self.ds.unbind(1)
        self._dvalues = list(zip(*(x.unbind(0) for x in self.dvalues.unbind(1)), strict=True))
        self._slopes = list(zip(*(x.unbind(0) for x in self.slopes.unbind(0)), strict=True))

    def back(
        self, values: States, previous: States, states: States, dout: Tensor, valid: Tensor | None
    ) -> None:  # fmt: skip
        """Walk through the steps of a chunk. ``values`` are the A values after their activations."""
        count = len(dout)
        self.dh[1 : count + 1] = dout if valid is None else dout.masked_fill(~valid, 0.0)
        self._dh[count].add_(self.dstates[0])
        self._dh[0].zero_()
        coefficients, factors = self.cell.factors(values, previous, states)
        for index, activation in enumerate(self.cell.activations):
            slope = self.slopes[index, :count]
            if activation is None:
                slope.copy_(coefficients[index])
            else:
                activation.slope(coefficients[index], values[index], slope)
        of_steps = list(zip(*(x.unbind(0) for x in factors), strict=True)) or [()] * count
        for step in reversed(range(count)):
            self._step(step, of_steps[step], None if valid is None else valid[step])
        self.dstates = (self._dh[0].clone(), *self.dstates[1:])

    def _step(self, step: int, factors: States, valid: Tensor | None) -> None:
        after = (self._dh[step + 1], *self.dstates[1:])
        dvalues, ds = self._dvalues[step], self._ds[step]
        before = self.cell.backward(self._slopes[step], factors, after, dvalues)
        if valid is not None:
            self.dvalues[step].masked_fill_(~valid, 0.0)
            # A sequence that has ended passes its gradients on.
            before = tuple(
                old.masked_fill(valid, 0.0) if new is None else torch.where(valid, new, old)
                for new, old in zip(before, after, strict=True)
            )
        dh = self._dh[step]
        if before[0] is not None:
            dh.add_(before[0])
        if not self.options.recurrent_cut:
            if self.options.recurrent_clip > 0.0:
                limit = self.options.recurrent_clip
                dh.add_(torch.bmm(ds, self.weights).clamp_(-limit, limit))
            else:
                dh.baddbmm_(ds, self.weights)
        self.dstates = (dh, *(torch.zeros_like(dh) if new is None else new for new in before[1:]))


def _values_again(gates: Tensor, h_before: Tensor, weights: Tensor, bias: Tensor | None, cell: Cell) -> Tensor:
    """The values ``[C, A, H, B, D]`` before their activations, of gates ``[C, G, H, B, D]`` and h ``[H, C B, D]``."""
    steps, _, heads, batch, width = gates.shape
    raw = weights.new_empty((heads, steps * batch, cell.gates * width))
    product(h_before, weights.transpose(1, 2), offset_of(bias, steps * batch, weights.dtype), raw)
    values = weights.new_empty((steps, cell.values, heads, batch, width))
    s = by_gate(raw.unflatten(1, (steps, batch)), cell).transpose(1, 2)
    join(values.transpose(0, 1), gates.transpose(0, 1), s, cell)
    return values


def _shifted(x: Tensor, initial: Tensor, chunk: slice) -> Tensor:
    """What stood before every step of a chunk, of x ``[N, H, B, D]`` and what stood before the first."""
    if chunk.start > 0:
        return x[chunk.start - 1 : chunk.stop - 1]
    return torch.cat([initial.unsqueeze(0), x[: chunk.stop - 1]])

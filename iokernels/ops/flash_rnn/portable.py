"""The backend ``torch``: a loop over time with one batched product a step, and a backward pass of its own.

Forward, a step is one product of all heads, ``s = h R^T``, added in place to what the inputs gave, and the cell's
pointwise equations. Backward, what the pointwise gradients are made of does not depend on the gradient that comes back
(:mod:`.cells`), so it is computed for CHUNK steps at a time, in whole-tensor operations; a step is then a handful of
products and one batched product, ``dh = ds R``. The gradients of R and b take one product and one sum a chunk. Memory
beyond what :class:`.options.Forward` keeps is that of a chunk. All of it is float32, float64 for float64 inputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .cells import Cell, States
from .options import (
    Forward,
    Gradients,
    Needs,
    Options,
    empty_gates,
    empty_history,
    empty_out,
    empty_state,
    empty_values,
    initial_states,
    state_dtype,
    valid_steps,
)

CHUNK = 8
"""Steps whose pointwise work shares whole-tensor operations: what they touch should stay in a cache."""


def forward(gates: Tensor, recurrent: Tensor, bias: Tensor | None, keep: bool, options: Options) -> Forward:
    """Run all steps. See :class:`.options.Forward` for what is returned; ``keep`` asks for its last two."""
    cell, kind = options.kind(), state_dtype(gates.dtype)
    keeps_values = keep and not options.recompute_gates
    result = Forward(
        empty_out(gates),
        empty_state(gates, cell),
        empty_values(gates, cell, keeps_values),
        empty_history(gates, cell, keep),
    )
    batch, length, _, heads, width = gates.shape
    weights = _weights(recurrent, kind).transpose(1, 2)
    valid = _valid(gates, options)
    states = tuple(x.transpose(0, 1).contiguous() for x in initial_states(gates, options).to(kind).unbind(0))
    values, history, out = _step_major(result.values), _step_major(result.history), _step_major(result.out)
    scratch = gates.new_empty((CHUNK, heads, batch, cell.values, width), dtype=kind)
    for first in range(0, length, CHUNK):
        chunk = slice(first, min(first + CHUNK, length))
        in_place = keeps_values and result.values.dtype == kind
        work = values[chunk] if in_place else scratch[: chunk.stop - first]
        _add_inputs(work, gates[:, chunk], bias, cell)
        steps: list[States] = []
        for step in range(first, chunk.stop):
            now = work[step - first]
            _add_product(now, states[0].to(gates.dtype).to(kind), weights, cell)
            following = cell.forward(now, states)
            if valid is not None:
                following = tuple(
                    torch.where(valid[step], new, old) for new, old in zip(following, states, strict=True)
                )
            states = following
            steps.append(states)
        h = torch.stack([now[0] for now in steps])
        out[chunk] = h if valid is None else h.masked_fill(~valid[chunk], 0.0)
        if keep:
            for index in range(1, len(cell.states)):
                torch.stack([now[index] for now in steps], out=history[chunk, :, :, index - 1])
        if keeps_values and not in_place:
            values[chunk] = work
    for index, state in enumerate(states):
        result.state[index] = state.transpose(0, 1)
    return result


def backward(
    dout: Tensor, dstate: Tensor | None, gates: Tensor | None, recurrent: Tensor, bias: Tensor | None, saved: Forward,
    options: Options, needs: Needs,
) -> Gradients:  # fmt: skip
    """Returns the gradients that ``needs`` asks for. ``gates`` is None unless the values are to be recomputed."""
    cell, out = options.kind(), saved.out
    kind = state_dtype(out.dtype)
    batch, length, heads, width = out.shape
    weights = _weights(recurrent, kind)
    valid = _valid(out, options)
    initial = initial_states(dout.unsqueeze(2), options).to(kind).transpose(1, 2)
    if dstate is None:
        dstates = tuple(torch.zeros_like(initial).unbind(0))
    else:
        dstates = tuple(dstate.to(kind).transpose(1, 2).contiguous().unbind(0))
    dgates = empty_gates(out, cell) if needs.gates else None
    dweights = torch.zeros_like(weights)
    dbias = weights.new_zeros(heads, cell.gates * width)
    values, history, hidden = _step_major(saved.values), _step_major(saved.history), _step_major(out)
    douts = _step_major(dout)
    scratch = weights.new_empty((heads, CHUNK, batch, cell.values, width))
    for first in reversed(range(0, length, CHUNK)):
        chunk = slice(first, min(first + CHUNK, length))
        count = chunk.stop - first
        # States before and after every step of the chunk. h: as the product saw it, rounded.
        h_before = _shifted(hidden, initial[0].to(out.dtype), chunk).to(kind)
        if gates is None:
            now = values[chunk].to(kind)
        else:
            now = weights.new_empty((count, heads, batch, cell.values, width))
            _add_inputs(now, gates[:, chunk], bias, cell)
            for step in range(count):
                _add_product(now[step], h_before[step], weights.transpose(1, 2), cell)
        others = range(1, len(cell.states))
        previous = (h_before, *(_shifted(history[..., k - 1, :], initial[k], chunk) for k in others))
        states = (hidden[chunk], *(history[chunk, ..., k - 1, :] for k in others))
        factors = cell.factors(now, previous, states)
        dh_chunk = douts[chunk].to(kind)
        dvalues = scratch[:, :count]
        for step in reversed(range(count)):
            dstates = _step_back(
                cell, tuple(x[step] for x in factors), dstates, dh_chunk[step], dvalues[:, step], weights, options,
                None if valid is None else valid[first + step],
            )  # fmt: skip
        ds = dvalues[..., : cell.gates, :].reshape(heads, count * batch, cell.gates * width)
        if needs.recurrent:
            dweights.baddbmm_(ds.transpose(1, 2), h_before.transpose(0, 1).reshape(heads, count * batch, width))
        if needs.bias:
            dbias += ds.sum(1)
        if dgates is not None:
            # [H, C, B, A, D] to [B, C, A, H, D].
            dx = dvalues.permute(2, 1, 3, 0, 4)
            dgates[:, chunk, : cell.joined] = dx[:, :, : cell.joined]
            dgates[:, chunk, cell.joined :] = dx[:, :, cell.gates :] if cell.apart else dx[:, :, cell.joined :]
    per_gate = dweights.view(heads, cell.gates, width, width).transpose(0, 1)
    return Gradients(
        gates=dgates,
        recurrent=per_gate.to(recurrent.dtype).contiguous() if needs.recurrent else None,
        bias=dbias.view(heads, cell.gates, width).transpose(0, 1).to(out.dtype).contiguous() if needs.bias else None,
        initial_state=torch.stack(dstates).transpose(1, 2).contiguous() if needs.initial_state else None,
    )


def _step_back(
    cell: Cell, factors: States, dstates: States, dout: Tensor, dvalues: Tensor, weights: Tensor, options: Options,
    valid: Tensor | None,
) -> States:  # fmt: skip
    """Fill ``dvalues [H, B, A, D]`` of one step, and return the gradients of the states before it."""
    after = (dstates[0] + (dout if valid is None else dout.masked_fill(~valid, 0.0)), *dstates[1:])
    before = cell.backward(factors, after, dvalues)
    if valid is not None:
        dvalues.masked_fill_(~valid.unsqueeze(-1), 0.0)
    dh = before[0]
    if not options.recurrent_cut:
        through = torch.bmm(dvalues[..., : cell.gates, :].flatten(-2), weights)
        if options.recurrent_clip > 0.0:
            through.clamp_(-options.recurrent_clip, options.recurrent_clip)
        dh = through if dh is None else through.add_(dh)
    found = (dh, *before[1:])
    if valid is None:
        return tuple(torch.zeros_like(after[0]) if new is None else new for new in found)
    return tuple(
        old.masked_fill(valid, 0.0) if new is None else torch.where(valid, new, old)
        for new, old in zip(found, dstates, strict=True)
    )


def _weights(recurrent: Tensor, kind: torch.dtype) -> Tensor:
    """R as one matrix a head, [H, G D, D] (out, in)."""
    return recurrent.to(kind).transpose(0, 1).flatten(1, 2).contiguous()


def _valid(x: Tensor, options: Options) -> Tensor | None:
    """Which steps belong to their sequence, [N, 1, B, 1]; None where all do."""
    if options.lengths is None:
        return None
    return valid_steps(x, options.lengths).t()[:, None, :, None]


def _step_major(x: Tensor) -> Tensor:
    """[B, N, H, D] as [N, H, B, D], and [B, N, A, H, D] as [N, H, B, A, D]."""
    return x.permute(1, 2, 0, 3) if x.dim() == 4 else x.permute(1, 3, 0, 2, 4)


def _shifted(x: Tensor, initial: Tensor, chunk: slice) -> Tensor:
    """What stood before every step of a chunk, of x ``[N, H, B, D]`` and what stood before the first."""
    if chunk.start > 0:
        return x[chunk.start - 1 : chunk.stop - 1]
    return torch.cat([initial.unsqueeze(0), x[: chunk.stop - 1]])


def _add_inputs(work: Tensor, gates: Tensor, bias: Tensor | None, cell: Cell) -> None:
    """Fill ``work [C, H, B, A, D]`` with all that does not depend on h."""
    x = gates.permute(1, 3, 0, 2, 4)
    bias = None if bias is None else bias.to(work.dtype).permute(1, 0, 2)[None, :, None]
    _fill(work[..., : cell.joined, :], x[..., : cell.joined, :], None if bias is None else bias[..., : cell.joined, :])
    if cell.apart:
        recurrent = work[..., cell.joined : cell.gates, :]
        _fill(recurrent, work.new_zeros(()).expand_as(recurrent), None if bias is None else bias[..., cell.joined :, :])
        work[..., cell.gates :, :] = x[..., cell.joined :, :]


def _fill(work: Tensor, x: Tensor, bias: Tensor | None) -> None:
    if bias is None:
        work.copy_(x)
    else:
        torch.add(x, bias, out=work)


def _add_product(work: Tensor, h: Tensor, weights: Tensor, cell: Cell) -> None:
    """Add ``R h`` to the values ``work [H, B, A, D]`` of one step; ``weights`` are [H, D, G D]."""
    if cell.apart:
        work[..., : cell.gates, :] += torch.bmm(h, weights).unflatten(-1, (cell.gates, -1))
    else:
        work.flatten(-2).baddbmm_(h, weights)

"""``LSTM``, ``GRU`` and ``RNN`` in place of those of ``torch.nn``, with heads."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from iokernels.ops.flash_rnn.api import flash_rnn, triton_refusal
from iokernels.ops.flash_rnn.cells import CELLS
from iokernels.ops.shared.layout import state_dtype
from iokernels.runtime import dispatch
from iokernels.runtime.contracts import Contract
from iokernels.runtime.contracts.plain import count, flag, number
from iokernels.runtime.registration.autocast import autocast_dtype

from .arguments import alike, multiplied, placed, strided
from .slstm import SLSTM, SLSTMState

__all__ = ["GRU", "LSTM", "RNN", "SLSTM", "SLSTMState"]

_MODES = {"lstm": ("LSTM", torch.lstm), "gru": ("GRU", torch.gru), "elman": ("RNN_TANH", torch.rnn_tanh)}
"""Of every cell: torch's name for it, and torch's function for whole networks of it."""

_ARGUMENTS = ("input_size", "hidden_size", "num_layers", "bias", "batch_first", "dropout", "bidirectional")


class _Recurrent(nn.RNNBase):
    """What the three modules share. The parameters, their names and their order are those of ``torch.nn``."""

    cell: str
    num_heads: int = 1
    weight_ih_l0: Tensor
    backend: str | None = None

    def __init__(self, sizes: tuple[Any, ...], num_heads: int, backend: str | None, **made: Any) -> None:
        name = type(self).__name__
        given = dict(zip(_ARGUMENTS, sizes, strict=True))
        for size in ("input_size", "hidden_size", "num_layers"):
            given[size] = count(name, size, given[size], 1, tensors=True)
        for choice in ("bias", "batch_first", "bidirectional"):
            given[choice] = flag(name, choice, given[choice])
        given["dropout"] = number(name, "dropout", given["dropout"], least=0.0, most=1.0, tensors=True)
        hidden, num_heads = given["hidden_size"], count(name, "num_heads", num_heads, 1, tensors=True)
        if hidden % num_heads:
            raise ValueError(f"{name}: num_heads is {num_heads}; it must divide hidden_size, which is {hidden}")
        super().__init__(_MODES[self.cell][0], **given, **placed(name, **made))
        self.num_heads, self.backend = num_heads, backend
        if num_heads > 1:
            for name in self._flat_weights_names:
                if name.startswith("weight_hh"):
                    dense = getattr(self, name)
                    setattr(self, name, nn.Parameter(dense.new_empty(dense.shape[0], hidden // num_heads)))
            self._init_flat_weights()
            self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the parameters anew: uniform, as in ``torch.nn`` up to ``hidden_size ** -0.5``; recurrent weights of
        several heads up to the width of a head to that power."""
        super().reset_parameters()
        if self.num_heads > 1:
            most = (self.hidden_size // self.num_heads) ** -0.5
            for name in self._flat_weights_names:
                if name.startswith("weight_hh"):
                    nn.init.uniform_(getattr(self, name), -most, most)

    def flatten_parameters(self) -> None:
        """Lay the parameters out for cuDNN, which may run a network of one head; with more there is nothing to do."""
        if self.num_heads == 1:
            super().flatten_parameters()

    def _init_flat_weights(self) -> None:
        # torch.nn keeps what stands for its weights, in the order in which cuDNN takes them. Here every call looks them
        # up, so that weight_norm, pruning, functional_call and FSDP may put plain tensors in the place of parameters;
        # and no such tensor, which cannot be copied, is kept.
        self._flat_weights = [self._parameters.get(name) for name in self._flat_weights_names]
        self._flat_weight_refs = [None if x is None else weakref.ref(x) for x in self._flat_weights]
        self.flatten_parameters()

    def extra_repr(self) -> str:
        """What ``repr`` shows between the parentheses."""
        return super().extra_repr() + (f", num_heads={self.num_heads}" if self.num_heads > 1 else "")

    def forward(self, input: Any, hx: Any = None) -> Any:  # torch.nn's names
        """Run whole sequences.

        Args:
            input: ``[N, B, input_size]``, ``[B, N, input_size]`` with batch_first, ``[N, input_size]`` for one
                sequence, or a ``PackedSequence``; dtype and device of the parameters.
            hx: states before the first step, ``[num_layers * directions, B, hidden_size]`` (without B for one
                sequence): h, or for an LSTM (h, c). Any floating dtype; they take that of input. None is zero.

        Returns:
            ``(output, hx)``: h of the last layer behind every step, of the kind and order of input with
            ``directions * hidden_size`` columns, and the states after the last step, as hx, in memory of their own.
            Without a step the states are those that were given. Under autocast both have its dtype.

        Raises:
            TypeError: input or hx is no ordinary tensor, or of a wrong dtype.
            ValueError: their shape or device does not fit.
        """
        if isinstance(input, PackedSequence):
            return self._packed(input, hx)
        one = strided(type(self).__name__, "input", input).dim() == 2
        require = Contract(type(self).__name__).require
        require(input.dim() in (2, 3), f"input has shape {list(input.shape)}; it must have 3 dimensions, or 2")
        self._check(input)
        states = self._states(hx, 1 if one else input.shape[0 if self.batch_first else 1], one)
        if one:
            input = input.unsqueeze(0 if self.batch_first else 1)
        if self._is_torchs(input) and input.shape[1 if self.batch_first else 0] > 0:
            out, states = self._by_torch((input,), states, self.batch_first)
        else:
            out, states = self._by_layers(input, states, None, self.batch_first)
        if one:
            out, states = out.squeeze(0 if self.batch_first else 1), tuple(state.squeeze(1) for state in states)
        return out, states if self.cell == "lstm" else states[0]

    def _packed(self, packed: PackedSequence, hx: Any) -> tuple[PackedSequence, Any]:
        data, sizes, order, inverse = packed
        self._check(data)
        states = self._states(hx, int(sizes[0]), False)
        if self._is_torchs(data):
            states = states and tuple(state if order is None else state.index_select(1, order) for state in states)
            out, states = self._by_torch((data, sizes), states, None)
            states = tuple(state if inverse is None else state.index_select(1, inverse) for state in states)
        else:
            padded, lengths = pad_packed_sequence(packed)
            found, states = self._by_layers(padded, states, lengths.to(data.device, torch.int32), False)
            if order is not None:
                found, lengths = found.index_select(1, order), lengths[order.cpu()]
            out = pack_padded_sequence(found, lengths).data
        return PackedSequence(out, sizes, order, inverse), states if self.cell == "lstm" else states[0]

    def _check(self, x: Tensor) -> None:
        name = type(self).__name__
        Contract(name).require(
            x.shape[-1] == self.input_size,
            f"input has shape {list(x.shape)}; its last dimension must be input_size, which is {self.input_size}",
        )
        multiplied(name, "input", x, self.weight_ih_l0)

    def _states(self, hx: Any, batch: int, one: bool) -> tuple[Tensor, ...] | None:
        """hx as one tensor ``[L, B, hidden_size]`` for every state."""
        if hx is None:
            return None
        names = CELLS[self.cell].states
        given = tuple(hx) if len(names) > 1 and isinstance(hx, (tuple, list)) else (hx,)
        name = type(self).__name__
        require = Contract(name).require
        require(len(given) == len(names), f"hx must be {'a pair (h, c)' if len(names) > 1 else 'one tensor, h'}")
        rows = self.num_layers * (2 if self.bidirectional else 1)
        expected = [rows, self.hidden_size] if one else [rows, batch, self.hidden_size]
        for part, state in zip(names, given, strict=True):
            alike(name, f"{part} of hx" if len(names) > 1 else "hx", state, self.weight_ih_l0)
            require(list(state.shape) == expected, f"hx has {part} of shape {list(state.shape)}; it must be {expected}")
        return tuple(state.unsqueeze(1) for state in given) if one else given

    def _is_torchs(self, x: Tensor) -> bool:
        """Whether the backend is ``torch`` and the network one that PyTorch has, so that its own kernels run it."""
        if self.num_heads > 1:
            return False
        # AOTAutograd cannot train oneDNN's LSTM, which a CPU runs, where its input wants no gradient.
        untrainable = x.is_cpu and self.cell == "lstm" and torch.is_grad_enabled() and not x.requires_grad
        if torch.compiler.is_compiling() and untrainable:
            return False
        asked = dispatch.requested(self.backend)
        if asked is None and x.device.type in dispatch.PREFERENCE:
            width, kind = self.hidden_size, autocast_dtype(x.device.type) or self.weight_ih_l0.dtype
            refusals = {"triton": partial(triton_refusal, self.cell, width, kind, x.device), "torch": lambda: None}
            asked = dispatch.choose("flash_rnn", None, x.device.type, refusals)
        return asked in (None, "torch")

    def _by_torch(
        self, x: Sequence[Tensor], states: tuple[Tensor, ...] | None, batch_first: bool | None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        if states is None:
            batch = int(x[1][0]) if len(x) > 1 else x[0].shape[0 if batch_first else 1]
            rows = self.num_layers * (2 if self.bidirectional else 1)
            states = (x[0].new_zeros(rows, batch, self.hidden_size),) * len(CELLS[self.cell].states)
        weights = [getattr(self, name) for name in self._flat_weights_names]
        cast = autocast_dtype(x[0].device.type)
        if x[0].is_cpu and cast is not None and x[0].dtype != torch.float64:
            # The CPU's autocast knows LSTM and not GRU.
            weights = [weight.to(cast) for weight in weights]
            with torch.autocast("cpu", enabled=False):
                return self._call_torch((x[0].to(cast), *x[1:]), states, weights, batch_first)
        return self._call_torch(x, states, weights, batch_first)

    def _call_torch(
        self, x: Sequence[Tensor], states: tuple[Tensor, ...], weights: list[Tensor], batch_first: bool | None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        states = tuple(state.to(x[0].dtype) for state in states)
        settings = [self.bias, self.num_layers, self.dropout, self.training, self.bidirectional]
        if batch_first is not None:
            settings.append(batch_first)
        found: Any = _MODES[self.cell][1](*x, states if self.cell == "lstm" else states[0], weights, *settings)
        return found[0], tuple(found[1:])

    def _by_layers(
        self, x: Tensor, states: tuple[Tensor, ...] | None, lengths: Tensor | None, batch_first: bool
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """One call of flash_rnn for every layer and direction. x keeps its order of batch and time throughout."""
        directions = 2 if self.bidirectional else 1
        time = 1 if batch_first else 0
        turned = None if lengths is None or directions == 1 else _turned(x.shape[time], lengths, batch_first)
        last: list[Tensor] = []
        for layer in range(self.num_layers):
            outs = []
            for direction in range(directions):
                row = directions * layer + direction
                before = None if states is None else torch.stack([state[row] for state in states])
                y = _reversed(x, time, turned) if direction else x
                out, after = self._layer(y, row, before, lengths, batch_first)
                outs.append(_reversed(out, time, turned) if direction else out)
                last.append(after)
            x = outs[0] if directions == 1 else torch.cat(outs, dim=2)
            if layer + 1 < self.num_layers:
                x = F.dropout(x, self.dropout, self.training)
        # Each in memory of its own.
        kinds = zip(*(row.unbind(0) for row in last), strict=True)
        return x, tuple(torch.stack(rows).to(x.dtype) for rows in kinds)

    def _layer(
        self, x: Tensor, row: int, before: Tensor | None, lengths: Tensor | None, batch_first: bool
    ) -> tuple[Tensor, Tensor]:
        """h ``[B, N, hidden_size]`` in the order of x, and the states ``[S, B, hidden_size]``."""
        inputs, recurrent, *biases = (getattr(self, name) for name in self._all_weights[row])
        width = self.hidden_size // self.num_heads
        split = (CELLS[self.cell].gates, self.num_heads, width)
        gates = F.linear(x, inputs, biases[0] if biases else None).unflatten(2, split)
        initial = None
        if before is not None:
            initial = before.to(state_dtype(gates.dtype)).unflatten(2, (self.num_heads, width))
        out, after = flash_rnn(
            gates if batch_first else gates.transpose(0, 1), recurrent.reshape(*split, width),
            biases[1].reshape(split) if biases else None, cell=self.cell, initial_state=initial, return_state=True,
            lengths=lengths, backend=self.backend,
        )  # fmt: skip
        return (out if batch_first else out.transpose(0, 1)).flatten(2), after.flatten(2)


def _turned(steps: int, lengths: Tensor, batch_first: bool) -> Tensor:
    """Where each step comes from when every sequence is turned around and its padding stays: ``[B, N, 1]``, or
    ``[N, B, 1]``."""
    step = torch.arange(steps, device=lengths.device)
    found = torch.where(step < lengths[:, None], lengths[:, None] - 1 - step, step)
    return (found if batch_first else found.t()).unsqueeze(2)


def _reversed(x: Tensor, time: int, turned: Tensor | None) -> Tensor:
    return x.flip(time) if turned is None else x.gather(time, turned.expand_as(x))


class LSTM(_Recurrent):
    """``torch.nn.LSTM`` through :func:`iokernels.flash_rnn`: the same constructor, results and ``state_dict``.

    Args:
        input_size: width of the input.
        hidden_size: width of h and c.
        num_layers: layers, each of which reads the h of the one before.
        bias: whether there are biases.
        batch_first: whether the batch is the first dimension of input and output.
        dropout: probability with which an element of h is zeroed between two layers, in training.
        bidirectional: whether each layer also reads the sequence backwards; its output has both h, side by side.
        proj_size: not supported: must be 0.
        device: where the parameters live.
        dtype: their dtype.
        num_heads: a divisor of hidden_size: with H heads of ``D = hidden_size / H`` units, the units of a head see the
            h of their own head only. ``weight_hh`` is then ``[4 * hidden_size, D]`` instead of
            ``[4 * hidden_size, hidden_size]``: rows as ever (gate, then unit), columns the units of the row's own head.
        backend: as in :func:`iokernels.flash_rnn`. With ``"torch"`` and one head, PyTorch's own recurrent kernels run
            all layers, cuDNN's on a GPU. With None that is so on the CPU, and on a GPU where Triton cannot.

    Raises:
        TypeError: an argument of a wrong type.
        ValueError: sizes that do not fit, or a proj_size.
    """

    cell = "lstm"

    def __init__(
        self, input_size: int, hidden_size: int, num_layers: int = 1, bias: bool = True, batch_first: bool = False,
        dropout: float = 0.0, bidirectional: bool = False, proj_size: int = 0, device: Any = None,
        dtype: torch.dtype | None = None, *, num_heads: int = 1, backend: str | None = None,
    ) -> None:  # fmt: skip
        if proj_size != 0:
            raise ValueError(f"LSTM: proj_size is {proj_size}; it must be 0: flash_rnn has no projected h")
        sizes = (input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional)
        super().__init__(sizes, num_heads, backend, device=device, dtype=dtype)


class GRU(_Recurrent):
    """``torch.nn.GRU`` through :func:`iokernels.flash_rnn`: the same constructor, results and ``state_dict``.

    Arguments are those of :class:`LSTM`, without proj_size.
    """

    cell = "gru"

    def __init__(
        self, input_size: int, hidden_size: int, num_layers: int = 1, bias: bool = True, batch_first: bool = False,
        dropout: float = 0.0, bidirectional: bool = False, device: Any = None, dtype: torch.dtype | None = None, *,
        num_heads: int = 1, backend: str | None = None,
    ) -> None:  # fmt: skip
        sizes = (input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional)
        super().__init__(sizes, num_heads, backend, device=device, dtype=dtype)


class RNN(_Recurrent):
    """``torch.nn.RNN`` through :func:`iokernels.flash_rnn`: the same constructor, results and ``state_dict``.

    Arguments are those of :class:`LSTM`, without proj_size, and ``nonlinearity``, which must be ``"tanh"``.
    """

    cell = "elman"

    def __init__(
        self, input_size: int, hidden_size: int, num_layers: int = 1, nonlinearity: str = "tanh", bias: bool = True,
        batch_first: bool = False, dropout: float = 0.0, bidirectional: bool = False, device: Any = None,
        dtype: torch.dtype | None = None, *, num_heads: int = 1, backend: str | None = None,
    ) -> None:  # fmt: skip
        if nonlinearity != "tanh":
            raise ValueError(f"RNN: nonlinearity is {nonlinearity!r}; it must be 'tanh': flash_rnn has no other")
        sizes = (input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional)
        super().__init__(sizes, num_heads, backend, device=device, dtype=dtype)
        self.nonlinearity = nonlinearity

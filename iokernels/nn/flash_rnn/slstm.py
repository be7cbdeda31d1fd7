"""The sLSTM layer of xLSTM: a recurrent sequence mixer with exponential gates and heads."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from iokernels.ops.flash_rnn.api import flash_rnn
from iokernels.ops.shared.layout import state_dtype
from iokernels.runtime.contracts import FLOATS, Contract, Spec, short
from iokernels.runtime.contracts.plain import count, flag, number

from .arguments import multiplied, placed, strided, writable

_CONTRACT = Contract(
    "SLSTM",
    x=Spec("B N embed_dim", FLOATS),
    **{
        "state.conv": Spec("B conv_size-1 embed_dim", FLOATS, optional=True),
        "state.memory": Spec("states B num_heads head_dim", FLOATS, optional=True),
    },
)


class SLSTMState(NamedTuple):
    """What a :class:`SLSTM` remembers of the tokens so far. The tensors are updated in place by ``step``."""

    conv: Tensor  # [B, conv_size - 1, embed_dim]: the last inputs, oldest first
    memory: Tensor  # float32 (float64 for float64 inputs) [4, B, num_heads, embed_dim / num_heads]: h, c, n, m


# What torch.save has written of a state, torch.load reads with its default, weights_only=True.
torch.serialization.add_safe_globals([SLSTMState])


class SLSTM(nn.Module):
    """The sLSTM layer of xLSTM (Beck et al., 2024, arXiv:2405.04517, appendix A): x ``[B, N, E]`` to the same shape.

    The gates z and o are projections of x, i and f of x after a short causal convolution and SiLU; every head projects
    its own E / H columns, for each gate. :func:`iokernels.flash_rnn` runs them, a head's h feeding back to that head,
    and h is normalised over each head (a group norm) and scaled. There is no output projection: in xLSTM a gated MLP
    follows, which is left to the caller.

    Args:
        embed_dim: width E of x and of the output.
        num_heads: heads H, a divisor of embed_dim.
        conv_size: tokens that the convolution sees, the current one among them; 0 is no convolution and no SiLU.
        bias: whether the gates have a bias.
        norm_eps: added to the variance before its root is taken.
        backend: as in :func:`iokernels.flash_rnn`.
        device: where the parameters live.
        dtype: their dtype.

    Raises:
        TypeError: an argument of a wrong type.
        ValueError: sizes that do not fit.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int = 4,
        *,
        conv_size: int = 4,
        bias: bool = True,
        norm_eps: float = 1e-5,
        backend: str | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        embed_dim, num_heads = (
            count("SLSTM", "embed_dim", embed_dim, 1, tensors=True),
            count("SLSTM", "num_heads", num_heads, 1, tensors=True),
        )
        _CONTRACT.require(
            embed_dim % num_heads == 0, f"num_heads is {num_heads}; it must divide embed_dim, which is {embed_dim}"
        )
        conv_size, norm_eps = (
            count("SLSTM", "conv_size", conv_size, 0, tensors=True),
            number("SLSTM", "norm_eps", norm_eps, least=0.0, tensors=True),
        )
        bias = flag("SLSTM", "bias", bias)
        place = placed("SLSTM", device, dtype)
        self.embed_dim, self.num_heads, self.head_dim = embed_dim, num_heads, embed_dim // num_heads
        self.conv_size, self.norm_eps, self.backend = conv_size, norm_eps, backend

        def made(*size: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(size, **place))

        # (gate, head, out, in); gates i, f, z, o.
        self.weight_ih = made(4, num_heads, self.head_dim, self.head_dim)
        self.weight_hh = made(4, num_heads, self.head_dim, self.head_dim)
        self.bias = made(4, num_heads, self.head_dim) if bias else None
        self.conv_weight = made(embed_dim, 1, conv_size) if conv_size else None
        self.conv_bias = made(embed_dim) if conv_size else None
        self.norm_weight = made(embed_dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the parameters anew.

        Weights are uniform, up to the number of their inputs to the power -1/2. The forget gate's biases go evenly from
        3 to 6 over the units of a head, so that memories last from about 20 to 400 tokens; the others are 0.
        """
        for weight, inputs in (
            (self.weight_ih, self.head_dim), (self.weight_hh, self.head_dim), (self.conv_weight, self.conv_size)
        ):  # fmt: skip
            if weight is not None:
                nn.init.uniform_(weight, -(inputs**-0.5), inputs**-0.5)
        for bias in (self.bias, self.conv_bias):
            if bias is not None:
                nn.init.zeros_(bias)
        if self.bias is not None:
            with torch.no_grad():
                self.bias[1] = torch.linspace(3.0, 6.0, self.head_dim)
        nn.init.ones_(self.norm_weight)

    def extra_repr(self) -> str:
        """What ``repr`` shows between the parentheses."""
        return f"{self.embed_dim}, {self.num_heads}, conv_size={self.conv_size}"

    def init_state(self, batch: int, device: Any = None, dtype: torch.dtype | None = None) -> SLSTMState:
        """The state before the first token, for ``batch`` sequences.

        Args:
            batch: number of sequences.
            device: that of the parameters if None.
            dtype: dtype of x; that of the parameters if None.
        """
        batch = count("SLSTM", "batch", batch, 0, tensors=True)
        placed("SLSTM", device, dtype)
        device = self.weight_ih.device if device is None else device
        dtype = self.weight_ih.dtype if dtype is None else dtype
        return SLSTMState(
            torch.zeros(batch, max(self.conv_size - 1, 0), self.embed_dim, device=device, dtype=dtype),
            torch.zeros(4, batch, self.num_heads, self.head_dim, device=device, dtype=state_dtype(dtype)),
        )

    def forward(self, x: Tensor, state: SLSTMState | None = None, return_state: bool = False) -> Any:
        """Mix whole sequences, differentiably.

        Args:
            x: ``[B, N, E]``.
            state: what came before, from :meth:`init_state` or an earlier call; not modified. None: nothing did.
            return_state: also return the state after the last token, a new one in memory of its own.

        Returns:
            ``[B, N, E]``, or ``([B, N, E], state)``.

        Raises:
            TypeError: x or the state is no ordinary tensor, or of a wrong dtype.
            ValueError: their shape or device does not fit.
        """
        state = self._checked(x, state)
        flag("SLSTM", "return_state", return_state)
        padded = self._padded(x, None if state is None else state.conv)
        h, memory = flash_rnn(
            self._gates(x, padded), self.weight_hh, self.bias, cell="slstm",
            initial_state=None if state is None else state.memory, return_state=True, backend=self.backend,
        )  # fmt: skip
        out = self._normed(h)
        # Of the inputs a copy, or the state would hold all of them.
        return (out, SLSTMState(padded[:, x.shape[1] :].clone(), memory)) if return_state else out

    def step(self, x: Tensor, state: SLSTMState) -> Tensor:
        """The next token or few, for generation: x ``[B, N, E]`` with a small N; ``state`` is updated in place.

        Has no gradient: call it under ``torch.no_grad()`` or ``torch.inference_mode()``.

        Raises:
            TypeError: as :meth:`forward`, or there is no state.
            ValueError: as :meth:`forward`, a gradient is asked for, or elements of the state share memory.
        """
        if state is None:
            raise TypeError("SLSTM: state is None; a step takes one: see init_state")
        for name, place in zip(SLSTMState._fields, self._checked(x, state) or (), strict=True):
            writable("SLSTM", f"state.{name}", place)
        out, after = self.forward(x, state, return_state=True)
        _CONTRACT.require(
            not out.requires_grad, "the step changes its state in place and has no gradient: call it in torch.no_grad()"
        )
        for place, value in zip(state, after, strict=True):
            place.copy_(value)
        return out

    def _checked(self, x: Tensor, state: Any) -> SLSTMState | None:
        """The state, if it and x can be what they are for."""
        if state is not None:
            if not isinstance(state, tuple) or len(state) != 2:
                raise TypeError(f"SLSTM: state is {type(state).__name__}; it must be an SLSTMState")
            state = SLSTMState(*state)
            for name, part in zip(SLSTMState._fields, state, strict=True):
                strided("SLSTM", f"state.{name}", part)
        strided("SLSTM", "x", x)
        sizes = {
            "embed_dim": self.embed_dim, "conv_size-1": max(self.conv_size - 1, 0), "states": 4,
            "num_heads": self.num_heads, "head_dim": self.head_dim,
        }  # fmt: skip
        conv, memory = (None, None) if state is None else state
        _CONTRACT.check(sizes, x=x, **{"state.conv": conv, "state.memory": memory})
        multiplied("SLSTM", "x", x, self.weight_ih)
        if memory is not None and memory.dtype != state_dtype(x.dtype):
            found, expected = short(memory.dtype), short(state_dtype(x.dtype))
            raise TypeError(f"SLSTM: state.memory is {found}; it must be {expected} where x is {short(x.dtype)}")
        return state

    def _padded(self, x: Tensor, past: Tensor | None) -> Tensor:
        """x behind the inputs that its first tokens' convolutions see."""
        before = max(self.conv_size - 1, 0)
        return F.pad(x, (0, 0, before, 0)) if past is None else torch.cat([past.to(x.dtype), x], dim=1)

    def _gates(self, x: Tensor, padded: Tensor) -> Tensor:
        """``[B, N, 4, H, D]``."""
        convolved = x
        if self.conv_weight is not None and x.shape[1] > 0:
            rows = F.conv1d(padded.transpose(1, 2), self.conv_weight, self.conv_bias, groups=self.embed_dim)
            convolved = F.silu(rows.transpose(1, 2))
        halves = (convolved, self.weight_ih[:2]), (x, self.weight_ih[2:])
        heads = (self.num_heads, self.head_dim)
        return torch.cat([torch.einsum("bnhi,ghoi->bngho", y.unflatten(2, heads), w) for y, w in halves], dim=2)

    def _normed(self, h: Tensor) -> Tensor:
        """Each head of ``[B, N, H, D]`` with mean 0 and variance 1, scaled: ``[B, N, E]``."""
        # Autocast makes float32 of some norms.
        normed = F.layer_norm(h, (self.head_dim,), eps=self.norm_eps).to(h.dtype)
        return normed.flatten(2) * self.norm_weight.to(h.dtype)

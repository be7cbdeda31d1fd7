"""Linear attention as modules: causal sequence mixers that remember a whole text in a state of fixed size.

:class:`LightningAttention`, :class:`Retention`, :class:`BasedAttention` and :class:`GatedDeltaNet` have one interface:

    out = mixer(x)                                  # [B, N, E] -> [B, N, E], differentiable, for training
    out, state = mixer(x, return_state=True)        # and what it remembers of x
    out, state = mixer(x, state, return_state=True) # goes on from there; the given state is not modified
    state = mixer.init_state(batch)                 # nothing remembered
    out = mixer.step(x, state)                      # the next token or few; the state is updated in place

A state is a named tuple of tensors: copy it with :func:`copy.deepcopy`, move it field by field.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from iokernels.ops.linear_attention.api import linear_attention, linear_attention_state, linear_attention_step
from iokernels.ops.linear_attention.decays import alibi_slopes, minimax_slopes, retention_slopes
from iokernels.ops.shared.layout import state_dtype
from iokernels.runtime.contracts import FLOATS, Contract, Spec
from iokernels.runtime.contracts.plain import count, flag, place

from .based import BasedAttention, BasedAttentionState
from .gated_delta_net import GatedDeltaNet, GatedDeltaNetState
from .positions import FixedDecay, rotated, token_positions
from .states import check_state, loadable

__all__ = [
    "BasedAttention",
    "BasedAttentionState",
    "GatedDeltaNet",
    "GatedDeltaNetState",
    "LightningAttention",
    "LightningAttentionState",
    "Retention",
    "RetentionState",
]

_MEMORY = Spec("B num_heads head_dim value_dim", (torch.float32, torch.float64))
_X = Spec("B N embed_dim", FLOATS)
_LIGHTNING = Contract("LightningAttention", x=_X, **{"state.memory": _MEMORY})
_RETENTION = Contract("Retention", x=_X, **{"state.memory": _MEMORY, "state.seen": Spec("B", (torch.int64,))})

SLOPES = ("alibi", "minimax", "retention")
GATES = ("linear", "sigmoid", "none")


@loadable
class LightningAttentionState(NamedTuple):
    """What a :class:`LightningAttention` remembers. ``step`` updates it in place."""

    memory: Tensor  # float32 (float64 for float64 inputs) [B, num_heads, head_dim, head_dim]


class LightningAttention(nn.Module):
    """The mixer of TransNormerLLM (Qin et al., 2023, arXiv:2307.14995) on Lightning Attention-2 (arXiv:2401.04658).

    With Q and K = SiLU of projections of x, V a projection, and head h forgetting ``exp(-slope_h)`` a token:

        out = W_o (SRMSNorm(linear_attention(Q, K, V)) * gate(W_u x))

    SRMSNorm divides by the root mean square over all heads and has no weight, so a scale of Q K^T cancels; here it is
    ``head_dim ** -0.5``, which keeps float16 in range. The decay is the only thing that tells positions apart.

    Args:
        embed_dim: width E of x and of the output.
        num_heads: heads, each with a state of ``head_dim x head_dim``.
        head_dim: ``embed_dim / num_heads`` if None.
        slopes: which slopes the heads have: ``"alibi"`` (:func:`iokernels.alibi_slopes`, as the papers), ``"minimax"``
            (:func:`iokernels.minimax_slopes`, which needs ``layer`` and ``layers``) or ``"retention"``.
        layer: which layer of the model this is, from 0; only ``"minimax"`` reads it.
        layers: how many layers the model has; likewise.
        gate: ``"linear"`` is the papers' (``gate(u) = u``), ``"sigmoid"`` that of MiniMax-01 (arXiv:2501.08313),
            ``"none"`` has no gate and no W_u.
        bias: whether the projections have a bias.
        norm_eps: added to the mean square before its root is taken.
        backend: as in :func:`iokernels.linear_attention`.
        device: where the parameters live.
        dtype: their dtype. The slopes are float32 always.

    Raises:
        ValueError: sizes or names that do not fit.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        head_dim: int | None = None,
        slopes: str = "alibi",
        layer: int = 0,
        layers: int = 1,
        gate: str = "linear",
        bias: bool = False,
        norm_eps: float = 1e-6,
        backend: str | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        embed_dim, num_heads, head_dim = _widths(_LIGHTNING, embed_dim, num_heads, head_dim)
        bias, norm_eps = _affine(_LIGHTNING, bias, norm_eps)
        _LIGHTNING.require(slopes in SLOPES, f"slopes is {slopes!r}; it must be one of {', '.join(SLOPES)}")
        _LIGHTNING.require(gate in GATES, f"gate is {gate!r}; it must be one of {', '.join(GATES)}")
        self.embed_dim, self.num_heads, self.head_dim = embed_dim, num_heads, head_dim
        self.slopes, self.gate, self.norm_eps, self.backend = slopes, gate, norm_eps, backend
        makers = {
            "alibi": partial(alibi_slopes, num_heads),
            "minimax": partial(minimax_slopes, num_heads, layer, layers),
            "retention": partial(retention_slopes, num_heads),
        }
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        width = num_heads * head_dim
        self.decay = FixedDecay(makers[slopes], device)
        self.in_proj = nn.Linear(embed_dim, 3 * width, bias=bias, **made)
        self.gate_proj = None if gate == "none" else nn.Linear(embed_dim, width, bias=bias, **made)
        self.out_proj = nn.Linear(width, embed_dim, bias=bias, **made)

    def extra_repr(self) -> str:
        """What ``repr`` shows between the parentheses."""
        return (
            f"{self.embed_dim}, {self.num_heads}, head_dim={self.head_dim}, slopes={self.slopes!r}, gate={self.gate!r}"
        )

    def init_state(self, batch: int, device: Any = None, dtype: torch.dtype | None = None) -> LightningAttentionState:
        """The state before the first token of ``batch`` sequences; device and dtype: of x, or of the parameters."""
        device, dtype = _place(_LIGHTNING, self.in_proj.weight, device, dtype)
        batch = count("LightningAttention", "batch", batch, 0)
        widths = self.head_dim, self.head_dim
        memory = linear_attention_state(batch, self.num_heads, *widths, dtype=state_dtype(dtype), device=device)
        return LightningAttentionState(memory)

    def forward(self, x: Tensor, state: LightningAttentionState | None = None, return_state: bool = False) -> Any:
        """Mix whole sequences, differentiably.

        Args:
            x: ``[B, N, E]``.
            state: what came before, from :meth:`init_state` or an earlier call; not modified. None: nothing did.
            return_state: also return the state after the last token, a new one.

        Returns:
            ``[B, N, E]``, or ``([B, N, E], state)``.
        """
        q, k, v = self._projected(x, state)
        out, memory = linear_attention(
            q, k, v, log_decay=self.decay(x),
            initial_state=None if state is None else state.memory, return_state=True, backend=self.backend,
        )  # fmt: skip
        out = self._output(x, out)
        return (out, LightningAttentionState(memory)) if return_state else out

    def step(self, x: Tensor, state: LightningAttentionState) -> Tensor:
        """The next token or few, for generation: x ``[B, N, E]`` with a small N; ``state`` is updated in place.

        Has no gradient: call it under ``torch.no_grad()`` or ``torch.inference_mode()``. Safe under CUDA-graph capture.
        """
        q, k, v = self._projected(x, state, written=True)
        log_decay = self.decay(x)
        return self._output(x, linear_attention_step(q, k, v, state.memory, log_decay=log_decay, backend=self.backend))

    def _projected(self, x: Tensor, state: LightningAttentionState | None, written: bool = False) -> tuple[Tensor, ...]:
        """q, k, v, each [B, num_heads, N, head_dim], where x and the state fit."""
        _LIGHTNING.check({"embed_dim": self.embed_dim}, x=x)
        if state is not None:
            sizes = {"num_heads": self.num_heads, "head_dim": self.head_dim, "value_dim": self.head_dim}
            check_state(
                _LIGHTNING, LightningAttentionState, state, x, written=written, embed_dim=self.embed_dim, **sizes
            )
        q, k, v = self.in_proj(x).unflatten(2, (3, self.num_heads, self.head_dim)).permute(2, 0, 3, 1, 4).unbind()
        return F.silu(q), F.silu(k), v

    def _output(self, x: Tensor, out: Tensor) -> Tensor:
        """Normalise [B, num_heads, N, head_dim] over its heads, gate and project."""
        out = out.transpose(1, 2).flatten(2)
        out = F.rms_norm(out, (out.shape[2],), None, self.norm_eps)
        if self.gate_proj is not None:
            gate = self.gate_proj(x)
            out = out * (torch.sigmoid(gate) if self.gate == "sigmoid" else gate)
        return self.out_proj(out)


@loadable
class RetentionState(NamedTuple):
    """What a :class:`Retention` remembers. ``step`` updates it in place."""

    memory: Tensor  # float32 (float64 for float64 inputs) [B, num_heads, head_dim, value_dim]
    seen: Tensor  # int64 [B]: tokens so far


class Retention(nn.Module):
    """Multi-scale retention (Sun et al., 2023, arXiv:2307.08621, section 2.3): head h keeps ``1 - 2 ** (-5 - h)``.

    Queries and keys turn with the position (pairs of neighbouring elements, base 10000). That is xPos without the decay
    of its own, which retention's replaces. Each head's output is normalised (group norm), multiplied by SiLU of a gate
    and projected back.

    Args:
        embed_dim: width E of x and of the output.
        num_heads: heads, each with a state of ``head_dim x value_dim``.
        head_dim: width of queries and keys, even; ``embed_dim / num_heads`` if None.
        expand_v: value_dim is this times head_dim; RetNet has 2.
        bias: whether the projections have a bias.
        norm_eps: added to the variance before its root is taken.
        backend: as in :func:`iokernels.linear_attention`.
        device: where the parameters live.
        dtype: their dtype. The decays are float32 always.

    Raises:
        ValueError: sizes that do not fit.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        head_dim: int | None = None,
        expand_v: float = 2.0,
        bias: bool = False,
        norm_eps: float = 1e-5,
        backend: str | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        embed_dim, num_heads, head_dim = _widths(_RETENTION, embed_dim, num_heads, head_dim)
        bias, norm_eps = _affine(_RETENTION, bias, norm_eps)
        value_dim = round(head_dim * _RETENTION.number("expand_v", expand_v, least=0.0))
        _RETENTION.require(head_dim % 2 == 0, f"head_dim is {head_dim}; it must be even, for its pairs turn")
        _RETENTION.require(value_dim > 0, f"head_dim is {head_dim}, expand_v {expand_v}; widths must be at least 1")
        self.embed_dim, self.num_heads = embed_dim, num_heads
        self.head_dim, self.value_dim, self.backend = head_dim, value_dim, backend
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        keys, values = num_heads * head_dim, num_heads * value_dim
        self.widths = (keys, keys, values)
        self.decay = FixedDecay(partial(retention_slopes, num_heads), device)
        self.in_proj = nn.Linear(embed_dim, sum(self.widths), bias=bias, **made)
        self.gate_proj = nn.Linear(embed_dim, values, bias=bias, **made)
        self.norm = nn.GroupNorm(num_heads, values, norm_eps, **made)
        self.out_proj = nn.Linear(values, embed_dim, bias=bias, **made)

    def extra_repr(self) -> str:
        """What ``repr`` shows between the parentheses."""
        return f"{self.embed_dim}, {self.num_heads}, head_dim={self.head_dim}, value_dim={self.value_dim}"

    def init_state(self, batch: int, device: Any = None, dtype: torch.dtype | None = None) -> RetentionState:
        """The state before the first token of ``batch`` sequences; device and dtype: of x, or of the parameters."""
        device, dtype = _place(_RETENTION, self.in_proj.weight, device, dtype)
        batch = count("Retention", "batch", batch, 0)
        widths = self.head_dim, self.value_dim
        memory = linear_attention_state(batch, self.num_heads, *widths, dtype=state_dtype(dtype), device=device)
        return RetentionState(memory, torch.zeros(batch, dtype=torch.int64, device=device))

    def forward(self, x: Tensor, state: RetentionState | None = None, return_state: bool = False) -> Any:
        """Mix whole sequences, differentiably: as :meth:`LightningAttention.forward`."""
        q, k, v = self._projected(x, state)
        out, memory = linear_attention(
            q, k, v, log_decay=self.decay(x), initial_state=None if state is None else state.memory,
            return_state=True, backend=self.backend,
        )  # fmt: skip
        out = self._output(x, out)
        if not return_state:
            return out
        new = torch.full(x.shape[:1], x.shape[1], dtype=torch.int64, device=x.device)
        return out, RetentionState(memory, new if state is None else state.seen + new)

    def step(self, x: Tensor, state: RetentionState) -> Tensor:
        """The next token or few, in place: as :meth:`LightningAttention.step`."""
        q, k, v = self._projected(x, state, written=True)
        log_decay = self.decay(x)
        out = linear_attention_step(q, k, v, state.memory, log_decay=log_decay, backend=self.backend)
        state.seen.add_(x.shape[1])
        return self._output(x, out)

    def _projected(self, x: Tensor, state: RetentionState | None, written: bool = False) -> tuple[Tensor, ...]:
        """q and k, turned, and v, each [B, num_heads, N, width], where x and the state fit."""
        _RETENTION.check({"embed_dim": self.embed_dim}, x=x)
        if state is not None:
            sizes = {"num_heads": self.num_heads, "head_dim": self.head_dim, "value_dim": self.value_dim}
            sizes["embed_dim"] = self.embed_dim
            check_state(_RETENTION, RetentionState, state, x, written=written, **sizes)
        parts = self.in_proj(x).split(self.widths, dim=2)
        q, k, v = (part.unflatten(2, (self.num_heads, -1)).transpose(1, 2) for part in parts)
        positions = token_positions(x, None if state is None else state.seen)
        return rotated(q, positions), rotated(k, positions), v

    def _output(self, x: Tensor, out: Tensor) -> Tensor:
        """Normalise each head of [B, num_heads, N, value_dim], gate and project."""
        out = out.transpose(1, 2).flatten(2)
        out = self.norm(out.flatten(0, 1)).view_as(out)  # a group of the norm is a head of one token
        return self.out_proj(F.silu(self.gate_proj(x)) * out)


def _widths(contract: Contract, embed_dim: Any, num_heads: Any, head_dim: Any) -> tuple[int, int, int]:
    """embed_dim, num_heads and the width of a head, where they are numbers that fit."""
    embed_dim, num_heads = (
        count(contract.operator, name, value, 0) for name, value in (("embed_dim", embed_dim), ("num_heads", num_heads))
    )
    contract.require(
        embed_dim > 0 and num_heads > 0, f"embed_dim is {embed_dim}, num_heads {num_heads}; both must be above 0"
    )
    if head_dim is None:
        contract.require(
            embed_dim % num_heads == 0, f"embed_dim is {embed_dim}; without head_dim, {num_heads} must divide it"
        )
        return embed_dim, num_heads, embed_dim // num_heads
    return embed_dim, num_heads, count(contract.operator, "head_dim", head_dim)


def _affine(contract: Contract, bias: Any, norm_eps: Any) -> tuple[bool, float]:
    return flag(contract.operator, "bias", bias), contract.number("norm_eps", norm_eps, least=0.0)


def _place(contract: Contract, weight: Tensor, device: Any, dtype: Any) -> tuple[Any, torch.dtype]:
    """Where a state lives and what dtype x has: as given, or those of the parameters."""
    device = place(contract.operator, device)
    if dtype is not None and dtype not in FLOATS:
        raise TypeError(f"{contract.operator}: dtype is {dtype!r}; it must be a floating dtype of torch")
    return weight.device if device is None else device, weight.dtype if dtype is None else dtype

"""Gated DeltaNet as a module: a causal sequence mixer whose state is a matrix a head."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from iokernels.ops.gated_delta_rule.api import gated_delta_rule, gated_delta_rule_step
from iokernels.ops.shared.layout import state_dtype
from iokernels.runtime.contracts import FLOATS, Contract, Spec
from iokernels.runtime.contracts.plain import count, flag, place

from .states import check_state, loadable

_CONTRACT = Contract(
    "GatedDeltaNet",
    x=Spec("B N embed_dim", FLOATS),
    **{
        "state.conv": Spec("B before channels", FLOATS),
        "state.memory": Spec("B num_heads head_dim value_dim", (torch.float32, torch.float64)),
    },
)


@loadable
class GatedDeltaNetState(NamedTuple):
    """What a :class:`GatedDeltaNet` remembers of the tokens so far. The tensors are updated in place by ``step``."""

    conv: Tensor  # [B, conv_size - 1, channels]: the last inputs of the convolution, oldest first
    memory: Tensor  # float32 (float64 for float64 inputs) [B, num_heads, head_dim, value_dim]


class GatedDeltaNet(nn.Module):
    """The mixer of Gated DeltaNet (Yang et al., 2024, arXiv:2412.06464, figure 1): x ``[B, N, E]`` to the same shape.

    Queries, keys and values are projections of x, each through a short causal convolution and SiLU; queries and keys
    are then scaled to length 1. With ``beta_t = sigmoid(b_t)`` and ``a_t = exp(-exp(A_log) softplus(d_t + dt_bias))``,
    b and d projections of x, :func:`iokernels.gated_delta_rule` mixes them; its output is normalised for each head
    (RMS), multiplied by SiLU of a gate and projected back.

    Args:
        embed_dim: width E of x and of the output.
        num_heads: heads, each with a state of ``head_dim x value_dim``.
        head_dim: width of queries and keys; ``embed_dim / num_heads`` if None.
        expand_v: value_dim is this times head_dim.
        num_key_heads: heads of queries and keys, a divisor of num_heads; num_heads if None.
        conv_size: tokens that the convolution sees, the current one among them; 1 is none.
        use_decay: whether the state decays; False is DeltaNet (arXiv:2406.06484).
        use_gate: whether the output is gated.
        allow_neg_eigval: ``beta = 2 sigmoid(b)``, so that what the state holds under a key may change its sign: needed
            to track states such as a parity (Grazzi et al., 2024, arXiv:2411.12537).
        bias: whether the projections of queries, keys, values, gate and output have a bias.
        norm_eps: added to the mean square before its root is taken.
        backend: as in :func:`iokernels.gated_delta_rule`.
        device: where the parameters live.
        dtype: their dtype. ``A_log`` and ``dt_bias``, which stand in exponents, are float32 at least.

    Raises:
        ValueError: sizes that do not fit.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        head_dim: int | None = None,
        expand_v: float = 1.0,
        num_key_heads: int | None = None,
        conv_size: int = 4,
        use_decay: bool = True,
        use_gate: bool = True,
        allow_neg_eigval: bool = False,
        bias: bool = False,
        norm_eps: float = 1e-5,
        backend: str | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        require = _CONTRACT.require
        name = "GatedDeltaNet"
        embed_dim, num_heads = count(name, "embed_dim", embed_dim, 0), count(name, "num_heads", num_heads, 0)
        require(
            embed_dim > 0 and num_heads > 0, f"embed_dim is {embed_dim}, num_heads {num_heads}; both must be above 0"
        )
        if head_dim is None:
            require(
                embed_dim % num_heads == 0, f"embed_dim is {embed_dim}; without head_dim, {num_heads} must divide it"
            )
            head_dim = embed_dim // num_heads
        key_dim: int = count(name, "head_dim", head_dim)
        conv_size = count(name, "conv_size", conv_size)
        key_heads: int = num_heads if num_key_heads is None else count(name, "num_key_heads", num_key_heads)
        value_dim = round(key_dim * _CONTRACT.number("expand_v", expand_v, least=0.0))
        require(num_heads % key_heads == 0, f"num_key_heads is {key_heads}; it must divide the {num_heads} heads")
        require(value_dim > 0, f"head_dim is {key_dim}, expand_v {expand_v}; widths must be at least 1")
        for flag_name, value in (
            ("use_decay", use_decay), ("use_gate", use_gate), ("allow_neg_eigval", allow_neg_eigval), ("bias", bias)
        ):  # fmt: skip
            flag(name, flag_name, value)
        norm_eps = _CONTRACT.number("norm_eps", norm_eps, least=0.0)
        self.embed_dim, self.num_heads, self.num_key_heads = embed_dim, num_heads, key_heads
        self.head_dim, self.value_dim, self.conv_size = key_dim, value_dim, conv_size
        self.use_decay, self.allow_neg_eigval = use_decay, allow_neg_eigval
        self.norm_eps, self.backend = norm_eps, backend

        made: dict[str, Any] = {"device": device, "dtype": dtype}
        self.widths = (key_heads * key_dim, key_heads * key_dim, num_heads * value_dim)
        self.in_proj = nn.Linear(embed_dim, sum(self.widths), bias=bias, **made)
        self.conv_weight = nn.Parameter(torch.empty(sum(self.widths), 1, conv_size, **made)) if conv_size > 1 else None
        self.beta_proj = nn.Linear(embed_dim, num_heads, **made)
        self.gate_proj = nn.Linear(embed_dim, num_heads * value_dim, bias=bias, **made) if use_gate else None
        self.norm_weight = nn.Parameter(torch.empty(value_dim, **made))
        self.out_proj = nn.Linear(num_heads * value_dim, embed_dim, bias=bias, **made)
        if use_decay:
            accurate = torch.promote_types(dtype or torch.get_default_dtype(), torch.float32)
            self.decay_proj = nn.Linear(embed_dim, num_heads, bias=False, **made)
            self.A_log = nn.Parameter(torch.empty(num_heads, device=device, dtype=accurate))
            self.dt_bias = nn.Parameter(torch.empty(num_heads, device=device, dtype=accurate))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the parameters anew.

        Decays start as in Mamba-2: A even in (0, 16), and steps whose softplus is log-even from 0.001 to 0.1.
        """
        for layer in self.children():
            layer.reset_parameters()  # pyright: ignore[reportCallIssue]
        nn.init.ones_(self.norm_weight)
        if self.conv_weight is not None:
            nn.init.uniform_(self.conv_weight, -(self.conv_size**-0.5), self.conv_size**-0.5)
        if self.use_decay:
            with torch.no_grad():
                self.A_log.uniform_(1e-3, 16.0).log_()
                step = self.dt_bias.uniform_(math.log(1e-3), math.log(0.1)).exp_()
                step.add_(torch.log(-torch.expm1(-step)))  # the inverse of softplus

    def extra_repr(self) -> str:
        """What ``repr`` shows between the parentheses."""
        return (
            f"{self.embed_dim}, {self.num_heads}, head_dim={self.head_dim}, value_dim={self.value_dim}, "
            f"allow_neg_eigval={self.allow_neg_eigval}"
        )

    def init_state(self, batch: int, device: Any = None, dtype: torch.dtype | None = None) -> GatedDeltaNetState:
        """The state before the first token, for ``batch`` sequences.

        Args:
            batch: number of sequences.
            device: that of the parameters if None.
            dtype: dtype of x; that of the parameters if None.
        """
        weight, batch = self.in_proj.weight, count("GatedDeltaNet", "batch", batch, 0)
        device = weight.device if device is None else place("GatedDeltaNet", device)
        if dtype is not None and dtype not in FLOATS:
            raise TypeError(f"GatedDeltaNet: dtype is {dtype!r}; it must be a floating dtype of torch")
        dtype = weight.dtype if dtype is None else dtype
        return GatedDeltaNetState(
            torch.zeros(batch, self.conv_size - 1, sum(self.widths), device=device, dtype=dtype),
            torch.zeros(batch, self.num_heads, self.head_dim, self.value_dim, device=device, dtype=state_dtype(dtype)),
        )

    def forward(self, x: Tensor, state: GatedDeltaNetState | None = None, return_state: bool = False) -> Any:
        """Mix whole sequences, differentiably.

        Args:
            x: ``[B, N, E]``.
            state: what came before, from :meth:`init_state` or an earlier call; not modified. None: nothing did.
            return_state: also return the state after the last token, a new one.

        Returns:
            ``[B, N, E]``, or ``([B, N, E], state)``.
        """
        self._check(x, state, written=False)
        mixed = self.in_proj(x)
        past = None if state is None else state.conv
        q, k, v = self._heads(self._convolved(mixed, past))
        beta, log_decay = self._gates(x)
        out, memory = gated_delta_rule(
            q, k, v, beta, log_decay=log_decay, initial_state=None if state is None else state.memory,
            return_state=True, backend=self.backend,
        )  # fmt: skip
        out = self._output(x, out)
        if not return_state:
            return out
        return out, GatedDeltaNetState(self._last(mixed, past), memory)

    def step(self, x: Tensor, state: GatedDeltaNetState) -> Tensor:
        """The next token or few, for generation: x ``[B, N, E]`` with a small N; ``state`` is updated in place.

        Has no gradient: call it under ``torch.no_grad()`` or ``torch.inference_mode()``. Safe under CUDA-graph capture.
        """
        self._check(x, state, written=True)
        mixed = self.in_proj(x)
        q, k, v = self._heads(self._convolved(mixed, state.conv))
        beta, log_decay = self._gates(x)
        out = gated_delta_rule_step(q, k, v, beta, state.memory, log_decay=log_decay, backend=self.backend)
        state.conv.copy_(self._last(mixed, state.conv))
        return self._output(x, out)

    def _check(self, x: Tensor, state: GatedDeltaNetState | None, written: bool) -> None:
        """Whether x and the state fit."""
        _CONTRACT.check({"embed_dim": self.embed_dim}, x=x)
        if state is not None:
            check_state(
                _CONTRACT, GatedDeltaNetState, state, x, written=written, embed_dim=self.embed_dim,
                before=self.conv_size - 1, channels=sum(self.widths), num_heads=self.num_heads, head_dim=self.head_dim,
                value_dim=self.value_dim,
            )  # fmt: skip

    def _convolved(self, mixed: Tensor, past: Tensor | None) -> Tensor:
        """SiLU of the depthwise causal convolution of ``[B, N, channels]``."""
        if self.conv_weight is not None and mixed.shape[1] > 0:
            channels, before = mixed.shape[2], self.conv_size - 1
            if past is None:
                padded = F.pad(mixed, (0, 0, before, 0))
            else:
                padded = torch.cat([past.to(mixed.dtype), mixed], dim=1)
            weight = self.conv_weight.to(mixed.dtype)
            mixed = F.conv1d(padded.transpose(1, 2), weight, groups=channels).transpose(1, 2)
        return F.silu(mixed)

    def _last(self, mixed: Tensor, past: Tensor | None) -> Tensor:
        """The inputs that the convolution will need: of ``past`` too where there are few new ones."""
        before = self.conv_size - 1
        if past is None:
            past = mixed.new_zeros(mixed.shape[0], before, mixed.shape[2])
        joined = torch.cat([past, mixed.to(past.dtype)], dim=1)
        return joined[:, joined.shape[1] - before :].clone()  # a view would keep the whole prompt alive

    def _heads(self, mixed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k of length 1 and v, each [B, heads, N, width]."""
        q, k, v = mixed.split(self.widths, dim=2)
        q, k = (_unit(x.unflatten(2, (self.num_key_heads, self.head_dim))) for x in (q, k))
        v = v.unflatten(2, (self.num_heads, self.value_dim))
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)

    def _gates(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """beta and log_decay, [B, num_heads, N], float32 at least."""
        accurate = torch.promote_types(x.dtype, torch.float32)
        beta = torch.sigmoid(self.beta_proj(x).to(accurate)).transpose(1, 2)
        if self.allow_neg_eigval:
            beta = 2.0 * beta
        if not self.use_decay:
            return beta, None
        step = F.softplus(self.decay_proj(x).to(accurate) + self.dt_bias.to(accurate))
        return beta, (-torch.exp(self.A_log.to(accurate)) * step).transpose(1, 2)

    def _output(self, x: Tensor, out: Tensor) -> Tensor:
        """Normalise each head of [B, num_heads, N, value_dim], gate and project."""
        out = F.rms_norm(out.transpose(1, 2), (self.value_dim,), self.norm_weight.to(out.dtype), self.norm_eps)
        out = out.flatten(2)
        if self.gate_proj is not None:
            out = out * F.silu(self.gate_proj(x))
        return self.out_proj(out)


def _unit(x: Tensor) -> Tensor:
    """The vectors of the last dimension scaled to length 1; of zeros there are zeros, and no gradient.

    The length is in float32 at least. Shorter ones than the dtype can hold well are scaled less: no more than the dtype
    holds. An epsilon in the dtype of x would be 0 in float16.
    """
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32))
    least = max(torch.finfo(x.dtype).tiny, 1e-12)
    return (x / length.clamp_min(least).masked_fill(length == 0.0, math.inf)).to(x.dtype)

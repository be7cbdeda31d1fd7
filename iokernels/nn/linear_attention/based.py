"""BASED as a module: a linear attention that recalls from afar, and an exact one over the nearest tokens."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from iokernels.ops.flash_attention.api import flash_attention
from iokernels.ops.linear_attention.api import linear_attention, linear_attention_state, linear_attention_step
from iokernels.ops.linear_attention.options import features
from iokernels.ops.shared.layout import state_dtype
from iokernels.runtime.contracts import FLOATS, Contract, Spec
from iokernels.runtime.contracts.plain import count, flag, place

from .positions import rotated, token_positions
from .states import check_state, loadable

_PAST = Spec("B num_heads before head_dim", FLOATS, optional=True)
_CONTRACT = Contract(
    "BasedAttention",
    x=Spec("B N embed_dim", FLOATS),
    **{
        "state.memory": Spec("B num_heads features columns", (torch.float32, torch.float64), optional=True),
        "state.keys": _PAST,
        "state.values": _PAST,
        "state.seen": Spec("B", (torch.int64,)),
    },
)

PARTS = ("linear", "window")


@loadable
class BasedAttentionState(NamedTuple):
    """What a :class:`BasedAttention` remembers; None for a part that it does not have. ``step`` updates it in place."""

    memory: Tensor | None  # float32 (float64) [B, num_heads, 1 + K + K^2, head_dim + 1], K = feature_dim
    keys: Tensor | None  # [B, num_heads, window - 1, head_dim]: the last keys, turned, oldest first
    values: Tensor | None  # like keys
    seen: Tensor  # int64 [B]: tokens so far


class BasedAttention(nn.Module):
    """The two mixers of BASED (Arora et al., 2024, arXiv:2402.18668, section 4), x ``[B, N, E]`` to the same shape.

    ``"linear"``: attention whose weights are the second-order Taylor polynomial of ``exp(q . k / sqrt(feature_dim))``,
    normalised, with queries and keys of ``feature_dim`` elements. It sees all tokens, and its state has a fixed size.
    ``"window"``: softmax attention to the last ``window`` tokens, the current one among them, whose queries and keys
    turn with the position (pairs of neighbouring elements, base 10000).

    The paper's models alternate layers of one part each: give ``parts=("linear",)`` and ``parts=("window",)``. With
    both (the default) one module adds up the two, each with projections of its own.

    Args:
        embed_dim: width E of x and of the output.
        num_heads: heads of each part; divides embed_dim.
        parts: ``"linear"``, ``"window"``, or both.
        feature_dim: width of the linear part's queries and keys; at most 32 on Triton.
        window: tokens that the other part sees.
        bias: whether the projections have a bias.
        backend: as in :func:`iokernels.linear_attention` and :func:`iokernels.flash_attention`.
        device: where the parameters live.
        dtype: their dtype.

    Raises:
        ValueError: sizes or names that do not fit.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        parts: tuple[str, ...] = PARTS,
        feature_dim: int = 16,
        window: int = 64,
        bias: bool = False,
        backend: str | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        require = _CONTRACT.require
        embed_dim, num_heads, feature_dim, window = (
            count("BasedAttention", name, value)
            for name, value in (
                ("embed_dim", embed_dim), ("num_heads", num_heads), ("feature_dim", feature_dim), ("window", window)
            )
        )  # fmt: skip
        flag("BasedAttention", "bias", bias)
        require(embed_dim % num_heads == 0, f"embed_dim is {embed_dim}; num_heads, {num_heads}, must divide it")
        head_dim = embed_dim // num_heads
        if not isinstance(parts, (tuple, list)):
            raise TypeError(f"BasedAttention: parts is {parts!r}; it must be a tuple of names")
        require(
            len(parts) > 0 and len(set(parts)) == len(parts) and set(parts) <= set(PARTS),
            f"parts is {parts!r}; it must hold {' or '.join(map(repr, PARTS))}, or each once",
        )
        require(
            "window" not in parts or head_dim % 2 == 0,
            f"embed_dim / num_heads is {head_dim}; it must be even, for pairs of the window's keys turn",
        )
        self.embed_dim, self.num_heads, self.head_dim = embed_dim, num_heads, head_dim
        self.parts, self.feature_dim, self.window, self.backend = tuple(parts), feature_dim, window, backend
        made: dict[str, Any] = {"bias": bias, "device": device, "dtype": dtype}
        self.linear_widths = (num_heads * feature_dim, num_heads * feature_dim, embed_dim)
        self.linear_proj = nn.Linear(embed_dim, sum(self.linear_widths), **made) if "linear" in parts else None
        self.window_proj = nn.Linear(embed_dim, 3 * embed_dim, **made) if "window" in parts else None
        # One product with both outputs side by side is the sum of a projection of each.
        self.out_proj = nn.Linear(len(parts) * embed_dim, embed_dim, **made)

    def extra_repr(self) -> str:
        """What ``repr`` shows between the parentheses."""
        return (
            f"{self.embed_dim}, {self.num_heads}, parts={self.parts}, feature_dim={self.feature_dim}, "
            f"window={self.window}"
        )

    def init_state(self, batch: int, device: Any = None, dtype: torch.dtype | None = None) -> BasedAttentionState:
        """The state before the first token of ``batch`` sequences; device and dtype: of x, or of the parameters."""
        weight, batch = self.out_proj.weight, count("BasedAttention", "batch", batch, 0)
        device = weight.device if device is None else place("BasedAttention", device)
        if dtype is not None and dtype not in FLOATS:
            raise TypeError(f"BasedAttention: dtype is {dtype!r}; it must be a floating dtype of torch")
        dtype = weight.dtype if dtype is None else dtype
        memory = keys = values = None
        if self.linear_proj is not None:
            memory = linear_attention_state(
                batch, self.num_heads, self.feature_dim, self.head_dim, feature_map="taylor", normalize=True,
                dtype=state_dtype(dtype), device=device,
            )  # fmt: skip
        if self.window_proj is not None:
            past = (batch, self.num_heads, self.window - 1, self.head_dim)
            keys, values = (torch.zeros(past, dtype=dtype, device=device) for _ in range(2))
        return BasedAttentionState(memory, keys, values, torch.zeros(batch, dtype=torch.int64, device=device))

    def forward(self, x: Tensor, state: BasedAttentionState | None = None, return_state: bool = False) -> Any:
        """Mix whole sequences, differentiably.

        Args:
            x: ``[B, N, E]``.
            state: what came before, from :meth:`init_state` or an earlier call; not modified. None: nothing did.
            return_state: also return the state after the last token, a new one.

        Returns:
            ``[B, N, E]``, or ``([B, N, E], state)``.
        """
        self._check(x, state, written=False)
        outs, memory, keys, values = [], None, None, None
        if self.linear_proj is not None:
            out, memory = linear_attention(
                *self._linear_heads(x), feature_map="taylor", normalize=True,
                initial_state=None if state is None else state.memory, return_state=True, backend=self.backend,
            )  # fmt: skip
            outs.append(out)
        if self.window_proj is not None:
            if state is None and return_state:
                state = self.init_state(x.shape[0], x.device, x.dtype)
            out, keys, values = self._near(x, state)
            outs.append(out)
        out = self._output(outs)
        if not return_state:
            return out
        if keys is not None and values is not None:
            keys, values = keys.clone(), values.clone()  # a view would keep those of the whole text alive
        new = torch.full(x.shape[:1], x.shape[1], dtype=torch.int64, device=x.device)
        return out, BasedAttentionState(memory, keys, values, new if state is None else state.seen + new)

    def step(self, x: Tensor, state: BasedAttentionState) -> Tensor:
        """The next token or few, for generation: x ``[B, N, E]`` with a small N; ``state`` is updated in place.

        Has no gradient: call it under ``torch.no_grad()`` or ``torch.inference_mode()``. Safe under CUDA-graph capture.
        """
        self._check(x, state, written=True)
        _CONTRACT.require(
            not (torch.is_grad_enabled() and (x.requires_grad or self.out_proj.weight.requires_grad)),
            "step has no gradient; call it under torch.no_grad()",
        )
        outs = []
        if self.linear_proj is not None:
            assert state.memory is not None
            q, k, v = self._linear_heads(x)
            options: dict[str, Any] = {"feature_map": "taylor", "normalize": True, "backend": self.backend}
            outs.append(linear_attention_step(q, k, v, state.memory, **options))
        if self.window_proj is not None:
            assert state.keys is not None
            assert state.values is not None
            out, keys, values = self._near(x, state)
            outs.append(out)
            state.keys.copy_(keys)
            state.values.copy_(values)
        state.seen.add_(x.shape[1])
        return self._output(outs)

    def _check(self, x: Tensor, state: BasedAttentionState | None, written: bool) -> None:
        """Whether x and the state fit."""
        _CONTRACT.check({"embed_dim": self.embed_dim}, x=x)
        if state is None:
            return
        sizes = {
            "embed_dim": self.embed_dim,
            "num_heads": self.num_heads,
            "features": features(self.feature_dim, True),
            "columns": self.head_dim + 1,
            "before": self.window - 1,
            "head_dim": self.head_dim,
        }
        check_state(_CONTRACT, BasedAttentionState, state, x, written=written, **sizes)
        for name, part, given in (
            ("memory", self.linear_proj, state.memory),
            ("keys", self.window_proj, state.keys),
            ("values", self.window_proj, state.values),
        ):
            _CONTRACT.require(
                (part is None) == (given is None),
                f"state.{name} is {'None' if given is None else 'given'}; with parts={self.parts} it must be "
                f"{'None' if part is None else 'a tensor'}",
            )

    def _linear_heads(self, x: Tensor) -> tuple[Tensor, ...]:
        """q, k, v of the linear part, each [B, num_heads, N, width]."""
        assert self.linear_proj is not None
        parts = self.linear_proj(x).split(self.linear_widths, dim=2)
        return tuple(part.unflatten(2, (self.num_heads, -1)).transpose(1, 2) for part in parts)

    def _near(self, x: Tensor, state: BasedAttentionState | None) -> tuple[Tensor, Any, Any]:
        """Attention to the window, and with a state the keys and values that the next tokens will see."""
        assert self.window_proj is not None
        heads = self.window_proj(x).unflatten(2, (3, self.num_heads, self.head_dim))
        q, k, v = heads.permute(2, 0, 3, 1, 4).unbind()
        positions = token_positions(x, None if state is None else state.seen)
        q, k = rotated(q, positions), rotated(k, positions)
        options: dict[str, Any] = {"causal": True, "window": (self.window - 1, 0), "backend": self.backend}
        if state is None:
            return flash_attention(q, k, v, **options), None, None
        assert state.keys is not None
        assert state.values is not None
        before = self.window - 1
        k, v = torch.cat([state.keys.to(k.dtype), k], dim=2), torch.cat([state.values.to(v.dtype), v], dim=2)
        # The first rows of a state that has not seen a whole window are no keys.
        known = torch.arange(k.shape[2], device=x.device) >= before - state.seen[:, None]
        out = flash_attention(q, k, v, mask=known[:, None, None], **options)
        first = k.shape[2] - before
        return out, k[:, :, first:], v[:, :, first:]

    def _output(self, outs: list[Tensor]) -> Tensor:
        return self.out_proj(torch.cat([out.transpose(1, 2).flatten(2) for out in outs], dim=2))

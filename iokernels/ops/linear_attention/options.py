"""What the backends of ``linear_attention`` agree on: the arguments after q, k, v, the state, the gradients.

Dense inputs are ``q, k [B, Hk, N, K]`` and ``v [B, H, N, V]``, where Hk divides H and head h of v reads head
``h // (H / Hk)`` of q and k. Packed sequences reach the backends as a batch of one, ``[1, H, total, *]``, with
``cu_seqlens``.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from iokernels.ops.shared.decays import LEAST_LOG_DECAY
from iokernels.ops.shared.layout import empty_in_order_of, state_dtype


class Options(NamedTuple):
    """Everything beside q, k and v, after validation.

    With b_t the sum of the log decays up to t, each clamped to [LEAST_LOG_DECAY, 0], and phi(x) = x, or
    ``1 + x + x^2 / 2`` with ``taylor``, the output is

        num_t = sum_{s <= t} exp(b_t - b_s) phi(scale * q_t . k_s) v_s
        den_t = sum_{s <= t} exp(b_t - b_s) phi(scale * q_t . k_s)
        out_t = num_t, or num_t / den_t with ``normalize`` (0 where den_t is 0)

    plus what the initial state holds of tokens before the first.

    The state after token t is ``[features, columns]`` float32 for each sequence and head, ``sum_{s <= t}
    exp(b_t - b_s) f(k_s) w_s^T``. f(k) is k itself, or with ``taylor`` the concatenation of 1, k and k (x) k, in this
    order, so that row ``1 + K + a K + c`` belongs to ``k_a k_c``; no scale is in it. w is v, with ``normalize``
    followed by a 1: the last column is the normaliser.
    """

    # Tensors, in the order of the operators' schemas.
    log_decay: Tensor | None = None  # any floating dtype, [H] or [B, H, N]
    initial_state: Tensor | None = None  # float32 (float64 for float64 inputs) [S, H, features, columns]
    cu_seqlens: Tensor | None = None  # int32 [S + 1]
    # Numbers.
    scale: float = 1.0
    taylor: bool = False
    normalize: bool = False

    def per_token(self) -> bool:
        """Whether there is a decay for every token."""
        return self.log_decay is not None and self.log_decay.dim() == 3


class Needs(NamedTuple):
    """Which gradients a backward pass has to compute."""

    q: bool
    k: bool
    v: bool
    log_decay: bool = False
    initial_state: bool = False


class Gradients(NamedTuple):
    """What a backward pass returns, each of the shape and dtype of its input; None where not needed."""

    q: Tensor | None
    k: Tensor | None
    v: Tensor | None
    log_decay: Tensor | None = None
    initial_state: Tensor | None = None


def features(key_width: Any, taylor: bool) -> Any:
    """Rows of the state."""
    return 1 + key_width + key_width * key_width if taylor else key_width


def columns(value_width: Any, normalize: bool) -> Any:
    """Columns of the state."""
    return value_width + 1 if normalize else value_width


def sequences(q: Tensor, options: Options) -> Any:
    """How many sequences there are."""
    return q.shape[0] if options.cu_seqlens is None else options.cu_seqlens.shape[0] - 1


def empty_state(q: Tensor, v: Tensor, options: Options) -> Tensor:
    """An uninitialised state of every sequence and head."""
    rows, width = features(q.shape[3], options.taylor), columns(v.shape[3], options.normalize)
    return q.new_empty((sequences(q, options), v.shape[1], rows, width), dtype=state_dtype(q.dtype))


def empty_denominator(v: Tensor, options: Options) -> Tensor:
    """An uninitialised ``den [B, H, N]``; empty without ``normalize``."""
    return v.new_empty(v.shape[:3] if options.normalize else (0,), dtype=state_dtype(v.dtype))


def log_decay_gradient(dg: Tensor, options: Options) -> Tensor:
    """The gradient of ``log_decay``, in its shape and dtype, from that of every token's decay, ``dg [B, H, N]``."""
    decay = options.log_decay
    assert decay is not None
    if decay.dim() == 1:
        dg = dg.sum((0, 2))
    # A clamped decay moves nothing.
    return dg.masked_fill((decay > 0) | (decay < LEAST_LOG_DECAY), 0.0).to(decay.dtype)


def gradients_without_tokens(
    q: Tensor, k: Tensor, v: Tensor, dstate: Tensor | None, options: Options, needs: Needs
) -> Gradients:  # fmt: skip
    """Without tokens or sequences the state passes through."""
    dinitial = None
    if needs.initial_state:
        assert options.initial_state is not None
        dinitial = torch.zeros_like(options.initial_state)
        if dstate is not None:
            dinitial.copy_(dstate)
    dq, dk, dv = (torch.zeros_like(x) if need else None for x, need in zip((q, k, v), needs[:3], strict=True))
    decay = options.log_decay if needs.log_decay else None
    return Gradients(dq, dk, dv, None if decay is None else torch.zeros_like(decay), dinitial)


def sum_of_shares(shares: Tensor, x: Tensor) -> Tensor:
    """The gradient of q or k, ``x [B, Hk, N, K]``, from a float32 share for each head of v and each slice,
    ``[slices * B, H, N, K]``; or ``shares`` itself where it is the gradient already."""
    if shares.shape == x.shape and shares.dtype == x.dtype:
        return shares
    batch, heads = x.shape[:2]
    total = shares.view(-1, batch, heads, shares.shape[1] // heads, *x.shape[2:]).sum((0, 3))
    return empty_in_order_of(x, x.shape[3]).copy_(total)


def zeroed(x: Tensor, options: Options) -> Tensor:
    """``x``, a number or row a token, with zeros where sequences are packed: what belongs to none no block visits."""
    return x.zero_() if options.cu_seqlens is not None else x


def wanted_gradients(
    q: Tensor, k: Tensor, dq: Tensor | None, dk: Tensor | None, dv: Tensor | None, dg: Tensor | None,
    dinitial: Tensor | None, options: Options, needs: Needs,
) -> Gradients:  # fmt: skip
    """What ``needs`` names, from dq and dk or their shares, dv, and the gradient ``dg`` of every token's decay."""
    return Gradients(
        sum_of_shares(dq, q) if dq is not None and needs.q else None,
        sum_of_shares(dk, k) if dk is not None and needs.k else None,
        dv if needs.v else None,
        None if dg is None else log_decay_gradient(dg, options),
        dinitial,
    )

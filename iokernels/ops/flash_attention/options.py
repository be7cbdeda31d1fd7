"""What the three backends of this room agree on: the arguments after q, k, v, and what a backward pass returns.

Dense inputs are ``q [B, Hq, Nq, D]``, ``k [B, Hkv, Nk, D]``, ``v [B, Hkv, Nk, Dv]``. Packed sequences reach the
backends as a batch of one, ``[1, H, total, D]``, with ``cu_seqlens_q`` and ``cu_seqlens_k``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from iokernels.ops.shared.layout import empty_in_order_of, state_dtype
from iokernels.runtime.registration.schema import Size


class Options(NamedTuple):
    """Everything that shapes the attention matrix, after validation.

    With i a query row, j a key and ``off = Nk - Nq`` (per sequence when packed), the score is

        s = scale * q_i . k_j
        s = softcap * tanh(s / softcap)                  if softcap > 0
        s = s + bias[i, j] - alibi_slope * |i + off - j|
        s = -inf   unless  i + off - window_left <= j <= i + off + window_right  and mask[i, j]

    where a window of -1 is unbounded on that side; causal is ``window_right = 0``.
    ``p = exp(s - lse)`` with ``lse = log(exp(sink) + sum_j exp(s))``, then dropout scales the survivors by
    ``1 / (1 - dropout_p)``, and ``out_i = sum_j p_ij v_j``. A row without a key has out 0 and lse -inf (the sink,
    where there is one).
    """

    # Tensors, in the order of the operators' schemas.
    bias: Tensor | None = None  # any floating dtype, [B|1, Hq|1, Nq|1, Nk|1]; packed: Nq, Nk are the longest lengths
    sinks: Tensor | None = None  # any floating dtype, [Hq], in natural-log units
    mask: Tensor | None = None  # bool, like bias; True: attend
    alibi_slopes: Tensor | None = None  # float32 [B|1, Hq]; packed: B counts sequences
    dropout_seed: Tensor | None = None  # int64 [1], on the device of q; present where dropout_p > 0
    cu_seqlens_q: Tensor | None = None  # int32 [S + 1]
    cu_seqlens_k: Tensor | None = None  # int32 [S + 1]
    # Numbers.
    scale: float = 1.0
    window_left: int = -1
    window_right: int = -1
    softcap: float = 0.0  # 0: none
    dropout_p: float = 0.0
    max_seqlen_q: Size = 0  # used only when packed
    max_seqlen_k: Size = 0

    @property
    def keeps_tail(self) -> bool:
        """Whether a forward pass also keeps what rounding took from the LSE (:func:`empty_statistics`)."""
        return self.bias is not None or self.alibi_slopes is not None


def of_sequence(options: Options, sequence: int, seqlen_q: int, seqlen_k: int) -> Options:
    """The options of one packed sequence, as those of a dense batch of one (views; dropout keeps its own count)."""

    def scores(x: Tensor | None) -> Tensor | None:
        if x is None:
            return None
        x = x if x.shape[0] == 1 else x[sequence : sequence + 1]
        return x[:, :, : seqlen_q if x.shape[2] > 1 else 1, : seqlen_k if x.shape[3] > 1 else 1]

    slopes = options.alibi_slopes
    if slopes is not None and slopes.shape[0] > 1:
        slopes = slopes[sequence : sequence + 1]
    return options._replace(
        bias=scores(options.bias), mask=scores(options.mask), alibi_slopes=slopes, cu_seqlens_q=None, cu_seqlens_k=None
    )


class Needs(NamedTuple):
    """Which gradients a backward pass has to compute."""

    q: bool
    k: bool
    v: bool
    bias: bool = False
    sinks: bool = False


class Gradients(NamedTuple):
    """What a backward pass returns; None where not needed. dq, dk, dv have the shape and dtype of q, k, v;
    dbias and dsinks those of bias and sinks."""

    q: Tensor | None
    k: Tensor | None
    v: Tensor | None
    bias: Tensor | None = None
    sinks: Tensor | None = None


def empty_out(q: Tensor, v: Tensor) -> Tensor:
    """An uninitialised output [B, Hq, Nq, Dv] in the memory order of q, so that a [B, N, H, D] model gets its
    layout back without a copy."""
    return empty_in_order_of(q, v.shape[3])


def empty_statistics(q: Tensor, options: Options) -> Tensor:
    """Uninitialised statistics of the rows: the log-sum-exp [B, Hq, Nq], or [2, B, Hq, Nq] where something is added to
    the scores.

    A bias may be as large as the dtype allows (-1e9 and ``finfo.min`` are how people pad), and then rounding takes from
    the LSE all that tells exp(s - lse) how many keys share a row. The second half, the tail, is what it took.
    """
    shape = q.shape[:3]
    return q.new_empty((2, *shape) if options.keeps_tail else shape, dtype=state_dtype(q.dtype))


def lse_and_tail(statistics: Tensor) -> tuple[Tensor, Tensor | None]:
    """The two halves of :func:`empty_statistics`, each [B, Hq, Nq]; the second is None where there is none."""
    return (statistics, None) if statistics.dim() == 3 else (statistics[0], statistics[1])


def narrowed(bias: Tensor, dtype: torch.dtype) -> Tensor:
    """``bias``, for scores in ``dtype``: what is finite stays finite there, and ``finfo(float64).min`` is no -inf.

    The derivative is that of the identity, also where the range ends.
    """
    if bias.dtype != torch.float64 or dtype == torch.float64:
        return bias
    most = torch.finfo(dtype).max
    finite, value = bias.isfinite(), bias.detach()
    nothing = torch.where(finite, bias - value, 0.0)
    return (torch.where(finite, value.clamp(-most, most), value) + nothing).to(dtype)

"""What the backends of ``gated_delta_rule`` agree on: the arguments after v, and what a backward pass returns.

Dense inputs are ``q, k [B, Hk, N, K]``, ``v [B, H, N, V]``, ``beta [B, H, N]``. Packed sequences reach the backends as
a batch of one, ``[1, H, total, D]``, with ``cu_seqlens``.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from iokernels.ops.shared.decays import LEAST_LOG_DECAY
from iokernels.ops.shared.layout import state_dtype


class DeltaOptions(NamedTuple):
    """What stands beside q, k, v and beta, after validation.

    With ``a_t = exp(log_decay_t)``, log_decay clamped to [LEAST_LOG_DECAY, 0], all of one head, the state S ``[K, V]``
    and the output are

        S_t = a_t (I - beta_t k_t k_t^T) S_(t-1) + beta_t k_t v_t^T        o_t = scale S_t^T q_t
    """

    log_decay: Tensor | None = None  # any floating dtype, [B, H, N], <= 0; None: no decay
    initial_state: Tensor | None = None  # of state_dtype, [S, H, K, V] with S sequences; None: zeros
    cu_seqlens: Tensor | None = None  # int32 [S + 1]
    scale: float = 1.0

    def sequences(self, v: Tensor) -> Any:
        """How many sequences there are, each with a state of its own."""
        return v.shape[0] if self.cu_seqlens is None else self.cu_seqlens.shape[0] - 1


class Needs(NamedTuple):
    """Which gradients a backward pass has to return."""

    q: bool
    k: bool
    v: bool
    beta: bool
    log_decay: bool = False
    initial_state: bool = False


class Gradients(NamedTuple):
    """What a backward pass computes, each of the shape and dtype of its argument; None where there is no argument."""

    q: Tensor
    k: Tensor
    v: Tensor
    beta: Tensor
    log_decay: Tensor | None
    initial_state: Tensor | None


def chunk_rows(dtype: torch.dtype, width: Any) -> Any:
    """Rows to a chunk of the Triton kernels, for keys of ``width``: as many as leave room for the state beside them."""
    return (64 if dtype.itemsize == 2 else 32) // (2 if width > 128 else 1)


def empty_inverses(q: Tensor, v: Tensor, backend: str) -> Tensor:
    """Where the forward pass leaves its triangular systems solved, for the backward pass: float32 [B, H, N, C].

    Half precision would be the largest of all errors where keys are alike. The backend ``torch`` solves the systems
    again, which costs it little, and keeps nothing.
    """
    shape = (*v.shape[:3], chunk_rows(v.dtype, q.shape[3])) if backend == "triton" else (0,)
    return v.new_empty(shape, dtype=torch.float32)


def log_decay_gradient(gradient: Tensor, log_decay: Tensor) -> Tensor:
    """That of ``log_decay``, with zeros where it was clamped and moves nothing; written into ``gradient``."""
    return gradient.masked_fill_((log_decay > 0) | (log_decay < LEAST_LOG_DECAY), 0.0)


def empty_state(q: Tensor, v: Tensor, options: DeltaOptions) -> Tensor:
    """An uninitialised state [S, H, K, V]."""
    return q.new_empty((options.sequences(v), v.shape[1], q.shape[3], v.shape[3]), dtype=state_dtype(q.dtype))

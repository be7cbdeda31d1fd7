"""The gated delta rule over a few chunks of rows, in batched matrix products: what the backend ``torch`` walks with.

Maths (Yang et al., 2024, "Parallelizing Linear Transformers with the Delta Rule", arXiv:2406.06484, section 3; with
decay, "Gated Delta Networks", arXiv:2412.06464, section 3.3). In a chunk of C rows let b be the running sum of the log
decays, E = exp(b), G_ij = exp(b_i - b_j) for i >= j and 0 above, q scaled, and H the state before the chunk. What row i
writes is n_i = beta_i (v_i - what the state already holds at k_i), and the rows before it in the chunk are part of that
state, so the n_i solve a unit triangular system:

    (I + A) n = beta (v - E K H)        A = tril(beta (K K^T) G, -1)

    o  = E Q H + P n                    P = (Q K^T) G
    H' = E_C H + (E_C / E  K)^T n

Written with W = (I + A)^-1 (beta E K) and U = (I + A)^-1 (beta v), n = U - W H: everything but H is one batched product
over all chunks, and the walk over H has two products a chunk.

Backward, with D' the gradient of H' and r the gradient of the right side of the system:

    dn = P^T do + (E_C / E  K) D'       r = (I + A)^-T dn        dA = -tril(r n^T, -1)
    D  = E_C D' + (E Q)^T do - W^T dn   dv = beta r

The gradients of q, k and beta follow by the product rule, and that of b from the rows of G, E and E_C / E, which
multiply what is already there: db_i = q_i . dq_i - k_i . dk_i over the terms with those factors. The gradient of the
log decays is the sum of db over the rest of the chunk.

Exponents are differences b_i - b_j with i >= j, never positive. b is summed and subtracted in float64: after a strong
decay in the chunk b is large, and its float32 rounding would be an error of every later weight.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from iokernels.ops.shared.decays import sums_dtype


class Rows(NamedTuple):
    """Inputs of M chunks of C rows for G heads of all sequences, in the accurate dtype; rows past the end are zero."""

    q: Tensor  # [G, M, C, K], scaled
    k: Tensor  # [G, M, C, K]
    v: Tensor  # [G, M, C, V]
    beta: Tensor  # [G, M, C, 1]
    log_decay: Tensor  # [G, M, C]


class Chunks(NamedTuple):
    """What the walk over the chunks needs, and its backward pass again."""

    weights: Tensor  # G, [G, M, C, C]
    products: Tensor  # K K^T
    system: Tensor  # A, whose diagonal and upper part are not to be read
    scores: Tensor  # P
    from_start: Tensor  # E, [G, M, C, 1]
    to_end: Tensor  # E_C / E
    whole: Tensor  # E_C, [G, M, 1, 1]
    entering: Tensor  # E Q above W, [G, M, 2 C, K]: what multiplies H
    leaving: Tensor  # E_C / E  K, [G, M, C, K]
    targets: Tensor  # U, [G, M, C, V]


def chunks_of(rows: Rows) -> Chunks:
    """Everything that does not depend on the state."""
    q, k, v, beta, log_decay = rows
    length = k.shape[2]
    past = torch.ones(length, length, dtype=torch.bool, device=k.device).tril()
    b = log_decay.cumsum(-1, dtype=sums_dtype(k.device))
    between = (b[..., :, None] - b[..., None, :]).to(k.dtype)
    weights = between.masked_fill_(~past, float("-inf")).exp_()
    from_start = b.to(k.dtype).exp()[..., None]
    to_end = (b[..., -1:] - b).to(k.dtype).exp()[..., None]
    transposed = k.transpose(2, 3)
    products = k @ transposed
    system = (products * weights).mul_(beta)
    solved = torch.linalg.solve_triangular(
        system, torch.cat([beta * from_start * k, beta * v], dim=3), upper=False, unitriangular=True
    )
    return Chunks(
        weights=weights,
        products=products,
        system=system,
        scores=(q @ transposed).mul_(weights),
        from_start=from_start,
        to_end=to_end,
        whole=from_start[:, :, -1:],
        entering=torch.cat([q * from_start, solved[..., : k.shape[3]]], dim=2),
        leaving=k * to_end,
        targets=solved[..., k.shape[3] :],
    )


class Walked(NamedTuple):
    """The forward walk over M chunks."""

    inter: Tensor  # E Q H, [G, M, C, V]
    written: Tensor  # n, [G, M, C, V]
    states: list[Tensor]  # H of every chunk, [G, K, V]
    final: Tensor  # H after the last


def walk(chunks: Chunks, state: Tensor) -> Walked:
    """Carry ``state [G, K, V]`` through the chunks."""
    count, length = chunks.targets.shape[1:3]
    inter, written, states = torch.empty_like(chunks.targets), torch.empty_like(chunks.targets), []
    for m in range(count):
        states.append(state)
        both = torch.bmm(chunks.entering[:, m], state)
        inter[:, m] = both[:, :length]
        written[:, m] = chunks.targets[:, m] - both[:, length:]
        state = torch.baddbmm(state * chunks.whole[:, m], chunks.leaving[:, m].transpose(1, 2), written[:, m])
    return Walked(inter, written, states, state)


def forward(rows: Rows, state: Tensor) -> tuple[Tensor, Tensor]:
    """Returns (out [G, M, C, V], the state after the chunks)."""
    chunks = chunks_of(rows)
    walked = walk(chunks, state)
    return walked.inter.add_(chunks.scores @ walked.written), walked.final


def backward(rows: Rows, state: Tensor, dout: Tensor, dfinal: Tensor) -> tuple[Rows, Tensor]:
    """The gradients of ``rows`` (of the scaled q) and of ``state``, from those of out and of the final state."""
    q, k, v, beta, _ = rows
    chunks = chunks_of(rows)
    walked = walk(chunks, state)
    written, length = walked.written, k.shape[2]

    dwritten = chunks.scores.transpose(2, 3) @ dout
    queries, keys = chunks.entering[:, :, :length], chunks.entering[:, :, length:]
    arriving = queries.transpose(2, 3) @ dout
    after: list[Tensor] = []  # D' of every chunk, from the last to the first
    gradient = dfinal
    for m in reversed(range(k.shape[1])):
        after.append(gradient)
        dwritten[:, m].baddbmm_(chunks.leaving[:, m], gradient)
        gradient = torch.baddbmm(gradient * chunks.whole[:, m], keys[:, m].transpose(1, 2), dwritten[:, m], alpha=-1.0)
        gradient += arriving[:, m]
    states, dstates = torch.stack(walked.states, dim=1), torch.stack(after[::-1], dim=1)

    right = torch.linalg.solve_triangular(
        chunks.system.transpose(2, 3), dwritten, upper=True, unitriangular=True
    )  # r of the comment above
    dscores = dout @ written.transpose(2, 3)
    crossing = (dscores * chunks.scores).tril_(-1)  # a token and itself, which no decay touches, are left out
    dscores.mul_(chunks.weights)
    dsystem = (right @ written.transpose(2, 3)).neg_().mul_(chunks.weights).tril_(-1)

    # Of every term that has a factor exp(b_i) or exp(-b_j), its rows' q . dq or k . dk are db_i or -db_j. Those of
    # pairs are sums of the same products along rows and columns, so that their rounding errors cancel.
    dq_start = (dout @ states.transpose(2, 3)).mul_(chunks.from_start)
    dk_end = (written @ dstates.transpose(2, 3)).mul_(chunks.to_end)
    dq, dk = dq_start + dscores @ k, dk_end + dscores.transpose(2, 3) @ q
    held = (right @ states.transpose(2, 3)).mul_(chunks.from_start)
    along_held = (k * held).sum(-1, keepdim=True)
    of_products = dsystem * chunks.products
    of_beta = of_products.sum(-1, keepdim=True)
    along_end = (k * dk_end).sum(-1)
    dlast = along_end.sum(-1) + (dstates * states).sum((-2, -1)) * chunks.whole[:, :, 0, 0]
    db = (q * dq_start).sum(-1) - along_end + crossing.sum(-1) - crossing.sum(-2)
    db += (beta * (of_beta - along_held))[..., 0] - (of_products * beta).sum(-2)
    pairs = dsystem.mul_(beta)
    dk += (pairs + pairs.transpose(2, 3)) @ k - beta * held
    return (
        Rows(
            q=dq,
            k=dk,
            v=beta * right,
            beta=(right * v).sum(-1, keepdim=True) - along_held + of_beta,
            log_decay=db.flip(-1).cumsum(-1).flip(-1) + dlast[..., None],
        ),
        gradient,
    )

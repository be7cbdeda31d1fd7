"""The gradients of R and b, once the loop over time is over and the gradients of all gates are there.

    dR_g = sum_t ds_g,t h_(t-1)^T        db_g = sum_t ds_g,t

One product of length B N for each gate, and one sum. The kernels of every backend leave this to PyTorch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .options import Needs, Options


def weight_gradients(
    dgates: Tensor, dapart: Tensor | None, out: Tensor, initial: Tensor | None, options: Options, needs: Needs
) -> tuple[Tensor | None, Tensor | None]:
    """(dR [G, H, D, D], db [G, H, D]), each where it is needed.

    ``dgates [B, N, G, H, D]`` and, for gates whose parts are apart, ``dapart [B, N, APART, H, D]`` of the recurrent
    ones; ``out`` is h and ``initial`` the states before the first step.
    """
    if not (needs.recurrent or needs.bias):
        return None, None
    parts = [dgates[:, :, g] for g in range(options.kind().joined)]
    if dapart is not None:
        parts += dapart.unbind(2)
    order = _time_first if out.stride(1) > out.stride(0) else _batch_first
    rows = [order(part) for part in parts]
    drecurrent = dbias = None
    if needs.recurrent:
        before = order(_before(out, initial)).transpose(0, 1)
        drecurrent = torch.stack([torch.bmm(part.permute(1, 2, 0), before) for part in rows])
    if needs.bias:
        dbias = torch.stack([part.sum(0, dtype=torch.float32) for part in rows]).to(out.dtype)
    return drecurrent, dbias


def _before(out: Tensor, initial: Tensor | None) -> Tensor:
    """h before every step, as the products saw it, in the order of ``out [B, N, H, D]``."""
    before = torch.empty_like(out)
    before[:, 1:] = out[:, :-1]
    before[:, :1] = 0.0 if initial is None else initial[0].unsqueeze(1)
    return before


def _batch_first(x: Tensor) -> Tensor:
    return x.flatten(0, 1)


def _time_first(x: Tensor) -> Tensor:
    return x.transpose(0, 1).flatten(0, 1)

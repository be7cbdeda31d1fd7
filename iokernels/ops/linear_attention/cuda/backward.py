"""Launches the backward kernels of ``csrc/linear_attention``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from iokernels.ops.linear_attention.options import (
    Gradients,
    Needs,
    Options,
    gradients_without_tokens,
    wanted_gradients,
    zeroed,
)
from iokernels.ops.shared.layout import empty_in_order_of
from iokernels.runtime.cuda.kernel import Argument
from iokernels.runtime.device import guard

from . import tuning
from .launch import Launch, strides


def backward(
    dout: Tensor, dstate: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor | None, state: Tensor | None,
    denominator: Tensor, options: Options, needs: Needs,
) -> Gradients:  # fmt: skip
    """The gradients that ``needs`` names, given those of out and, where the loss uses it, of the final state. ``state``
    is there where decays want a gradient; ``out`` and ``denominator`` belong to the normaliser, which is not here."""
    if v.numel() == 0 or (options.cu_seqlens is not None and options.cu_seqlens.shape[0] == 1):
        return gradients_without_tokens(q, k, v, dstate, options, needs)
    with guard(q.device):
        return _Backward(dout, dstate, q, k, v, state, options, needs).run()


class _Backward:
    """One backward pass: what its kernels share."""

    def __init__(
        self, dout: Tensor, dstate: Tensor | None, q: Tensor, k: Tensor, v: Tensor, state: Tensor | None,
        options: Options, needs: Needs,
    ) -> None:  # fmt: skip
        self.dout, self.dstate, self.q, self.k, self.v, self.state = dout, dstate, q, k, v, state
        self.options, self.needs = options, needs
        self.launch = Launch(q, k, v, options)
        # The states where segments end, by the row that ends them: of a long sequence no two are in one SEGMENT.
        crossing = needs.log_decay
        self.slots = max(self.launch.rows - 2, -1) // tuning.SEGMENT + 1 if crossing else 0
        batch, heads = v.shape[:2]
        shape = (batch * self.slots, heads, q.shape[3], v.shape[3])
        self.restarts = q.new_empty(shape, dtype=torch.float32) if self.slots else None

    def run(self) -> Gradients:
        """Launch what the gradients take."""
        needs = self.needs
        crossing = needs.log_decay
        dq = self._keys_buffer(self.q) if needs.q or crossing else None
        dk = self._keys_buffer(self.k) if needs.k or crossing else None
        r = None if dq is None else self._dq(dq)
        dg = None if dk is None else self._dk(dk, r)
        dv, dinitial = self._dv() if needs.v or needs.initial_state else (None, None)
        return wanted_gradients(self.q, self.k, dq, dk, dv, dg, dinitial, self.options, needs)

    def _keys_buffer(self, x: Tensor) -> Tensor:
        """Where dq or dk goes: in its own shape, or, where several heads add up to it, a share of each."""
        if self.launch.group == 1:
            return zeroed(empty_in_order_of(x, x.shape[3]), self.options)
        return zeroed(x.new_empty((*self.v.shape[:3], x.shape[3]), dtype=torch.float32), self.options)

    def _shares(self, kernel: str) -> Tensor:
        """A number of every token for each slice of columns."""
        slices = tuning.slices(self.launch.problem(kernel, True), self.launch.config(kernel, True))
        return zeroed(self.v.new_empty((slices, *self.v.shape[:3]), dtype=torch.float32), self.options)

    def _row_strides(self) -> tuple[int, ...]:
        batch, heads, rows, _ = self.v.shape
        return heads * rows, rows, 1, batch * heads * rows

    def _dq(self, dq: Tensor) -> Tensor | None:
        """Fill dq, and return r [B, H, N] where decays want a gradient."""
        kernel, crossing, initial = tuning.BACKWARD_Q, self.needs.log_decay, self.options.initial_state
        r = self._shares(kernel) if crossing else None
        args = {
            "q_ptr": self.q,
            "k_ptr": self.k,
            "v_ptr": self.v,
            "dout_ptr": self.dout,
            "dq_ptr": dq,
            "r_ptr": r,
            "restarts_ptr": self.restarts,
            "decay_ptr": self.launch.decay,
            "state_ptr": initial,
            "cu_seqlens_ptr": self.launch.offsets,
            **self._strides(dq, "dq"),
            "stride_r": self._row_strides(),
            "stride_decay": strides(self.launch.decay),
            "stride_restarts": _exchanged(self.restarts),
            "stride_state": _exchanged(initial),
            "slots": self.slots,
        }
        self._run(kernel, "backward_dq", dq, args)
        return None if r is None else _sum_of(r)

    def _dk(self, dk: Tensor, r: Tensor | None) -> Tensor | None:
        """Fill dk, and return the gradient of every token's decay [B, H, N] where it is wanted."""
        kernel, crossing = tuning.BACKWARD_K, self.needs.log_decay
        dg = self._shares(kernel) if crossing else None
        behind = self.state if crossing else None
        args = {
            "q_ptr": self.q,
            "k_ptr": self.k,
            "v_ptr": self.v,
            "dout_ptr": self.dout,
            "dk_ptr": dk,
            "r_ptr": r,
            "dg_ptr": dg,
            "restarts_ptr": self.restarts,
            "behind_ptr": behind,
            "decay_ptr": self.launch.decay,
            "dstate_ptr": self.dstate,
            "cu_seqlens_ptr": self.launch.offsets,
            **self._strides(dk, "dk"),
            "stride_r": self._row_strides(),
            "stride_decay": strides(self.launch.decay),
            "stride_restarts": _exchanged(self.restarts),
            "stride_behind": _exchanged(behind),
            "stride_dstate": _exchanged(self.dstate),
            "slots": self.slots,
        }
        self._run(kernel, "backward_dk", dk, args)
        return None if dg is None else _sum_of(dg)

    def _strides(self, result: Tensor, name: str) -> dict[str, Argument]:
        named = {"q": self.q, "k": self.k, "v": self.v, "dout": self.dout, name: result}
        return {f"stride_{key}": x.stride() for key, x in named.items()}

    def _run(self, kernel: str, source: str, result: Tensor, args: dict[str, Any]) -> None:
        crossing = self.needs.log_decay
        # What the decays do not take part in reads three of the four.
        beside = {tuning.BACKWARD_Q: self.k, tuning.BACKWARD_K: self.q}
        read = (self.q, self.k) if crossing else (beside[kernel],)
        self.launch.run(
            kernel, source, (*read, self.v, self.dout, result), args, crossing=crossing,
            Result=result.dtype, SEGMENT=tuning.SEGMENT if crossing else 0,
        )  # fmt: skip

    def _dv(self) -> tuple[Tensor, Tensor | None]:
        """dv, and the gradient of the initial state where it is wanted."""
        q, k, dout, launch = self.q, self.k, self.dout, self.launch
        initial = self.options.initial_state if self.needs.initial_state else None
        dinitial = None if initial is None else torch.empty_like(initial)
        dv = zeroed(empty_in_order_of(self.v, self.v.shape[3]), self.options)
        args = {
            "q_ptr": q,
            "k_ptr": k,
            "dout_ptr": dout,
            "dv_ptr": dv,
            "decay_ptr": launch.decay,
            "dstate_ptr": self.dstate,
            "dinitial_ptr": dinitial,
            "cu_seqlens_ptr": launch.offsets,
            "stride_q": q.stride(),
            "stride_k": k.stride(),
            "stride_dout": dout.stride(),
            "stride_dv": dv.stride(),
            "stride_decay": strides(launch.decay),
            "stride_dstate": strides(self.dstate),
            "stride_dinitial": strides(dinitial),
        }
        launch.run(tuning.BACKWARD_V, "backward_dv", (q, k, dout, dv), args)
        return dv, dinitial


def _sum_of(shares: Tensor) -> Tensor:
    return shares[0] if shares.shape[0] == 1 else shares.sum(0)


def _exchanged(state: Tensor | None) -> tuple[int, ...]:
    """Strides of a state with rows and columns exchanged."""
    outer, head, row, column = strides(state)
    return outer, head, column, row

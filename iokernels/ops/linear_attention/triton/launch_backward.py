"""Launches the backward kernels of this room."""

from __future__ import annotations

from typing import Any

import torch
import triton
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
from iokernels.ops.shared.triton_tiles import View, is_wide, padded, strides, view
from iokernels.runtime.device import guard

from .backward import (
    linear_attention_bwd_dk_kernel,
    linear_attention_bwd_dq_kernel,
    linear_attention_bwd_dv_kernel,
    linear_attention_bwd_normalize_kernel,
)
from .launch import Launch, resources, rows_view
from .tuning import RESTART
from .walk import DecayGradient


def backward(
    dout: Tensor, dstate: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor | None, state: Tensor | None,
    denominator: Tensor, options: Options, needs: Needs,
) -> Gradients:  # fmt: skip
    """The gradients that ``needs`` names, given those of out and, where the loss uses it, of the final state. ``out``
    is there with ``normalize``, ``state`` where decays want a gradient."""
    with guard(q.device):
        return _Backward(dout, dstate, q, k, v, out, state, denominator, options, needs).run()


class _Backward:
    """One backward pass: what its kernels share."""

    def __init__(
        self, dout: Tensor, dstate: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor | None,
        state: Tensor | None, denominator: Tensor, options: Options, needs: Needs,
    ) -> None:  # fmt: skip
        self.q, self.k, self.v, self.options, self.needs = q, k, v, options, needs
        self.state = state
        self.dstate = None if dstate is None else dstate.contiguous()
        self.launch = Launch(q, k, v, options)
        config = self.launch.config("linear_attention_bwd_dq", needs.log_decay)
        self.cut = self.launch.cut(config.segments, config.chunk, RESTART if needs.log_decay else None)
        self.dout, self.dden = (
            (dout, None) if out is None or v.numel() == 0 else _normalized(dout, out, denominator)
        )  # fmt: skip

    def run(self) -> Gradients:
        """Launch what the gradients take."""
        needs, cut, launch = self.needs, self.cut, self.launch
        if self.v.shape[0] * launch.sequences == 0 or self.v.shape[2] == 0:
            return gradients_without_tokens(self.q, self.k, self.v, self.dstate, self.options, needs)
        dinitial = torch.empty_like(self.options.initial_state) if needs.initial_state else None  # pyright: ignore
        behind, before = self.dstate, self.options.initial_state
        if cut.split:
            if needs.q or needs.log_decay:
                before = launch.states_before(cut, before, None)
            behind = launch.gradients_behind(cut, self.dout, self.dden, self.dstate, dinitial)
        dq = self._keys_buffer(self.q) if needs.q or needs.log_decay else None
        dk = self._keys_buffer(self.k) if needs.k or needs.log_decay else None
        r = None if dq is None else self._dq(dq, before)
        dg = None if dk is None else self._dk(dk, r, behind, before)
        dv = None
        if needs.v or (dinitial is not None and not cut.split):
            dv = zeroed(empty_in_order_of(self.v, self.v.shape[3]), self.options)
            self._dv(dv, behind, dinitial)
        return wanted_gradients(self.q, self.k, dq, dk, dv, dg, dinitial, self.options, needs)

    def _slices(self, config: Any) -> int:
        return triton.cdiv(self.v.shape[3], config.width) if self.options.taylor else 1

    def _keys_buffer(self, x: Tensor) -> Tensor:
        """Where dq or dk goes: in its own shape, or, where several heads or slices add up to it, a share of each."""
        kernel = "linear_attention_bwd_dq" if x is self.q else "linear_attention_bwd_dk"
        slices = self._slices(self.launch.config(kernel, self.needs.log_decay))
        if self.launch.group == 1 and slices == 1:
            return zeroed(empty_in_order_of(x, x.shape[3]), self.options)
        batch, heads, rows, _ = self.v.shape
        shares = x.new_empty((slices * batch, heads, rows, x.shape[3]), dtype=torch.float32)
        return zeroed(shares, self.options)

    def _dq(self, dq: Tensor, before: Tensor | None) -> Tensor | None:
        """Fill dq, and return r [B, H, N] where decays want a gradient."""
        launch, options, wanted = self.launch, self.options, self.needs.log_decay
        config = launch.config("linear_attention_bwd_dq", wanted)
        over, width = ("v", self.v.shape[3]) if options.taylor else ("k", self.q.shape[3])
        r = self._shares(triton.cdiv(width, config.width)) if wanted else None
        linear_attention_bwd_dq_kernel[launch.grid(self.cut, config, width)](
            launch.inputs, self.cut.offsets, view(self.dout), rows_view(self.dden, self.v), view(dq),
            DecayGradient(None, None, view(None), rows_view(r, self.v, options.taylor)), _exchanged(before),
            *launch.varying(self.cut), options.scale,
            FEATURES=launch.features(self.cut, has_state=before is not None, writes_state=False, decay_gradient=wanted),
            SIZES=launch.sizes(config, self.q, self.k, self.v, self.dout, dq, over=over), **resources(config),
        )  # fmt: skip
        return None if r is None else _sum_of(r)

    def _dk(self, dk: Tensor, r: Tensor | None, behind: Tensor | None, before: Tensor | None) -> Tensor | None:
        """Fill dk, and return the gradient of every token's decay [B, H, N] where it is wanted."""
        launch, options, wanted = self.launch, self.options, self.needs.log_decay
        config = launch.config("linear_attention_bwd_dk", wanted)
        over, width = ("v", self.v.shape[3]) if options.taylor else ("k", self.q.shape[3])
        dg = self._shares(triton.cdiv(width, config.width)) if wanted else None
        end = before if self.cut.split and wanted else None
        final = self.state if wanted else None
        states = _exchanged(final if end is None else end)._replace(ptr=final)
        linear_attention_bwd_dk_kernel[launch.grid(self.cut, config, width)](
            launch.inputs, self.cut.offsets, view(self.dout), rows_view(self.dden, self.v), view(dk),
            DecayGradient(r, end, states, rows_view(dg, self.v, options.taylor)), _exchanged(behind),
            *launch.varying(self.cut), options.scale,
            FEATURES=launch.features(self.cut, has_state=behind is not None, writes_state=False, decay_gradient=wanted),
            SIZES=launch.sizes(config, self.q, self.k, self.v, self.dout, dk, over=over), **resources(config),
        )  # fmt: skip
        return None if dg is None else _sum_of(dg)

    def _dv(self, dv: Tensor, behind: Tensor | None, dinitial: Tensor | None) -> None:
        """Fill dv, and dinitial where sequences are not split."""
        launch, cut = self.launch, self.cut
        config = launch.config("linear_attention_bwd_dv", self.needs.log_decay)
        writes = dinitial is not None and not cut.split
        linear_attention_bwd_dv_kernel[launch.grid(cut, config)](
            launch.inputs, cut.offsets, view(self.dout), rows_view(self.dden, self.v), view(dv), view(behind),
            view(dinitial if writes else None), *launch.varying(cut), self.options.scale,
            FEATURES=launch.features(cut, has_state=behind is not None, writes_state=writes),
            SIZES=launch.sizes(config, self.q, self.k, self.dout, dv), **resources(config),
        )  # fmt: skip

    def _shares(self, slices: int) -> Tensor:
        return zeroed(self.v.new_empty((slices, *self.v.shape[:3]), dtype=torch.float32), self.options)


def _sum_of(shares: Tensor) -> Tensor:
    return shares[0] if shares.shape[0] == 1 else shares.sum(0)


def _exchanged(state: Tensor | None) -> View:
    """A state with rows and columns exchanged."""
    own = strides(state)
    return View(state, own.b, own.h, own.d, own.n)


def _normalized(dout: Tensor, out: Tensor, denominator: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of num and of den."""
    dnum, dden = empty_in_order_of(out, out.shape[3]), torch.empty_like(denominator)
    batch, heads, rows, width = out.shape
    block_v = padded(width)
    block_m = max(16, 4096 // block_v)
    linear_attention_bwd_normalize_kernel[(batch * heads * triton.cdiv(rows, block_m),)](
        view(dout), view(out), denominator, view(dnum), dden, heads, rows,
        V_WIDTH=width, BLOCK_V=block_v, BLOCK_M=block_m, WIDE=is_wide(block_m, dout, out, dnum), num_warps=4,
    )  # fmt: skip
    return dnum, dden

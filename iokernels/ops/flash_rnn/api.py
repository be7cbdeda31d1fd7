"""The public function of fused recurrent networks, its argument contract and its choice of backend."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from iokernels.ops.shared.layout import state_dtype
from iokernels.runtime import device as devices
from iokernels.runtime import dispatch
from iokernels.runtime.contracts import FLOATS, Contract, Spec, short
from iokernels.runtime.contracts.offsets import readable
from iokernels.runtime.plans import Plans, remembered
from iokernels.runtime.registration.autocast import autocast

from . import reference
from .cells import CELLS
from .op import run
from .options import Options

CONTRACT = Contract(
    "flash_rnn",
    gates=Spec("B N G H D", FLOATS),
    recurrent=Spec("G H D D", same_dtype_as="gates"),
    bias=Spec("G H D", same_dtype_as="gates", optional=True),
    initial_state=Spec("S B H D", (torch.float32, torch.float64), optional=True),
    lengths=Spec("B", (torch.int32,), optional=True),
)


def flash_rnn(
    gates: Tensor,
    recurrent: Tensor,
    bias: Tensor | None = None,
    *,
    cell: str = "lstm",
    initial_state: Tensor | None = None,
    return_state: bool = False,
    lengths: Tensor | None = None,
    recurrent_clip: float | None = None,
    recurrent_cut: bool = False,
    recompute_gates: bool = False,
    backend: str | None = None,
) -> Any:
    """A recurrent network over N steps, all of them in one call: LSTM, GRU, Elman and sLSTM, in heads.

    ``gates`` holds what the inputs add to the gates of every step, usually ``x @ W^T`` computed for all steps at once.
    The recurrent matrix is block-diagonal: a head mixes its own D units. H = 1 is the ordinary network, whose equations
    and order of gates are those of ``torch.nn``. With ``s_g = R_g h + b_g``:

    ========= === ============== =======================================================================================
    cell       G  states         equations
    ========= === ============== =======================================================================================
    ``lstm``   4  h, c           gates i, f, z, o, each ``x + s``. ``c = σ(f) c + σ(i) tanh(z)``; ``h = σ(o) tanh(c)``
    ``gru``    3  h              gates r, z, n. ``n = tanh(x_n + σ(r) s_n)``; ``h = σ(z) h + (1 - σ(z)) n``
    ``elman``  1  h              ``h = tanh(x + s)``
    ``slstm``  4  h, c, n, m     gates i, f, z, o. ``m' = max(log σ(f) + m, i)``; I = ``exp(i - m')``;
                                 F = ``exp(log σ(f) + m - m')``; ``c = F c + I tanh(z)``; ``n = F n + I``;
                                 ``h = σ(o) c / n``
    ========= === ============== =======================================================================================

    FlashRNN (Pöppel et al., 2024, arXiv:2412.07752); sLSTM from xLSTM (Beck et al., 2024, arXiv:2405.04517). States
    and pointwise work are float32; h is rounded to the dtype of gates where it meets the recurrent matrix.

    Args:
        gates: ``[B, N, G, H, D]``, float16, bfloat16, float32 or float64. Any strides: ``[N, B, ...]`` is passed as
            ``x.transpose(0, 1)``, and h comes back in the same order. On ``triton`` the matrices of a head stay in the
            shared memory of one thread block: D up to 128 for half-precision LSTM, GRU and sLSTM on GPUs for data
            centres, up to 64 on others and in float32 (Elman in half precision: 256 and 128). ``cuda`` also keeps them
            in registers, and shares a head between thread blocks where one does not hold it.
        recurrent: ``[G, H, D, D]`` (gate, head, out, in), dtype and device of gates. ``weight_hh`` of ``torch.nn.LSTM``
            is ``recurrent.view(4 * D, D)`` with one head.
        bias: ``[G, H, D]``, dtype and device of gates, added to the recurrent part; None for none. (A bias of the
            input part belongs in gates. Only for the n of GRU does it matter which is which.)
        cell: ``"lstm"``, ``"gru"``, ``"elman"`` or ``"slstm"``.
        initial_state: ``[S, B, H, D]`` float32 (float64 for float64 inputs), the states before the first step in the
            order of the table; None is zero. Differentiable. For sLSTM, n = 0 says that nothing is stored yet, and m
            is then not looked at.
        return_state: also return the states after the last step.
        lengths: int32 ``[B]`` on the device of gates, between 0 and N: sequence b stops after ``lengths[b]`` steps. h
            is 0 in the rows after them and the state is the one that was reached. On a GPU the values are never read by
            the host and are clamped; on the CPU they are checked.
        recurrent_clip: clamp each element of the gradient that comes back through the recurrent matrices,
            ``sum_g R_g^T ds_g``, to ``[-recurrent_clip, recurrent_clip]`` at every step; None does not.
        recurrent_cut: leave that gradient out of the step before (the gradient of ``recurrent`` and the path through
            the states stay): truncation to one step.
        recompute_gates: what a backward pass needs beside h and the states. By default G values (GRU: 4) a unit and
            step are kept, in the dtype of gates (sLSTM: float32), and the gates themselves are not. With True the gates
            are kept, which costs nothing where they live on anyway, and the values are made again by one large product;
            the backward pass then needs that much memory for itself.
        backend: ``"triton"``, ``"cuda"``, ``"torch"``, ``"reference"``, or None for the rule of
            :mod:`iokernels.runtime.dispatch`.

    Returns:
        ``h [B, N, H, D]`` in the dtype of gates, or ``(h, state)`` with ``state [S, B, H, D]`` float32 (float64 for
        float64 inputs), differentiable. A call with ``initial_state=state`` continues where this one ended. The
        stabiliser m counts as a constant: h does not depend on it, and it has no gradient.

    Raises:
        TypeError: an argument of a wrong type or dtype.
        ValueError: shapes, devices or numbers that do not fit; the message names the argument.
        UnsupportedError: the named backend cannot run this call.

    No argument is modified. Under autocast gates, recurrent and bias are cast to the autocast dtype. Gradients can be
    taken once; ``backend="reference"`` supports higher orders. Every backend gives the same bits on every run.
    """
    gates, recurrent, bias = autocast(gates, recurrent, bias)
    plan = remembered(
        _PLANS,
        _plan,
        (cell, return_state, recurrent_clip, recurrent_cut, recompute_gates, dispatch.requested(backend)),
        (gates, recurrent, bias, initial_state, lengths),
    )
    if lengths is not None and readable(lengths):
        _check_lengths(lengths, gates.shape[1])
    options = Options(
        initial_state,
        lengths,
        plan.cell,
        recurrent_clip=plan.recurrent_clip,
        recurrent_cut=plan.recurrent_cut,
        recompute_gates=plan.recompute_gates,
    )
    if plan.backend == "reference":
        out, state = reference.run(gates, recurrent, bias, options)
    else:
        out, state = run(gates, recurrent, bias, plan.backend, options)
    return (out, state) if return_state else out


class Plan(NamedTuple):
    """What validation makes of a call."""

    backend: str
    cell: str
    recurrent_clip: float
    recurrent_cut: bool
    recompute_gates: bool


_PLANS: Plans[Plan] = Plans()


def _plan(
    cell: Any, return_state: Any, recurrent_clip: Any, recurrent_cut: Any, recompute_gates: Any, backend: str | None,
    gates: Tensor, recurrent: Tensor, bias: Tensor | None, initial_state: Tensor | None, lengths: Tensor | None,
) -> Plan:  # fmt: skip
    if not isinstance(cell, str) or cell not in CELLS:
        raise ValueError(f"flash_rnn: cell is {cell!r}; it must be one of {', '.join(CELLS)}")
    sizes = CONTRACT.check(
        gates=gates, recurrent=recurrent, bias=bias, initial_state=initial_state, lengths=lengths
    )  # fmt: skip
    kind = CELLS[cell]
    CONTRACT.require(
        sizes["G"] == kind.gates,
        f"gates has shape {list(gates.shape)}; its dimension 2 must be the {kind.gates} gates of {cell}",
    )
    CONTRACT.require(sizes["H"] > 0 and sizes["D"] > 0, "gates has no head, or heads without units")
    if initial_state is not None:
        CONTRACT.require(
            sizes["S"] == len(kind.states),
            f"initial_state has shape {list(initial_state.shape)}; its dimension 0 must be the {len(kind.states)} "
            f"states of {cell}: {', '.join(kind.states)}",
        )
        expected = state_dtype(gates.dtype)
        if initial_state.dtype != expected:
            raise TypeError(
                f"flash_rnn: initial_state is {short(initial_state.dtype)}; it must be {short(expected)} where gates "
                f"is {short(gates.dtype)}"
            )
    for name, flag in (
        ("return_state", return_state), ("recurrent_cut", recurrent_cut), ("recompute_gates", recompute_gates)
    ):  # fmt: skip
        CONTRACT.flag(name, flag)
    clip = 0.0 if recurrent_clip is None else CONTRACT.number("recurrent_clip", recurrent_clip, above=0.0)
    backend = dispatch.choose(
        "flash_rnn",
        backend,
        gates.device.type,
        {
            "triton": partial(triton_refusal, cell, gates.shape[4], gates.dtype, gates.device),
            "cuda": partial(
                cuda_refusal, cell, gates.shape[0], gates.shape[3], gates.shape[4], gates.dtype, gates.device
            ),
            "torch": lambda: None,
            "reference": lambda: None,
        },
    )
    return Plan(backend, cell, clip, bool(recurrent_cut), bool(recompute_gates))


def triton_refusal(cell: str, width: int, dtype: torch.dtype, device: torch.device) -> str | None:
    """Why the backend ``triton`` cannot run heads of ``width`` units, as the end of a sentence; None where it can."""
    if dtype == torch.float64:
        return "its kernels take float16, bfloat16 and float32, not float64"
    from .triton.tuning import max_width  # with it comes the tuning layer, which importing the library does not need

    most = max_width(CELLS[cell].gates, dtype.itemsize, _shared_memory(device))
    if width > most:
        return (
            f"D is {width}, and its kernels keep the recurrent matrices of a head on chip, which limits "
            f"{cell} in {short(dtype)} to {most} on {devices.spec_of(device).name}"
        )
    return devices.triton_refusal(device)


def cuda_refusal(cell: str, batch: int, heads: int, width: int, dtype: torch.dtype, device: torch.device) -> str | None:
    """Why the backend ``cuda`` cannot run such a call, as the end of a sentence; None where it can."""
    if dtype == torch.float64:
        return "its kernels take float16, bfloat16 and float32, not float64"
    reason = devices.cuda_refusal(device)
    if reason is not None or width <= _widest_of_one_block(cell, dtype, device):
        return reason
    # Whether several blocks can share a head depends on how many there are, so a compiled call is for these sizes.
    if torch.compiler.is_compiling():
        from torch.fx.experimental.symbolic_shapes import guard_scalar

        batch, heads, width = (int(guard_scalar(size)) for size in (batch, heads, width))
    if _held(cell, batch, heads, width, dtype, device):
        return None
    return (
        f"H is {heads}, D {width} and B {batch}, and its kernels keep the recurrent matrices on chip, in blocks that "
        f"run at the same time: that is more than {_name(device)} holds"
    )


def _widest_of_one_block(cell: str, dtype: torch.dtype, device: torch.device) -> int:
    """Up to here a head needs one block, whatever their number."""
    from .cuda.tuning import widest_of_one_block

    return widest_of_one_block(CELLS[cell], dtype.itemsize, _tensor_cores(dtype), devices.spec_of(device))


def _held(cell: str, batch: int, heads: int, width: int, dtype: torch.dtype, device: torch.device) -> bool:
    from .cuda.tuning import KERNELS, fits, problem_for

    problem = width, heads, batch, dtype.itemsize, _tensor_cores(dtype), devices.spec_of(device)
    return all(fits(problem_for(kernel, CELLS[cell], *problem)) for kernel in KERNELS)


def _tensor_cores(dtype: torch.dtype) -> bool:
    return dtype != torch.float32 or torch.get_float32_matmul_precision() != "highest"


def _name(device: torch.device) -> str:
    return devices.spec_of(device).name


def _shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that a thread block may use. Dynamo asks and does not trace how the driver is asked."""
    return devices.spec_of(device).smem_block


# What torch.compiler.assume_constant_result sets; calling it would import the whole compiler with this library.
for _constant in (_shared_memory, _widest_of_one_block, _held, _name):
    _constant.__dict__["_dynamo_marked_constant"] = True


def _check_lengths(lengths: Tensor, steps: int) -> None:
    for length in lengths.tolist():
        CONTRACT.require(0 <= length <= steps, f"lengths has {length}; they must be between 0 and N, which is {steps}")

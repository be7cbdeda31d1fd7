"""The public functions of short depthwise convolution, their argument contract and their choice of backend."""

from __future__ import annotations

import operator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from iokernels.ops.shared.sizes import check_own_memory, places
from iokernels.runtime import device as devices
from iokernels.runtime import dispatch
from iokernels.runtime.contracts import FLOATS, Contract, Spec, short
from iokernels.runtime.contracts.offsets import check_offsets, readable
from iokernels.runtime.plans import Plans, remembered
from iokernels.runtime.registration.autocast import autocast

from . import reference
from .op import convolve, step_op
from .options import ShortOptions

DENSE = Contract(
    "short_conv",
    x=Spec("B H N", FLOATS),
    weight=Spec("H W", FLOATS),
    bias=Spec("H", FLOATS, optional=True),
    initial_state=Spec("B H W-1", same_dtype_as="x", optional=True),
)
PACKED = Contract(
    "short_conv",
    x=Spec("T H", FLOATS),
    weight=Spec("H W", FLOATS),
    cu_seqlens=Spec("B+1", (torch.int32,)),
    bias=Spec("H", FLOATS, optional=True),
    initial_state=Spec("B H W-1", same_dtype_as="x", optional=True),
)
STEP = Contract(
    "short_conv_step",
    x=Spec("B H", FLOATS),
    weight=Spec("H W", FLOATS),
    state=Spec("S H W-1", FLOATS),
    bias=Spec("H", FLOATS, optional=True),
    state_indices=Spec("B", (torch.int32,), optional=True),
)

MAX_WIDTH = 128
"""Widest filter of the Triton kernels; a wider one is work for ``fft_conv``."""

Padding = str | int | tuple[int, int]


def short_conv(
    x: Tensor,
    weight: Tensor,
    *,
    bias: Tensor | None = None,
    activation: str | None = None,
    padding: Padding = "causal",
    initial_state: Tensor | None = None,
    return_state: bool = False,
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
) -> Any:
    """Depthwise convolution along the sequence with a short filter, as ``torch.nn.functional.conv1d(groups=H)``.

    ``out[m] = act(bias + sum_w weight[w] x[m + w - left])``: the last tap meets the newest input. One pass through
    memory forward and one backward, whatever the layout, for filters of up to 8 taps; wider ones, to 128, run as
    products with Toeplitz matrices.

    Args:
        x: ``[B, H, N]``, float16, bfloat16, float32 or float64, any strides: pass a ``[B, N, H]`` tensor as
            ``x.transpose(1, 2)``, it is not copied. With ``cu_seqlens``: ``[total, H]``, packed sequences.
        weight: ``[H, W]``, the dtype of x or float32; the ``weight.squeeze(1)`` of a depthwise ``torch.nn.Conv1d``.
        bias: ``[H]``, the dtype of x or float32.
        activation: None, or ``"silu"`` (``"swish"`` is the same), applied to the sum.
        padding: what stands around the sequence, zeros but for the state: ``"causal"`` (W - 1 before), ``"same"``
            ((W - 1) // 2 before, the rest of W - 1 after, as torch has it), ``"valid"`` (none), a number on both
            sides, or ``(before, after)``, each at most W - 1. Packed sequences take paddings that sum to W - 1.
        initial_state: ``[B, H, W - 1]``, the dtype of x: the inputs before the first, the oldest first, in place of
            zeros. Causal padding only. Packed: a row for each sequence.
        return_state: also return the last W - 1 inputs, the ``initial_state`` of what follows. Causal padding only.
        cu_seqlens: int32 ``[B + 1]`` on the device of x, not decreasing, from 0 to at most total: sequence b holds the
            rows ``cu_seqlens[b]`` to ``cu_seqlens[b + 1]`` and sees no other. May be empty. On a GPU its values are
            never read by the host, and offsets out of range are clamped; on the CPU they are checked.
        backend: ``"triton"``, ``"torch"``, ``"reference"``, or None for the rule of :mod:`iokernels.runtime.dispatch`.

    Returns:
        ``out [B, H, N + before + after - (W - 1)]`` (packed: ``[total, H]``, zero in rows of no sequence) in the dtype
        and memory order of x, or ``(out, final_state)`` with ``final_state [B, H, W - 1]`` in the dtype of x.
        Differentiable in x, weight, bias and initial_state, also through the final state. The gradients of weight and
        bias are the same bits on every run.

    Raises:
        TypeError: an argument of a wrong type or dtype.
        ValueError: shapes, devices or numbers that do not fit; the message names the argument.
        UnsupportedError: the named backend cannot run this call.

    No argument is modified. Under autocast all tensors are cast to the autocast dtype. Gradients can be taken once;
    ``backend="reference"`` supports higher orders.
    """
    x, weight, bias, initial_state = autocast(x, weight, bias, initial_state)
    plan = remembered(
        _PLANS,
        _dense_plan if cu_seqlens is None else _packed_plan,
        (activation, padding, return_state, dispatch.requested(backend)),
        (x, weight, bias, initial_state, cu_seqlens),
    )
    packed = cu_seqlens is not None
    if packed:
        check_offsets(PACKED, "cu_seqlens", cu_seqlens, x.shape[0])
        x = x.transpose(0, 1).unsqueeze(0)
    options = ShortOptions(
        bias, initial_state, cu_seqlens,
        left=plan.left, right=plan.right, silu=plan.silu, return_state=plan.return_state,
    )  # fmt: skip
    if plan.backend == "reference":
        out, final_state = reference.convolve(x, weight, options)
    else:
        out, final_state = convolve(x, weight, plan.backend, options)
    if packed:
        out = out.squeeze(0).transpose(0, 1)
    return (out, final_state) if return_state else out


@torch.no_grad()
def short_conv_step(
    x: Tensor,
    weight: Tensor,
    state: Tensor,
    *,
    bias: Tensor | None = None,
    activation: str | None = None,
    state_indices: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """One more row of a causal :func:`short_conv`, for generation. Modifies ``state``.

    Args:
        x: ``[B, H]``, the new inputs, of the dtypes that :func:`short_conv` takes.
        weight: ``[H, W]``, the dtype of x or float32.
        state: ``[B, H, W - 1]``, the dtype of x, or float32 for 16-bit x; any strides that give each element a place
            of its own: the inputs before, the oldest first, as :func:`short_conv` returns them. **Shifted in place**: x
            becomes the newest.
        bias: ``[H]``, the dtype of x or float32.
        activation: None, ``"silu"`` or ``"swish"``.
        state_indices: int32 ``[B]``: row b uses ``state[state_indices[b]]``, and state has any number of rows. Rows
            with a negative index get out 0 and touch no state. Indices must differ; on a GPU they are not read by the
            host, and must be below the number of rows.
        backend: as in :func:`short_conv`.

    Returns:
        ``out [B, H]``, dtype of x.

    Raises:
        TypeError, ValueError, UnsupportedError: as :func:`short_conv`.

    Under autocast x, weight and bias are cast to the autocast dtype. Without gradients. On ``triton`` it is one launch,
    allocates the result only, and may be captured in a CUDA graph.
    """
    x, weight, bias = autocast(x, weight, bias)
    plan = remembered(
        _PLANS,
        _step_plan,
        (activation, dispatch.requested(backend), places(state)),
        (x, weight, state, bias, state_indices),
    )
    if not torch.compiler.is_compiling() and state.is_neg():
        # The memory of a negated view holds the negative of its numbers: with x and weight negated, the same sums.
        x, weight, state = x.neg(), weight.neg(), torch._neg_view(state)  # pyright: ignore[reportPrivateImportUsage]
    if state_indices is not None:
        _check_indices(state_indices, state.shape[0])
    if plan.backend == "reference":
        return reference.step(x, weight, state, bias, state_indices, plan.silu)
    return step_op(x, weight, state, bias, state_indices, plan.silu, plan.backend)


class ShortPlan(NamedTuple):
    """What validation makes of a call: a function of metadata alone, so it is remembered."""

    backend: str
    left: int
    right: int
    silu: bool
    return_state: bool


_PLANS: Plans[ShortPlan] = Plans()


def _dense_plan(
    activation: Any, padding: Any, return_state: Any, backend: str | None, x: Tensor, weight: Tensor, bias: Any,
    initial_state: Any, cu_seqlens: None,
) -> ShortPlan:  # fmt: skip
    sizes = DENSE.check(_known(weight), x=x, weight=weight, bias=bias, initial_state=initial_state)
    plan = _plan(DENSE, activation, padding, return_state, backend, x, weight, bias, initial_state)
    rows = sizes["N"] + plan.left + plan.right
    if rows < sizes["W"] - 1:  # not require(): torch.compile cannot format a symbol, and would have to for the message
        raise ValueError(
            f"{DENSE.operator}: padding {padding!r} makes {rows} rows of the {sizes['N']} of x, "
            f"too few for the {sizes['W']} taps of weight"
        )
    return plan


def _packed_plan(
    activation: Any, padding: Any, return_state: Any, backend: str | None, x: Tensor, weight: Tensor, bias: Any,
    initial_state: Any, cu_seqlens: Tensor,
) -> ShortPlan:  # fmt: skip
    if isinstance(cu_seqlens, Tensor) and cu_seqlens.dim() == 1:
        PACKED.require(
            cu_seqlens.shape[0] >= 1, "cu_seqlens is empty; it must have one entry more than there are sequences"
        )
    PACKED.check(
        _known(weight), x=x, weight=weight, cu_seqlens=cu_seqlens, bias=bias, initial_state=initial_state
    )  # fmt: skip
    plan = _plan(PACKED, activation, padding, return_state, backend, x, weight, bias, initial_state)
    PACKED.require(
        plan.left + plan.right == weight.shape[1] - 1,
        f"padding {padding!r} changes the length of a sequence; with cu_seqlens both sides must sum to W - 1",
    )
    return plan


def _known(weight: Any) -> dict[str, Any]:
    """The size of a state, from the filter; contracts know names and one more, not one less."""
    if isinstance(weight, Tensor) and weight.dim() == 2:
        return {"W-1": weight.shape[1] - 1}
    return {}


def _plan(
    contract: Contract, activation: Any, padding: Any, return_state: Any, backend: str | None, x: Tensor,
    weight: Tensor, bias: Any, initial_state: Any,
) -> ShortPlan:  # fmt: skip
    silu = _silu(contract, activation)
    width = weight.shape[1]
    contract.require(width >= 1, f"weight has shape {list(weight.shape)}; it has no taps")
    _same_or_single(contract, x, weight=weight, bias=bias)
    left, right = _padding(contract, padding, width)
    return_state = contract.flag("return_state", return_state)
    contract.require(
        (initial_state is None and not return_state) or (left, right) == (width - 1, 0),
        f"padding is {padding!r}; initial_state and return_state need causal padding",
    )
    return ShortPlan(_choose(contract, backend, x, weight), left, right, silu, return_state)


def _step_plan(
    activation: Any, backend: str | None, strides: Any, x: Tensor, weight: Tensor, state: Tensor, bias: Any,
    state_indices: Any,
) -> ShortPlan:  # fmt: skip
    known = _known(weight)
    if state_indices is None and isinstance(x, Tensor) and x.dim() == 2 and not x.is_nested:
        known["S"] = x.shape[0]
    STEP.check(known, x=x, weight=weight, state=state, bias=bias, state_indices=state_indices)
    width = weight.shape[1]
    STEP.require(width >= 1, f"weight has shape {list(weight.shape)}; it has no taps")
    _same_or_single(STEP, x, weight=weight, bias=bias)
    if state.dtype != x.dtype and (state.dtype, x.dtype.itemsize) != (torch.float32, 2):
        wide = " or float32" if x.dtype.itemsize == 2 else ""
        raise TypeError(f"short_conv_step: state is {short(state.dtype)}; it must be {short(x.dtype)}, as x is{wide}")
    if strides is not None:
        check_own_memory(STEP, "state", state)
    return ShortPlan(_choose(STEP, backend, x, weight), width - 1, 0, _silu(STEP, activation), True)


def _silu(contract: Contract, activation: Any) -> bool:
    contract.require(
        activation is None or (isinstance(activation, str) and activation in ("silu", "swish")),
        f"activation is {activation!r}; it must be None, 'silu' or 'swish'",
    )
    return activation is not None


def _same_or_single(contract: Contract, x: Tensor, **tensors: Tensor | None) -> None:
    for name, tensor in tensors.items():
        if tensor is not None and tensor.dtype not in (x.dtype, torch.float32):
            raise TypeError(
                f"{contract.operator}: {name} is {short(tensor.dtype)}; "
                f"it must be {short(x.dtype)}, as x is, or float32"
            )


def _padding(contract: Contract, padding: Any, width: int) -> tuple[int, int]:
    words = {"causal": (width - 1, 0), "same": ((width - 1) // 2, width - 1 - (width - 1) // 2), "valid": (0, 0)}
    if isinstance(padding, str) and padding in words:
        return words[padding]
    sides: Any = padding if isinstance(padding, (tuple, list)) else (padding, padding)
    try:
        if any(isinstance(side, (bool, Tensor)) for side in sides):
            raise TypeError
        left, right = map(operator.index, sides)
    except (TypeError, ValueError):
        raise TypeError(
            f"{contract.operator}: padding is {padding!r}; it must be 'causal', 'same', 'valid', an int or two ints"
        ) from None
    contract.require(
        0 <= left < width and 0 <= right < width,
        f"padding is {padding!r}; each side must be from 0 to {width - 1}, one less than the taps",
    )
    return left, right


def _choose(contract: Contract, backend: str | None, x: Tensor, weight: Tensor) -> str:
    return dispatch.choose(
        contract.operator,
        backend,
        x.device.type,
        {
            "triton": partial(_triton_refusal, x, weight),
            "torch": lambda: None,
            "reference": lambda: None,
        },
    )


def _triton_refusal(x: Tensor, weight: Tensor) -> str | None:
    if x.dtype == torch.float64:
        return "its kernels take float16, bfloat16 and float32, not float64"
    if weight.shape[1] > MAX_WIDTH:
        return f"weight has {weight.shape[1]} taps, and its kernels take up to {MAX_WIDTH}"
    return devices.triton_refusal(x.device)


def _check_indices(indices: Tensor, rows: int) -> None:
    if not readable(indices):
        return
    used = [index for index in indices.tolist() if index >= 0]
    STEP.require(max(used, default=-1) < rows, f"state_indices names row {max(used, default=-1)} of {rows} states")
    STEP.require(len(set(used)) == len(used), f"state_indices is {indices.tolist()}; its rows must differ")

"""The public functions of the gated delta rule, their argument contracts and their choice of backend."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from iokernels.ops.shared.layout import in_place, state_dtype
from iokernels.runtime import device as devices
from iokernels.runtime import dispatch
from iokernels.runtime.contracts import FLOATS, Contract, Spec, short
from iokernels.runtime.contracts.memory import overlaps_itself
from iokernels.runtime.contracts.offsets import check_offsets, readable
from iokernels.runtime.contracts.plain import flag
from iokernels.runtime.plans import Plans, remembered
from iokernels.runtime.registration.autocast import autocast

from . import reference
from .op import gated_delta_rule as run
from .op import step_op
from .options import DeltaOptions

STATES = (torch.float32, torch.float64)
_DENSE = {
    "q": Spec("B Hk N K", FLOATS),
    "k": Spec("B Hk N K", same_dtype_as="q"),
    "v": Spec("B H N V", same_dtype_as="q"),
    "beta": Spec("B H N", FLOATS),
    "log_decay": Spec("B H N", FLOATS, optional=True),
}
DENSE = Contract("gated_delta_rule", **_DENSE, initial_state=Spec("B H K V", STATES, optional=True))
PACKED = Contract(
    "gated_delta_rule",
    q=Spec("T Hk K", FLOATS),
    k=Spec("T Hk K", same_dtype_as="q"),
    v=Spec("T H V", same_dtype_as="q"),
    beta=Spec("T H", FLOATS),
    log_decay=Spec("T H", FLOATS, optional=True),
    cu_seqlens=Spec("S+1", (torch.int32,)),
    initial_state=Spec("S H K V", STATES, optional=True),
)
STEP = Contract("gated_delta_rule_step", **_DENSE, state=Spec("B H K V", STATES))

MAX_HEAD_DIM = 256
"""Widest key or value that the Triton kernels hold on chip."""


def gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    *,
    log_decay: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    return_state: bool = False,
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
) -> Any:
    """Linear attention whose state forgets what it held under a key before it writes there again.

    Each head carries a matrix S ``[K, V]`` along the sequence, with ``a_t = exp(log_decay_t)``:

        S_t = a_t (I - beta_t k_t k_t^T) S_(t-1) + beta_t k_t v_t^T        o_t = scale S_t^T q_t

    Without decay it is the delta rule (Schlag et al., 2021, arXiv:2102.11174; in chunks, Yang et al., 2024,
    arXiv:2406.06484), with decay Gated DeltaNet (Yang et al., 2024, arXiv:2412.06464). Time and memory are linear in N.

    **Keys.** ``I - beta k k^T`` has the eigenvalue ``1 - beta |k|^2`` along k. It must lie in [-1, 1], or the state
    grows without bound: with keys of length 1, which is what models use, beta may be anything in [0, 2]. This function
    does not normalise: pass ``torch.nn.functional.normalize(k, dim=-1)``. With beta above 1 the eigenvalue is negative,
    which lets a model track states such as a parity (Grazzi et al., 2024, arXiv:2411.12537).

    Args:
        q: ``[B, Hk, N, K]``, float16, bfloat16, float32 or float64; K up to 256 on ``triton``. Any strides: pass a
            ``[B, N, H, D]`` tensor as ``x.transpose(1, 2)``, it is not copied.
        k: ``[B, Hk, N, K]``, dtype and device of q.
        v: ``[B, H, N, V]``, dtype and device of q; V up to 256 on ``triton``. Hk divides H; head h reads the query and
            key head ``h // (H/Hk)``.
        beta: ``[B, H, N]``, any floating dtype: how much of the old value is replaced.
        log_decay: the natural log of the factor on the state before each token, at most 0: ``[H]`` or ``[B, H, N]``,
            any floating dtype (float32 is advised), or None for no decay. On the CPU values are checked; on a GPU,
            where reading them would wait for it, a positive one counts as 0. Below -110, where float32 has nothing left
            of the exponential, it counts as -110: minus infinity is a reset.
        scale: factor of the output; ``K ** -0.5`` if None.
        initial_state: the state before the first token, ``[B, H, K, V]``, float32 (float64 for float64 inputs); zeros
            if None.
        return_state: also return the state after the last token.
        cu_seqlens: int32 ``[S + 1]``: S sequences packed one after the other, sequence s in the rows ``cu_seqlens[s]``
            to ``cu_seqlens[s + 1]``, not decreasing, from 0 to at most T. Then q and k are ``[T, Hk, K]``, v is
            ``[T, H, V]``, beta and log_decay ``[T, H]`` (log_decay also ``[H]``), and states ``[S, H, K, V]``.
            Sequences may be empty. On a GPU the values are never read by the host, and offsets out of range are clamped
            to the tensors; on the CPU they are checked.
        backend: ``"triton"``, ``"torch"``, ``"reference"``, or None for the rule of :mod:`iokernels.runtime.dispatch`.

    Returns:
        ``out``, with the shape, dtype and memory order of v, or ``(out, state)`` with the state ``[B, H, K, V]`` in
        float32 (float64 for float64 inputs). Rows that belong to no packed sequence are 0. Both are differentiable with
        respect to q, k, v, beta, log_decay and initial_state.

    Raises:
        TypeError: an argument of a wrong type or dtype.
        ValueError: shapes, devices or numbers that do not fit; the message names the argument.
        UnsupportedError: the named backend cannot run this call.

    No argument is modified. Under autocast q, k and v are cast to the autocast dtype. Gradients can be taken once;
    ``backend="reference"`` supports higher orders.
    """
    q, k, v = autocast(q, k, v)
    packed = cu_seqlens is not None
    if packed and not isinstance(cu_seqlens, Tensor):
        raise TypeError(f"gated_delta_rule: cu_seqlens is {type(cu_seqlens).__name__}; it must be a torch.Tensor")
    decay = _per_token(log_decay, beta)
    plan = remembered(
        _PLANS,
        _packed_plan if packed else _dense_plan,
        (scale, return_state, dispatch.requested(backend)),
        (q, k, v, beta, decay, initial_state, cu_seqlens) if packed else (q, k, v, beta, decay, initial_state),
    )
    _check_decay("gated_delta_rule", log_decay)
    if cu_seqlens is not None:
        check_offsets(PACKED, "cu_seqlens", cu_seqlens, q.shape[0])
        q, k, v, beta = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v, beta))
        decay = None if decay is None else decay.transpose(0, 1).unsqueeze(0)
    options = DeltaOptions(decay, initial_state, cu_seqlens, plan.scale)
    if plan.backend == "reference":
        out, state = reference.gated_delta_rule(q, k, v, beta, options)
    else:
        out, state = run(q, k, v, beta, plan.backend, options)
    if packed:
        out = out.squeeze(0).transpose(0, 1)
    return (out, state) if return_state else out


def gated_delta_rule_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    state: Tensor,
    *,
    log_decay: Tensor | None = None,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """:func:`gated_delta_rule` of the next token or few, with the state updated in place: for generation.

    The state is read and written once, whatever N is; tokens are taken one after the other. Safe under CUDA-graph
    capture. It has no gradient.

    Args:
        q: ``[B, Hk, N, K]``, and k, v, beta, log_decay and scale as in :func:`gated_delta_rule`; N is 1 or a few.
        state: ``[B, H, K, V]``, float32 (float64 for float64 inputs), any strides. **Modified**: holds the state after
            the last token on return.

    Returns:
        ``out [B, H, N, V]``, in the dtype and memory order of v.

    Raises:
        TypeError, ValueError, UnsupportedError: as :func:`gated_delta_rule`; ValueError also where an argument requires
            a gradient and gradients are enabled.
    """
    q, k, v = autocast(q, k, v)
    decay = _per_token(log_decay, beta)
    plan = remembered(
        _PLANS,
        _step_plan,
        (scale, torch.is_grad_enabled(), dispatch.requested(backend)),
        (q, k, v, beta, decay, state),
    )
    STEP.require(
        not overlaps_itself(state), "state has elements that share memory, as expand makes them; it is updated in place"
    )
    _check_decay("gated_delta_rule_step", log_decay)
    if plan.backend == "reference":
        out, after = reference.gated_delta_rule(q, k, v, beta, DeltaOptions(decay, state, None, plan.scale))
        state.copy_(after)
        return out
    return in_place(lambda held: step_op(q, k, v, beta, held, decay, plan.scale, plan.backend), state)


class Plan(NamedTuple):
    """What validation makes of a call: a function of metadata alone, so it is remembered."""

    backend: str
    scale: float


_PLANS: Plans[Plan] = Plans()


def _dense_plan(
    scale: Any, return_state: Any, backend: str | None,
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Any, initial_state: Any,
) -> Plan:  # fmt: skip
    sizes = DENSE.check(q=q, k=k, v=v, beta=beta, log_decay=log_decay, initial_state=initial_state)
    return _plan(DENSE, q, sizes, scale, return_state, "initial_state", initial_state, backend)


def _packed_plan(
    scale: Any, return_state: Any, backend: str | None,
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Any, initial_state: Any, cu_seqlens: Any,
) -> Plan:  # fmt: skip
    if isinstance(cu_seqlens, Tensor) and cu_seqlens.dim() == 1:
        PACKED.require(
            cu_seqlens.shape[0] >= 1, "cu_seqlens is empty; it must have one entry more than there are sequences"
        )
    sizes = PACKED.check(
        q=q, k=k, v=v, beta=beta, log_decay=log_decay, cu_seqlens=cu_seqlens, initial_state=initial_state
    )
    return _plan(PACKED, q, sizes, scale, return_state, "initial_state", initial_state, backend)


def _step_plan(
    scale: Any, grad_enabled: bool, backend: str | None,
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Any, state: Tensor,
) -> Plan:  # fmt: skip
    tensors = {"q": q, "k": k, "v": v, "beta": beta, "log_decay": log_decay, "state": state}
    sizes = STEP.check(**tensors)
    for name, tensor in tensors.items():
        STEP.require(
            not (grad_enabled and tensor is not None and tensor.requires_grad),
            f"{name} requires a gradient, and the step has none: call it under torch.no_grad(), or use "
            "gated_delta_rule",
        )
    return _plan(STEP, q, sizes, scale, False, "state", state, backend)


def _plan(
    contract: Contract, q: Tensor, sizes: dict[str, Any], scale: Any, return_state: Any, state_name: str, state: Any,
    backend: str | None,
) -> Plan:  # fmt: skip
    heads, key_heads, width = sizes["H"], sizes["Hk"], sizes["K"]
    contract.require(key_heads > 0, f"k has {key_heads} heads; it must have at least 1")
    contract.require(
        heads % key_heads == 0,
        f"k has {key_heads} heads and v has {heads}; the heads of k must divide those of v",
    )
    contract.require(width > 0 and sizes["V"] > 0, f"head widths are {width} and {sizes['V']}; they must be at least 1")
    flag(contract.operator, "return_state", return_state)
    if state is not None and state.dtype != state_dtype(q.dtype):
        raise TypeError(
            f"{contract.operator}: {state_name} is {short(state.dtype)}; it must be {short(state_dtype(q.dtype))} "
            f"where q is {short(q.dtype)}"
        )
    scale = contract.number("scale", width**-0.5 if scale is None else scale)
    backend = dispatch.choose(
        contract.operator,
        backend,
        q.device.type,
        {
            "triton": partial(devices.kernel_refusal, q, {"K": sizes["K"], "V": sizes["V"]}, MAX_HEAD_DIM),
            "torch": lambda: None,
            "reference": lambda: None,
        },
    )
    return Plan(backend, scale)


def _per_token(log_decay: Any, beta: Any) -> Any:
    """A decay per head as a view of the shape of beta; its gradient is then summed by that of the view."""
    if not isinstance(log_decay, Tensor) or not isinstance(beta, Tensor):
        return log_decay
    if log_decay.dim() != 1 or log_decay.layout != torch.strided or beta.dim() not in (2, 3):
        return log_decay
    if beta.dim() == 2:  # packed: [T, H]
        return log_decay.expand(beta.shape[0], -1)
    return log_decay[None, :, None].expand(beta.shape[0], -1, beta.shape[2])


def _check_decay(operator: str, log_decay: Tensor | None) -> None:
    """Check the values, where reading them costs no synchronisation."""
    if log_decay is not None and readable(log_decay) and not bool((log_decay <= 0).all()):
        raise ValueError(f"{operator}: log_decay is {log_decay.max().item()} somewhere; it must be at most 0")

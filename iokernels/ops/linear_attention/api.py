"""The public functions of linear attention, their argument contract and their choice of backend."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from iokernels.ops.shared.layout import in_place, state_dtype
from iokernels.runtime import dispatch
from iokernels.runtime.contracts import FLOATS, Contract, Spec, short
from iokernels.runtime.contracts.offsets import check_offsets, readable
from iokernels.runtime.contracts.plain import count, flag, place
from iokernels.runtime.plans import Plans, remembered
from iokernels.runtime.registration.autocast import autocast

from . import reference
from .op import attend, step
from .options import Options, columns, features
from .refusals import cuda_refusal, triton_refusal

_STATES = (torch.float32, torch.float64)
_PER_HEAD, _PER_TOKEN = Spec("H", FLOATS, optional=True), Spec("B H N", FLOATS, optional=True)
_DENSE = {
    "q": Spec("B Hk N K", FLOATS),
    "k": Spec("B Hk N K", same_dtype_as="q"),
    "v": Spec("B H N V", same_dtype_as="q"),
}
_INITIAL = Spec("B H F W", _STATES, optional=True)
DENSE = {
    dims: Contract("linear_attention", **_DENSE, log_decay=decay, initial_state=_INITIAL)
    for dims, decay in ((1, _PER_HEAD), (3, _PER_TOKEN))
}
"""By the number of dimensions of log_decay."""
PACKED = {
    dims: Contract(
        "linear_attention",
        q=Spec("N Hk K", FLOATS),
        k=Spec("N Hk K", same_dtype_as="q"),
        v=Spec("N H V", same_dtype_as="q"),
        cu_seqlens=Spec("B+1", (torch.int32,)),
        log_decay=decay,
        initial_state=_INITIAL,
    )
    for dims, decay in ((1, _PER_HEAD), (2, Spec("N H", FLOATS, optional=True)))
}
STEP = {
    dims: Contract("linear_attention_step", **_DENSE, state=Spec("B H F W", _STATES), log_decay=decay)
    for dims, decay in ((1, _PER_HEAD), (3, _PER_TOKEN))
}

FEATURE_MAPS = (None, "taylor")


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    log_decay: Tensor | None = None,
    feature_map: str | None = None,
    scale: float | None = None,
    normalize: bool = False,
    initial_state: Tensor | None = None,
    return_state: bool = False,
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
) -> Any:
    """Causal linear attention with scalar decay, in memory and time linear in the length.

    ``out_t = sum_{s <= t} exp(b_t - b_s) phi(scale * q_t . k_s) v_s`` with b the running sum of ``log_decay``. It is
    Lightning Attention-2 (Qin et al., 2024, arXiv:2401.04658) and retention (one decay a head), linear attention
    (none), simple gated linear attention and Mamba-2 (one decay a head and token; q = C, k = B, v = dt x,
    log_decay = dt A), and BASED (Arora et al., 2024, arXiv:2402.18668; phi the Taylor polynomial of exp).

    Args:
        q: ``[B, Hk, N, K]``, float16, bfloat16, float32 or float64. Any strides: pass a ``[B, N, H, K]`` tensor as
            ``x.transpose(1, 2)``, it is not copied.
        k: ``[B, Hk, N, K]``, dtype and device of q.
        v: ``[B, H, N, V]``, dtype and device of q. Hk divides H; head h of v reads head ``h // (H / Hk)`` of q and k,
            as the groups of Mamba-2 do.
        log_decay: ``[H]`` or ``[B, H, N]``, any floating dtype, at most 0; None never forgets. ``exp(log_decay)`` is
            what is kept of the state when a token arrives, before its own key is added. Differentiable. On the CPU a
            positive value is refused; on a GPU the values are not read by the host, and a positive one counts as 0.
            Below -110, where float32 has nothing left of the exponential, it counts as -110.
        feature_map: None for phi(x) = x, or ``"taylor"`` for ``1 + x + x^2 / 2`` (K up to 32 on ``triton``).
        scale: factor of ``q . k``; ``K ** -0.5`` if None. The code of Lightning Attention-2 has none: pass 1.
        normalize: divide by ``sum_{s <= t} exp(b_t - b_s) phi(scale * q_t . k_s)``. Without a feature map that is
            positive only if the features in q and k are. Where it is 0, out is 0.
        initial_state: the state of tokens before the first, as ``return_state`` gives it: float32 (float64 for float64
            inputs). Differentiable. None is zero.
        return_state: also return the state after the last token.
        cu_seqlens: int32 ``[S + 1]`` on the device of q, not decreasing, from 0: sequence s holds the rows
            ``cu_seqlens[s]`` to ``cu_seqlens[s + 1]`` of packed tensors, and has a state of its own. Then q and k are
            ``[total, Hk, K]``, v ``[total, H, V]``, log_decay ``[H]`` or ``[total, H]``, and B below is S. On a GPU its
            values are never read by the host: offsets out of range are clamped to the tensors, and a sequence of
            negative length is empty. On the CPU they are checked. The backend ``torch`` reads them.
        backend: ``"triton"``, ``"cuda"`` (float16 and bfloat16, K and V up to 128, no feature map, no ``normalize``),
            ``"torch"``, ``"reference"``, or None for the rule of :mod:`iokernels.runtime.dispatch`.

    Returns:
        ``out [B, H, N, V]`` (packed: ``[total, H, V]``, with zeros in rows of no sequence) in the dtype and memory
        order of v, or ``(out, state)``. ``state [B, H, K, V]``, float32 (float64 for float64 inputs), is
        ``sum_s exp(b_N - b_s) k_s v_s^T``, without the scale. With ``normalize`` it has a column more, the normaliser
        ``sum_s exp(b_N - b_s) k_s``: ``[B, H, K, V + 1]``. With ``feature_map="taylor"`` it has ``1 + K + K^2`` rows
        instead of K: row 0 is that of the constant 1, row ``1 + a`` of ``k_a``, row ``1 + K + a K + c`` of ``k_a k_c``.
        A sequence without tokens keeps its state.

    Raises:
        TypeError: an argument of a wrong type or dtype.
        ValueError: shapes, devices or numbers that do not fit; the message names the argument.
        UnsupportedError: the named backend cannot run this call.

    No argument is modified, and what is returned owns its memory: ``out += x`` or a step with the state leave the
    gradients as they are, but for ``normalize``, whose backward pass needs out: there autograd refuses. Under autocast
    q, k and v are cast to the autocast dtype. Gradients can be taken once;
    ``backend="reference"`` supports higher orders. Every backend gives the same bits on every run. ``triton`` and
    ``cuda`` round the state to the dtype of q where it meets q, so float16 needs states below 65,504; bfloat16 has no
    such bound.
    """
    q, k, v = autocast(q, k, v)
    packed = cu_seqlens is not None
    plan = remembered(
        _PLANS,
        _packed_plan if packed else _dense_plan,
        (feature_map, scale, normalize, return_state, dispatch.requested(backend)),
        (q, k, v, log_decay, initial_state, cu_seqlens),
    )
    _check_decay("linear_attention", log_decay)
    if packed:
        check_offsets(PACKED[1], "cu_seqlens", cu_seqlens, q.shape[0])
        q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
        if log_decay is not None and log_decay.dim() == 2:
            log_decay = log_decay.transpose(0, 1).unsqueeze(0)
    options = Options(log_decay, initial_state, cu_seqlens, plan.scale, taylor=plan.taylor, normalize=plan.normalize)
    if plan.backend == "reference":
        out, state = reference.attend(q, k, v, options)
    else:
        out, state = attend(q, k, v, return_state, plan.backend, options)
    if packed:
        out = out.squeeze(0).transpose(0, 1)
    return (out, state) if return_state else out


def linear_attention_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: Tensor,
    *,
    log_decay: Tensor | None = None,
    feature_map: str | None = None,
    scale: float | None = None,
    normalize: bool = False,
    backend: str | None = None,
) -> Tensor:
    """The next token, or the next few, of :func:`linear_attention`, with the state updated in place.

    Args:
        q: ``[B, Hk, N, K]``: N new tokens a sequence, usually 1.
        k: ``[B, Hk, N, K]``.
        v: ``[B, H, N, V]``.
        state: ``[B, H, K, V]``, or of more columns and rows as :func:`linear_attention` says, float32 (float64 for
            float64 inputs), contiguous. **Modified**: it holds the new tokens afterwards.
        log_decay: None, ``[H]`` or ``[B, H, N]``.

    The other arguments and the errors are those of :func:`linear_attention`. The call allocates nothing but its result
    and does not synchronise, so it can be captured in a CUDA graph. It has no gradient: tensors that require one are
    refused while gradients are recorded.

    Returns:
        ``out [B, H, N, V]``, the same as if all tokens had been given at once.
    """
    q, k, v = autocast(q, k, v)
    plan = remembered(
        _PLANS,
        _step_plan,
        (feature_map, scale, normalize, dispatch.requested(backend)),
        (q, k, v, log_decay, state),
    )
    contract = STEP[1]
    contract.require(state.is_contiguous(), "state is not contiguous; it is updated in place and must be")
    if torch.is_grad_enabled():
        for name, x in (("q", q), ("k", k), ("v", v), ("state", state), ("log_decay", log_decay)):
            contract.require(
                x is None or not x.requires_grad,
                f"{name} requires a gradient, which a step in place does not have; "
                "call it under torch.no_grad(), or linear_attention with initial_state",
            )
    _check_decay("linear_attention_step", log_decay)
    options = Options(log_decay, scale=plan.scale, taylor=plan.taylor, normalize=plan.normalize)
    if plan.backend == "reference":
        out, new = reference.attend(q, k, v, options._replace(initial_state=state))
        state.copy_(new)
        return out
    return in_place(lambda held: step(q, k, v, held, plan.backend, options), state)


def lightning_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    slopes: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    return_state: bool = False,
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
) -> Any:
    """Lightning Attention-2: :func:`linear_attention` in which head h forgets ``exp(-slopes[h])`` a token.

    ``slopes`` is ``[H]``, any floating dtype, at least 0, differentiable; :mod:`.decays` has those in use by name.
    The other arguments, the results and the errors are those of :func:`linear_attention`.
    """
    if not isinstance(slopes, Tensor):
        raise TypeError(f"lightning_attention: slopes is {type(slopes).__name__}; it must be a torch.Tensor")
    if slopes.dim() != 1:
        raise ValueError(f"lightning_attention: slopes has shape {list(slopes.shape)}; it must be [H]")
    if slopes.layout != torch.strided:
        raise TypeError(f"lightning_attention: slopes has layout {slopes.layout}; it must be dense: slopes.to_dense()")
    if not slopes.is_floating_point():
        raise TypeError(f"lightning_attention: slopes is {short(slopes.dtype)}; it must be of a floating dtype")
    if isinstance(v, Tensor) and v.dim() == (4 if cu_seqlens is None else 3) and v.shape[1] != slopes.shape[0]:
        raise ValueError(
            f"lightning_attention: slopes has shape {list(slopes.shape)}; it must be [{v.shape[1]}], the heads of v"
        )
    if readable(slopes) and not bool((slopes >= 0).all()):
        raise ValueError("lightning_attention: slopes has a value that is not at least 0; log_decay is their negative")
    return linear_attention(
        q, k, v, log_decay=-slopes, scale=scale, initial_state=initial_state, return_state=return_state,
        cu_seqlens=cu_seqlens, backend=backend,
    )  # fmt: skip


def linear_attention_state(
    batch: int,
    heads: int,
    key_width: int,
    value_width: int,
    *,
    feature_map: str | None = None,
    normalize: bool = False,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Tensor:
    """The state before the first token, zeros ``[batch, heads, rows, columns]``: what a cache starts with.

    ``heads`` and ``value_width`` are those of v, ``key_width`` that of k; rows and columns are as
    :func:`linear_attention` says; a batch of 0 is one. ``dtype`` is float32, or float64 for float64 inputs.

    Raises:
        TypeError: an argument of a wrong type or dtype.
        ValueError: a count out of range, or an unknown name.
    """
    name = "linear_attention_state"
    batch, heads = count(name, "batch", batch, 0), count(name, "heads", heads, 0)
    key_width, value_width = count(name, "key_width", key_width), count(name, "value_width", value_width)
    _check_feature_map(name, feature_map)
    flag(name, "normalize", normalize)
    if not any(dtype is known for known in _STATES):
        raise TypeError(f"{name}: dtype is {dtype!r}; it must be torch.float32 or torch.float64")
    shape = batch, heads, features(key_width, feature_map == "taylor"), columns(value_width, normalize)
    return torch.zeros(shape, dtype=dtype, device=place(name, device))


class Plan(NamedTuple):
    """What validation makes of a call."""

    backend: str
    scale: float
    taylor: bool
    normalize: bool


_PLANS: Plans[Plan] = Plans()


def _dense_plan(
    feature_map: Any, scale: Any, normalize: Any, return_state: Any, backend: str | None,
    q: Tensor, k: Tensor, v: Tensor, log_decay: Any, initial_state: Any, cu_seqlens: Any,
) -> Plan:  # fmt: skip
    contract = _by_decay(DENSE, log_decay)
    sizes = contract.check(q=q, k=k, v=v, log_decay=log_decay, initial_state=initial_state)
    flag(contract.operator, "return_state", return_state)
    return _plan(
        contract, sizes, feature_map, scale, normalize, backend, q, "initial_state", initial_state,
        partial(cuda_refusal, q, sizes, feature_map == "taylor", normalize),
    )  # fmt: skip


def _packed_plan(
    feature_map: Any, scale: Any, normalize: Any, return_state: Any, backend: str | None,
    q: Tensor, k: Tensor, v: Tensor, log_decay: Any, initial_state: Any, cu_seqlens: Any,
) -> Plan:  # fmt: skip
    contract = _by_decay(PACKED, log_decay)
    if isinstance(cu_seqlens, Tensor) and cu_seqlens.dim() == 1:
        contract.require(
            cu_seqlens.shape[0] >= 1, "cu_seqlens is empty; it must have one entry more than there are sequences"
        )
    sizes = contract.check(
        q=q, k=k, v=v, cu_seqlens=cu_seqlens, log_decay=log_decay, initial_state=initial_state
    )  # fmt: skip
    flag(contract.operator, "return_state", return_state)
    return _plan(
        contract, sizes, feature_map, scale, normalize, backend, q, "initial_state", initial_state,
        partial(cuda_refusal, q, sizes, feature_map == "taylor", normalize),
    )  # fmt: skip


def _step_plan(
    feature_map: Any, scale: Any, normalize: Any, backend: str | None,
    q: Tensor, k: Tensor, v: Tensor, log_decay: Any, state: Any,
) -> Plan:  # fmt: skip
    contract = _by_decay(STEP, log_decay)
    sizes = contract.check(q=q, k=k, v=v, state=state, log_decay=log_decay)
    return _plan(
        contract, sizes, feature_map, scale, normalize, backend, q, "state", state,
        lambda: "its kernels take whole sequences, and there is none for a step in place",
    )  # fmt: skip


def _by_decay(contracts: dict[int, Contract], log_decay: Any) -> Contract:
    """The contract with the form that log_decay has, or the one per head where it has neither."""
    dims = log_decay.dim() if isinstance(log_decay, Tensor) else 1
    if dims not in contracts:
        one, other = (", ".join(c.specs["log_decay"].shape.split()) for c in contracts.values())
        raise ValueError(
            f"{contracts[1].operator}: log_decay has shape {list(log_decay.shape)}; it must be [{one}] or [{other}]"
        )
    return contracts[dims]


def _plan(
    contract: Contract, sizes: dict[str, Any], feature_map: Any, scale: Any, normalize: Any, backend: str | None,
    q: Tensor, state_name: str, state: Tensor | None, refuses_cuda: dispatch.Refusal,
) -> Plan:  # fmt: skip
    heads, key_heads, width = sizes["H"], sizes["Hk"], sizes["K"]
    contract.require(key_heads > 0, f"q has {key_heads} heads; it must have at least 1")
    contract.require(
        heads % key_heads == 0,
        f"q has {key_heads} heads and v has {heads}; the heads of q and k must divide those of v",
    )
    contract.require(width > 0 and sizes["V"] > 0, f"widths are {width} and {sizes['V']}; they must be at least 1")
    _check_feature_map(contract.operator, feature_map)
    flag(contract.operator, "normalize", normalize)
    taylor = feature_map == "taylor"
    scale = contract.number("scale", width**-0.5 if scale is None else scale)
    if state is not None:
        rows, wide = features(width, taylor), columns(sizes["V"], normalize)
        contract.require(
            sizes["F"] == rows and sizes["W"] == wide,
            f"{state_name} has shape {list(state.shape)}; its last two dimensions must be {rows} and {wide}",
        )
        expected = state_dtype(q.dtype)
        if state.dtype != expected:
            raise TypeError(
                f"{contract.operator}: {state_name} is {state.dtype}; it must be {expected} where q is {q.dtype}"
            )
    backend = dispatch.choose(
        contract.operator,
        backend,
        q.device.type,
        {
            "triton": partial(triton_refusal, q, sizes, taylor),
            "cuda": refuses_cuda,
            "torch": lambda: None,
            "reference": lambda: None,
        },
    )
    return Plan(backend, scale, taylor, normalize)


def _check_feature_map(operator: str, feature_map: Any) -> None:
    if feature_map not in FEATURE_MAPS:
        raise ValueError(f'{operator}: feature_map is {feature_map!r}; it must be None or "taylor"')


def _check_decay(operator: str, log_decay: Tensor | None) -> None:
    if log_decay is not None and readable(log_decay) and not bool((log_decay <= 0).all()):
        raise ValueError(f"{operator}: log_decay has a value that is not at most 0; a state may not grow")
